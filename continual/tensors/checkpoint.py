"""A full checkpoint: one safetensors file, or shards with an index. Headers in memory, tensors read one at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from continual.errors import Refuse, Retry
from continual.tensors import header
from continual.tensors.files import Files, small_file
from continual.tensors.header import TensorInfo, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
_LONGEST_FILE_NAME = 255


class Checkpoint:
    """A model's weight files, open for reading; a context manager. Thread-safe. `tensors` maps names to places, `config` is config.json or empty, `root` the
    directory its files have to lie in, if any."""

    def __init__(self, path: Path, files: Files, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.path = path
        self.tensors = tensors
        self.config = config
        self.files = files.stats
        self.root = files.root
        self._files = files

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """Tensor `name` in its own dtype, on the CPU. `out` is a flat uint8 buffer to read into, at least as long as the tensor's bytes.

        Raises Retry if the file cannot be read to its end any more.
        """
        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8) if out is None else out[: info.nbytes]
        if info.nbytes:
            self._files.preadv(info.file, raw.numpy().data, info.offset)
        return raw.view(TORCH[info.dtype]).reshape(info.shape) if info.nbytes else torch.empty(info.shape, dtype=TORCH[info.dtype])

    def read_part(self, info: TensorInfo, start: int, into: memoryview) -> None:
        """Fills `into` with the bytes of a tensor from its byte `start` on. Raises Retry if the file cannot be read to there any more."""
        self._files.preadv(info.file, into, info.offset + start)

    def prefetch(self, info: TensorInfo) -> None:
        """Asks the kernel to read a tensor ahead."""
        self._files.will_need(info.file, info.offset, info.nbytes)

    def check_unchanged(self) -> None:
        """Raises Retry naming a file that changed since it was opened."""
        self._files.check_unchanged()


def weight_files(path: Path, root: Path | None = None) -> tuple[Path, ...]:
    """The weight files of a model directory (or the one file it is), in the order of their names, whether or not they are there.

    As transformers does, one file goes before shards with an index. Raises Refuse if there are none to use, Retry if the index cannot be read now.
    """
    if path.is_file():
        return (path,)
    if os.path.lexists(path / SINGLE):
        return (path / SINGLE,)
    if os.path.lexists(path / INDEX):
        return tuple(path / shard for shard in sorted(set(_weight_map(path, root).values())))
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise Refuse("index", f"{path}: {len(found)} safetensors files and no {INDEX} that says what belongs together")
    if pickled := sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")):
        raise Refuse("pickle", f"{path}: only pickled weights ({pickled[0]}), which can run code when loaded; convert them to safetensors")
    raise Refuse("no-weights", f"{path}: no safetensors file in it")


def open_checkpoint(path: Path, root: Path | None) -> Checkpoint:
    """Opens a full checkpoint and reads its headers. Raises Refuse for anything malformed, Retry for what cannot be read now."""
    paths = weight_files(path, root)
    if missing := next((p for p in paths if not p.exists()), None):
        if not path.exists():
            raise Retry(f"{path}: is gone; nothing was settled")
        raise Refuse("missing-shard", f"{path}: {missing.name} is not there: a file the index names is missing, or a link leads nowhere")
    files = Files(paths, root)
    try:
        tensors: dict[str, TensorInfo] = {}
        for i, shard in enumerate(paths):
            found = header.parse(functools.partial(files.pread, i), files.stats[i].size, str(shard), i)
            if twice := next((name for name in found if name in tensors), None):
                raise Refuse("header", f"{shard}: tensor {twice} is in {paths[tensors[twice].file].name} as well")
            tensors |= found
        if not tensors:
            raise Refuse("no-weights", f"{path}: its weight files hold no tensor")
        if path.is_dir() and os.path.lexists(path / INDEX) and paths[0].name != SINGLE:
            _check_index(path, root, tensors, paths)
        return Checkpoint(path, files, tensors, read_config(path, root))
    except BaseException:
        files.close()
        raise


def read_config(path: Path, root: Path | None) -> dict[str, Any]:
    """config.json beside the weights, an empty dictionary where there is none. Raises Refuse if it is no JSON object."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(config, root) if config.exists() else {}


def read_json(path: Path, root: Path | None, reason: str = "config") -> dict[str, Any]:
    """A small JSON object. Raises Refuse(reason) if the file is none, Retry if it cannot be read now."""
    return header.json_object(small_file(path, root), str(path), reason)


def _weight_map(path: Path, root: Path | None) -> dict[str, str]:
    body = read_json(path / INDEX, root, "index").get("weight_map")
    if not isinstance(body, dict) or not body:
        raise Refuse("index", f"{path / INDEX}: no weight_map")
    for name, shard in body.items():
        if not _is_shard(shard):
            raise Refuse(
                "index",
                f"{path / INDEX}: tensor {shown(name)} is said to be in {shown(shard)}: a shard is a safetensors file in the same directory",
            )
    return body


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, str) or not shard.isprintable() or len(shard.encode()) > _LONGEST_FILE_NAME:
        return False
    return shard == Path(shard).name and shard.endswith(".safetensors") and not shard.startswith(".")


def _check_index(path: Path, root: Path | None, tensors: Mapping[str, TensorInfo], paths: tuple[Path, ...]) -> None:
    claimed = _weight_map(path, root)
    for name, shard in claimed.items():
        if name not in tensors or paths[tensors[name].file].name != shard:
            raise Refuse("index", f"{path / INDEX}: tensor {shown(name)} is said to be in {shard}, where it is not")
    if unclaimed := sorted(tensors.keys() - claimed.keys()):
        raise Refuse("index", f"{path / INDEX}: tensor {unclaimed[0]} is in a shard, but not in the index")
