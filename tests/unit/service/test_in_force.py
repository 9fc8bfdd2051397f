"""What `continual config show` tells of settings, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.config.given import look
from continual.gates import GATES
from continual.service.in_force import MASK, shown


def test_every_setting_is_shown_with_where_it_was_set_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "continual.toml"
    file.write_text(
        "[views.a]\nonly = ['x']\n[sources.post]\nbox = '/in'\napi_token = 'hidden'\n"
        "[[hooks]]\nkind = 'http'\nurl = 'https://me:hidden@there/a?key=hidden'\n[gates.noise]\nact = 'warn'\n"
        "[evaluation]\ncommand = ['eval', '{model}', '--api-key', 'hidden', '--auth=token=hidden', "
        "'Authorization: Bearer hidden', '--tokenizer', 'shown']\n"
    )
    environ = {"CONTINUAL_WEBHOOK_SECRET": "hidden", "CONTINUAL_KEEP": "5"}
    rows = {str(row["setting"]): row for row in shown(look({"port": 1}, file=file, environ=environ))}
    assert "hidden" not in str(rows)
    assert rows["webhook_secret"] == {
        "setting": "webhook_secret",
        "value": MASK,
        "from": "environment: CONTINUAL_WEBHOOK_SECRET",
    }
    assert rows["tokenizer"]["value"] != MASK
    assert rows["evaluation.command"]["value"] == [
        *("eval", "{model}", "--api-key", MASK, f"--auth=token={MASK}", f"Authorization: Bearer {MASK}"),
        *("--tokenizer", "shown"),
    ]
    assert rows["sources.post.api_token"]["value"] == MASK
    assert (rows["keep"]["value"], rows["keep"]["from"]) == (5, "environment: CONTINUAL_KEEP")
    assert (rows["port"]["value"], rows["port"]["from"]) == (1, "flag: port")
    assert rows["views.a.only"] == {"setting": "views.a.only", "value": ["x"], "from": f"{file}: views"}
    assert (rows["gates.noise.act"]["value"], rows["gates.noise.act"]["from"]) == ("warn", f"{file}: gates")
    assert (rows["hub.poll"]["value"], rows["hub.poll"]["from"]) == (300.0, "default")
    assert f"https://{MASK}@there/a?{MASK}" in str(rows["hooks"]["value"])
    assert {name.split(".")[1] for name in rows if name.startswith("gates.")} <= {gate.name for gate in GATES}


@pytest.mark.parametrize("name", ["webhook_secret", "promote_token", "admin_token"])
def test_a_secret_that_is_not_set_is_told_from_one_that_is(name: str) -> None:
    rows = {row["setting"]: row["value"] for row in shown(look({}, environ={}))}
    assert rows[name] is None
