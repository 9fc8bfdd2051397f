"""For which reasons the daemon calls itself degraded, as a table of what its parts said."""

from __future__ import annotations

from pathlib import Path

from continual.records import Event
from continual.service.health import FAILED, REASONS, REMEMBERED, Health
from continual.service.queue import Queued
from continual.sources.folder import FolderSource

FOLDER = FolderSource(Path("/watched"))


def queued(name: str, attempt: int, error: str = "", *, denied: bool = False) -> Queued:
    return Queued(Event("folder", f"/watched/{name}"), FOLDER, attempt, due=float(attempt), error=error, denied=denied)


def test_nothing_is_wrong_at_first_and_when_new_candidates_wait() -> None:
    health = Health()
    assert health.found([FOLDER], []) == []
    health.room("/state", 10**9, 10**8)
    assert health.found([FOLDER], [queued("a", 99, "no"), queued("b", 0)]) == [], "one of them has not been tried"


def test_each_reason_has_its_sentence() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    health.room("/state", 1000, 2000)
    health.broke("alice", "RecursionError: too deep")
    health.fails("cluster", "10.0.0.1:6379", "has not answered")
    health.fails("round", "a round over the pool", "ZeroDivisionError")
    health.fails("publish", "publish", "no permission")
    health.fails("release", "release", "the Hub has trouble")
    health.fails("hook", "http (http://x)", "HTTP 500")
    health.fails("canary", "the merge", "no data")
    health.fails("notify", "Slack (number 1)", "not taken")
    here, hub = FolderSource(Path("/gone")), FolderSource(Path("/hub"))
    here.problem = "/gone: the folder cannot be reached"
    hub.problem, hub.denied = "check HF_TOKEN", True
    found = health.found([here, hub], [queued("a", FAILED, "\x1b[2Jchanged"), queued("b", FAILED + 1, "changed")])
    assert [shortfall.reason for shortfall in found] == list(REASONS)
    told = {shortfall.reason: shortfall.message for shortfall in found}
    assert told["disk"].startswith("/state: 1 kB free and the next fold needs 2 kB")
    assert "cannot be reached" in told["source"]
    assert "HF_TOKEN" in told["token"]
    assert told["retrying"] == r"all 2 candidates that wait failed at least 3 times: a: \x1b[2Jchanged"
    assert "RecursionError" in told["internal"]
    now[0] = REMEMBERED + 1
    health.room("/state", 2000, 2000)
    for reason, which in (("round", "a round over the pool"), ("publish", "publish"), ("release", "release")):
        health.works(reason, which)
    health.works("cluster", "10.0.0.1:6379")
    health.works("hook", "http (http://x)")
    health.works("canary", "the merge")
    health.works("notify", "Slack (number 1)")
    here.problem = hub.problem = None
    assert health.found([here, hub], [queued("a", FAILED - 1)]) == []


def test_a_candidate_whose_token_is_refused_is_told_of_beside_others() -> None:
    found = Health().found([FOLDER], [queued("new", 0), queued("gated", 1, "check HF_TOKEN", denied=True)])
    assert [(s.reason, s.message) for s in found] == [("token", "gated: check HF_TOKEN")]
