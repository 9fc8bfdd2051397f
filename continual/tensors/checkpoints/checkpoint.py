"""A full checkpoint: one safetensors file, or shards with an index. Headers in memory, tensors read one at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from continual.errors import Refuse, Retry
from continual.lazily import Dtypes, torch
from continual.outside import VALUES, shown
from continual.tensors.checkpoints import foreign, header, quantised
from continual.tensors.checkpoints.compound import COPIED, WHOLE, Part, has_weights, settings_of
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.checkpoints.place import Folder, Place, Weights, read_json
from continual.tensors.checkpoints.weight_sets import INDEX, SINGLE, weight_set
from continual.timing.clock import stage

__all__ = ["CONFIG", "FLOATS", "INDEX", "SINGLE", "TORCH", "Checkpoint", "open_checkpoint", "weight_files"]

CONFIG = "config.json"
TORCH = Dtypes(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "I64": "int64",
        "U64": "uint64",
        "F64": "float64",
    }
)
FLOATS = ("F32", "F16", "BF16")
MOST_SHARDS = 16_384
"""Files of the largest model that is opened."""
_LONGEST_FILE_NAME = 255
_HASHED = 1 << 20
"""Bytes that are read at a time of a tensor that is compared."""


class HeldTensors(NamedTuple):
    """What weight files hold: the tensors by name, the names of those that are no part of the model, and the part of
    the model that each file is in."""

    tensors: Mapping[str, TensorInfo]
    unlisted: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


class Checkpoint:
    """A model's weight files, open for reading; a context manager. Thread-safe.

    `tensors` says for each name where in `files` the tensor is. `config` is config.json, or empty. `where` names the
    model in messages. `unlisted` are the names of tensors that lie in a shard and not in the index: they are no part of
    the model. `parts`: the folder of the model that each weight file is in; after the weight files, `files` has those
    that say which folders there are and what they do.
    """

    def __init__(
        self,
        place: Place,
        weights: Weights,
        held: HeldTensors,
        config: Mapping[str, object],
        only: str | None = None,
    ) -> None:
        self.place = place
        self.parts = held.parts
        self.unlisted = held.unlisted
        self.where = str(place) if only is None else place.file(only)
        self.tensors = held.tensors
        self.config = config
        self.files = weights.stats
        self._weights = weights
        self._compared: dict[tuple[int, int], tuple[TensorInfo, str]] = {}

    @property
    def path(self) -> Path:
        """Where it lies on this machine: a directory, or one file. Only for what was opened here, as bases are."""
        assert isinstance(self.place, Folder)
        return self.place.path

    @property
    def directory(self) -> Path:
        """The directory that its files are in. Only for what was opened on this machine."""
        assert isinstance(self.place, Folder)
        return self.place.directory

    def with_tensors(self, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same open files with other names for what is in them. One of the two is closed."""
        other = copy.copy(self)
        other.tensors = tensors
        return other

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._weights.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def part_of(self, info: TensorInfo) -> Part:
        """The folder of the model that a tensor is in."""
        return self.parts[info.file] if self.parts else WHOLE

    def metadata(self) -> tuple[str, Mapping[str, str]]:
        """The first weight file, as messages name it, and what its publisher wrote into its header."""
        where = self.place.file(self.files[0].name)
        return where, header.metadata(functools.partial(self._weights.pread, 0), where)

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Tensor `name` in its own dtype, on the CPU. `out` is a flat uint8 buffer to read into, at least as long as
        the tensor's bytes.

        Raises Retry if the file cannot be read to its end any more.
        """
        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8) if out is None else out[: info.nbytes]
        if info.nbytes:
            self.read_part(info, 0, raw.numpy().data)
        return (
            raw.view(TORCH[info.dtype]).reshape(info.shape)
            if info.nbytes
            else torch.empty(info.shape, dtype=TORCH[info.dtype])
        )

    def compare(self, digests: Mapping[str, str]) -> None:
        """Has each of these tensors compared with its BLAKE3 hash, by name, before anything of it is read."""
        named = [(self.tensors[name], digest) for name, digest in digests.items() if name in self.tensors]
        self._compared = {(info.file, info.offset): (info, digest) for info, digest in named if info.nbytes}

    def _compare(self, info: TensorInfo, digest: str) -> None:
        seen, piece = blake3(), memoryview(bytearray(min(_HASHED, info.nbytes)))
        for at in range(0, info.nbytes, _HASHED):
            part = piece[: min(_HASHED, info.nbytes - at)]
            self._weights.preadv(info.file, part, info.offset + at)
            seen.update(part)
        if seen.hexdigest() != digest:
            raise Retry(
                f"{self.place.file(self.files[info.file].name)} has another tensor {info.name} than the base: delete "
                "this file on this machine, and it is fetched anew; nothing was settled"
            )

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a tensor from its byte `start` on. Raises Retry if the file cannot be read to
        there any more, or the tensor is not what it is compared with."""
        if (found := self._compared.get((info.file, info.offset))) is not None:
            self._compare(*found)
            self._compared.pop((info.file, info.offset), None)
        with stage("read", len(into)):
            self._weights.preadv(info.file, into, info.offset + start)

    def expect(self, infos: Sequence[TensorInfo]) -> None:
        """Says which tensors will be read, in this order."""
        self._weights.expect(self.extents(infos))

    def extents(self, infos: Sequence[TensorInfo]) -> list[tuple[int, int, int]]:
        """Where in `files` that lies which is read for these tensors: file, first byte, bytes."""
        return [(info.file, info.offset, info.nbytes) for info in infos]

    def prefetch(self, info: TensorInfo) -> None:
        """Says that a tensor comes next, so that it is read ahead."""
        self._weights.will_need(info.file, info.offset, info.nbytes)

    def check_unchanged(self) -> None:
        """Raises Retry naming a file that changed since it was opened."""
        self._weights.check_unchanged()


