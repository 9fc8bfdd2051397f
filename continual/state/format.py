"""`Format` and `Commit`: what format.json and a commit file say, as frozen records, and their JSON bodies."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeVar

from continual.errors import Damaged
from continual.records import OMITTED, Kind, SlotSpec, TensorSpec
from continual.state.entries import Entry, EntryKind, FoldEntry, entry_of
from continual.state.fields import body_of, record_of
from continual.state.layout import Layout
from continual.state.parts import without_sketches
from continual.stores import Where

VERSION = 1
"""Of states that keep something of every tensor."""
SPARSE = 2
"""Of states that keep adapters as they are, as the first of them were made: arrays may end early, or be missing."""
TOGETHER = 3
"""The same, and tensors of one shape share an array."""
E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A weight file of the base, as it was when the state was made. `size` in bytes."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class HeaderRecord:
    """A tensor as the header of its file has it: the safetensors word of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdaptersForm:
    """A state that keeps adapters as they are: of each layer at most `width` singular triplets."""

    width: int
    kind: Literal["adapters"] = "adapters"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecord:
    """The base of a state.

    `path`: its directory; a base that came from the Hub also has `repo`, `revision` (the commit), and `licence` where
    its card names one. `digests`: tensor name to the BLAKE3 hash of its bytes; `squares`: tensor name to ‖θ₀‖², of
    those that are folded. `plain`, `exclude`: the globs of names that the state was made with. Of a state that keeps
    adapters `digests` and `squares` are empty, as no weight of the base is read; it has `headers`, tensor name to what
    the headers say, `aliases`, another name of a tensor to that of the tensor, `config`, the text of its config.json,
    and `packed`, how a quantised one is quantised: `headers` are then those of the model it was quantised from.
    """

    path: str
    revision: str | None = None
    repo: str | None = field(default=None, metadata={OMITTED: True})
    licence: str | None = field(default=None, metadata={OMITTED: True})
    files: tuple[BaseFile, ...]
    digests: Mapping[str, str]
    squares: Mapping[str, float]
    plain: tuple[str, ...]
    exclude: tuple[str, ...]
    headers: Mapping[str, HeaderRecord] | None = field(default=None, metadata={OMITTED: True})
    aliases: Mapping[str, str] | None = field(default=None, metadata={OMITTED: True})
    config: str | None = field(default=None, metadata={OMITTED: True})
    packed: str | None = field(default=None, metadata={OMITTED: True})


@dataclass(frozen=True)
class Format:
    """What never changes in a state. `slots`: tensor name to slot name to shape and dtype; empty for carried
    tensors. `form`: that of a state that keeps adapters as they are; None where it keeps a merge of whole tensors. Such
    a state has slots for each of the `layers`: each expert of a stack is one."""

    version: int
    id: str
    base: BaseRecord
    tensors: tuple[TensorSpec, ...]
    rule: str
    options: Mapping[str, object]
    slots: Mapping[str, Mapping[str, SlotSpec]]
    form: AdaptersForm | None = None

    @classmethod
    def new(
        cls,
        base: BaseRecord,
        tensors: Sequence[TensorSpec],
        rule: str,
        options: Mapping[str, object],
        slots: Mapping[str, Mapping[str, SlotSpec]],
        form: AdaptersForm | None = None,
    ) -> Format:
        """Of a new state: the version of its form, an id that is drawn here, and the tensors in order of their
        names."""
        ordered = tuple(sorted(tensors, key=lambda tensor: tensor.name))
        version = VERSION if form is None else TOGETHER
        return cls(version, secrets.token_hex(16), base, ordered, rule, options, slots, form)

    @property
    def layers(self) -> tuple[TensorSpec, ...]:
        """What a state of adapters keeps something of, in the order of the tensors."""
        return tuple(layer for tensor in self.tensors for layer in tensor.layers)

    @property
    def sparse(self) -> bool:
        """Whether arrays may end early or be missing: what is not there is zero."""
        return self.form is not None

    @cached_property
    def layout(self) -> Layout:
        """Where what is kept of each tensor lies below a generation."""
        together = self.version == TOGETHER
        # in the order of format.json, and not in that of whoever made the state
        return Layout(
            {layer.name: self.slots[layer.name] for layer in self.layers} if together else self.slots, together
        )

    @property
    def generation_bytes(self) -> int:
        """Bytes of all accumulators, without metadata and checksums; of a sparse state, the most that it can have."""
        return self.bytes_of(self.slots)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of the accumulators of these tensors."""
        return sum(slot.nbytes for name in names for slot in self.slots[name].values())

    def body(self) -> dict[str, object]:
        """As format.json holds it."""
        tensors = tuple(
            _TensorBody(t.name, t.shape, t.dtype, t.kind, t.depth, self._slots_of(t), t.experts or None)
            for t in self.tensors
        )
        return body_of(_FormatBody(self.version, self.id, self.base, self.rule, self.options, tensors, self.form))

    def _slots_of(self, tensor: TensorSpec) -> Mapping[str, SlotSpec]:
        """The slots of a tensor, or of each of the layers that it is."""
        names = [layer.name for layer in tensor.layers] if self.sparse else []
        return self.slots[names[0] if names else tensor.name]

    @classmethod
    def of(cls, body: Mapping[str, object], path: Where) -> Format:
        """From format.json. Raises Damaged for a newer format, and naming what it lacks or what has another type."""
        if body.get("version") not in (VERSION, SPARSE, TOGETHER):
            raise Damaged(
                f"{path}: format {body.get('version')}; this continual understands the formats {VERSION} to "
                f"{TOGETHER}: install the version that wrote it"
            )
        found = record_of(_FormatBody, body, path)
        if (found.form is not None) != (found.version in (SPARSE, TOGETHER)):
            raise Damaged(f"{path}: format {found.version} {'has' if found.form else 'lacks'} the key form")
        tensors = tuple(TensorSpec(t.name, t.shape, t.dtype, t.kind, t.depth, t.experts or 0) for t in found.tensors)
        slots = {tensor.name: tensor.slots for tensor in found.tensors}
        if found.form is not None:
            slots = _of_layers(tensors, slots)
            _check_slots(slots, found.form.width, path)
        return cls(found.version, found.id, found.base, tensors, found.rule, found.options, slots, found.form)


def _check_slots(slots: Mapping[str, Mapping[str, SlotSpec]], width: int, path: Where) -> None:
    """Raises Damaged where a slot of a state of adapters has not `width` rows, or is not in all else as that of another
    layer whose rows are as long: such slots share an array."""
    seen: dict[tuple[str, tuple[int, ...]], tuple[str, SlotSpec]] = {}
    for name, mine in slots.items():
        for slot, spec in mine.items():
            other, like = seen.setdefault((slot, spec.shape[1:]), (name, spec))
            if len(spec.shape) != 2 or spec.shape[0] != width:
                raise Damaged(f"{path}: the slot {slot} of {name} has the shape {list(spec.shape)}, not {width} rows")
            if spec != like:
                raise Damaged(f"{path}: the slot {slot} of {name} and that of {other} differ in more than their names")


def _of_layers(
    tensors: Sequence[TensorSpec], slots: Mapping[str, Mapping[str, SlotSpec]]
) -> dict[str, Mapping[str, SlotSpec]]:
    """The slots of each layer of a state of adapters. Its first versions kept nothing of stacks, and had slots for them
    in which nothing was: those of an expert take their place."""
    found: dict[str, Mapping[str, SlotSpec]] = {}
    for tensor in tensors:
        mine = slots[tensor.name]
        if tensor.kind == "stack":
            sides = dict(zip(("u", "v"), tensor.expert.shape, strict=True))
            mine = {
                slot: replace(spec, shape=(spec.shape[0], sides[slot])) if slot in sides else spec
                for slot, spec in mine.items()
            }
        found |= {layer.name: mine for layer in tensor.layers} or {tensor.name: mine}
    return found


@dataclass(frozen=True, slots=True)
class _TensorBody:
    """A tensor in format.json, with its slots."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    depth: float
    slots: Mapping[str, SlotSpec]
    experts: int | None = field(default=None, metadata={OMITTED: True})


