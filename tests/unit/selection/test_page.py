"""The settings of rounds, as ops/docs/selection.md has them, are those of the code: every one, with its default."""

from __future__ import annotations

import re
from pathlib import Path

from continual.config import RoundSettings

PAGE = Path(__file__).parents[3] / "ops" / "docs" / "selection.md"


def said(default: object) -> str:
    if default is None:
        return "with `corrective`"
    if isinstance(default, bool):
        return "true" if default else "false"
    return f"`{default}`" if isinstance(default, str) else f"{float(str(default)):.7g}"


def test_every_setting_of_rounds_is_on_the_page_with_its_default() -> None:
    table = PAGE.read_text().partition("| `[rounds]` | default | meaning |")[2].partition("\n\n")[0]
    found = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert sorted(found) == sorted(RoundSettings.model_fields)
    for name, value in RoundSettings().model_dump().items():
        assert found[name].partition(" (")[0] == said(value), name