class PartFile(NamedTuple):
    """A weight file: its path in the model, the folder of the model that it is in, and the path of the index that names
    it."""

    name: str
    part: Part
    named_by: str | None = None


def weight_files(place: Place, folder: str = "") -> tuple[str, ...]:
    """Names of the weight files of a model, or of those in a folder of it, in order, there or not; weight_sets.py says
    which they are.

    Raises Refuse if there are none to use, Retry if the index cannot be read now.
    """
    return tuple(file.name for file in _files(place, Part(folder, "")))


def _files(place: Place, part: Part) -> tuple[PartFile, ...]:
    """The weight files in a folder of a model."""
    if (only := place.only) is not None:  # asked once: the answer may be another the next time
        return (PartFile(only, part),)
    names, where = place.names(part.folder), place.file(part.folder) if part.folder else str(place)
    found = weight_set(names, where)
    if found is None:
        raise foreign.refuse_names(names, where)
    if found.file is not None:
        if not found.file.isprintable():
            raise Refuse("no-file", f"{where}: {shown(found.file)} cannot be printed: rename it")
        return (PartFile(part.name(found.file), part),)
    assert found.listing is not None
    index = part.name(found.listing)
    shards = sorted(set(_weight_map(place, index).values()))
    if len(shards) > MOST_SHARDS:
        raise Refuse("index", f"{place.file(index)}: names {len(shards)} shards; at most {MOST_SHARDS} are read")
    return tuple(PartFile(part.name(shard), part, index) for shard in shards)


def part_files(place: Place, parts: Sequence[Part]) -> tuple[PartFile, ...]:
    """The weight files of all parts of a model. What has no weights is left out, and so is what is only copied. Raises
    as `weight_files`."""
    if len(parts) == 1 and not parts[0].folder:
        return _files(place, parts[0])
    read = [part for part in parts if part.folder not in COPIED and has_weights(place, part)]
    return tuple(file for part in read or parts[:1] for file in _files(place, part))


def beside_files(place: Place, parts: Sequence[Part]) -> tuple[PartFile, ...]:
    """The weight files of the parts beside an adapter, which need not have any. Raises as `weight_files`."""
    return part_files(place, parts[1:]) if any(has_weights(place, part) for part in parts[1:]) else ()


def opened_files(place: Place, parts: Sequence[Part], adapter: str | None = None) -> tuple[str, ...]:
    """The files that are opened of a model in parts, in this order: they make its key. `adapter`: the weight file of
    one that adapts the first part. Raises as `weight_files`."""
    files = part_files(place, parts) if adapter is None else (PartFile(adapter, WHOLE), *beside_files(place, parts))
    return (*(file.name for file in files), *settings_of(place, parts))


