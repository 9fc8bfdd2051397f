"""A model directory as what it is, a full checkpoint or an adapter; and the candidate it makes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from continual.errors import Refuse, Retry
from continual.records import Candidate, Lineage
from continual.tensors.adapter import CONFIG, WEIGHTS, Adapter
from continual.tensors.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint, open_checkpoint, weight_files
from continual.tensors.header import shown
from continual.tensors.kinds import BaseModel
from continual.tensors.matching import sources

Model = Checkpoint | Adapter


def open_model(path: Path, *, root: Path | None = None) -> Model:
    """Opens the model in directory `path` (or a single safetensors file) and reads its headers.

    `root` is the watched folder its files must lie in, None for a path given by hand. Raises Refuse with a reason for anything malformed or of a kind
    that is not understood, Retry for what cannot be read now.
    """
    try:
        if not path.exists():
            raise Retry(f"{path}: is gone, or never was; nothing was settled")
        if _is_adapter(path):
            _adapter_files(path)
            return Adapter(path, root)
        return open_checkpoint(path, root)
    except OSError as error:
        raise Retry(f"{error.filename or path}: cannot be read ({error.strerror}); nothing was settled") from error


def open_shipped(base: BaseModel, model: Model, lineage: Lineage, name: str) -> Checkpoint:
    """The safetensors file `name` beside the weights of `model`, which has a tensor of its shape for every one that is folded.

    Raises Refuse naming what is missing or of another shape, Retry for what cannot be read now.
    """
    if isinstance(model, Adapter):
        raise Refuse("moments", f"{model.path} is an adapter: what weighs each parameter ({name}) is shipped with full fine-tunes only")
    place = (model.path if model.path.is_dir() else model.path.parent) / name
    if not os.path.lexists(place):
        raise Refuse(
            "moments", f"{place} is not there: this rule weighs each parameter by it; publish it before the weights, then 'continual retry'"
        )
    found = open_checkpoint(place, model.root)
    try:
        for source in (s.full for n, s in sources(base, model, lineage.prefix)[0].items() if n in lineage.folded):
            assert source is not None
            info = found.tensors.get(source.name)
            if info is None or info.shape != source.shape or info.dtype not in FLOATS:
                is_there = f"{info.dtype} {list(info.shape)}" if info else "not there"
                raise Refuse(
                    "moments",
                    f"{place}: {shown(source.name)} is {is_there}; it has to be floats of the weight's shape {list(source.shape)}",
                )
    except BaseException:
        found.close()
        raise
    return found


def model_files(path: Path, *, root: Path | None = None) -> tuple[Path, ...]:
    """The files that make up the model at `path`, whether or not all are there yet: its weight files, and its index or adapter configuration.

    Reads the index, no header. Raises Refuse if there is no model, or an index that is malformed, Retry for what cannot be read now.
    """
    try:
        if _is_adapter(path):
            return _adapter_files(path)
        weights = weight_files(path, root)
    except OSError as error:
        raise Retry(f"{error.filename or path}: cannot be read ({error.strerror}); nothing was settled") from error
    index = path / INDEX
    return (*weights, index) if weights[0].name not in (SINGLE, path.name) and index.exists() else weights


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and os.path.lexists(path / CONFIG)


def _adapter_files(path: Path) -> tuple[Path, ...]:
    if os.path.lexists(path / SINGLE) or os.path.lexists(path / INDEX):
        raise Refuse("adapter-kind", f"{path}: holds both an adapter and a full model; publish them in two directories")
    if not os.path.lexists(path / WEIGHTS):
        pickled = (path / "adapter_model.bin").exists()
        what = (
            "only adapter_model.bin, a pickle that can run code when loaded; convert it to safetensors"
            if pickled
            else f"no {WEIGHTS} in it"
        )
        raise Refuse("pickle" if pickled else "no-weights", f"{path}: {what}")
    return (path / WEIGHTS, path / CONFIG)


def candidate_of(model: Model, *, source: str) -> Candidate:
    """The candidate a model is: its key names the place and the state of every weight file there."""
    path = model.path.absolute()
    seen = hashlib.sha256(str(path).encode("utf-8", "surrogateescape"))
    for file in model.files:
        seen.update(f"\0{file.name}\0{file.size}\0{file.mtime_ns}\0{file.inode}".encode("utf-8", "surrogateescape"))
    form: Literal["full", "adapter"] = "adapter" if isinstance(model, Adapter) else "full"
    return Candidate(f"folder:{seen.hexdigest()}", path.name, source, str(path), path, form, model.files, model.nbytes)
