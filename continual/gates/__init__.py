"""Who may come in: the list of the gates, and `Gates`, which asks them. What a gate is stands in `contract`; each other
module is one gate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from continual.config import Settings
from continual.errors import Misconfigured, Refuse
from continual.gates.assembly import AssemblyGate
from continual.gates.computes import ConfigGate
from continual.gates.contract import (
    AtFold,
    AtHeaders,
    AtNumbers,
    AtTensor,
    Doubt,
    Earlier,
    Gate,
    Headers,
    Numbers,
    TensorNumbers,
)
from continual.gates.copies import CopiesGate
from continual.gates.cut import CutGate
from continual.gates.declared import CardGate
from continual.gates.finite import FiniteGate
from continual.gates.form import FormGate
from continual.gates.grid import GridGate
from continual.gates.interference import InterferenceGate
from continual.gates.lineage import LineageGate
from continual.gates.noise import NoiseGate
from continual.gates.norms import NormsGate
from continual.gates.own_release import OwnReleaseGate
from continual.gates.policy import PolicyGate
from continual.gates.signature import SignatureGate
from continual.gates.unmergeable import UnmergeableGate
from continual.gates.updates import UpdatesGate
from continual.gates.weight import WeightGate
from continual.records import Warned

__all__ = [
    "GATES",
    "AssemblyGate",
    "CardGate",
    "ConfigGate",
    "CopiesGate",
    "CutGate",
    "Earlier",
    "FiniteGate",
    "FormGate",
    "Gate",
    "Gates",
    "GridGate",
    "Headers",
    "InterferenceGate",
    "LineageGate",
    "NoiseGate",
    "NormsGate",
    "Numbers",
    "OwnReleaseGate",
    "PolicyGate",
    "SignatureGate",
    "TensorNumbers",
    "UnmergeableGate",
    "UpdatesGate",
    "WeightGate",
    "make",
]

GATES: tuple[type[Gate], ...] = (
    OwnReleaseGate,
    PolicyGate,
    UpdatesGate,
    AssemblyGate,
    LineageGate,
    FormGate,
    WeightGate,
    CardGate,
    ConfigGate,
    SignatureGate,
    FiniteGate,
    UnmergeableGate,
    GridGate,
    NormsGate,
    NoiseGate,
    CopiesGate,
    InterferenceGate,
    CutGate,
)
"""Every gate. Those of one stage are asked in this order."""

G = TypeVar("G", bound=Gate)


class Gates:
    """The gates of one state, each with its settings. Immutable, so thread-safe.

    `values` has the value of each setting by which a candidate is refused, by the name under which a person sets it
    (`vocab`, `gates.lineage.extra`), as JSON holds it: those of each gate, and `others`.
    """

    def __init__(self, gates: Sequence[Gate], others: Mapping[str, object] = MappingProxyType({})) -> None:
        self._gates = tuple(gates)
        self._at_headers = [gate for gate in gates if isinstance(gate, AtHeaders)]
        self._at_fold = [gate for gate in gates if isinstance(gate, AtFold)]
        self._at_tensor = [gate for gate in gates if isinstance(gate, AtTensor)]
        self._at_numbers = [gate for gate in gates if isinstance(gate, AtNumbers)]
        self.values: Mapping[str, object] = {
            setting(gate, field.name): _plain(getattr(gate, field.name))
            for gate in gates
            for field in dataclasses.fields(gate)
        } | dict(others)

    def at_headers(self, seen: Headers) -> Headers:
        """Asks every gate that looks at headers. Returns what they found out. Raises Refuse of the first that refuses,
        Retry."""
        for gate in self._at_headers:
            with self.told(gate):
                seen = gate.judge(seen) or seen
        return seen

    def at_fold(self, seen: Headers) -> Headers:
        """Asks every gate that looks at a candidate before its fold. Returns what they found out. Raises as
        `at_headers`."""
        for gate in self._at_fold:
            warned: list[Warned] = []
            with self.told(gate, warned, accepted=seen.accepted):
                seen = gate.judge(seen) or seen
            seen = seen._replace(warnings=(*seen.warnings, *warned))
        return seen

    def at_tensor(self, seen: TensorNumbers) -> None:
        """Asks every gate that looks at one tensor. Raises Refuse of the first that refuses."""
        for gate in self._at_tensor:
            with self.told(gate):
                gate.judge(seen)

    def at_numbers(self, seen: Numbers) -> tuple[Warned, ...]:
        """Asks every gate that looks at the sums of the whole model. Returns what those found that only warn.
        Raises Refuse of the first that refuses."""
        warned: list[Warned] = []
        for gate in self._at_numbers:
            with self.told(gate, warned, accepted=seen.accepted):
                gate.judge(seen)
        return tuple(warned)

    @contextlib.contextmanager
    def told(self, gate: Gate, warned: list[Warned] | None = None, *, accepted: bool = False) -> Iterator[None]:
        """Writes into a Refuse that is raised in the block the values of the settings that it went by: they are those
        of `gate`. A doubt of a gate that only
        warns goes into `warned` instead, that of one that is off nowhere. Raises what else the block raises."""
        try:
            yield
        except Refuse as refusal:
            if isinstance(gate, Doubt) and refusal.by and warned is not None:
                if gate.act == "off":
                    return
                if accepted or gate.act == "warn":
                    warned.append(Warned(gate.name, refusal.reason, str(refusal)))
                    return
                refusal.by = (*refusal.by, "act")
            names = [setting(gate, name) for name in refusal.by]
            refusal.settings = {name: self.values[name] for name in names}
            raise

    def the(self, kind: type[G]) -> G:
        """The gate of this class, for its settings."""
        return next(gate for gate in self._gates if isinstance(gate, kind))


def setting(gate: Gate | type[Gate], field: str) -> str:
    """The name under which a person sets a field of a gate."""
    return field if field in gate.shared else f"gates.{gate.name}.{field}"


def make(settings: Settings, kinds: Sequence[type[Gate]] = GATES) -> Gates:
    """The gates as the settings have them. Raises Misconfigured for a gate or a key that is not known, or a value that
    cannot be used."""
    known = {kind.name: kind for kind in kinds}
    for name in settings.gates:
        if name not in known:
            raise Misconfigured(f"gates.{name}: no such gate; known are {', '.join(known)}")
    return Gates([_made(kind, settings) for kind in kinds], settings.evaluation.values)


def _made(kind: type[Gate], settings: Settings) -> Gate:
    fields = {field.name for field in dataclasses.fields(kind)}
    shared = set(kind.shared)
    own = settings.gates.get(kind.name, {})
    for key in own:
        if key in shared:
            raise Misconfigured(f"gates.{kind.name}.{key}: {key} is a setting of that name; set it there")
        if key not in fields:
            words = ", ".join(sorted(fields - shared)) or "none"
            raise Misconfigured(f"gates.{kind.name}.{key}: unknown; the settings of this gate are: {words}")
    values = {key: getattr(settings, key) for key in shared}
    if not own:
        return kind(**values)  # they were checked with the settings, and its own are as it has them
    try:
        return _adapter(kind).validate_python(values | own)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in ("gates", kind.name, *first["loc"]))
        raise Misconfigured(f"{path} = {first['input']!r}: {first['msg']}") from None


_ADAPTERS: dict[type[Gate], TypeAdapter[Gate]] = {}


def _adapter(kind: type[Gate]) -> TypeAdapter[Gate]:
    """What checks the settings of a gate, made once: that takes longer than to check them."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _plain(value: object) -> object:
    """A value as JSON holds it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item) for item in (value if isinstance(value, Sequence) else sorted(value, key=str))]
    return str(value)