def open_checkpoint(
    place: Place, only: str | None = None, *, parts: Sequence[Part] = (WHOLE,), packed: bool = False
) -> Checkpoint:
    """Opens a full checkpoint, or the one file `only` of a place, and reads its headers; with `packed` also those of a
    quantised one.

    `parts`: the folders of the model; beside the file `only`, which stands for the first of them, the weights of the
    others are opened. Raises Refuse for anything malformed, and for what is no checkpoint of floats (foreign.py,
    quantised.py); Retry for what cannot be read now.
    """
    files = part_files(place, parts) if only is None else (PartFile(only, WHOLE), *beside_files(place, parts))
    settings = settings_of(place, parts) if only is None or len(parts) > 1 else ()
    if missing := next((file.name for file in files if not place.present(file.name)), None):
        place.names()  # raises where all of it is gone
        raise Refuse(
            "missing-shard",
            f"{place}: {missing} is not there: a file that the index names is missing, or a link leads nowhere; "
            "publish all shards of the model",
        )
    weights = place.open([*(file.name for file in files), *settings])
    try:
        config = read_config(place, next((part for part in parts if part.weighted), WHOLE).folder)
        for part in dict.fromkeys(file.part for file in files) if only is None and not packed else ():
            quantised.check_config(place.file(part.name(CONFIG)), read_config(place, part.folder))
        held = _headers(place, weights, files, packed)
        if not held.tensors:
            raise Refuse("no-weights", f"{place}: its weight files hold no tensor: save the model again")
        if only is None and not packed:
            quantised.check_tensors(str(place), held.tensors)
        return Checkpoint(place, weights, held, config, only)
    except BaseException:
        weights.close()
        raise


def _headers(place: Place, weights: Weights, files: Sequence[PartFile], packed: bool) -> HeldTensors:
    """What all files hold. Where there is an index, which
    claims a file for each tensor, that alone decides."""
    indexes = {file.named_by: file.part for file in files if file.named_by is not None}
    claimed = {index: _weight_map(place, index) for index in indexes}
    tensors: dict[str, TensorInfo] = {}
    unlisted: set[str] = set()
    for i, (file, part, index) in enumerate(files):
        where = place.file(file)
        try:
            found = header.parse(functools.partial(weights.pread, i), weights.stats[i].size, where, i, narrow=packed)
        except Refuse as error:
            if error.reason in ("header", "truncated", "foreign"):
                weights.look_again(i)
            raise
        if index is not None:
            unlisted.update(part.prefix + name for name in found if name not in claimed[index])
            found = {name: info for name, info in found.items() if part.name(claimed[index].get(name, "")) == file}
        if part.prefix:
            found = {part.prefix + name: info._replace(name=part.prefix + name) for name, info in found.items()}
        if twice := next((name for name in found if name in tensors), None):
            raise Refuse(
                "header",
                f"{where}: tensor {twice} is in {files[tensors[twice].file].name} as well: take one of the two away",
            )
        tensors |= found
        if len(tensors) + len(unlisted) > header.MOST:
            raise Refuse(
                "header", f"{where}: with it there are more than the {header.MOST} tensors that a model may have"
            )
    for index, part in indexes.items():
        if lost := next((name for name in claimed[index] if part.prefix + name not in tensors), None):
            raise Refuse(
                "index",
                f"{place.file(part.folder) if part.folder else place}: its index says that tensor {shown(lost)} is in "
                f"{claimed[index][lost]}, where it is not: a shard of another model, or an index that was not written "
                "anew",
            )
    return HeldTensors(tensors, tuple(sorted(unlisted)), tuple(file.part for file in files))


def read_config(place: Place, folder: str = "") -> dict[str, object]:
    """config.json beside the weights, empty where there is none; the Infinity that Mamba models have in it is read.
    Raises Refuse if it is no JSON object, Retry if it cannot be read now."""
    name = Part(folder, "").name(CONFIG)
    if not place.present(name):
        return {}
    return header.json_object(place.small(name), place.file(name), "config", infinite=True)


def _weight_map(place: Place, index: str) -> dict[str, str]:
    where = place.file(index)
    body = read_json(place, index, "index", values=header.MOST + VALUES).get("weight_map")
    if not isinstance(body, dict) or not body:
        raise Refuse(
            "index", f"{where}: has no weight_map, so it says of no tensor in which file it is: save the model again"
        )
    for name, shard in body.items():
        if not _is_shard(shard):
            raise Refuse(
                "index",
                f"{where}: tensor {shown(name)} is said to be in {shown(shard)}: "
                "a shard is a safetensors file in the same directory",
            )
    return body


def _is_shard(shard: object) -> bool:
    if not isinstance(shard, str) or not shard.isprintable() or len(shard.encode()) > _LONGEST_FILE_NAME:
        return False
    return shard == Path(shard).name and shard.endswith(".safetensors") and not shard.startswith(".")
