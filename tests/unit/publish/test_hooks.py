"""Which settings of hooks are refused, as a table."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from continual.config import HookSettings
from continual.errors import Misconfigured
from continual.publish.hooks import check


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ({"kind": "sglang"}, "url is missing"),
        ({"kind": "vllm-lora", "url": ""}, "url is missing"),
        ({"kind": "http", "url": "ftp://host/x"}, "http:// or https://"),
        ({"kind": "http", "url": "127.0.0.1:8000"}, "http:// or https://"),
        ({"kind": "http", "url": "http:///x"}, "http:// or https://"),
        ({"kind": "http", "url": "http://host:s3cret/x"}, "is its port a number"),
        ({"kind": "http", "url": "http://[::1/s3cret"}, "cannot be read"),
        ({"kind": "http", "url": "http://me:s3cret@host/x"}, "credentials"),
        ({"kind": "http", "url": "http://s3cret@host/x"}, "credentials"),
        ({"kind": "http", "url": "http://host/a b?s3cret"}, "percent-encoded"),
        ({"kind": "http", "url": "http://host/x\n"}, "percent-encoded"),
        ({"kind": "http", "url": "http://host/é"}, "percent-encoded"),
        ({"kind": "sglang", "url": "http://host?token=s3cret"}, "nothing after ? or #"),
        ({"kind": "vllm-lora", "url": "http://host#x"}, "nothing after ? or #"),
        ({"kind": "http", "url": "http://host", "command": ["x"]}, "command is for the kind command"),
        ({"kind": "http", "url": "http://host", "name": "x"}, "name is for sglang-lora and vllm-lora"),
        ({"kind": "sglang", "url": "http://host", "rank": 8}, "rank is for sglang-lora and vllm-lora"),
        ({"kind": "vllm-lora", "url": "http://host", "name": " "}, "name is empty"),
        ({"kind": "sglang-lora", "url": "http://host", "name": "{view}"}, "told of the merge alone: set view"),
        ({"kind": "http", "url": "http://host", "timeout": float("inf")}, "at most 86400 seconds"),
        ({"kind": "sglang", "url": "http://host", "secret": "whsec_s3cret"}, "secret is for http"),
        ({"kind": "http", "url": "http://host", "secret": "s3cret"}, "has to be whsec_ and Base64, or env:NAME"),
        ({"kind": "http", "url": "http://host", "secret": "whsec_s3creta="}, "has 5 bytes"),
        ({"kind": "http", "url": "http://host", "secret": "env:NOT_THERE_AT_ALL"}, "no such variable"),
        ({"kind": "vllm", "url": "http://host", "rank": 8}, "rank is for sglang-lora and vllm-lora"),
        ({"kind": "command"}, "command is missing"),
        ({"kind": "command", "command": ["", "x"]}, "command is missing"),
        ({"kind": "command", "command": ["x", "a\0b"]}, "NUL"),
        ({"kind": "command", "command": ["x"], "url": "http://host"}, "url is for the other kinds"),
    ],
)
def test_what_check_refuses(hook: dict[str, Any], said: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        check([HookSettings(kind="command", command=("true",)), HookSettings(**hook)])
    assert str(refused.value).startswith(f"hook 2 ({hook['kind']}): ")
    assert said in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_what_check_takes() -> None:
    check([])
    check(
        [
            HookSettings(kind="sglang", url="http://127.0.0.1:30000"),
            HookSettings(kind="vllm-lora", url="https://host/behind/", name="merged", rank=64),
            HookSettings(kind="http", url="https://[::1]:8000/hook?token=x"),
            HookSettings(kind="http", url="https://host", secret=SecretStr("whsec_" + "x" * 32)),
            HookSettings(kind="vllm", url="http://127.0.0.1:8000"),
            HookSettings(kind="command", command=("deploy", "{directory}")),
        ]
    )
