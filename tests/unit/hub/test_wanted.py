"""Which repos of the Hub the settings let in, and what is said of the others."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from continual.config import HubSettings
from continual.errors import Misconfigured
from continual.hub import Info, RemoteFile
from continual.hub.wanted import left_out


def info(repo: str, **facts: object) -> Info:
    return Info(repo, "1" * 40, datetime.fromtimestamp(1_800_000_000.0, UTC), **facts)  # type: ignore[arg-type]


BASES, OWN = ("org/base",), "me/merge"
FT = ("base_model:org/base", "base_model:finetune:org/base", "license:mit", "text")


@pytest.mark.parametrize(
    ("found", "asked", "why"),
    [
        (info("a/m", tags=FT), {}, None),
        (info("a/m", tags=("base_model:adapter:org/base",)), {}, None),
        (info("a/m", tags=("base_model:quantized:org/base",)), {}, "no fine-tune"),
        (info("a/m", tags=("base_model:quantized:org/base",)), {"relations": ("quantized",)}, None),
        (info("a/m"), {}, "no fine-tune"),
        (info("a/m"), {"repos": ("a/m",)}, None),
        (info("a/m"), {"authors": ("a",)}, None),
        (info("me/merge", tags=FT), {}, "our own"),
        (info("org/base", tags=FT), {}, "base itself"),
        (info("a/m", tags=FT), {"allow": ("b/*",)}, "not in allow"),
        (info("a/m", tags=FT), {"allow": ("b/*", "a/*")}, None),
        (info("a/m", tags=FT), {"deny": ("a/*",)}, "in deny"),
        (info("a/m", tags=FT), {"licences": ("apache-*",)}, "licence mit"),
        (info("a/m", tags=FT[:2]), {"licences": ("mit",)}, "licence none"),
        (info("a/m", tags=FT), {"deny_licences": ("mit",)}, "deny_licences"),
        (info("a/m", tags=FT), {"deny_licences": ("MIT",)}, "deny_licences"),
        (info("a/m", tags=FT), {"licences": ("MIT",), "allow": ("A/*",)}, None),
        (info("a/m", tags=(*FT, "license:cc-by-nc-4.0")), {"deny_licences": ("cc-*",)}, "licence cc-by-nc-4.0 is in"),
        (info("a/m", tags=(*FT, "license:cc-by-nc-4.0")), {"licences": ("mit",)}, "licence cc-by-nc-4.0 is not in"),
        (info("a/m", tags=FT), {"deny": ("A/M",)}, "in deny"),
        (info("a/m", tags=FT), {"tags": ("text", "image")}, "lacks the tag image"),
        (info("a/m", tags=FT), {"deny_tags": ("te*",)}, "has the tag text"),
        (info("a/m", tags=FT, gated=True), {"gated": "refuse"}, "gated"),
        (info("a/m", tags=FT, private=True), {"private": "refuse"}, "private"),
        (info("a/m", tags=FT, gated=True, private=True), {}, None),
        (info("a/m", tags=FT), {"since": "2099-01-01"}, "last commit before"),
        (info("a/m", tags=FT), {"since": "2001-01-01T12:00Z"}, None),
        (
            info("a/m", tags=FT, files={"x.safetensors": RemoteFile("x.safetensors", 11, "", None)}),
            {"max_bytes": 10},
            "11 bytes",
        ),
        (info("a/m", tags=FT, files={"x.bin": RemoteFile("x.bin", 11, "", None)}), {"max_bytes": 10}, None),
    ],
)
def test_what_is_left_out(found: Info, asked: dict[str, object], why: str | None) -> None:
    said = left_out(found, HubSettings.model_validate(asked), BASES, OWN)
    assert (said is None) == (why is None), said
    assert why is None or why in (said or "")


def test_a_date_that_is_none() -> None:
    with pytest.raises(Misconfigured, match=r"hub\.since = soon"):
        left_out(info("a/m", tags=FT), HubSettings.model_validate({"since": "soon"}), BASES)
