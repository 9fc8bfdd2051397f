"""What is put into an export when all else is in it: the bill of materials, and then the signature of everything."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from continual.engine.reading import Reading
from continual.publish import bom
from continual.signing.signer import Signer


class Finished(Protocol):
    """What an export is to be, as far as it matters here."""

    @property
    def path(self) -> Path:
        """The directory that it becomes."""
        ...

    @property
    def signer(self) -> Signer | None:
        """What signs it."""
        ...

    @property
    def bom(self) -> bool:
        """Whether a bill of materials lies in it."""
        ...


def finish(directory: Path, target: Finished, reading: Reading) -> None:
    """Completes the export in `directory`, before it gets its name. Raises Misconfigured and Retry."""
    if target.bom:
        bom.write(directory, reading.state, reading.commit.seq, target.path.name)
    if target.signer is not None:
        target.signer.sign(directory, target.path.name)
