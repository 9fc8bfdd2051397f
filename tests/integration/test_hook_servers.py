"""Hooks against real loopback servers that speak as SGLang and vLLM do."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from continual.config import HookSettings
from continual.publish.hooks import Called, call
from continual.publish.published import Published
from tests.helpers.hooks import STATE, VLLM, Answer, Served, Waits, published, serving_hooks, tell

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def served() -> Iterator[Served]:
    with serving_hooks() as found:
        yield found


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
    read_otherwise = dataclasses.replace(published(tmp_path), mark="89abcdef01234567")
    assert tell(HookSettings(kind="sglang", url=served.url), read_otherwise).ok
    assert served.asked[1][1]["weight_version"] == "0123456789ab-7-89abcdef", "another reading of the same record"
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


@pytest.mark.parametrize("kind", ["sglang", "sglang-lora", "vllm-lora"])
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
    load, unload = "load_lora_adapter", "unload_lora_adapter"
    assert paths == [load, load, unload, load, unload, unload, load]
    assert [body["lora_name"] for _, body in served.asked[2:5]] == ["merged.trial"] * 3
    assert served.asked[-1][1] == {"lora_name": "merged", "lora_path": str(tmp_path / "lora-8")}


def test_a_damaged_adapter_does_not_unload_the_one_that_serves(tmp_path: Path, served: Served) -> None:
    served.reply = vllm = VLLM()
    vllm.loaded["continual"] = "old"
    vllm.broken = "Call to add_lora method failed: LoRA rank 16 is greater than max_lora_rank 8."
    told = tell(HookSettings(kind="vllm-lora", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (False, 3)
    assert told.message == f"HTTP 500: {vllm.broken}"
    assert vllm.loaded == {"continual": "old"}


def test_a_trial_that_was_left_there_is_in_nobodys_way(tmp_path: Path, served: Served) -> None:
    served.reply = vllm = VLLM()
    vllm.loaded |= {"continual": "old", "continual.trial": "older"}
    assert tell(HookSettings(kind="vllm-lora", url=served.url), published(tmp_path)).ok
    assert vllm.loaded == {"continual": str(tmp_path / "lora-7")}


def test_sglang_is_given_an_adapter_after_the_old_one_is_gone(tmp_path: Path, served: Served) -> None:
    loaded: dict[str, str] = {}

    def reply(path: str, body: Any) -> Answer:
        """As tokenizer_control_mixin.py of SGLang answers: what failed is 400 with `error_message`."""
        name = body["lora_name"]
        if path == "/unload_lora_adapter":
            there = loaded.pop(name, None)
            said = {"success": True} if there else {"success": False, "error_message": f"LoRA {name} does not exist"}
            return (200 if there else 400), said
        assert path == "/load_lora_adapter"
        if "broken" in body["lora_path"]:
            return 400, {"success": False, "error_message": "rank 64 exceeds the maximum 16"}
        assert name not in loaded
        loaded[name] = body["lora_path"]
        return 200, {"success": True, "loaded_adapters": dict(loaded)}

    served.reply = reply
    hook = HookSettings(kind="sglang-lora", url=f"{served.url}/", view="*")
    for seq in (7, 8):
        told = tell(hook, Published(STATE, seq, lora=tmp_path / f"lora-{seq}", view="sales"))
        assert (told.ok, told.attempts) == (True, 1), told.message
        assert loaded == {"sales": str(tmp_path / f"lora-{seq}")}
    told = tell(hook, Published(STATE, 9, lora=tmp_path / "broken", view="sales"))
    assert (told.ok, told.attempts, told.message) == (False, 1, "HTTP 400: rank 64 exceeds the maximum 16")
    served.reply = lambda _path, _body: (404, {"detail": "Not Found"})
    assert "with --enable-lora" in tell(hook, published(tmp_path)).message
    served.reply = lambda path, _body: (503, "busy") if "unload" in path else (200, {"success": True})
    served.asked.clear()
    assert not tell(hook, published(tmp_path)).ok
    assert {path for path, _ in served.asked} == {"/unload_lora_adapter"}, "two of them in memory is too many"


def test_an_unload_that_fails_is_tried_again(tmp_path: Path, served: Served) -> None:
    vllm, failed = VLLM(), []

    def reply(path: str, body: Any) -> Answer:
        if "unload" in path and body["lora_name"] == "continual" and not failed:
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


def test_vllm_is_paused_for_whole_weights_and_goes_on(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (200, {"status": "ok"})
    told = tell(HookSettings(kind="vllm", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts) == (True, 1)
    assert [path for path, _ in served.asked] == ["/pause?mode=wait", "/collective_rpc", "/resume"]
    loading = served.asked[1][1]
    assert (loading["method"], loading["kwargs"]) == (
        "reload_weights",
        {"weights_path": str(tmp_path / "current-7")},
    )


def test_vllm_that_may_have_half_of_the_weights_stays_paused(tmp_path: Path, served: Served) -> None:
    served.reply = lambda path, _body: (500, "out of memory") if path == "/collective_rpc" else (200, "")
    told = tell(HookSettings(kind="vllm", url=served.url, tries=2), published(tmp_path))
    assert (told.ok, told.attempts) == (False, 1), "what a failed load leaves behind goes into the next"
    assert "out of memory; it stays paused" in told.message
    served.state = {"is_paused": True}
    again = tell(HookSettings(kind="vllm", url=served.url), published(tmp_path))
    assert (again.ok, again.attempts) == (False, 1)
    assert "start it anew" in again.message
    assert [path for path, _ in served.asked] == ["/pause?mode=wait", "/collective_rpc"]


def test_vllm_that_took_nothing_goes_on(tmp_path: Path, served: Served) -> None:
    served.reply = lambda path, _body: (400, {"detail": "no such method"}) if path == "/collective_rpc" else (200, "")
    told = tell(HookSettings(kind="vllm", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts, told.message) == (False, 1, "HTTP 400: no such method")
    assert served.asked[-1][0] == "/resume"


def test_vllm_that_does_not_go_on_is_no_success(tmp_path: Path, served: Served) -> None:
    served.reply = lambda path, _body: (500, "stuck") if path == "/resume" else (200, "")
    told = tell(HookSettings(kind="vllm", url=served.url, tries=1), published(tmp_path))
    assert (told.ok, told.message) == (False, "loaded; HTTP 500: stuck")


def test_vllm_without_its_development_mode_says_what_to_do(tmp_path: Path, served: Served) -> None:
    served.reply = lambda _path, _body: (404, {"detail": "Not Found"})
    told = tell(HookSettings(kind="vllm", url=served.url), published(tmp_path))
    assert (told.ok, told.attempts, len(served.asked)) == (False, 1, 1)
    assert "VLLM_SERVER_DEV_MODE=1" in told.message


def test_what_is_posted_is_signed_anew_at_each_try_under_one_id(tmp_path: Path, served: Served) -> None:
    answers = [503, 503, 200, 200]
    served.reply = lambda _path, _body: (answers[len(served.asked) - 1], "")
    hook = HookSettings(kind="http", url=f"{served.url}/a?token=s3cret", secret=SecretStr(SECRET))
    assert tell(hook, published(tmp_path)).ok
    assert tell(hook, dataclasses.replace(published(tmp_path), seq=8)).ok
    for head, raw in zip(served.heads, served.bodies, strict=True):
        signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + raw
        mac = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, "sha256").digest()
        assert head["webhook-signature"] == "v1," + base64.b64encode(mac).decode()
        assert abs(int(head["webhook-timestamp"]) - time.time()) < 60
    *ids, other = [head["webhook-id"] for head in served.heads]
    assert (len(ids), len(set(ids)), other in ids) == (3, 1, False)


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
            "view": None,
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
