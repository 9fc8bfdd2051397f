"""A base as a state keeps it: its headers and its config.json, and none of its weights. The files need not be on this
machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from continual.errors import Misconfigured, Refuse
from continual.records import ITEMSIZE, FileStat, TensorSpec
from continual.tensors.checkpoints.checkpoint import CONFIG, Checkpoint, HeldTensors, read_config
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.checkpoints.place import Weights, key_of
from continual.tensors.names.kinds import BaseModel
from continual.tensors.names.tied import can_untie

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name to the safetensors word of its dtype, and its shape."""


class KeptPlace:
    """Where a base is that a state keeps the headers of: a place with config.json alone. `name` is how people call the
    base: its path, or its repo and revision."""

    source = "state"
    only = None
    settled_key = None
    revision = None
    licence = None

    def __init__(self, name: str, config: str | None) -> None:
        self.name = self.origin = name
        self._files = {} if config is None else {CONFIG: config.encode()}

    def __str__(self) -> str:
        return self.name

    def file(self, name: str) -> str:
        """How messages name a file of it."""
        return f"{self.name}/{name}"

    def must_be_there(self) -> None:
        """It is."""

    def names(self, folder: str = "") -> frozenset[str]:
        """config.json, where the base has one."""
        return frozenset() if folder else frozenset(self._files)

    def present(self, name: str) -> bool:
        """Whether it is kept."""
        return name in self._files

    def small(self, name: str) -> bytes:
        """What a kept file holds. Raises Refuse (`no-file`) for any other."""
        if name not in self._files:
            raise Refuse("no-file", f"{self.file(name)}: the state keeps only config.json of its base")
        return self._files[name]

    def files(self) -> frozenset[str]:
        """config.json, where the base has one."""
        return frozenset(self._files)

    def sha256(self, name: str) -> str:
        """Of a kept file. Raises as `small`."""
        return hashlib.sha256(self.small(name)).hexdigest()

    def open(self, *_: object, **__: object) -> Weights:
        """No weights."""
        return _NoWeights(self.name)

    def look(self) -> tuple[FileStat, ...]:
        """Nothing."""
        return ()

    def key(self, files: Sequence[FileStat]) -> str:
        """As of a directory of this name."""
        return key_of(self.origin, files)


class _NoWeights:
    """The weights of a base that a state keeps no weights of: whoever asks for some has to open the base itself."""

    stats: tuple[FileStat, ...] = ()

    def __init__(self, name: str) -> None:
        self._name = name

    def pread(self, *_: object, **__: object) -> bytes:
        """Raises Misconfigured."""
        raise self._none()

    def preadv(self, *_: object, **__: object) -> None:
        """Raises Misconfigured."""
        raise self._none()

    def expect(self, *_: object, **__: object) -> None:
        """Nothing will be read."""

    def will_need(self, *_: object, **__: object) -> None:
        """Nothing will be read."""

    def look_again(self, *_: object, **__: object) -> None:
        """Nothing was read."""

    def check_unchanged(self) -> None:
        """Nothing can change."""

    def close(self) -> None:
        """Nothing is open."""

    def _none(self) -> Misconfigured:
        return Misconfigured(f"{self._name}: this state keeps adapters, and no weights of its base")


def kept_base(
    name: str, headers: Headers, config: str | None, specs: tuple[TensorSpec, ...], aliases: Mapping[str, str]
) -> BaseModel:
    """The base that a state keeps the headers of. Raises Refuse for a config that is no JSON."""
    place = KeptPlace(name, config)
    tensors = {
        tensor: TensorInfo(tensor, dtype, shape, 0, 0, math.prod(shape) * ITEMSIZE.get(dtype, 1))
        for tensor, (dtype, shape) in headers.items()
    }
    return BaseModel(Checkpoint(place, place.open(), HeldTensors(tensors), read_config(place)), specs, aliases)


def is_kept(base: BaseModel) -> bool:
    """Whether a base has no weights to read: that of a state that keeps adapters."""
    return isinstance(base.checkpoint.place, KeptPlace)


def or_untied(base: BaseModel) -> str:
    """The end of a line that says what else to do where two tables are one; nothing where they have to stay so."""
    if not can_untie(base.checkpoint.config):
        return ""
    form = " and without --adapters" if is_kept(base) else ""
    return f", or fold it into a state made with 'continual init --tied untie'{form}"


def config_text(checkpoint: Checkpoint) -> str | None:
    """The text of a base's config.json, None where there is none. Raises Misconfigured where it is no text."""
    place = checkpoint.place
    if not place.present(CONFIG):
        return None
    try:
        return place.small(CONFIG).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Misconfigured(f"{place.file(CONFIG)}: no UTF-8: {error}") from None
