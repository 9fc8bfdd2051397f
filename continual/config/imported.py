"""A merge that was described for another program, as continual makes it: the settings file, and what is typed."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Imported:
    """A merge as continual makes it: what `init`, `fold` and `export` are given. `weights`: by the name of a model,
    where it is not 1; `notes`: what is the same only in part."""

    base: str
    rule: str
    scale: str
    models: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    tokenizer: str = "base"
    dtype: str | None = None
    notes: tuple[str, ...] = ()

    def commands(self, config: str = "continual.toml") -> tuple[str, ...]:
        """What is to be typed, with the settings in the file `config`."""
        on = ["--config", config]
        export = ["continual", "export", "merged", *([] if self.dtype is None else ["--dtype", self.dtype]), *on]
        return (
            shlex.join(["continual", "init", self.base, "--scale", self.scale, *on]),
            shlex.join(["continual", "fold", *self.models, *on]),
            shlex.join(export),
        )

    def settings(self) -> str:
        """The settings file (TOML), with the commands and notes as remarks at its head."""
        lines = [f"# note: {note}" for note in self.notes]
        lines += ["# save this as continual.toml, then:", *(f"#   {line}" for line in self.commands()), ""]
        lines.append(f"rule = {_toml(self.rule)}")
        if self.options:
            lines.append("options = { " + ", ".join(f"{k} = {_toml(v)}" for k, v in self.options.items()) + " }")
        if self.before:
            lines.append("before = [" + ", ".join(_toml(one) for one in self.before) + "]")
        lines.append(f"tokenizer = {_toml(self.tokenizer)}")
        if self.weights:
            lines += ["", "[weights]", *(f"{_toml(glob.escape(k))} = {v!r}" for k, v in self.weights.items())]
        return "\n".join(lines)


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
