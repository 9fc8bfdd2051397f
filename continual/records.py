"""The frozen records that pass between stages. No behaviour beyond what follows from the fields."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["matrix", "stack", "plain", "carried"]
_COLOURS = 3

SCHEME = "hf://"
"""What the origin of a model on the Hub begins with: `hf://ORG/NAME`."""

KEY, OMITTED, REST = "key", "omitted", "rest"
"""Metadata of fields, for their JSON bodies (state/fields.py): another key than the field's name; left out where the
value is None; a mapping of all keys that no other field has."""

LARGEST = 1e30
"""No weight of a model and no scale is larger: with them a sum stays within float32."""
WEIGHT = f"a number above 0, from {1 / LARGEST:g} to {LARGEST:g}"
"""What a weight is, as messages say it."""

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes per element of the safetensors dtypes that can be carried; F32, F16 and BF16 are the ones that can be folded.
"""


def over_pixels(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is a convolution with one to three channels going in."""
    return len(shape) == 4 and 0 < shape[1] <= _COLOURS


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the base: `dtype` is the safetensors word (F32, BF16, …); `depth` in [0, 1] is its layer's place in
    the stack (0 for what is before the layers). `experts`: how many matrices of one shape a `stack` is, one after the
    other in its memory; 0 of every other kind."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    depth: float = 0.0
    experts: int = 0

    @property
    def pixels(self) -> bool:
        """Whether it is a convolution over the pixels of an image, of one to three colours, which is no matrix."""
        return self.kind == "plain" and over_pixels(self.shape)

    @property
    def expert(self) -> TensorSpec:
        """One of the matrices of a stack, under the name of the stack."""
        rows, columns = (
            self.shape[1:] if len(self.shape) == 3 else (self.shape[0] // self.experts, math.prod(self.shape[1:]))
        )
        return TensorSpec(self.name, (rows, columns), self.dtype, "matrix", self.depth)

    @property
    def layers(self) -> tuple[TensorSpec, ...]:
        """What a state of adapters keeps apart: each matrix of a stack by a name of its own, NAME[number] from 0 on;
        else the tensor itself, or nothing of one that is carried."""
        if self.kind == "carried":
            return ()
        return tuple(replace(self.expert, name=f"{self.name}[{n}]") for n in range(self.experts)) or (self,)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


def depths_of(specs: Iterable[TensorSpec]) -> list[float]:
    """The depths of what can be folded, in order: where a model has a weight for each layer, it has one for each."""
    return sorted({spec.depth for spec in specs if spec.kind != "carried"})


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """Shape and dtype (`float32`, `float64`, `uint16`) of one accumulator of one tensor. `rows`: how many rows a chunk
    of it has on disk; such an array may end early, what is not there is zero. None: as many as fit, all are there."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    rows: int | None = field(default=None, metadata={OMITTED: True})

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * {"float32": 4, "float64": 8, "uint16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file of a candidate, as it was when it was looked at: the name is relative to the model's directory."""

    name: str
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Event:
    """A source saw something that may be a candidate at `origin`: a model directory, which has to lie in `root`, or a
    repo (`hf://ORG/NAME`) at `revision`.

    `order` says which of several comes first: nanoseconds since 1970, then a name.
    """

    source: str
    origin: str
    order: tuple[int, str] = (0, "")
    root: Path | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The model's name, for people."""
        _, scheme, rest = self.origin.partition("://")
        return rest if scheme else Path(self.origin).name

    @property
    def key(self) -> str:
        """Tells which model at which revision the event is about. A newer event of this key replaces an older one."""
        return self.origin if self.revision is None else f"{self.origin}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A fine-tune as known from its headers, and as the ledger names it.

    `key` says which bytes at which place (FORMAT.md); `origin` is the place alone; `revision` is the commit of one that
    came from a repo, `licence` what its card names.
    """

    key: str
    name: str
    source: str
    origin: str
    form: Literal["full", "adapter"]
    nbytes: int = field(metadata={KEY: "bytes"})
    revision: str | None = field(default=None, metadata={OMITTED: True})
    licence: str | None = field(default=None, metadata={OMITTED: True})

    def answers(self, word: str) -> bool:
        """Whether a person means it by `word`: its name, its key, its origin, or the path of its directory."""
        return word in (self.name, self.key, self.origin) or self.origin == str(Path(word).absolute())


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Which rows of a candidate's tables belong to which of the base's, by the texts of the tokens.

    `tables`: the base's names of the tables, all of `ours` rows in the base and `theirs` in the candidate. `runs`: the
    first row in the base, the first row in the candidate, and how many follow, in the base's order; the other rows of
    the base are unchanged. `left_out`: tokens that the candidate alone has; `lacking`: those that the base alone has.
    """

    tables: tuple[str, ...]
    ours: int
    theirs: int
    runs: tuple[tuple[int, int, int], ...]
    left_out: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A digest of which rows are which."""
        said = json.dumps([self.ours, self.theirs, self.runs], separators=(",", ":"))
        return f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"

    @property
    def moved(self) -> bool:
        """Whether a row lies elsewhere in the candidate, or rows that both have are not the same token."""
        return self.runs != ((0, 0, min(self.ours, self.theirs)),)


@dataclass(frozen=True, slots=True)
class Lineage:
    """How a candidate's tensors map to the base's, from headers only.

    `folded`: base names that get a task vector. `unchanged`: base names the candidate lacks and is allowed to lack
    (task vector zero).
    `extra`: the candidate's tensors the base lacks; they stay out. `prefix`: (base's, candidate's) leading part that
    differs. `narrowed`: base name to the candidate's narrower dtype, to which the base is cast before subtracting.
    `rows`: base name to the number of vocabulary rows in common. `renamings`: (base's, candidate's) parts of names that
    mean the same by the table of renamings, `*` for any number. Where there are any, `prefix` is of canonical names.
    `repackings`: (base's, candidate's) experts that are packed in one of the two, and one by one in the other.
    `lacking`: those of `unchanged` that are weights which a full candidate does not have.
    `tokens`: tables whose rows were matched by the texts of their tokens; those of them that `rows` has, too, have all
    rows in common in the same places.
    """

    folded: tuple[str, ...]
    unchanged: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    prefix: tuple[str, str] = ("", "")
    narrowed: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    renamings: tuple[tuple[str, str], ...] = ()
    repackings: tuple[tuple[str, str], ...] = ()
    lacking: tuple[str, ...] = ()
    tokens: tuple[TokenRows, ...] = ()


class MatrixTotals(NamedTuple):
    """The totals of a rule that takes some tensors for matrices: Σ‖τ_i‖ over the matrices, Σ‖τ_i‖ over the other
    tensors, and Σ ρ_i‖τ_i‖ over the matrices, ρ_i² being the stable rank of a task vector."""

    matrix_norm_sum: float = 0.0
    plain_norm_sum: float = 0.0
    spread_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """What a rule keeps of the whole model, besides the accumulators of its tensors. All 0 before the first fold.

    `count`: how many models are folded. `weight`: Σw of them. `norm_sum`: Σ‖τ_i‖, each over the whole model.
    `merged_sq`: ‖X‖² of what the rule keeps. `matrices`: of the rules that take some tensors for matrices. `each`: the
    same of each model, where it is known of all of them; it is in the records of the folds, not in that of the totals.
    """

    count: float = 0.0
    weight: float = 0.0
    norm_sum: float = 0.0
    merged_sq: float = 0.0
    matrices: MatrixTotals | None = None
    each: tuple[MatrixTotals, ...] = ()

    @staticmethod
    def of(body: Mapping[str, float]) -> Totals:
        """The totals as a record has them; what is not there is 0."""
        matrices = MatrixTotals(*(body.get(name, 0.0) for name in MatrixTotals._fields))
        return Totals(
            count=body.get("count", 0.0),
            weight=body.get("weight", 0.0),
            norm_sum=body.get("norm_sum", 0.0),
            merged_sq=body.get("merged_sq", 0.0),
            matrices=matrices if "spread_sum" in body else None,
        )

    def body(self) -> dict[str, float]:
        """The totals as a record has them."""
        common = {
            "count": self.count,
            "weight": self.weight,
            "norm_sum": self.norm_sum,
            "merged_sq": self.merged_sq,
        }
        return common | (self.matrices._asdict() if self.matrices is not None else {})


@dataclass(frozen=True, slots=True)
class Warned:
    """What a gate that only warns found: its name, the reason, and the message with which it would have refused."""

    gate: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file by its name and `blake3:` with the digest of its bytes."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveRecord:
    """The objective of a round, and the digests of what it is made of: `code` of a function's module, else `rows`;
    `heads` where there are any; `teachers`, each by its name with a digest of what it said; `keep`, a file of texts of
    which what the model predicts must stay. `digest` is over all the rest."""

    kind: Literal["rows", "function"]
    objective: str
    seed: int
    held: float
    batch: int
    dtype: str
    unsupervised: bool
    code: FileDigest | None = field(default=None, metadata={OMITTED: True})
    rows: tuple[FileDigest, ...] | None = field(default=None, metadata={OMITTED: True})
    heads: tuple[FileDigest, ...] | None = field(default=None, metadata={OMITTED: True})
    teachers: tuple[FileDigest, ...] | None = field(default=None, metadata={OMITTED: True})
    keep: FileDigest | None = field(default=None, metadata={OMITTED: True})
    digest: str


def is_weight(value: float) -> bool:
    """Whether a model can count so much: it is what `WEIGHT` says."""
    return 1 / LARGEST <= value <= LARGEST
