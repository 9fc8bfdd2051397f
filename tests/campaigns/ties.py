"""What transformers ties in each of its language models, against what continual knows of ties.

    python -m tests.campaigns.ties

Imports every modeling file of transformers, which takes half a minute, and makes no model. Prints each class where the
two differ; the last line says how many ties were compared. `tests/unit/tensors/names/test_tied.py` asks the same of a
few.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from continual.tensors.names.tied import ties

_LANGUAGE = re.compile(r"ForCausalLM|ForConditionalGeneration|ForMaskedLM|LMHead|ForPreTraining|ForSpeechTo|ForTextTo")
_PATTERN = re.compile(r"[\\(\[*]")


class Tie(NamedTuple):
    """Two names of one tensor in a class of transformers, and whether its configuration ties them by default."""

    owner: str
    family: str
    alias: str
    name: str
    default: bool


def ties_of(module: ModuleType) -> Iterator[Tie]:
    """The ties of the language models that a modeling file defines. Ties of whole blocks, which it names by patterns,
    are of no language model's head."""
    from transformers import PreTrainedModel

    for owner, kind in sorted(vars(module).items()):
        if not inspect.isclass(kind) or not issubclass(kind, PreTrainedModel) or kind.__module__ != module.__name__:
            continue
        said: Any = getattr(kind, "_tied_weights_keys", None)
        if not _LANGUAGE.search(owner) or not isinstance(said, dict) or kind.config_class is None:
            continue
        try:
            default = bool(getattr(kind.config_class(), "tie_word_embeddings", False))
        except Exception as error:  # a class that needs an argument or a package says nothing by default
            print(f"{owner}: {type(error).__name__}", file=sys.stderr)
            continue
        for alias, name in said.items():
            if not _PATTERN.search(alias + name):
                whole = alias if alias.endswith((".weight", ".bias")) else f"{alias}.weight"
                yield Tie(owner, kind.config_class.model_type, whole, name.rstrip("$"), default)


def differing(tie: Tie) -> str | None:
    """What continual says otherwise of a tie, with the family's default and with a word of the config; None if
    nothing."""
    for config in ({}, {"tie_word_embeddings": True}) if tie.default else ({"tie_word_embeddings": True},):
        body = {"model_type": tie.family, **config}
        if ties({tie.name}, body).get(tie.alias) != tie.name and ties({tie.alias}, body).get(tie.name) != tie.alias:
            return f"{tie.owner} ({tie.family}): {tie.alias} is {tie.name}, with {config or 'a config that is silent'}"
    if not tie.default and tie.alias in ties({tie.name}, {"model_type": tie.family}) and "." in tie.alias:
        shared = ties({tie.name}, {"model_type": tie.family, "tie_word_embeddings": False})
        if tie.alias not in shared:
            return f"{tie.owner} ({tie.family}): {tie.alias} is {tie.name} by default here, and not there"
    return None


def main() -> int:
    """Compares all; returns 1 where something differs."""
    models = importlib.import_module("transformers.models")
    compared, told = 0, []
    for file in sorted(Path(str(models.__file__)).parent.glob("*/modeling_*.py")):
        if file.stem.startswith(("modeling_tf_", "modeling_flax_")):
            continue
        try:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        except ImportError as error:
            print(f"{file.stem}: {error}", file=sys.stderr)
            continue
        for tie in ties_of(module):
            compared += 1
            told += [line] if (line := differing(tie)) else []
    print("\n".join([*told, f"{compared} ties of transformers compared, {len(told)} differ"]))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
