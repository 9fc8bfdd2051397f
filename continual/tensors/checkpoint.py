"""A full checkpoint: one safetensors file, or shards with an index. Headers in memory, tensors read one at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from continual.errors import Refuse
from continual.outside import VALUES, shown
from continual.tensors import header
from continual.tensors.header import TensorInfo
from continual.tensors.place import Folder, Place, Weights, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
MOST_SHARDS = 4096
"""Files of the largest model that is opened."""
_LONGEST_FILE_NAME = 255


class Checkpoint:
    """A model's weight files, open for reading; a context manager. Thread-safe.

    `tensors` says for each name where in `files` the tensor is. `config` is config.json, or empty. `where` names the
    model in messages.
    """

    def __init__(
        self,
        place: Place,
        weights: Weights,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, object],
        only: str | None = None,
    ) -> None:
        self.place = place
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
    """Names of the weight files of a model, in order, whether or not they are there.

    As transformers does, one file goes before shards with an index. Raises Refuse if there are none to use, Retry if
    the index cannot be read now.
    """
    if (only := place.only) is not None:  # asked once: the answer may be another the next time
        return (only,)
    names = place.names()
    if SINGLE in names:
        return (SINGLE,)
    if INDEX in names:
        shards = sorted(set(_weight_map(place).values()))
        if len(shards) > MOST_SHARDS:
            raise Refuse("index", f"{place.file(INDEX)}: names {len(shards)} shards; at most {MOST_SHARDS} are read")
        return tuple(shards)
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) == 1:
        if not found[0].isprintable():
            raise Refuse("no-file", f"{place}: its file {shown(found[0])} has a name that cannot be printed: rename it")
        return (found[0],)
    if found:
        raise Refuse("index", f"{place}: {len(found)} safetensors files and no {INDEX} that says what belongs together")
    if pickled := sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))):
        raise Refuse(
            "pickle",
            f"{place}: only pickled weights ({shown(pickled[0])}), which can run code when loaded; "
            "convert them to safetensors",
        )
    raise Refuse("no-weights", f"{place}: no safetensors file in it")


def open_checkpoint(place: Place, only: str | None = None) -> Checkpoint:
    """Opens a full checkpoint, or the one file `only` of a place, and reads its headers.

    Raises Refuse for anything malformed, Retry for what cannot be read now.
    """
    names = weight_files(place) if only is None else (only,)
    if missing := next((name for name in names if not place.present(name)), None):
        place.names()  # raises where all of it is gone
        raise Refuse(
            "missing-shard",
            f"{place}: {missing} is not there: a file the index names is missing, or a link leads nowhere",
        )
    weights = place.open(names)
    try:
        tensors: dict[str, TensorInfo] = {}
        for i, shard in enumerate(names):
            where = place.file(shard)
            found = header.parse(functools.partial(weights.pread, i), weights.stats[i].size, where, i)
            if twice := next((name for name in found if name in tensors), None):
                raise Refuse("header", f"{where}: tensor {twice} is in {names[tensors[twice].file]} as well")
            tensors |= found
            if len(tensors) > header.MOST:
                raise Refuse(
                    "header", f"{where}: with it there are more than the {header.MOST} tensors that a model may have"
                )
        if not tensors:
            raise Refuse("no-weights", f"{place}: its weight files hold no tensor")
        if only is None and place.only is None and names[0] != SINGLE and INDEX in place.names():
            _check_index(place, tensors, names)
        return Checkpoint(place, weights, tensors, read_config(place), only)
    except BaseException:
        weights.close()
        raise


def read_config(place: Place) -> dict[str, object]:
    """config.json beside the weights, empty where there is none; the Infinity that Mamba models have in it is read.
    Raises Refuse if it is no JSON object, Retry if it cannot be read now."""
    if not place.present(CONFIG):
        return {}
    return header.json_object(place.small(CONFIG), place.file(CONFIG), "config", infinite=True)


def _weight_map(place: Place) -> dict[str, str]:
    where = place.file(INDEX)
    body = read_json(place, INDEX, "index", values=header.MOST + VALUES).get("weight_map")
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


def _check_index(place: Place, tensors: Mapping[str, TensorInfo], files: tuple[str, ...]) -> None:
    claimed, where = _weight_map(place), place.file(INDEX)
    for name, shard in claimed.items():
        if name not in tensors or files[tensors[name].file] != shard:
            raise Refuse("index", f"{where}: tensor {shown(name)} is said to be in {shard}, where it is not")
    if unclaimed := sorted(tensors.keys() - claimed.keys()):
        raise Refuse("index", f"{where}: tensor {unclaimed[0]} is in a shard, but not in the index")
