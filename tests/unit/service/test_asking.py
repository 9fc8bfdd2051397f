"""Who is asked for a status: the daemon that the lock of the state names, if it is about that state."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from continual.service.asking import ask


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ({"state_id": "x", "state": "HERE"}, True),
        ({"state_id": "x", "state": "/another/state"}, False),  # its port was taken by another daemon since
        ({"state": "HERE"}, False),
        (["HERE"], False),
        (None, False),
    ],
)
def test_only_the_daemon_of_this_state_is_believed(tmp_path: Path, said: object, known: bool) -> None:
    body = b"<html>" if said is None else json.dumps(said).replace("HERE", str(tmp_path)).encode()
    with answering(body) as url:
        lock = json.dumps({"pid": 1, "url": url})
        (tmp_path / "lock").write_text(f"crc\n{lock}\n")
        assert (ask(tmp_path) is not None) is known


def test_nobody_is_asked_where_no_lock_names_one(tmp_path: Path) -> None:
    assert ask(tmp_path) is None
