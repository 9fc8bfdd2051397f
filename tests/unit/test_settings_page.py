"""The settings and flags that the pages show are those of the code: every one, with its default."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from typer.models import OptionInfo

from continual.cli.flags import FLAGS
from continual.cli.main import run
from continual.config import (
    CanarySettings,
    HookSettings,
    HubSettings,
    NotifySettings,
    ReleaseSettings,
    Settings,
    SigningSettings,
    ViewSettings,
    load,
)
from continual.config.notify import Happening
from tests.helpers.pages import DOCS, PAGES, blocks, name

HEAD = "| setting | default | flag | what it says |\n|---|---|---|---|\n"
TOML = [
    pytest.param(block, id=f"{name(page)}, block {number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "toml"), 1)
]


def said(default: object) -> str:
    """A default as the page writes it: as in TOML, and nothing where there is none."""
    if default is None or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, dict | tuple):
        assert not default
        return "`{}`" if isinstance(default, dict) else "`[]`"
    return f"`{default}`" if isinstance(default, int | float) else f'`"{default}"`'


def flag(setting: str) -> str:
    """The flag of a setting; nothing where there is none, and for what `init` alone takes."""
    if setting not in FLAGS:
        return ""
    option = FLAGS[setting].default
    assert isinstance(option, OptionInfo)
    return ", ".join(f"`{word}`" for written in option.param_decls or () for word in written.split("/"))


def rows() -> list[str]:
    defaults = dict(Settings())
    return [
        f"| `{setting}` | {said(defaults[setting])} | {flag(setting)} | {field.description} |"
        for setting, field in Settings.model_fields.items()
    ]


def test_every_setting_is_on_the_page_with_default_flag_and_meaning() -> None:
    table = (DOCS / "commands.md").read_text().partition(HEAD)[2].partition("\n\n")[0]
    assert table.splitlines() == rows()


@pytest.mark.parametrize("kind", [HubSettings, ReleaseSettings, HookSettings])
def test_every_setting_of_the_hub_is_named_on_its_page(kind: type[BaseModel]) -> None:
    page = (DOCS / "hub.md").read_text()
    assert [setting for setting in kind.model_fields if not re.search(rf"\b{setting}\b", page)] == []


def test_every_setting_of_a_canary_is_on_its_page_with_default_and_meaning() -> None:
    head = "| setting | default | what it says |\n|---|---|---|\n"
    table = (DOCS / "hub.md").read_text().partition("## Canaries")[2].partition(head)[2].partition("\n\n")[0]
    defaults = dict(CanarySettings())
    fields = CanarySettings.model_fields.items()
    assert table.splitlines() == [f"| `{key}` | {said(defaults[key])} | {row.description} |" for key, row in fields]


def test_every_setting_of_signing_is_on_its_page_with_default_and_meaning() -> None:
    head = "| setting | default | what it says |\n|---|---|---|\n"
    table = (DOCS / "signatures.md").read_text().partition(head)[2].partition("\n\n")[0]
    defaults = dict(SigningSettings())
    fields = SigningSettings.model_fields.items()
    assert table.splitlines() == [f"| `{key}` | {said(defaults[key])} | {row.description} |" for key, row in fields]


def test_every_setting_of_messages_is_on_its_page_with_default_and_meaning() -> None:
    head = "| setting | default | what it says |\n|---|---|---|\n"
    part = (DOCS / "operations.md").read_text().partition("## Telling people")[2]
    fields = NotifySettings.model_fields
    names = [f"`{key}`" for key in fields]
    table = part.partition(head)[2].partition("\n\n")[0].splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in table] == names
    for row, (key, field) in zip(table, fields.items(), strict=True):
        _, _, default, meaning, _ = [cell.strip() for cell in row.split("|")]
        assert meaning == field.description, key
        assert load_default(default) == field.default, key
    explained = part.partition("| event | what is said |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", explained)) == set(get_args(Happening))


def load_default(written: str) -> object:
    """What a default of a page stands for."""
    found = tomllib.loads(f"it = {written.strip('`')}")["it"]
    return tuple(found) if isinstance(found, list) else found


def test_every_setting_of_a_view_is_named_on_its_page() -> None:
    part = (DOCS / "commands.md").read_text().partition("## Views")[2].partition("\n## ")[0]
    assert [setting for setting in ViewSettings.model_fields if not re.search(rf"\b{setting}\b", part)] == []


@pytest.mark.parametrize("block", TOML)
def test_every_settings_file_that_a_page_shows_is_one(tmp_path: Path, block: str) -> None:
    file = tmp_path / "continual.toml"
    file.write_text(block)
    load({}, file=file, environ={})


def test_every_flag_is_for_a_setting_and_run_takes_all() -> None:
    settings = set(FLAGS) - {"config", "json"}
    assert settings <= set(Settings.model_fields)
    assert set(inspect.signature(run).parameters) - {"context", "config"} == settings
