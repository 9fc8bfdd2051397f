"""The configuration of an adapter, as PEFT writes it: JSON within limits, and checks of single values.

Which keys mean something is said by the kind of adapter. A key that no one understands and that has a value other than
its default is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from continual.errors import Refuse
from continual.outside import shown
from continual.tensors.adapters.patterns import Patterns
from continual.tensors.checkpoints.header import json_object
from continual.tensors.checkpoints.place import Place, Weights

CONFIG = "adapter_config.json"
_LARGEST_CONFIG = 4 << 20
_VALUES = 150_000
"""Values of the largest configuration: one for each key of its tables, and some."""
_INFORMATION = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "peft_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "ensure_weight_tying",
    ]
)
"""Keys that every kind has: what the adapter was trained on, and which modules it has tensors for."""
MERGE = "merge the adapter into its base (merge_and_unload of PEFT) and publish that"
"""What the publisher of an adapter can do that is not understood."""
_NOT_MERGED = {
    "alora_invocation_tokens": "makes it act only after these tokens, which no merged weight can do: publish a LoRA "
    "without it",
    "layer_replication": "repeats layers of the base: merged it has other layers than the base, and cannot be folded",
    "loftq_config": "says that it was trained beside a base that LoftQ had changed, and then B·A alone is not the task "
    "vector; merge it into that base and publish that",
    "enable_lora": "adapts parts of a fused weight, as PEFT before 0.3 did, and PEFT reads it no more; train it anew",
    "arrow_config": "chooses among several adapters for each token, which no merged weight can do: publish each",
}
"""Keys that no merged model can be made of, or not this base's: why."""
_OFF: tuple[object, ...] = (None, False, {}, [], "")
T = TypeVar("T", int, float)


class Fields:
    """A configuration's keys and values. `place` is where it lies, `where` names the file in messages, `kind` is its
    `peft_type`."""

    def __init__(self, place: Place, file: Weights) -> None:
        """Reads the configuration in `file`, which was opened at `place`. Raises Refuse (`config`) if it is no JSON
        object within the limits, Retry if it cannot be read now."""
        size = file.stats[0].size
        self.place, self.where = place, place.file(CONFIG)
        if size > _LARGEST_CONFIG:
            raise Refuse("config", f"{self.where}: {size} bytes are too many for a configuration file")
        self._take(json_object(file.pread(0, size, 0), self.where, "config", values=_VALUES))

    @classmethod
    def of(cls, place: Place, where: str, body: Mapping[str, object]) -> Fields:
        """A configuration that does not lie in a file of its own; `where` says in messages where it does. Raises Refuse
        (`config`)."""
        fields = cls.__new__(cls)
        fields.place, fields.where = place, where
        fields._take(body)
        return fields

    def _take(self, body: Mapping[str, object]) -> None:
        self.body: Mapping[str, object] = body
        self.kind = self.body.get("peft_type")
        self.saved = self.names("modules_to_save")
        """Names of the modules whose whole weights are beside the factors."""

    def only(self, understood: frozenset[str]) -> None:
        """Raises Refuse (`adapter-kind`) for a key that is on and not understood."""
        for key, value in self.body.items():
            if key not in _INFORMATION and key not in understood and value not in _OFF:
                why = _NOT_MERGED.get(key) or f"is not understood; {MERGE}"
                raise Refuse("adapter-kind", f"{self.place}: {shown(key)} = {shown(value)} {why}")

    @property
    def transposed(self) -> bool:
        """Whether it says that the base stores these weights as in × out."""
        return self.flag("fan_in_fan_out")

    @property
    def bias(self) -> str:
        """Which trained biases of the base are beside the factors: `none`, `all` or `only`, those of adapted modules.
        Raises Refuse (`adapter-kind`) for another word."""
        value = self.body.get("bias") or "none"
        if value in ("none", "all"):
            return str(value)
        kind = str(self.kind).lower()
        if isinstance(value, str) and value.lower() in (f"{kind}_only", f"{kind.removeprefix('ada')}_only"):
            return "only"
        raise Refuse(
            "adapter-kind",
            f"{self.place}: bias = {shown(value)} is not understood; {MERGE}",
        )

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch. Raises Refuse (`config`) for what is neither true nor false."""
        value = self.body.get(key)
        if value not in (None, True, False):
            raise Refuse("config", f"{self.where}: {key} = {shown(value)} is neither true nor false")
        return default if value is None else bool(value)

    def rank(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` is that of PEFT, for a key that is not there. Raises Refuse (`config`)."""
        return _rank(self.where, key, self.body.get(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number from 0 to 1e30; `default` as above. Raises Refuse (`config`)."""
        return _number(self.where, key, self.body.get(key, default))

    def ranks(self, key: str) -> Patterns[int]:
        """A table of ranks by patterns of modules' names. Raises Refuse (`config`)."""
        return self._patterns(key, _rank)

    def numbers(self, key: str) -> Patterns[float]:
        """A table of numbers by patterns of modules' names. Raises Refuse (`config`)."""
        return self._patterns(key, _number)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names, empty where there is none. Raises Refuse (`config`)."""
        body = self.body.get(key) or []
        if not isinstance(body, list) or any(not isinstance(name, str) for name in body):
            raise Refuse("config", f"{self.where}: {key} = {shown(body)} is no list of names")
        return tuple(body)

    def _patterns(self, key: str, check: Callable[[str, str, object], T]) -> Patterns[T]:
        body = self.body.get(key) or {}
        if not isinstance(body, dict):
            raise Refuse("config", f"{self.where}: {key} = {shown(body)} is no table")
        values = {pattern: check(self.where, f"{key}[{shown(pattern)}]", value) for pattern, value in body.items()}
        return Patterns(values, self.where, key)


def _rank(where: str, key: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise Refuse("config", f"{where}: {key} = {shown(value)} is no positive whole number")
    return value


def _number(where: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e30:
        raise Refuse("config", f"{where}: {key} = {shown(value)} is no number from 0 to 1e30")
    return float(value)
