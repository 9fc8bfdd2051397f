"""Hooks against real loopback servers that speak as SGLang and vLLM do, and against real commands."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from continual import config
from continual.config import HookSettings
from continual.errors import Misconfigured
from continual.publish import hooks
from continual.publish.hooks import Called, Published, call, check

Answer = tuple[int, Any]
STATE = "0123456789abcdef0123"


@dataclass
class Served:
    """A server that answers what `reply(path, body)` gives: a status and JSON or text; None drops the connection.
    `asked` is what came."""

    url: str
    reply: Callable[[str, Any], Answer | None] = lambda _path, _body: (200, "")
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def served() -> Iterator[Served]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            it.asked.append((self.path, body))
            answer = it.reply(self.path, body)
            if answer is None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            status, said = answer
            data = (said if isinstance(said, str) else json.dumps(said)).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | it.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the other side went away, as it is meant to

    server = Server(("127.0.0.1", 0), Handler)
    it = Served(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield it
    finally:
        it.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Waits:
    """Stands for the waits between tries: takes down how long they are, and says at which the daemon stops."""

    stops_at: int = 99
    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return len(self.seconds) >= self.stops_at


def tell(hook: HookSettings, published: Published, waits: Waits | None = None) -> Called:
    check([hook])
    told = call(hook, published, threading.Event(), waits or Waits())
    assert told.message.isprintable()
    assert len(told.message) <= 300
    assert told.kind == hook.kind
    json.dumps(told.body())
    return told


def published(tmp_path: Path) -> Published:
    return Published(
        STATE,
        7,
        tmp_path / "current-7",
        tmp_path / "lora-7",
        "org/merge",
        "c0ffee",
        "https://hub/org/merge",
        "record-7",
    )


class VLLM:
    """What vLLM's routes do; `said` is what they say of a name that is loaded."""

    def __init__(self, said: str = "has already been loaded.") -> None:
        self.said = said
        self.loaded: dict[str, str] = {}
        self.broken = ""

    def __call__(self, path: str, body: Any) -> Answer:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if self.loaded.pop(name, None) is None:
                return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found.", "code": 404}}
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if path != "/v1/load_lora_adapter":
            return 404, {"detail": "Not Found"}
        if self.broken:
            return 400, {"object": "error", "message": self.broken, "code": 400}
        if name in self.loaded:
            return 400, {"object": "error", "message": f"The lora adapter '{name}' {self.said}", "code": 400}
        self.loaded[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully."


def test_sglang_is_told_where_the_weights_are(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (
        200,
        {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0},
    )
    told = tell(HookSettings(kind="sglang", url=f"{served.url}/"), published(tmp_path))
    assert told.ok
    assert told.message == "HTTP 200: Succeeded to update model weights."
    assert (told.target, told.attempts) == (f"{served.url}/", 1)
    asked = {"model_path": str(tmp_path / "current-7"), "weight_version": "0123456789ab-7", "flush_cache": True}
    assert served.asked == [("/update_weights_from_disk", asked)]
    assert set(told.body()) == {"kind", "target", "ok", "attempts", "seconds", "message"}


def test_sglang_that_cannot_load_them_is_not_asked_again(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (
        400,
        {"success": False, "message": "Failed to get weights iterator:\nno\x1b[31m such\tfile"},
    )
    told = tell(HookSettings(kind="sglang", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (False, 1)
    assert told.message == "HTTP 400: Failed to get weights iterator: no [31m such file"


@pytest.mark.parametrize(
    "said", [{"success": False, "message": "busy"}, {"message": "busy"}, "busy", "[1]", "[" * 50_000, "x" * 200_000]
)
def test_sglang_without_success_is_none(tmp_path: Path, served: Served, said: Any) -> None:
    served.reply = lambda _path, _body: (200, said)
    told = tell(HookSettings(kind="sglang", url=served.url, tries=2), published(tmp_path))
    assert (told.ok, told.attempts) == (False, 2)
    assert told.message.startswith("HTTP 200, but no success: ")


@pytest.mark.parametrize("kind", ["sglang", "vllm-lora"])
def test_without_a_directory_no_server_is_asked(served: Served, kind: Any) -> None:
    told = tell(HookSettings(kind=kind, url=served.url), Published(STATE, 7, repo="org/merge"))
    assert (told.ok, told.attempts, served.asked) == (False, 1, [])
    assert "set `current`" in told.message


@pytest.mark.parametrize(
    "said",
    [
        "has already been loaded.",
        "has already beenloaded.",
        "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.",
    ],
    ids=["as it was", "without the space", "as it is"],
)
def test_vllm_unloads_the_old_adapter_and_loads_the_new(tmp_path: Path, served: Served, said: str) -> None:
    served.reply = vllm = VLLM(said)
    hook = HookSettings(kind="vllm-lora", url=served.url, name="merged")
    for seq in (7, 8):
        told = tell(hook, Published(STATE, seq, lora=tmp_path / f"lora-{seq}"))
        assert (told.ok, told.attempts) == (True, 1)
        assert told.message == "HTTP 200: Success: LoRA adapter 'merged' added successfully."
        assert vllm.loaded == {"merged": str(tmp_path / f"lora-{seq}")}
    paths = [path.removeprefix("/v1/") for path, _ in served.asked]
    assert paths == ["load_lora_adapter", "load_lora_adapter", "unload_lora_adapter", "load_lora_adapter"]
    assert served.asked[-1][1] == {"lora_name": "merged", "lora_path": str(tmp_path / "lora-8")}


def test_a_damaged_adapter_does_not_unload_the_one_that_serves(tmp_path: Path, served: Served) -> None:
    served.reply = vllm = VLLM()
    vllm.loaded["continual"] = "old"
    vllm.broken = "Loading lora /x failed: rank 16 is greater than max_lora_rank 8"
    told = tell(HookSettings(kind="vllm-lora", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts, len(served.asked)) == (False, 1, 1)
    assert told.message == f"HTTP 400: {vllm.broken}"
    assert vllm.loaded == {"continual": "old"}


def test_an_unload_that_fails_is_tried_again(tmp_path: Path, served: Served) -> None:
    vllm, failed = VLLM(), []

    def reply(path: str, body: Any) -> Answer:
        if "unload" in path and not failed:
            failed.append(path)
            return 500, {"error": {"message": "Failed to remove lora adapter"}}
        return vllm(path, body)

    served.reply = reply
    vllm.loaded["continual"] = "old"
    told = tell(HookSettings(kind="vllm-lora", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (True, 2)


def test_vllm_without_the_routes_says_what_to_do(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (404, {"detail": "Not Found"})
    told = tell(HookSettings(kind="vllm-lora", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (False, 1)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in told.message


@pytest.mark.parametrize("status", [200, 201, 204])
def test_http_gets_all_that_is_known(tmp_path: Path, served: Served, status: int) -> None:
    served.reply = lambda _path, _body: (status, "")
    told = tell(HookSettings(kind="http", url=f"{served.url}/deploy?token=s3cret"), published(tmp_path))
    assert (told.ok, told.target, told.message) == (True, f"{served.url}/deploy", f"HTTP {status}")
    assert served.asked[0] == (
        "/deploy?token=s3cret",
        {
            "state": STATE,
            "seq": 7,
            "directory": str(tmp_path / "current-7"),
            "lora": str(tmp_path / "lora-7"),
            "repo": "org/merge",
            "commit": "c0ffee",
            "url": "https://hub/org/merge",
            "tag": "record-7",
        },
    )
    assert "s3cret" not in json.dumps(told.body())


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503])
def test_what_passes_is_tried_again(tmp_path: Path, served: Served, status: int) -> None:
    answers = iter([(status, "later"), (status, "later"), (200, "")])
    served.reply = lambda _path, _body: next(answers)
    waits = Waits()
    told = tell(HookSettings(kind="http", url=served.url, tries=5), published(tmp_path), waits)
    assert (told.ok, told.attempts, waits.seconds) == (True, 3, [1.0, 2.0])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
def test_what_does_not_pass_is_not_tried_again(tmp_path: Path, served: Served, status: int) -> None:
    served.reply = lambda _path, _body: (status, {"error": "no"})
    told = tell(HookSettings(kind="http", url=served.url, tries=5), published(tmp_path))
    assert (told.ok, told.attempts, told.message) == (False, 1, f"HTTP {status}: no")


def test_the_waits_double_up_to_half_a_minute(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (503, "")
    waits = Waits()
    told = tell(HookSettings(kind="http", url=served.url, tries=8), published(tmp_path), waits)
    assert (told.ok, told.attempts, told.message) == (False, 8, "HTTP 503")
    assert waits.seconds == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(tmp_path: Path, served: Served, status: int) -> None:
    served.reply = lambda _path, _body: (status, "")
    served.headers["Location"] = f"{served.url}/elsewhere"
    told = tell(HookSettings(kind="http", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts, len(served.asked)) == (False, 1, 1)
    assert told.message == f"HTTP {status}: redirects are not followed"


def test_a_dropped_connection_is_tried_again(tmp_path: Path, served: Served) -> None:
    answers: Iterator[Answer | None] = iter([None, (200, "")])
    served.reply = lambda _path, _body: next(answers)
    told = tell(HookSettings(kind="http", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (True, 2)


def test_an_answer_that_breaks_off(tmp_path: Path, served: Served) -> None:
    """Whether it worked is settled by the status; of SGLang it is not."""
    served.reply = lambda _path, _body: (200, '{"success": true, "message": "so')
    served.headers["Content-Length"] = "1000"
    assert tell(HookSettings(kind="http", url=served.url), published(tmp_path)).ok
    assert not tell(HookSettings(kind="sglang", url=served.url, tries=1), published(tmp_path)).ok


def test_a_slow_server(tmp_path: Path, served: Served) -> None:
    def reply(_path: str, _body: Any) -> Answer:
        served.release.wait(30)
        return 200, ""

    served.reply = reply
    begun = time.monotonic()
    told = tell(HookSettings(kind="http", url=served.url, timeout=0.1, tries=2), published(tmp_path))
    assert (told.ok, told.attempts, told.message) == (False, 2, "no answer in time")
    assert 0.2 <= told.seconds <= time.monotonic() - begun < 5


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = tell(HookSettings(kind="sglang", url=url, tries=2), published(tmp_path))
    assert (told.ok, told.attempts, told.message) == (False, 2, "Connection refused")


def test_a_proxy_is_not_asked_for_this_machine(tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert tell(HookSettings(kind="http", url=served.url, tries=1), published(tmp_path)).ok
    assert tell(
        HookSettings(kind="http", url=served.url.replace("127.0.0.1", "localhost"), tries=1), published(tmp_path)
    ).ok


def test_a_stop_ends_the_tries(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (503, "")
    hook = HookSettings(kind="http", url=served.url, tries=9)
    told = tell(hook, published(tmp_path), Waits(stops_at=2))
    assert (told.ok, told.attempts, told.message) == (False, 2, "HTTP 503")
    stop = threading.Event()
    thread_saw: list[Called] = []
    thread = threading.Thread(target=lambda: thread_saw.append(call(hook, published(tmp_path), stop)))
    thread.start()
    while len(served.asked) < 3:
        assert thread.is_alive()
        time.sleep(0.01)
    stop.set()
    thread.join(5)
    assert (thread_saw[0].ok, thread_saw[0].attempts) == (False, 1)
    told = call(hook, published(tmp_path), stop)
    assert (told.ok, told.attempts) == (False, 0)
    assert "stopping" in told.message


def python(code: str, *arguments: str, **more: Any) -> HookSettings:
    return HookSettings(kind="command", command=(sys.executable, "-c", code, *arguments), **more)


def test_a_command_gets_arguments_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hooks.SECRETS:
        monkeypatch.setenv(name, "hf_s3cret")
    monkeypatch.setenv("KEPT", "yes")
    code = (
        "import json, os, sys; sys.stdin.read(); "
        "json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['PUBLISHED_DIRECTORY'], 'w')); print('copied\\n')"
    )
    given = (
        "{directory}",
        "x={lora}:{seq}",
        '{"a": {}, "{b}": "{state}"}',
        "{repo}@{commit} {url} {tag}",
        "{Seq}{seq!r}",
        "$KEPT;",
    )
    told = tell(python(code, *given), published(tmp_path))
    assert (told.ok, told.attempts, told.message, told.target) == (True, 1, "exit status 0: copied", sys.executable)
    arguments, environment = json.loads((tmp_path / "current-7").read_text())
    assert arguments == [
        str(tmp_path / "current-7"),
        f"x={tmp_path}/lora-7:7",
        f'{{"a": {{}}, "{{b}}": "{STATE}"}}',
        "org/merge@c0ffee https://hub/org/merge record-7",
        "{Seq}{seq!r}",
        "$KEPT;",
    ]
    assert environment["KEPT"] == "yes"
    assert environment["PUBLISHED_SEQ"] == "7"
    assert environment["PUBLISHED_LORA"] == str(tmp_path / "lora-7")
    assert not [name for name, value in environment.items() if name in hooks.SECRETS or "s3cret" in value]
    config.load(
        {}, environ={name: value for name, value in environment.items() if name != "CONTINUAL_CONFIG"}
    )  # it can run `continual`


def test_what_is_put_into_an_argument_is_not_filled_in_itself() -> None:
    told = tell(
        python("import sys; print(sys.argv[1:])", "{directory}", "{lora}"),
        Published(STATE, 7, directory=Path("/{seq}")),
    )
    assert told.message == "exit status 0: ['/{seq}', '']"


def test_a_command_that_fails_is_tried_again() -> None:
    code = "import sys; print('one'); print('t\\033[1mwo\\u2028\\n\\n', file=sys.stderr); sys.exit(3)"
    waits = Waits()
    told = tell(python(code, tries=2), Published(STATE, 7), waits)
    assert (told.ok, told.attempts, waits.seconds) == (False, 2, [1.0])
    assert told.message == "exit status 3: t [1mwo"


def test_a_command_that_says_much() -> None:
    told = tell(python("print('x' * 500_000); print('y' * 500_000)", tries=1), Published(STATE, 7))
    assert told.ok
    assert told.message.startswith("exit status 0: yyy")
    assert len(told.message) == 300


def test_a_command_that_is_killed() -> None:
    told = tell(python("import os; os.kill(os.getpid(), 9)", tries=1), Published(STATE, 7))
    assert (told.ok, told.message) == (False, "killed by signal 9")


@pytest.mark.parametrize("mode", [None, 0o644])
def test_a_program_that_cannot_be_run_is_not_tried_again(tmp_path: Path, mode: int | None) -> None:
    program = tmp_path / "deploy"
    if mode is not None:
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
    told = tell(HookSettings(kind="command", command=(str(program), "--token", "s3cret"), tries=5), Published(STATE, 7))
    assert (told.ok, told.attempts, told.target) == (False, 1, str(program))
    assert told.message in ("cannot be run: No such file or directory", "cannot be run: Permission denied")


def gone(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        )  # whoever adopts it may be slow to reap it
    except FileNotFoundError:
        return True


def test_a_time_out_ends_what_a_command_started(tmp_path: Path) -> None:
    """It is tried until the shell came so far as to say who it is and whom it started, on a busy machine more than
    once."""
    pids = tmp_path / "pids"
    command = ("/bin/sh", "-c", 'sleep 60 & echo begun; echo $$ $! > "$1"; wait', "sh", str(pids))
    hook = HookSettings(kind="command", command=command, timeout=0.3, tries=99)
    told = call(
        hook, Published(STATE, 7), threading.Event(), lambda _seconds: pids.exists() and pids.read_text().endswith("\n")
    )
    assert (told.ok, told.message) == (False, "not done after 0.3 s, ended: begun")
    assert told.seconds >= 0.3
    shell, child = (int(pid) for pid in pids.read_text().split())
    assert gone(shell)
    end = time.monotonic() + 5
    while not gone(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_command_leaves_running_holds_up_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    hook = HookSettings(
        kind="command",
        command=("/bin/sh", "-c", 'sleep 60 & echo $! > "$1"; echo started', "sh", str(pids)),
        timeout=30,
    )
    told = tell(hook, Published(STATE, 7))
    assert (told.ok, told.message) == (True, "exit status 0: started")
    assert told.seconds < 10
    child = int(pids.read_text())
    assert not gone(child)
    os.kill(child, 9)


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
        ({"kind": "http", "url": "http://host", "name": "x"}, "name is for vllm-lora"),
        ({"kind": "sglang", "url": "http://host", "rank": 8}, "rank is for vllm-lora"),
        ({"kind": "vllm-lora", "url": "http://host", "name": " "}, "name is empty"),
        ({"kind": "http", "url": "http://host", "timeout": float("inf")}, "at most 86400 seconds"),
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
            HookSettings(kind="command", command=("deploy", "{directory}")),
        ]
    )
