"""A model directory as what it is, a full checkpoint or an adapter; and the candidate it makes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from continual.errors import Refuse, Retry
from continual.records import Candidate
from continual.tensors.adapter import CONFIG, Adapter
from continual.tensors.checkpoint import Checkpoint, open_checkpoint

Model = Checkpoint | Adapter


def open_model(path: Path, *, root: Path | None = None) -> Model:
    """Opens the model in directory `path` (or a single safetensors file) and reads its headers.

    `root` is the watched folder its files must lie in, None for a path given by hand. Raises Refuse with a reason for anything malformed or of a kind
    that is not understood, Retry for what cannot be read now.
    """
    if not path.exists():
        raise Retry(f"{path}: is gone; nothing was settled")
    try:
        if path.is_dir() and (path / CONFIG).exists():
            if not (path / "adapter_model.safetensors").exists():
                raise Refuse("pickle" if (path / "adapter_model.bin").exists() else "no-weights", f"{path}: no adapter_model.safetensors in it")
            return Adapter(path, root)
        return open_checkpoint(path, root)
    except OSError as error:
        raise Retry(f"{error.filename}: cannot be read ({error.strerror}); nothing was settled") from error


def candidate_of(model: Model, *, source: str) -> Candidate:
    """The candidate a model is: its key names the place and the state of every weight file there."""
    path = model.path.absolute()
    seen = hashlib.sha256(str(path).encode("utf-8", "surrogateescape"))
    for file in model.files:
        seen.update(f"\0{file.name}\0{file.size}\0{file.mtime_ns}\0{file.inode}".encode("utf-8", "surrogateescape"))
    form = "adapter" if isinstance(model, Adapter) else "full"
    return Candidate(f"folder:{seen.hexdigest()}", path.name, source, str(path), path, form, model.files, model.nbytes)
