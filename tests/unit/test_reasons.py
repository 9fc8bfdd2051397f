"""The list of refusal reasons against what the code says, and against the page that explains each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from continual.errors import REFUSALS
from continual.gates import GATES
from continual.service.health import REASONS
from continual.service.metrics import Metrics
from continual.service.series import DROPPED, ERRORS
from tests.helpers import house

PAGE = (Path(__file__).parents[2] / "ops/docs/operations.md").read_text()


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text that stands where a reason does: first in a Refuse, given as `reason`, or what `reason` is by
    default."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            values = [
                *(node.args[:1] if name == "Refuse" else []),
                *(k.value for k in node.keywords if k.arg == "reason"),
            ]
        elif isinstance(node, ast.FunctionDef):
            given = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            values = [default for argument, default in given if argument.arg == "reason"]
        for value in values:
            branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            for branch in branches:
                if isinstance(branch, ast.Constant) and isinstance(branch.value, str):
                    yield branch.lineno, branch.value


def explained(heading: str) -> set[str]:
    """The words in the first column of the table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        word
        for line in section.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def test_every_reason_in_the_code_is_in_the_list() -> None:
    found = [
        (f"{name}:{line}", word)
        for name, module in house.modules().items()
        if not name.startswith("continual.demo")
        for line, word in words(module.tree)
        if word not in ("waiting", "")
    ]
    assert len(found) > 60
    assert [where for where in found if where[1] not in REFUSALS] == []
    assert {reason for gate in GATES for reason in gate.reasons} <= set(REFUSALS)


def test_every_reason_in_the_list_is_said_somewhere() -> None:
    text = "\n".join(module.text for name, module in house.modules().items() if name != "continual.errors")
    assert [reason for reason in REFUSALS if f'"{reason}"' not in text] == []
    assert len(REFUSALS) == len(set(REFUSALS))


def test_every_word_is_a_label_from_the_start() -> None:
    text = Metrics().text().decode()
    for series, label, known in (
        ("continual_refusals_total", "reason", REFUSALS),
        ("continual_errors_total", "kind", ERRORS),
        ("continual_http_dropped_total", "reason", DROPPED),
    ):
        assert [word for word in known if f'{series}{{{label}="{word}"}} 0.0' not in text] == [], series
    metrics = Metrics()
    metrics.degraded(set())
    text = metrics.text().decode()
    assert [word for word in REASONS if f'continual_degraded{{reason="{word}"}} 0.0' not in text] == []


def test_every_word_is_explained() -> None:
    assert explained("Why a candidate was refused") == set(REFUSALS)
    assert explained("When it is degraded") == set(REASONS)
    kinds = next(line for line in PAGE.splitlines() if line.startswith("| `continual_errors_total`"))
    assert [kind for kind in ERRORS if f"`{kind}`" not in kinds] == []
