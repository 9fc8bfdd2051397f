"""What a commit to the Hub has to add and to delete, so that a branch holds what was exported."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.errors import Retry
from continual.hub import Info
from continual.hub.proof import same
from continual.tensors.adapters.adapter_config import CONFIG

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete


class Changes(NamedTuple):
    """What a commit adds, by name; which files it deletes; and the bytes of what it adds."""

    adds: Mapping[str, Path | bytes]
    deletes: list[str]
    nbytes: int


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """Turns what keeps the exported files from being read into Retry."""
    try:
        yield
    except OSError as error:
        raise Retry(
            f"{error.filename or directory}: cannot be read ({error.strerror or error}); nothing was released"
        ) from error


def _files(directory: Path) -> dict[str, Path]:
    """Every file below a directory, by its name there. Raises OSError where one folder cannot be listed: what is not
    seen would be deleted from the branch."""

    def not_listed(error: OSError) -> None:
        raise error

    found = (Path(root, name) for root, _, names in os.walk(directory, onerror=not_listed) for name in names)
    return {str(file.relative_to(directory)): file for file in sorted(found)}


def changes_to(directory: Path, texts: Mapping[str, bytes], now: Info | None) -> Changes:
    """What makes the branch as it is `now` into the exported directory, with `texts` in place of its own files. Files
    that are the same stay. Weights of before at its top level go, and so do the configurations, by one of which a model
    is loaded as what it no longer is: a whole model, or an adapter. Raises OSError."""
    adds: dict[str, Path | bytes] = {}
    nbytes = 0
    there = now.files if now else {}
    ours: dict[str, Path | bytes] = {**_files(directory), **texts}
    for name, file in ours.items():
        known = there.get(name)
        if known is not None and same(file, known):
            continue
        adds[name] = file
        nbytes += len(file) if isinstance(file, bytes) else file.stat().st_size
    weights = (".safetensors", ".safetensors.index.json")
    gone = [
        name
        for name in there
        if name not in ours and "/" not in name and (name.endswith(weights) or name in ("config.json", CONFIG))
    ]
    return Changes(adds, sorted(gone), nbytes)


def operations_of(changes: Changes) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit does, as the package names it; reads and hashes what is uploaded. Raises OSError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name, file in changes.adds.items():
        try:
            operations.append(CommitOperationAdd(name, str(file) if isinstance(file, Path) else file))
        except ValueError as error:  # what the package says of a file that is not there any more
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from error
    return operations + [CommitOperationDelete(name) for name in changes.deletes]
