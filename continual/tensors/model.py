"""A model directory as what it is, a full checkpoint or an adapter; and the candidate it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from continual.errors import Refuse
from continual.outside import shown
from continual.records import Candidate, Lineage
from continual.tensors.adapters.adapter import Adapter
from continual.tensors.adapters.adapter_config import CONFIG
from continual.tensors.adapters.adapter_files import check_adapter, check_elsewhere
from continual.tensors.adapters.loras.file import LoraFile
from continual.tensors.adapters.loras.parsing import is_lora
from continual.tensors.checkpoints.checkpoint import FLOATS, Checkpoint, open_checkpoint
from continual.tensors.checkpoints.compound import MODULES, WHOLE, manifest_of, parts_of
from continual.tensors.checkpoints.place import Place, place_of
from continual.tensors.layouts.same_layout import checkpoint_in_layout_of
from continual.tensors.matched.matching import naming_of, sources
from continual.tensors.names.kinds import BaseModel

Model = Checkpoint | Adapter


def open_model(where: Path | Place, *, root: Path | None = None, whole: bool = True, packed: bool = False) -> Model:
    """Opens the model at a place, or in a directory (or a single safetensors file), and reads its headers.

    `root` is the watched folder the files of a directory must lie in, None for a path given by hand. Without `whole`
    only what lies at the top is read of a model in several folders. With `packed` a quantised model is opened as well,
    with its tensors as they are. Raises Refuse with
    a reason for anything malformed or of a kind that is not understood, Retry for what cannot be read now.
    """
    place = place_of(where, root)
    if _is_adapter(place):
        check_adapter(place)
        return Adapter(place, parts_of(place) if manifest_of(place) == MODULES else (WHOLE,))
    parts = parts_of(place) if whole else (WHOLE,)
    if parts[0].folder and CONFIG in place.names(parts[0].folder):
        raise Refuse(
            "adapter-kind", f"{place.file(parts[0].folder)}: holds an adapter; its files belong beside {MODULES}"
        )
    if parts == (WHOLE,):
        check_elsewhere(place)
    found = open_checkpoint(place, parts=parts, packed=packed)
    try:
        if not is_lora(found.tensors.keys()):
            return found
        if not (place.only is not None and place.present(CONFIG)):
            return LoraFile(found)
    except BaseException:
        found.close()
        raise
    found.close()
    return Adapter(place)  # one file was named, and its configuration lies beside it


def open_shipped(base: BaseModel, model: Model, lineage: Lineage, name: str) -> Checkpoint:
    """The safetensors file `name` beside the weights of `model`, which has a tensor of its shape for every one that is
    folded.

    Raises Refuse naming what is missing or of another shape, Retry for what cannot be read now.
    """
    if isinstance(model, Adapter):
        raise Refuse(
            "moments",
            f"{model.place} is an adapter: what weighs each parameter ({name}) is shipped with full fine-tunes only",
        )
    where = model.place.file(name)
    if not model.place.present(name):
        raise Refuse(
            "moments",
            f"{where} is not there: this rule weighs each parameter by it; "
            "publish it before the weights, then 'continual retry'",
        )
    found = open_checkpoint(model.place, name)
    try:
        alike = checkpoint_in_layout_of(base, found)
        matches = sources(base, checkpoint_in_layout_of(base, model), naming_of(lineage))[0]
        for source in (match.full for name, match in matches.items() if name in lineage.folded):
            assert source is not None
            info = alike.tensors.get(source.name)
            if info is None or info.shape != source.shape or info.dtype not in FLOATS:
                is_there = f"{info.dtype} {list(info.shape)}" if info else "not there"
                raise Refuse(
                    "moments",
                    f"{where}: {shown(source.name)} is {is_there}; "
                    f"it has to be floats of the weight's shape {list(source.shape)}",
                )
    except BaseException:
        found.close()
        raise
    return found


def _is_adapter(place: Place) -> bool:
    return place.only is None and CONFIG in place.names()


def candidate_of(model: Model, *, source: str | None = None) -> Candidate:
    """The candidate a model is; `source` says who saw it, where that is not who opened it."""
    place = model.place
    form: Literal["full", "adapter"] = "adapter" if isinstance(model, Adapter) else "full"
    return Candidate(
        key=place.key(model.files),
        name=place.name,
        source=source or place.source,
        origin=place.origin,
        form=form,
        nbytes=model.nbytes,
        revision=place.revision,
        licence=place.licence,
    )


def unreadable(place: Place) -> Candidate:
    """A candidate whose headers cannot be read, known by its place and the state of its files."""
    files = place.look()
    return Candidate(
        key=place.key(files),
        name=place.name,
        source=place.source,
        origin=place.origin,
        form="full",
        nbytes=sum(file.size for file in files),
        revision=place.revision,
        licence=place.licence,
    )
