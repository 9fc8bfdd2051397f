"""What a unit is told of the settings: every path that is written, what is hidden from services, and the network only
where something needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from continual.config import Settings
from continual.errors import Misconfigured
from continual.service.unit import drop_in


def lines(**values: Any) -> list[str]:
    values = {"state": "/srv/state", "watch": ["/srv/in"], **values}
    return drop_in(Settings.model_validate(values)).splitlines()


def test_what_lies_where_services_may_look_is_allowed_alone() -> None:
    found = lines(current="/srv/out/current", log_file="/var/log/continual/log", drain=600)
    assert [line for line in found if line.startswith("ReadWritePaths=")] == [
        "ReadWritePaths=/srv/out",
        "ReadWritePaths=/srv/state",
        "ReadWritePaths=/var/log/continual",
    ]
    assert "RequiresMountsFor=/srv/in" in found
    assert "TimeoutStopSec=660" in found
    assert not any(line.startswith(("Bind", "ProtectHome", "IPAddress", "Wants")) for line in found)


def test_what_is_hidden_from_services_is_bound_and_only_that() -> None:
    found = lines(
        state="/home/me/my state", watch=["/home/me/in", "/srv/in"], views={"a": {"current": "/tmp/a/current"}}
    )
    assert "ProtectHome=tmpfs" in found
    assert [line for line in found if line.startswith(("Bind", "ReadWrite"))] == [
        'BindPaths="/home/me/my state"',
        "BindPaths=/tmp/a",
        "BindReadOnlyPaths=/home/me/in",
    ]


def test_a_percent_sign_and_quotes_are_no_specifiers() -> None:
    assert 'ReadWritePaths="/srv/100%% \\"s\\" \\\\"' in lines(state='/srv/100% "s" \\')


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"hub": {"watch": True}}, "the Hub"),
        ({"release": {"repo": "a/b"}}, "the Hub"),
        ({"allow_remote": True}, "allow_remote"),
        ({"hooks": [{"kind": "http", "url": "http://10.0.0.9:30000"}]}, "10.0.0.9"),
        ({"hooks": [{"kind": "http", "url": "http://127.0.0.1:30000"}]}, None),
        ({"otlp": "http://10.0.0.9:4318"}, "10.0.0.9"),
        ({"otlp": "http://localhost:4318"}, None),
        ({"notify": {"urls": ["json://10.0.0.9"]}}, "notify"),
        ({"release": {"canary": {"prometheus": "http://prom:9090"}}}, "prom"),
        ({}, None),
    ],
)
def test_the_network_is_let_in_where_it_is_needed_and_it_says_for_what(values: dict[str, Any], why: str | None) -> None:
    found = lines(**values)
    assert ("IPAddressAllow=any" in found) is (why is not None)
    assert why is None or f"# for {why}" in found


@pytest.mark.parametrize("values", [{"state": "state"}, {"watch": ["in"]}, {"current": "current"}, {"state": "/a\nb"}])
def test_what_a_service_could_not_find_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured):
        lines(**values)


def test_a_base_that_the_state_names_may_be_read(tmp_path: Path) -> None:
    from continual import making
    from tests.helpers import models

    making.init(models.base(tmp_path / "base"), tmp_path / "state")
    assert f"RequiresMountsFor={tmp_path / 'base'}" in lines(state=tmp_path / "state")


def test_a_state_on_an_object_store_needs_the_network_and_no_folder() -> None:
    pytest.importorskip("obstore", reason="obstore is not installed (the extra s3)")
    found = lines(state="s3://bucket/state")
    assert "# for the store of the state" in found
    assert not any(line.startswith("ReadWritePaths") for line in found)
