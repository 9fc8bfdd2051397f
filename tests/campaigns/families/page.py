"""The page ops/docs/families.md: what the campaign found, for a reader who knows nothing of it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.campaigns.families.judging import Cell

Found = Mapping[str, Mapping[str, Cell]]

_MARKS = {
    "right": "✓",
    "told": "part",
    "refused": "refused",
    "wrong": "**wrong**",
    "silent loss": "**lost**",
    "n/a": "n/a",
    "unfit": "–",
}
_HEAD = """# Families of models: what is read right

Which published models continual reads, family by family: whole fine-tunes and each kind of adapter of PEFT. The page is
written by a program, which tries every cell:

```
python -m tests.campaigns.families --write --transformers4 PYTHON
```

For each family it makes a tiny random model of the real class, and fine-tunes of it. Each fine-tune is folded alone
into a new state (rule `mean`, scale 1) and exported, and the library loads the export. The cell is right where every
tensor and the model's answer are those of the fine-tune. For a whole fine-tune, every bit must agree. For an adapter
they must agree with what PEFT merges, to 2e-6 of the largest value of each tensor and 2e-4 of the answer's.

| cell | what it means |
|---|---|
| ✓ | right |
| refused | continual keeps it out, and says why: the line is below |
| part | it is folded in part, and the line of the fold names what is left out |
| n/a | the library or PEFT cannot do it: its own error is below |
| – | the family has nothing of the kind, such as packed experts |
| **wrong** | the export differs: a defect |
| **lost** | a change of the fine-tune is not in the export, and no line says so: the worst defect |
"""
_COLUMNS = {
    "full": "a whole fine-tune: every parameter and every other float is moved",
    "again": "the export is folded into another state, and exported again: the same bytes",
    "as LoRA": "`export --as-lora` at full rank, loaded by PEFT, is the export",
    "LoRA": "LoRA on all linear layers (`all-linear`), or on those that PEFT's users name for the family",
    "LoRA, embedding": "LoRA on the input embedding",
    "LoRA, tied tables": "LoRA on an input embedding that is the output head too (`ensure_weight_tying`)",
    "LoRA, head saved": "LoRA, and the head trained whole (`modules_to_save`)",
    "LoRA, biases": 'LoRA, and the biases trained (`bias = "all"`)',
    "LoRA, tokens": "LoRA, and some rows of the input embedding (`trainable_token_indices`)",
    "LoRA, experts": "LoRA on packed experts (`target_parameters`)",
    "LoRA, no experts": "LoRA on the attention of a model that has packed experts",
    "tokens": "trainable tokens alone",
    "base 4, full 5": "transformers 4 wrote the base, transformers 5 loaded it and wrote the fine-tune",
    "base 5, full 4": "transformers 5 rewrote that base, transformers 4 wrote the fine-tune",
    "base 5, LoRA 4": "transformers 5 rewrote that base, the LoRA adapter was made under transformers 4",
}
_GROUPS = (
    ("Whole fine-tunes", ("full", "again", "as LoRA", "base 4, full 5", "base 5, full 4", "base 5, LoRA 4")),
    (
        "LoRA",
        (
            "LoRA",
            "LoRA, embedding",
            "LoRA, tied tables",
            "LoRA, head saved",
            "LoRA, biases",
            "LoRA, tokens",
            "LoRA, experts",
            "rsLoRA",
        ),
    ),
    ("Other adapters", ("DoRA", "AdaLoRA", "LoHa", "LoKr", "IA3", "VeRA", "tokens")),
)


def text(found: Found) -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, columns in _GROUPS:
        there = [column for column in columns if any(column in cells for cells in found.values())]
        if there:
            parts.append(f"## {title}\n\n{_explained(there)}{_table(found, there)}\n")
    parts.append(_reasons(found))
    parts.append(f"Made with {_versions()}.\n")
    return "\n".join(parts)


def write(found: Found, file: Path) -> None:
    """Writes the page."""
    file.write_text(text(found), "utf-8")


def _explained(columns: Sequence[str]) -> str:
    lines = [f"- **{column}**: {_COLUMNS[column]}.\n" for column in columns if column in _COLUMNS]
    return "".join(lines) + ("\n" if lines else "")


def _table(found: Found, columns: Sequence[str]) -> str:
    rows = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in found.items():
        marks = (_MARKS[cells[column].verdict] if column in cells else "" for column in columns)
        rows.append(f"| {name} | {' | '.join(marks)} |")
    return "\n".join(rows) + "\n"


def _reasons(found: Found) -> str:
    """Why each cell is not right: one line for those that say the same of several families."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for name, cells in found.items():
        for column, cell in cells.items():
            if cell.verdict not in ("right", "unfit"):
                told.setdefault((column, cell.verdict, _common(cell.said)), []).append(name)
    lines = [
        _wrapped(f"- **{column}**, {_MARKS[verdict].strip('*')}: {', '.join(names)}. {said}")
        for (column, verdict, said), names in told.items()
    ]
    return "## Why\n\n" + ("\n".join(lines) if lines else "Every cell is right.") + "\n"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _common(said: str) -> str:
    """A line without the scratch directory that this run had; safe in a page."""
    short = re.sub(r"/\S*?/(?=(?:base|full|newer|rewritten|merged|lora|adapter-[a-z0-9-]+|older)\b)", "", said)
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
