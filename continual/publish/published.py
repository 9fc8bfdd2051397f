"""What a publication is, as those hear of it who are told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Published:
    """What is out, as far as it is known. `view` is None for the merge. `directory` is on this machine: a model, or the
    adapter that a view is put out as; `lora` an adapter of the same merge or view. `mark` tells what is out at one
    record apart, where the settings of a view have changed."""

    state: str | None = None
    seq: int | None = None
    directory: Path | None = None
    lora: Path | None = None
    repo: str | None = None
    commit: str | None = None
    url: str | None = None
    tag: str | None = None
    view: str | None = None
    mark: str | None = None

    def facts(self) -> dict[str, object]:
        """What a server or a command is told."""
        return {key: value for key, value in asdict(self).items() if key != "mark"}
