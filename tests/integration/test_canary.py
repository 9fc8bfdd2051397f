"""Candidates: out first, watched, promoted or taken back; through kills, by every way that decides, of the merge and of
views, in folders and on the Hub."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import Misconfigured
from continual.service import publishing, showing
from continual.service import release as releasing
from continual.service.canary import measuring, stages, verdicts
from continual.service.outgoing import What, outgoing
from continual.state import State
from continual.state.canaries import CanaryRecord, Measurement
from continual.state.entries import CanaryEntry, HookEntry, ReleaseEntry, RetryEntry, RollbackEntry
from tests.helpers import adapters, hubs, models
from tests.helpers.command import machine, run
from tests.helpers.prometheus import Told, told
from tests.helpers.released import REPO, releases
from tests.helpers.services import daemon, get, status, until, url
from tests.loopback import serving

pytestmark = pytest.mark.slow
ALARM = "query q: 9 is above max = 1"


def entries(state: Path, kind: type) -> list[Any]:
    with State.open(state) as opened:
        return [c.entry for c in opened.ledger.log if isinstance(c.entry, kind)]


def seq_at(link: Path) -> int | None:
    return int(json.loads((link / "continual.json").read_text())["seq"]) if link.exists() else None


def names(state: Path) -> list[str]:
    with State.open(state) as opened:
        return [commit.entry.candidate.name for commit in opened.ledger.folds()]


def written(tmp: Path, server: Told, more: str = "") -> Path:
    """The settings file of a merge whose candidates `server` is asked about."""
    file = tmp / "continual.toml"
    file.write_text(
        f'current = "{tmp}/current"\nkeep = 1\n[release.canary]\nprometheus = "{server.url}"\nquery = "errors"\n'
        f"max = 0.5\ninterval = 0.1\n{more}\n"
    )
    return file


def call(address: str, token: str | None) -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, b"", headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_daemon_watches_through_a_kill_and_promotes_or_takes_back(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    state, watch, link = tmp_path / "state", tmp_path / "in", tmp_path / "current"
    making.init(base, state)
    watch.mkdir()
    told_of = tmp_path / "told"
    hook = f"""
