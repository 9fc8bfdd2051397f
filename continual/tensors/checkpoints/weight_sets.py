"""Which of the weight files in a directory are the model, decided by their names alone.

Publishers put other things beside a model: the same weights in half precision (`model.fp16.safetensors`), the files
that its makers use themselves (`consolidated.safetensors`), the values of an optimiser. Where names do not decide it
the model is refused, naming both.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from continual.errors import Refuse
from continual.outside import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "pytorch_lora_weights")
"""What the weights of a model are called, the first before the others, as transformers and diffusers write them; the
last is that of a LoRA."""
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json")
_SHARD = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<variant>[A-Za-z0-9_]+))?-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors"
)
_LATE = re.compile(r"(?P<stem>.+?)-\d{5}-of-\d{5}\.(?P<variant>[A-Za-z0-9_]+)\.safetensors")
"""Shards as older versions of diffusers name those of a variant."""
_FILE = re.compile(r"(?P<stem>[^.]+)(?:\.(?P<variant>[A-Za-z0-9_-]+))?\.safetensors")
_BESIDE = re.compile(r"(?:consolidated|optimizer|scheduler|adapter_model|fisher|moments|scaler)(?:[._-].*)?")
"""Stems of what lies beside a model, and is the model only where there is nothing else."""


class WeightSet(NamedTuple):
    """The weights of a model: one `file`, or the shards that the index `listing` names."""

    file: str | None = None
    listing: str | None = None


def weight_set(names: Collection[str], where: str) -> WeightSet | None:
    """The set of files that is the model; None where there is no safetensors file.

    As transformers does, one file goes before shards with an index, and weights without a variant before `fp16` and
    others. Raises Refuse (`index`) where several could be meant, naming two of them.
    """
    for stem in _STEMS:
        if f"{stem}.safetensors" in names:
            return WeightSet(file=f"{stem}.safetensors")
        if f"{stem}.safetensors.index.json" in names:
            return WeightSet(listing=f"{stem}.safetensors.index.json")
    found = _sets(names)
    if not found:
        return None
    first = [chose for stem, chose in found if not _BESIDE.fullmatch(stem)] or [chose for _, chose in found]
    if len(first) > 1:
        one, other = (chose.file or chose.listing for chose in first[:2])
        raise Refuse(
            "index",
            f"{where}: {shown(one)} and {shown(other)} could both be the model, and no {INDEX} says what belongs "
            f"together: call the one that is meant {SINGLE}, or take the others away",
        )
    return first[0]


def _sets(names: Collection[str]) -> list[tuple[str, WeightSet]]:
    """Every set of files that can be a model by itself, with its stem: variants of a set that is there without one are
    left out, as are shards that an index stands for."""
    sets: dict[tuple[str, str], WeightSet] = {}
    for name in sorted(names):
        if match := _INDEX.fullmatch(name):
            sets[match["stem"], match["variant"] or ""] = WeightSet(listing=name)
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        match = _SHARD.fullmatch(name) or _FILE.fullmatch(name)
        key = (match["stem"], match["variant"] or "") if match else (name, "")
        if "number" in (match.groupdict() if match else {}):
            if key not in sets and match and int(match["count"]) == 1:
                sets[key] = WeightSet(file=name)
            elif key not in sets:
                sets[name, ""] = WeightSet(file=name)
        else:
            sets.setdefault(key, WeightSet(file=name))
    bare = {stem for stem, variant in sets if not variant}
    return [(stem, chose) for (stem, variant), chose in sets.items() if not variant or stem not in bare]


def index_for(files: Collection[str]) -> str | None:
    """The name of the index that these weight files of one folder need to be loaded; None where the one file is found
    by its name."""
    first = min(files)
    match = _SHARD.fullmatch(first) or _LATE.fullmatch(first)
    if match is None:
        alone = _FILE.fullmatch(first)
        return None if len(files) == 1 and alone and alone["stem"] in _STEMS[:2] else INDEX
    variant = f".{match['variant']}" if match["variant"] else ""
    return f"{match['stem']}.safetensors.index{variant}.json"


def stem_of(name: str) -> str:
    """How the names of a model's shards begin, from the name of one of its files."""
    return next((stem for stem in _STEMS[1:2] if name.startswith(stem)), _STEMS[0])
