"""The public API: its names, and how each is called. What a type checker sees of it is in tests/typed/public_api.py."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path

import pytest

import continual
from continual.errors import ContinualError

SIGNATURES = {
    "init": "(base, state, recipe=None, *, progress, client=None)",
    "survey": "(base, recipe=None, *, client=None)",
    "open": "(state='state', *, write=False, **settings)",
    "verify": "(state='state', *, progress)",
    "look_repair": "(state='state', *, progress)",
    "repair": "(state, plan, *, progress)",
    "backup": "(state, directory, wish=None, *, progress)",
    "Wish": "(copy=False, check=True, clone=False, dry_run=False)",
    "Merge": "(settings, *, write=False, client=None, on_step=None)",
    "ReadView": "(rule=None, options, scale=None, lines=None, only=(), without=(), weights, name='')",
    "Merge.plan": "(self, model)",
    "Merge.fold": "(self, model, *, progress)",
    "Merge.pool": "(self)",
    "Merge.round": "(self, progress, told=None)",
    "Merge.look_round": "(self, progress)",
    "Merge.why": "(self, word)",
    "Merge.read": "(self, name, *, at=None)",
    "Merge.export": "(self, target, progress, *, view=None)",
    "Merge.view": "(self, name)",
    "Merge.contents": "(self, view=None, *, at=None)",
    "Merge.explain": "(self, view=None, *, at=None, progress)",
    "Merge.export_lora": "(self, target, view=None, progress)",
    "Merge.scale": "(self, at=None, view=None)",
    "Merge.rescale": "(self, scale=None, lines=None, rule=None)",
    "Merge.tune": "(self, evaluation, wanted=None, progress, told=None)",
    "Merge.tune_weights": "(self, evaluation, wanted=None, progress, told=None)",
    "Merge.tune_layers": "(self, wanted, progress, told=None)",
    "Merge.read_inputs": "(self, wanted, progress)",
    "TaskRows": "(objective, models, rows=(), heads=(), rank=64, calibration, dry_run=False)",
    "Learning": (
        "(objective, rows=(), heads=(), calibration, candidates=20, work=None, dry_run=False, rule=None, teachers=(), "
        "models=False, keep=None, drift=0.02)"
    ),
    "Weighing": "(candidates=20, groups=(), work=None, dry_run=False, rule=None)",
    "Merge.look_unfold": "(self, word, at=None)",
    "Merge.unfold": "(self, plan, progress)",
    "Merge.certify": "(self, seq, file, *, at=None, progress)",
    "Merge.combine": "(self, other, *, dry_run=False, progress)",
    "Merge.diff": "(self, a, b='HEAD', *, progress)",
    "Merge.look_replay": "(self, models=(), states=(), *, progress)",
    "Merge.replay": "(self, directory, models=(), states=(), *, progress)",
    "Merge.retry": "(self, word, *, because=None, by=None)",
    "Merge.close": "(self)",
    "Recipe": (
        "(rule=None, options, scale=None, lines=None, plain=(), exclude=(), untie=False, width=None, reading=None)"
    ),
    "LoraTarget": "(directory, rank, dtype='F32', form='peft', at=None, mark=None, signer=None, bom=False)",
    "Target": (
        "(directory, at=None, dtype=None, shard_size=None, tokenizer=None, mark=None, earlier=None, explain=False, "
        "signer=None, bom=False)"
    ),
    "Tuning": "(candidates=20, policy=None, around=None, lines=False, work=None, dry_run=False, rule=None)",
    "Command": "(argv, key=None, lower=False, timeout=None)",
    "Rows": "(name, file, heads=None, batch=16)",
    "Retry": "(message, after=0.0)",
    "Refuse": "(reason, message, *, by=())",
}
"""Defaults that are no plain value are left out."""
RECORDS = {
    "Survey": "base rule options scale lines state_bytes kinds tensors aliases width packed",
    "Plan": "name path form ok reason message passes read_bytes disk_bytes memory_bytes folded matrices stacks plain "
    "unchanged prefix extra narrowed renamings tokens",
    "Outcome": "fate name message reason commit report",
    "Verified": "findings strays",
    "RepairPlan": "findings last to lost undone again tags generations aside tag_files inputs",
    "BackupReport": "directory id head records generations dropped nbytes linked copied copied_bytes checked",
    "Tuned": "read score before entry commit",
}
PATHS = {
    "init": ("base", "state"),
    "survey": ("base",),
    "open": ("state",),
    "verify": ("state",),
    "look_repair": ("state",),
    "repair": ("state",),
    "backup": ("state", "directory"),
    "Merge.plan": ("model",),
    "Merge.fold": ("model",),
    "Merge.export": ("target",),
    "Merge.look_unfold": ("at",),
    "Merge.certify": ("file", "at"),
    "Merge.combine": ("other",),
    "Merge.replay": ("directory",),
    "Target": ("directory",),
    "LoraTarget": ("directory",),
    "Tuning": ("work",),
    "Rows": ("file", "heads"),
}


def named(name: str) -> typing.Any:
    owner, _, attribute = name.partition(".")
    found = getattr(continual, owner)
    return getattr(found, attribute) if attribute else found


def shown(name: str) -> str:
    """The signature without types."""
    parts, star = [], False
    for parameter in inspect.signature(named(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            star = True
            parts.append("*")
        text = f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name
        plain = isinstance(parameter.default, str | int | float | tuple | None)
        parts.append(f"{text}={parameter.default!r}" if plain else text)
    return f"({', '.join(parts)})"


def test_the_names_are_these() -> None:
    records = {"ContinualError", "Halt", "Settings", "__version__"} | set(RECORDS)
    assert set(continual.__all__) == {name for name in SIGNATURES if "." not in name} | records
    assert sorted(continual.__all__) == continual.__all__
    assert [name for name in continual.__all__ if not hasattr(continual, name)] == []
    assert len(continual.__doc__ or "") > 100


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_is_called_like_this(name: str) -> None:
    assert shown(name) == SIGNATURES[name]
    assert named(name).__doc__


@pytest.mark.parametrize("name", RECORDS)
def test_each_record_has_these_fields(name: str) -> None:
    kind = named(name)
    fields = kind._fields if issubclass(kind, tuple) else kind.__dataclass_fields__
    assert list(fields) == RECORDS[name].split()


@pytest.mark.parametrize("name", PATHS)
def test_a_path_may_be_a_string(name: str) -> None:
    of = named(name)
    hints = typing.get_type_hints(of, localns={"Hub": object})
    for parameter in PATHS[name]:
        assert {str, Path} <= set(typing.get_args(hints[parameter])), parameter


def test_other_names_are_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Asked'"):
        _ = continual.Asked  # type: ignore[attr-defined]


def test_checkers_are_told_of_the_same_names_from_the_same_modules() -> None:
    assert continual.__file__
    tree = ast.parse(Path(continual.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == {name: home for home, names in continual._HOMES.items() for name in names}
    assert set(told) | {"__version__"} == set(continual.__all__)


def test_errors_are_of_three_kinds_and_the_page_draws_them() -> None:
    from continual import errors

    def tree(kind: type, depth: int = 0) -> list[str]:
        below = [
            line for sub in kind.__subclasses__() if sub.__module__ == errors.__name__ for line in tree(sub, depth + 1)
        ]
        return [f"{'    ' * depth}{kind.__name__}", *below]

    drawn = [line.rstrip() for line in (errors.__doc__ or "").splitlines()]
    for line in tree(ContinualError):
        assert any(
            text.removeprefix("    ").split("  ")[0] == line or text[4:].startswith(f"{line} ") for text in drawn
        ), line
