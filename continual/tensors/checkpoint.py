"""A full checkpoint: one safetensors file, or shards with an index. Headers in memory, tensors read one at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from continual.errors import Refuse
from continual.outside import VALUES, shown
from continual.tensors import foreign, header, quantised
from continual.tensors.header import TensorInfo
from continual.tensors.place import Folder, Place, Weights, read_json
from continual.tensors.weight_sets import INDEX, SINGLE, weight_set

__all__ = ["CONFIG", "FLOATS", "INDEX", "SINGLE", "TORCH", "Checkpoint", "open_checkpoint", "weight_files"]

CONFIG = "config.json"
TORCH: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
FLOATS = ("F32", "F16", "BF16")
MOST_SHARDS = 16_384
"""Files of the largest model that is opened."""
_LONGEST_FILE_NAME = 255


class Checkpoint:
    """A model's weight files, open for reading; a context manager. Thread-safe.

    `tensors` says for each name where in `files` the tensor is. `config` is config.json, or empty. `where` names the
    model in messages. `unlisted` are the names of tensors that lie in a shard and not in the index: they are no part of
    the model.
    """

    def __init__(
        self,
        place: Place,
        weights: Weights,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, object],
        only: str | None = None,
        unlisted: tuple[str, ...] = (),
    ) -> None:
        self.place = place
        self.unlisted = unlisted
        self.where = str(place) if only is None else place.file(only)
        self.tensors = tensors
        self.config = config
        self.files = weights.stats
        self._weights = weights

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
            self._weights.preadv(info.file, raw.numpy().data, info.offset)
        return (
            raw.view(TORCH[info.dtype]).reshape(info.shape)
            if info.nbytes
            else torch.empty(info.shape, dtype=TORCH[info.dtype])
        )

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a tensor from its byte `start` on. Raises Retry if the file cannot be read to
        there any more."""
        self._weights.preadv(info.file, into, info.offset + start)

    def expect(self, infos: Sequence[TensorInfo]) -> None:
        """Says which tensors will be read, in this order."""
        self._weights.expect([(info.file, info.offset, info.nbytes) for info in infos])

    def prefetch(self, info: TensorInfo) -> None:
        """Says that a tensor comes next, so that it is read ahead."""
        self._weights.will_need(info.file, info.offset, info.nbytes)

    def check_unchanged(self) -> None:
        """Raises Retry naming a file that changed since it was opened."""
        self._weights.check_unchanged()


def weight_files(place: Place) -> tuple[str, ...]:
    """Names of the weight files of a model, in order, there or not; weight_sets.py says which they are.

    Raises Refuse if there are none to use, Retry if the index cannot be read now.
    """
    return _files(place)[0]


def _files(place: Place) -> tuple[tuple[str, ...], str | None]:
    """The names of the weight files, and that of the index that names them."""
    if (only := place.only) is not None:  # asked once: the answer may be another the next time
        return (only,), None
    names = place.names()
    found = weight_set(names, str(place))
    if found is None:
        raise foreign.refuse_names(names, str(place))
    if found.file is not None:
        if not found.file.isprintable():
            raise Refuse("no-file", f"{place}: {shown(found.file)} cannot be printed: rename it")
        return (found.file,), None
    assert found.listing is not None
    shards = sorted(set(_weight_map(place, found.listing).values()))
    if len(shards) > MOST_SHARDS:
        raise Refuse(
            "index", f"{place.file(found.listing)}: names {len(shards)} shards; at most {MOST_SHARDS} are read"
        )
    return tuple(shards), found.listing


def open_checkpoint(place: Place, only: str | None = None) -> Checkpoint:
    """Opens a full checkpoint, or the one file `only` of a place, and reads its headers.

    Raises Refuse for anything malformed, and for what is no checkpoint of floats (foreign.py, quantised.py); Retry for
    what cannot be read now.
    """
    names, index = _files(place) if only is None else ((only,), None)
    if missing := next((name for name in names if not place.present(name)), None):
        place.names()  # raises where all of it is gone
        raise Refuse(
            "missing-shard",
            f"{place}: {missing} is not there: a file the index names is missing, or a link leads nowhere",
        )
    weights = place.open(names)
    try:
        config = read_config(place)
        if only is None:
            quantised.check_config(place, config)
        claimed = _weight_map(place, index) if index is not None else None
        tensors, unlisted = _headers(place, weights, names, claimed)
        if not tensors:
            raise Refuse("no-weights", f"{place}: its weight files hold no tensor")
        if only is None:
            quantised.check_tensors(str(place), tensors)
            foreign.check_tensors(tensors.keys(), str(place))
        return Checkpoint(place, weights, tensors, config, only, unlisted)
    except BaseException:
        weights.close()
        raise


def _headers(
    place: Place, weights: Weights, names: tuple[str, ...], claimed: Mapping[str, str] | None
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors of all files, and the names of those that are no part of the model. Where there is an index, which
    has `claimed` a file for each tensor, that alone decides."""
    tensors: dict[str, TensorInfo] = {}
    unlisted: set[str] = set()
    for i, shard in enumerate(names):
        where = place.file(shard)
        found = header.parse(functools.partial(weights.pread, i), weights.stats[i].size, where, i)
        if claimed is not None:
            unlisted.update(name for name in found if name not in claimed)
            found = {name: info for name, info in found.items() if claimed.get(name) == shard}
        if twice := next((name for name in found if name in tensors), None):
            raise Refuse("header", f"{where}: tensor {twice} is in {names[tensors[twice].file]} as well")
        tensors |= found
        if len(tensors) + len(unlisted) > header.MOST:
            raise Refuse(
                "header", f"{where}: with it there are more than the {header.MOST} tensors that a model may have"
            )
    for name, shard in (claimed or {}).items():
        if name not in tensors:
            raise Refuse(
                "index",
                f"{place}: its index says that tensor {shown(name)} is in {shard}, where it is not: a shard of another "
                "model, or an index that was not written anew",
            )
    return tensors, tuple(sorted(unlisted))


def read_config(place: Place) -> dict[str, object]:
    """config.json beside the weights, empty where there is none; the Infinity that Mamba models have in it is read.
    Raises Refuse if it is no JSON object, Retry if it cannot be read now."""
    if not place.present(CONFIG):
        return {}
    return header.json_object(place.small(CONFIG), place.file(CONFIG), "config", infinite=True)


def _weight_map(place: Place, index: str) -> dict[str, str]:
    where = place.file(index)
    body = read_json(place, index, "index", values=header.MOST + VALUES).get("weight_map")
    if not isinstance(body, dict) or not body:
        raise Refuse("index", f"{where}: no weight_map")
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
