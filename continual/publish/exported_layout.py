"""Which tensor of an export lies in which of its files, and the index that says so. No weights are written here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from continual.lazily import torch
from continual.publish.exported_weights import DTYPES
from continual.publish.weights import Placed
from continual.records import ITEMSIZE
from continual.tensors import BaseModel, TensorInfo
from continual.tensors.checkpoints.compound import MODULES, manifest_of
from continual.tensors.checkpoints.weight_sets import index_for, stem_of


def layout(base: BaseModel, dtype: str | None, shard_size: int | None) -> dict[str, list[Placed]]:
    """Which tensor goes where: file name to its tensors in order. Without `shard_size` the files are the base's own, as
    are those of modules after the transformer. The files of each folder of a model in parts stay in that folder."""
    checkpoint = base.checkpoint
    infos = sorted(checkpoint.tensors.values(), key=lambda info: (info.file, info.offset))
    files: dict[str, list[Placed]] = {}
    one_file = manifest_of(checkpoint.place) == MODULES
    for part, inside in itertools.groupby(infos, checkpoint.part_of):
        size = None if one_file and part.prefix else shard_size
        groups = _groups(base, list(inside), dtype, size)
        if size is None:
            files |= groups
            continue
        stem = stem_of(Path(next(iter(groups))).name)
        for i, placed in enumerate(groups.values(), 1):
            number = "" if len(groups) == 1 else f"-{i:05d}-of-{len(groups):05d}"
            files[part.name(f"{stem}{number}.safetensors")] = placed
    return files


def _groups(
    base: BaseModel, infos: Sequence[TensorInfo], dtype: str | None, size: int | None
) -> dict[str, list[Placed]]:
    """The tensors of one folder in files of `size` bytes (None: in the base's), by the name of the base's file that
    the first is in, with a number where several begin in one."""
    files = base.checkpoint.files
    floats = {spec.name for spec in base.specs if spec.dtype in DTYPES}
    groups: list[tuple[str, list[Placed]]] = []
    end = 0
    for info in infos:
        source = base.aliases.get(info.name, info.name)
        word = dtype if dtype is not None and source in floats else info.dtype
        nbytes = torch.Size(info.shape).numel() * ITEMSIZE[word]
        file = files[info.file].name
        if not groups or (groups[-1][0] != file if size is None else end + nbytes > size):
            groups.append((file, []))
            end = 0
        name = info.name.removeprefix(base.checkpoint.part_of(info).prefix)
        groups[-1][1].append(Placed(name, source, word, info.shape, end, end + nbytes))
        end += nbytes
    return dict(groups) if size is None else {f"{file}\0{i}": placed for i, (file, placed) in enumerate(groups)}


def write_indexes(files: Mapping[str, Sequence[Placed]], directory: Path) -> None:
    """Writes the index of each folder that needs one."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(file.rpartition("/")[0], []).append(file)
    for folder, inside in folders.items():
        names = {file: Path(file).name for file in inside}
        if (index := index_for(names.values())) is None:
            continue
        weight_map = {p.name: names[file] for file in inside for p in files[file]}
        size = sum(p.end - p.begin for file in inside for p in files[file])
        body = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / folder / index).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", "utf-8")
