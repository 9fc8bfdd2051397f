"""On which addresses the service listens."""

from __future__ import annotations

import socket

import pytest

from continual.errors import Misconfigured
from continual.service.web import listen


def test_only_loopback_unless_allowed() -> None:
    with pytest.raises(Misconfigured, match="allow_remote"):
        listen("0.0.0.0", 0, allow_remote=False)
    listen("127.0.0.1", 0, allow_remote=False).close()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Misconfigured, match=str(port)):
            listen("127.0.0.1", port, allow_remote=False)