[[hooks]]
kind = "command"
command = ["sh", "-c", "echo $PUBLISHED_SEQ$CONTINUAL_PROMOTE_TOKEN >> {told_of}"]
after = "candidate"
"""
    environment = {"CONTINUAL_PROMOTE_TOKEN": "s3cret"}
    with told() as server:
        file = written(tmp_path, server, hook)
        with daemon(state, watch, "--config", str(file), environment=environment) as process:
            address = url(process, state)
            models.fine_tune(base, watch / "alice", 1)
            until(lambda: any("no data" in row["message"] for row in status(address)["degraded"]), "nothing is said")
            assert "neither promoted nor taken back: query errors: no data" in get(f"{address}/readyz")[1]
            server.values = [0.1]
            until(lambda: not status(address)["degraded"], "there is data")
            assert call(f"{address}/promote", None)[0] == call(f"{address}/promote", "s3cre")[0] == 401
            assert call(f"{address}/promote?at=7", "s3cret")[0] == 409
            assert call(f"{address}/promote?at=x", "s3cret")[0] == 400
            assert not link.exists()
            assert call(f"{address}/promote?at=1", "s3cret")[0] == 202
            until(lambda: seq_at(link) == 1 and not status(address)["canaries"], "the first is promoted")
            models.fine_tune(base, watch / "bob", 2)
            until(lambda: status(address)["canaries"] and status(address)["canaries"][0]["measurements"], "bob's turn")
            models.fine_tune(base, watch / "carol", 3)
            until(lambda: status(address)["folds"] == 3, "carol is folded beside it")
            assert "canary" in run("status", "--state", state).stdout
            process.kill()
            process.wait()
        candidate = machine("status", "--state", state, "--config", file)["canaries"][0]
        with daemon(state, watch, "--config", str(file), environment=environment) as process:
            address = url(process, state)
            until(lambda: status(address)["canaries"][0]["measurements"] > candidate["measurements"], "it goes on")
            server.values = [0.1, 0.9]
            until(lambda: entries(state, RollbackEntry), "bob is taken back")
            server.values = [0.1]
            until(lambda: seq_at(tmp_path / "current-candidate") != candidate["seq"], "bob is out nowhere")
            until(lambda: names(state) == ["alice", "carol"], "carol is folded again")
            until(lambda: status(address)["canaries"], "and is the next")
            page, text = get(f"{address}/")[1], get(f"{address}/metrics")[1]
            seq = until(lambda: [c["seq"] for c in status(address)["canaries"] if c["measurements"]], "carol's turn")[0]
            assert f"Record {seq} is promoted" in run("promote", "--at", seq, "--state", state).stdout
            until(lambda: seq_at(link) == seq, "carol is promoted")
    found, back = entries(state, CanaryEntry), entries(state, RollbackEntry)[0]
    assert [(one.canary.verdict, one.canary.by) for one in found] == [
        ("promoted", "http"),
        ("failed", "metric"),
        ("promoted", "command"),
    ]
    assert (back.to, found[1].of) == (1, candidate["seq"])
    assert f"the canary of record {candidate['seq']} failed: query errors: 0.9 is above max = 0.5; 2 of" in back.message
    assert [one.candidate.name for one in entries(state, RetryEntry)] == ["carol"]
    assert "was taken back: query errors" in page
    assert 'continual_canary_verdicts_total{verdict="failed"} 1.0' in text
    lines = [int(line) for line in told_of.read_text().splitlines()]  # and no token
    assert lines[:2] == [1, candidate["seq"]]
    assert seq in lines
    assert all(call.hook.ok for call in entries(state, HookEntry))


def out_now(merge: api.Merge, name: str | None, way: What = "publish") -> stages.Step | None:
    """One turn of an outlet, as the daemon does it."""
    model = merge.state.ledger.model
    assert model is not None
    found = stages.step(merge, name, model.seq)
    if found is not None and way == "publish":
        publishing.put(merge, found.out, found.seq)
    elif found is not None:
        done = merge.state.publications.release(REPO, found.out.asked.branch)
        if not releasing.is_out(merge, found.out, found.seq, done):
            merge.record(releasing.entry(releasing.release_as(merge, found.out, found.seq), name))
    if found is not None:
        stages.done(merge, name, way, found.seq, "goes out" if found.after == "candidate" else "promoted")
    return found


def alarmed(merge: api.Merge, name: str | None) -> CanaryRecord:
    """The candidate after an alarm that takes it back."""

    def failed(before: CanaryRecord) -> CanaryRecord:
        return before.decided("failed", "metric", ALARM)

    found = merge.state.canaries.change(name, failed)
    assert found is not None
    return found


def test_a_view_that_fails_goes_nowhere_until_it_reads_otherwise(tmp_path: Path) -> None:
    """The merge is not rolled back for one view; its candidate goes back to what is promoted."""
    base = models.base(tmp_path / "base")
    state, link = tmp_path / "state", tmp_path / "out/ä b"
    making.init(base, state, making.Recipe(width=64))
    views = {"ä b": {"current": link, "rule": "mean", "canary": {}}}
    wanted = Settings.model_validate({"state": state, "views": views, "max_base_ratio": 100.0})
    candidate = link.with_name("ä b-candidate")
    with api.Merge(wanted, write=True) as merge:
        merge.fold(adapters.lora(tmp_path / "a", base, 1))
        assert out_now(merge, "ä b") is not None
        assert (seq_at(candidate), link.exists()) == (1, False)
        stages.finish(merge, stages.promote(merge, "ä b", None, "command", "by hand"))
        assert seq_at(link) == 1
        merge.fold(adapters.lora(tmp_path / "b", base, 2))
        out_now(merge, "ä b")
        second = seq_at(candidate)
        assert (seq_at(link), merge.state.canaries.get("ä b").back) == (1, 1)  # type: ignore[union-attr]
        (shown,) = showing.canaries(merge)
        assert (shown.view, shown.seq, shown.phase, shown.places) == ("ä b", second, "watched", (str(candidate),))
        alarmed(merge, "ä b")
        assert stages.step(merge, "ä b", merge.head) is None, "until it is taken back nothing goes out"
        with pytest.raises(Misconfigured, match="being taken back: query q: 9 is above"):
            stages.promote(merge, "ä b", None, "command", "by hand")
        assert stages.take_back(merge, "ä b") == []
        assert len(merge.state.ledger.folds()) == 2, "no rollback"
        out_now(merge, "ä b")
        assert seq_at(candidate) == seq_at(link) == 1
        assert merge.state.canaries.get("ä b") is None
        merge.fold(adapters.lora(tmp_path / "c", base, 3))
        out_now(merge, "ä b")
        assert seq_at(candidate) == merge.head
        found = merge.state.publications.verdict("ä b")
        assert found is not None
        assert (found.of, found.canary.verdict) == (second, "failed")
        merge.state.rollback(1)  # a person took it back: the candidate has what is promoted
        out_now(merge, "ä b")
        assert (merge.state.canaries.get("ä b"), seq_at(candidate)) == (None, merge.head)


def test_what_was_cut_off_while_it_was_taken_back_is_done_once(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    wanted = Settings.model_validate(
        {"state": tmp_path / "state", "current": tmp_path / "c", "keep": 1, "release": {"canary": {}}}
    )

    class Cut(Exception):
        pass

    def stop(step: str) -> None:
        steps.append(step)
        if len(steps) == cut:
            raise Cut

    with api.Merge(wanted, write=True) as merge:
        for seed in range(2):
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{seed}", seed))
            out_now(merge, None)
            stages.finish(merge, stages.promote(merge, None, None, "command", ""))
        back = stages.promoted(merge, outgoing(wanted))
        for seed in range(2, 6):  # more than are kept
            merge.fold(models.fine_tune(base, tmp_path / f"ft-{seed}", seed))
            out_now(merge, None)
        candidate = alarmed(merge, None)
    rolled, cut = [], 0
    while not rolled or merge.state.canaries.get(None) is not None:
        cut += 1
        steps: list[str] = []
        with api.Merge(wanted, write=True, on_step=stop) as merge:
            with contextlib.suppress(Cut):
                stages.take_back(merge, None)
            rolled = [c for c in merge.state.ledger.log if c.kind == "rollback"]
        assert cut < 80
    with api.Merge(wanted) as merge:
        kinds = [commit.kind for commit in merge.state.ledger.log if commit.seq > candidate.seq]
        assert (candidate.back, rolled[0].entry.to) == (back, back)
        assert [fold.entry.candidate.name for fold in merge.state.ledger.folds()] == ["ft-0", "ft-1"]
        assert kinds.count("rollback") == 1
        assert kinds.count("publish") == 1
        assert [c.name for c in merge.state.ledger.retried()] == ["ft-3", "ft-4", "ft-5"]


def test_what_a_person_took_out_is_not_put_back_by_an_alarm(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state", making.Recipe(rule="task-arithmetic"))
    wanted = Settings.model_validate(
        {"state": tmp_path / "state", "current": tmp_path / "c", "keep": 9, "release": {"canary": {}}}
    )

    def inside() -> list[str]:
        return [fold.entry.candidate.name for fold in merge.state.ledger.folds()]

    with api.Merge(wanted, write=True) as merge:
        for seed, name in enumerate("ab"):
            merge.fold(models.fine_tune(base, tmp_path / name, seed))
        out_now(merge, None)
        stages.finish(merge, stages.promote(merge, None, None, "command", ""))
        merge.fold(models.fine_tune(base, tmp_path / "d", 3))
        out_now(merge, None)
        alarmed(merge, None)
        merge.unfold(merge.look_unfold("a"))
        with pytest.raises(Misconfigured, match=r"would put a back, which record \d+ took out; unfold d"):
            stages.take_back(merge, None)
        assert (inside(), merge.state.canaries.get(None) is None) == (["b", "d"], False)
        merge.unfold(merge.look_unfold("d"))
        assert stages.take_back(merge, None) == []
        assert (inside(), merge.state.canaries.get(None)) == (["b"], None)
        out_now(merge, None)  # that something was taken out is a canary, too
        alarmed(merge, None)
        assert stages.take_back(merge, None) == []
        assert inside() == ["b"]
        for name in "ef":
            merge.fold(models.fine_tune(base, tmp_path / name, ord(name)))
        out_now(merge, None)
        alarmed(merge, None)
        merge.state.rollback(1)  # by hand, to before what is promoted
        assert stages.take_back(merge, None) == []
        assert inside() == ["a"]
        assert [commit.kind for commit in merge.state.ledger.log].count("rollback") == 1


def test_a_candidate_branch_on_the_hub_and_one_commit_that_promotes(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, release={"repo": REPO, "canary": {}}) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
            assert releasing.look(merge).branch == "candidate"
            out_now(merge, None, "release")
            assert [seq for seq, _ in releases(hub, "candidate")] == [1]
            assert releases(hub) == []
            before = len(hub.history(REPO))
            uploads = len([r for r in hub.journal if r.method == "PUT"])
            stages.finish(merge, stages.promote(merge, None, 1, "command", ""))
            assert len(hub.history(REPO)) == before + 1
            assert len([r for r in hub.journal if r.method == "PUT"]) == uploads, "its bytes are there"
            assert hub.repo(REPO).tags == {"record-1": hub.head(REPO)}
            merge.fold(models.fine_tune(base, tmp_path / "b", 2))
            out_now(merge, None, "release")
            alarmed(merge, None)
            stages.take_back(merge, None)
            out_now(merge, None, "release")
            back = merge.head if merge.state.ledger.head.kind == "rollback" else merge.state.ledger.models[-1].seq
            assert releases(hub, "candidate")[-1][0] == back
            assert [seq for seq, _ in releases(hub)] == [1]
            newest = hub.repo(REPO).find("candidate")
            main = hub.repo(REPO).find("main")
            assert newest is not None
            assert main is not None
            assert newest.files["model.safetensors"].sha256 == main.files["model.safetensors"].sha256
            with pytest.raises(Misconfigured, match="no canary of the merge waits"):
                stages.promote(merge, None, None, "command", "")


def test_by_hand_a_release_is_a_candidate_until_it_is_promoted(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        file = tmp_path / "c.toml"
        file.write_text(f'current = "{tmp_path}/c"\n[release]\nrepo = "{REPO}"\n[release.canary]\n')
        client = hubs.Client(endpoint=hub.endpoint, token=hubs.hubs.TOKEN)
        flags = ("--state", tmp_path / "state", "--config", file)
        with hubs.merge(tmp_path / "state", hub) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
        assert run("promote", *flags, client=client).returncode == 2
        assert run("release", *flags, client=client).returncode == 0
        assert (releases(hub), seq_at(tmp_path / "c-candidate"), (tmp_path / "c").exists()) == ([], 1, False)
        assert "no tag" not in run("promote", "--at", 5, *flags, client=client).stdout
        assert machine("promote", *flags, client=client) == {"view": None, "seq": 1, "done": True}
        assert ([seq for seq, _ in releases(hub)], seq_at(tmp_path / "c")) == ([1], 1)
        for _ in range(2):
            assert machine("release", *flags, client=client)["new"] is False
        assert len(entries(tmp_path / "state", ReleaseEntry)) == 2, "the canary, and what was promoted"


def test_the_evaluation_command_is_asked_about_a_candidate(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    score = tmp_path / "score.py"
    score.write_text(
        "import json, sys, os\nfile = os.path.join(sys.argv[1], 'continual.json')\n"
        "seq = json.load(open(file))['seq'] if os.path.exists(file) else 0\n"
        "print(json.dumps({'acc': {0: 0.5, 1: 0.6}.get(seq, 0.3)}))\n"
    )
    wanted = Settings.model_validate(
        {
            "state": tmp_path / "state",
            "current": tmp_path / "c",
            "release": {"canary": {"evaluate": True}},
        }
    )
    asked = wanted.evaluation.model_copy(update={"command": (sys.executable, str(score), "{model}")})
    with api.Merge(wanted, write=True) as merge:
        merge.fold(models.fine_tune(base, tmp_path / "a", 1))
        merge.settings = wanted.model_copy(update={"evaluation": asked})

        def looked() -> Measurement:
            record = merge.state.canaries.get(None)
            assert record is not None
            return measuring.measure(merge, outgoing(merge.settings), record)

        out_now(merge, None)
        assert (looked().verdict, looked().said) == ("passed", "evaluation: acc 0.6")
        stages.finish(merge, stages.promote(merge, None, None, "command", ""))
        merge.settings = wanted
        merge.fold(models.fine_tune(base, tmp_path / "b", 2))
        merge.settings = wanted.model_copy(update={"evaluation": asked})
        out_now(merge, None)
        assert (looked().verdict, looked().said) == ("failed", "evaluation: acc is worse by 0.3")
        score.write_text("raise SystemExit('no rows')\n")
        found = looked()
        assert (found.verdict, "no rows" in found.said) == ("inconclusive", True), "it fails on what is out, too"
    assert verdicts.measures(wanted.release.canary)  # type: ignore[arg-type]


def test_a_view_that_fails_on_the_hub_gives_its_branch_back(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        state = tmp_path / "adapters"
        making.init(base, state, making.Recipe(width=64))
        views = {"v": {"repo": REPO, "as_lora": "own", "canary": {}}}
        with hubs.merge(state, hub, views=views, max_base_ratio=100.0) as merge:
            for seed, name in enumerate(("a", "b")):
                merge.fold(adapters.lora(tmp_path / name, base, seed))
                out_now(merge, "v", "release")
                if name == "a":
                    stages.finish(merge, stages.promote(merge, "v", None, "command", ""))
            second = merge.state.ledger.models[-1].seq
            assert [seq for seq, _ in releases(hub, "candidate")] == [1, second]
            alarmed(merge, "v")
            stages.take_back(merge, "v")
            out_now(merge, "v", "release")
            assert [seq for seq, _ in releases(hub, "candidate")] == [1, second, 1]
            assert [seq for seq, _ in releases(hub)] == [1]
            commits = len(hub.history(REPO, "candidate"))
            out_now(merge, "v", "release")
            assert len(hub.history(REPO, "candidate")) == commits, "it is back already"
