"""Which hooks hear of what, and which are refused for the views that they name."""

from __future__ import annotations

from typing import Any

import pytest

from continual.config import Settings
from continual.errors import Misconfigured
from continual.service.telling import Waiter, check

VIEWS = {
    "sales": {"current": "out/sales", "as_lora": 16},
    "safe": {"current": "out/safe", "repo": "org/safe"},
    "far": {"repo": "org/far"},
    "drawn": {"current": "out/drawn", "as_lora": 4, "format": "kohya"},
}


def settings(**hook: Any) -> Settings:
    given = {"url": "http://127.0.0.1:1"} | hook
    given = {key: value for key, value in given.items() if value is not None}
    return Settings.model_validate({"current": "out/merged", "views": VIEWS, "hooks": [given]})


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({"kind": "http", "view": "sails"}, "the settings name no such view; there are sales, safe, far, drawn"),
        ({"kind": "sglang", "view": "sales"}, "views.sales.as_lora is set, and this kind loads a whole model"),
        ({"kind": "sglang", "view": "far"}, "views.far.current is not set"),
        ({"kind": "vllm-lora", "view": "far"}, "views.far.current is not set"),
        ({"kind": "sglang-lora", "view": "drawn"}, "views.drawn.format = kohya, and the server loads adapters of PEFT"),
        ({"kind": "vllm-lora", "view": "sa*", "name": "merged"}, "sales and safe would be served under one name"),
    ],
)
def test_a_hook_that_cannot_be_told_of_its_views_is_refused(hook: dict[str, Any], said: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        check(settings(**hook))
    assert str(refused.value).startswith(f"hook 1 ({hook['kind']}): view = {hook['view']}: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "hook",
    [
        {"kind": "http", "view": "*"},
        {"kind": "http", "view": "later-*"},
        {"kind": "vllm-lora", "view": "sa*"},
        {"kind": "vllm-lora", "view": "sa*", "name": "of-{view}"},
        {"kind": "sglang-lora", "view": "sales", "name": "merged"},
        {"kind": "sglang", "view": "safe"},
    ],
)
def test_others_are_taken(hook: dict[str, Any]) -> None:
    check(settings(**hook))


@pytest.mark.parametrize(
    ("hook", "heard"),
    [
        ({}, {(None, "current")}),
        ({"after": "release"}, {(None, "release")}),
        ({"view": "sales"}, {("sales", "current")}),
        ({"view": "*"}, {("sales", "current"), ("safe", "current"), ("far", "release"), ("drawn", "current")}),
        ({"view": "sa*", "after": "release"}, {("sales", "release"), ("safe", "release")}),
    ],
)
def test_a_hook_hears_of_the_merge_or_of_its_views(hook: dict[str, Any], heard: set[tuple[str | None, str]]) -> None:
    found = settings(kind="http", **hook)
    waiter = Waiter(1, found.hooks[0])
    asked = [(view, after) for view in (None, *VIEWS) for after in ("current", "release")]
    assert {(view, after) for view, after in asked if waiter.hears(found, view, after)} == heard
