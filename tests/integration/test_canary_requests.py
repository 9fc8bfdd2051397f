"""Canaries that wait in a pull request on the Hub: opened once, merged or closed there by a person, or here."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.api import Merge
from continual.config import Settings
from continual.errors import Misconfigured
from continual.service import release as releasing
from continual.service import view_settings
from continual.service.canary import reporting, stages
from continual.service.outgoing import outgoing
from continual.state import State
from continual.state.canaries import CanaryRecord
from continual.state.entries import CanaryEntry, RollbackEntry
from continual.state.parts import Evaluated
from tests.helpers import hubs, models
from tests.helpers.command import machine, run
from tests.helpers.released import REPO, releases
from tests.helpers.services import daemon, get, status, until, url
from tests.loopback import Hub, environment, faults, serving
from tests.loopback.repos import PullRequest

pytestmark = pytest.mark.slow
ASKED = {"release": {"repo": REPO, "canary": {"request": True}}}


def requests(hub: Hub) -> list[PullRequest]:
    return list(hub.repo(REPO).requests.values())


def begun(merge: Merge) -> CanaryRecord:
    """The newest record as a canary, whose pull request is open."""
    step = stages.step(merge, None, merge.state.ledger.models[-1].seq)
    assert step is not None
    assert step.out.request
    record = merge.state.canaries.get(None)
    assert record is not None
    reporting.propose(merge, record)
    found = stages.done(merge, None, "release", record.seq, "goes out")
    assert found is not None
    assert found.phase == "watched"
    return found


def test_a_request_is_opened_once_whatever_is_cut_off_and_says_what_is_new(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, **ASKED) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "ali|ce <b>", 1))
            stages.step(merge, None, 1)
            record = merge.state.canaries.get(None)
            assert record is not None
            hub.faults = faults.Times(faults.Drop(0), 1, path="/commit/")  # made, and nobody hears of it
            begun(merge)
            assert len(requests(hub)) == 1
            again = reporting.propose(merge, record)
            assert (again.new, again.branch, len(requests(hub))) == (False, "refs/pr/1", 1)
            (pull,) = requests(hub)
            assert (pull.status, releases(hub)) == ("open", [])
            assert "in place of the base: 1 model more, 0 fewer, 1 in all" in pull.description
            assert "### ali\\|ce \\<b\\>" in pull.description
            commit = hub.repo(REPO).find("refs/pr/1")
            assert commit is not None
            assert {"README.md", "continual.json", "model.safetensors"} <= commit.files.keys()
            (shown,) = machine("status", "--state", tmp_path / "state")["canaries"]
            assert shown["seq"] == 1


def test_merging_there_promotes_and_closing_there_takes_back(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, **ASKED) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
            record = begun(merge)
            assert stages.ask_request(merge, record) is None
            merged = hub.merge(REPO, 1)
            found = stages.ask_request(merge, record)
            assert found is not None
            assert (found.phase, found.by) == ("promoted", "hub")
            assert found.why == f"pull request 1 of {REPO} was merged"
            before = len(hub.history(REPO))
            stages.finish(merge, found)
            assert (len(hub.history(REPO)), hub.head(REPO)) == (before, merged), "nobody commits it again"
            assert hub.repo(REPO).tags == {"record-1": merged}
            assert stages.is_promoted(merge, outgoing(merge.settings), 1)
            merge.fold(models.fine_tune(base, tmp_path / "b", 2))
            record = begun(merge)
            hub.discuss(REPO, 2, status="closed")
            found = stages.ask_request(merge, record)
            assert found is not None
            assert (found.phase, found.why) == ("failed", f"pull request 2 of {REPO} was closed")
            stages.take_back(merge, None)
            assert [fold.entry.candidate.name for fold in merge.state.ledger.folds()] == ["a"]


def test_promoting_here_merges_it_and_taking_back_closes_it_with_the_reason(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, **ASKED) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
            begun(merge)
            stages.finish(merge, stages.promote(merge, None, None, "command", ""))
            assert [pull.status for pull in requests(hub)] == ["merged"]
            assert [seq for seq, _ in releases(hub)] == [1]
            merge.fold(models.fine_tune(base, tmp_path / "b", 2))
            record = begun(merge)
            merge.fold(models.fine_tune(base, tmp_path / "c", 3))
            merge.state.canaries.change(None, lambda before: before.decided("failed", "metric", "query q: 9"))
            stages.take_back(merge, None)
            step = stages.step(merge, None, merge.state.ledger.models[-1].seq)
            assert step is not None
            assert releasing.close_requests(merge, step.out, step.seq, "query q: 9") == [record.request]
            assert releasing.close_requests(merge, step.out, step.seq, "query q: 9") == []
            assert (requests(hub)[1].status, requests(hub)[1].comments[-1][1]) == ("closed", "query q: 9")
            hub.propose(REPO, {"x": b"y"}, "Record 7 of somebody else")
            assert releasing.close_requests(merge, step.out, step.seq, "no") == [], "it is not ours"


def test_a_copy_of_our_request_by_somebody_else_is_none_of_ours(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, **ASKED) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
            record = begun(merge)
            ours = hub.repo(REPO).find("refs/pr/1")
            assert ours is not None
            copied = {"continual.json": hub.read(REPO, ours.sha, "continual.json"), "model.safetensors": b"evil"}
            forged = hub.propose(REPO, copied, requests(hub)[0].title, author="mallory")
            again = reporting.propose(merge, record)
            assert (again.branch, forged) == ("refs/pr/1", 2)
            found = merge.state.canaries.get(None)
            assert found is not None
            assert found.request == 1
            step = stages.step(merge, None, 1)
            assert step is not None
            assert releasing.close_requests(merge, step.out, 1, "no") == [1], "theirs is not ours to close"


def test_the_report_has_the_metrics_of_both_on_the_same_rows(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        with hubs.merge(tmp_path / "state", hub, **ASKED) as merge:
            merge.fold(models.fine_tune(base, tmp_path / "a", 1))
            (fold,) = merge.state.ledger.folds()
            found = Evaluated({"acc|x": 0.75, "new": 0.5}, {"acc|x": 0.5})
            object.__setattr__(fold.entry.numbers, "evaluated", found)
            said = reporting.report(merge, outgoing(merge.settings), 1)
    assert "| metric | before | with it |\n|---|---|---|\n| acc\\|x | 0.5 | 0.75 |\n| new |  | 0.5 |" in said
    wrong = Settings.model_validate({"current": "c", "release": {"canary": {"request": True}}})
    with pytest.raises(Misconfigured, match="a pull request is to the branch main"):
        view_settings.check(wrong)


def test_a_daemon_hears_of_a_merge_by_a_webhook_at_once_and_by_asking(tmp_path: Path) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub)
        (tmp_path / "in").mkdir()
        state, file = tmp_path / "state", tmp_path / "c.toml"
        file.write_text(f'webhook_secret = "s3cret"\n[release]\nrepo = "{REPO}"\n[release.canary]\nrequest = true\n')
        env = environment(hub, tmp_path)
        models.fine_tune(base, tmp_path / "in/alice", 1)
        with daemon(state, tmp_path / "in", "--config", str(file), environment=env) as process:
            address = url(process, state)
            until(lambda: status(address)["canaries"] and status(address)["canaries"][0]["since"], "it is proposed")
            assert f"{REPO}/discussions/1" in get(f"{address}/")[1]
            hub.webhooks = [(f"{address}/webhook", "s3cret")]
            hub.merge(REPO, 1)
            assert hub.deliver() == [202]
            until(lambda: not status(address)["canaries"], "it is promoted long before it would be asked for")
            models.fine_tune(base, tmp_path / "in/bob", 2)
            until(lambda: len(requests(hub)) == 2 and status(address)["canaries"][0]["since"], "the next")
            assert "is promoted by the daemon" in run("promote", "--state", state).stdout
            until(lambda: requests(hub)[1].status == "merged", "it is merged")
            until(lambda: not status(address)["canaries"], "and done")
        with State.open(state) as opened:
            found = [c.entry.canary.by for c in opened.ledger.log if isinstance(c.entry, CanaryEntry)]
            assert not [c for c in opened.ledger.log if isinstance(c.entry, RollbackEntry)]
    assert found == ["hub", "command"]
    assert len(releases(hub)) == 2