@dataclass(frozen=True, slots=True)
class _FormatBody:
    """The keys of format.json."""

    version: int
    id: str
    base: BaseRecord
    rule: str
    options: Mapping[str, object]
    tensors: tuple[_TensorBody, ...]
    form: AdaptersForm | None = field(default=None, metadata={OMITTED: True})


@dataclass(frozen=True, slots=True)
class Commit:
    """One record of the ledger. `generation` is the one in force after it, None before the first fold; `receipts` the
    CRC of its receipts.json."""

    seq: int
    prev: str | None
    crc: str
    generation: str | None
    receipts: str | None
    time: str
    entry: Entry

    @property
    def kind(self) -> EntryKind:
        """The kind of its entry. This and the next four are known where the entry would have to be read first."""
        return self.entry.kind

    @property
    def key(self) -> str | None:
        """The key of the candidate that it is about, if there is one."""
        return self.entry.candidate.key if self.entry.candidate is not None else None

    @property
    def origin(self) -> str | None:
        """Where that candidate came from."""
        return self.entry.candidate.origin if self.entry.candidate is not None else None

    @property
    def digest(self) -> str | None:
        """The content digest of what was folded."""
        return self.entry.digest

    @property
    def read(self) -> Mapping[str, object] | None:
        """The read-time options that it sets."""
        return self.entry.read

    def body(self) -> dict[str, object]:
        """As the commit file holds it, without its own CRC."""
        own = {
            "seq": self.seq,
            "prev": self.prev,
            "generation": self.generation,
            "receipts": self.receipts,
            "time": self.time,
        }
        return own | self.entry.body()

    def shown(self) -> dict[str, object]:
        """As `body`, for people and machines: without the sketches, which are for the gates alone."""
        return without_sketches(self.body())

    @classmethod
    def of(cls, body: Mapping[str, object], crc: str, path: Where | str) -> Commit:
        """From a commit file. Raises Damaged naming what it lacks, or what has another type."""
        chain = record_of(_Link, body, path)
        return cls(chain.seq, chain.prev, crc, chain.generation, chain.receipts, chain.time, entry_of(body, path))

    def of_kind(self, kind: type[E]) -> E:
        """Its entry, which the caller knows to be of this kind."""
        assert isinstance(self.entry, kind), self.entry
        return self.entry


@dataclass(frozen=True, slots=True)
class _Link:
    """A record's place in the chain."""

    seq: int
    prev: str | None
    generation: str | None
    receipts: str | None
    time: str


@dataclass(frozen=True, slots=True)
class FoldCommit(Commit):
    """A fold: the record of it, or one of several that came in one record of another kind."""

    entry: FoldEntry

    @classmethod
    def at(cls, commit: Commit, entry: FoldEntry) -> FoldCommit:
        """The fold that `entry` says, with the place in the chain of `commit`."""
        return cls(commit.seq, commit.prev, commit.crc, commit.generation, commit.receipts, commit.time, entry)
