"""The source that polls the Hub, in this process: what it gives, when it is told what became of it, and what it holds
against."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from continual import making
from continual.api import Merge
from continual.config import load
from continual.errors import Misconfigured, Retry
from continual.records import Event
from continual.service import once as watching
from continual.service.daemon import check
from continual.service.once import Tried
from continual.service.watched import wiring_of
from continual.sources.hub import HubSource
from continual.state.inbox import PushRecord
from tests.helpers import hubs, models
from tests.helpers.hubs import BASE, made, merge, publish
from tests.loopback import Account, Hub, faults, serving

pytestmark = pytest.mark.slow

ASKED = {"watch": True, "bases": (BASE,), "settle": 0.0, "poll": 0.05}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def take(ours: Merge, source: HubSource, count: int) -> list[Event]:
    """The next events, each folded; and the source told."""

    async def drive() -> list[Event]:
        stop, found = asyncio.Event(), []
        async with asyncio.timeout(30):
            async for event in source.events(stop):
                found.append(event)
                outcome = await asyncio.to_thread(ours.fold, event)
                source.settled(event, outcome.key)
                if len(found) == count:
                    stop.set()
        source.forget()
        return found

    return asyncio.run(drive())


def source_of(ours: Merge) -> HubSource:
    """The Hub as a source of this state, as another process would make it."""
    return HubSource(wiring_of(ours))


def once(ours: Merge) -> list[Tried]:
    return list(watching.once(ours, watching.watched(ours)))


def folded(ours: Merge) -> list[str]:
    return [c.entry.candidate.name for c in ours.state.ledger.folds()]


def test_what_is_there_what_comes_and_what_was_seen_before_a_restart(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    for i, name in enumerate(("one", "two")):
        publish(hub, f"org/{name}", models.fine_tune(base, tmp_path / name, i))
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        assert [e.origin for e in take(ours, source_of(ours), 2)] == ["hf://org/one", "hf://org/two"]
        assert source_of(ours).poll() == 0
        publish(hub, "org/three", models.fine_tune(base, tmp_path / "three", 3))
        assert source_of(ours).poll() == 1
        hub.delete("org/three")  # seen, and gone before it was looked at: the next process knows of it
        (event,) = take(ours, source_of(ours), 1)
        assert event.origin == "hf://org/three"
        assert ours.state.ledger.refusals[-1].entry.reason == "gone"
        assert folded(ours) == ["org/one", "org/two"]


def test_a_commit_that_is_superseded_brings_the_one_that_came_after(tmp_path: Path, hub: Hub) -> None:
    """As where the push of the newer commit is lost, and nothing is polled."""
    base = made(tmp_path, hub)
    first = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    with merge(tmp_path / "state", hub, hub={"bases": (BASE,), "settle": 0.0}) as ours:
        source = source_of(ours)
        source.inbox.put("a" * 32, PushRecord("org/ft", first, 1.0))
        second = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "b", 2))
        assert ours.fold(Event("webhook", "hf://org/ft", (1, ""), None, first)).reason == "superseded"
        source = source_of(ours)  # as after a kill right here
        assert [e.revision for e in take(ours, source, 1)] == [second]
        assert ours.state.ledger.refusals[-1].entry.reason == "superseded"
        assert folded(ours) == ["org/ft"]
        assert source.inbox.items() == {}


def test_a_hub_that_lags_supersedes_nothing(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    newer = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "b", 2))
    real = hub.state

    def lagging(ago: int = 0) -> Any:
        return real(ago + 1)

    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        event = Event("hub", "hf://org/ft", (1, ""), None, newer)
        hub.on_request = lambda request: setattr(
            hub, "state", real if "/revision/" in request.path or "commits" in request.path else lagging
        )
        with pytest.raises(Retry, match="older commit"):
            ours.fold(event)
        hub.on_request = None
        hub.state = real  # type: ignore[method-assign]
        assert ours.fold(event).fate == "folded"


def test_retry_reads_the_commit_that_it_was(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    hub.tokens["stranger"] = Account("stranger")
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    hub.gate("org/ft")
    with merge(tmp_path / "state", hub, token="stranger", hub=ASKED) as ours:
        assert take(ours, source_of(ours), 1)[0].revision == sha
        assert ours.state.ledger.refusals[-1].entry.reason == "gated"
        ours.retry("org/ft")
        hub.admit("stranger", "org/ft")
        hub.commit("org/ft", {"README.md": hubs.card(license="mit")})
        events = take(ours, source_of(ours), 1)
        assert (events[0].source, events[0].revision) == ("retry", sha)
        (fold,) = ours.state.ledger.folds()
        assert fold.entry.candidate.source == "hub"


def _longer(tensors: dict[str, Any]) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:-2].clone()


def test_a_changed_setting_has_what_it_refused_looked_at_again(tmp_path: Path, hub: Hub) -> None:
    """No listing shows these commits as new again. One after which another came gives way to that."""
    base = made(tmp_path, hub)
    for i, name in enumerate(("org/ft", "org/moved")):
        publish(hub, name, models.fine_tune(base, tmp_path / name, i, change=_longer))
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        assert {t.outcome.reason for t in once(ours) if t.outcome} == {"vocab"}
        assert (once(ours), ours.standing.reopened()) == ([], [])
    hub.commit("org/moved", {"README.md": hubs.card()})
    with merge(tmp_path / "state", hub, hub=ASKED, vocab="common-rows") as ours:
        assert len(ours.standing.reopened()) == 2
        while once(ours):
            pass
        assert folded(ours) == ["org/ft", "org/moved"]
        reasons = [refusal.entry.reason for refusal in ours.state.ledger.refusals]
        assert reasons == ["vocab", "vocab", "superseded"]


def test_what_the_settings_of_the_hub_leave_out_by_now_stays_out(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1, change=_longer))
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        take(ours, source_of(ours), 1)
    with merge(tmp_path / "state", hub, hub=ASKED | {"deny": ("org/ft",)}, vocab="common-rows") as ours:
        assert len(ours.standing.reopened()) == 1
        assert once(ours) == []
        assert folded(ours) == []


def test_a_source_that_runs_takes_up_what_a_changed_setting_lets_in(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with merge(tmp_path / "state", hub, hub=ASKED, max_base_ratio=1e-9) as ours:
        source = source_of(ours)
        take(ours, source, 1)
        assert folded(ours) == []
        ours.settings = ours.settings.model_copy(update={"max_base_ratio": 0.5})
        source.reopen(ours.standing.reopened())
        assert [e.source for e in take(ours, source, 1)] == ["hub"]
        assert folded(ours) == ["org/ft"]
        source.reopen(ours.standing.reopened())
        assert len(source.cursor.seen) == 0


def test_other_settings_find_what_was_passed_over(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    publish(hub, "org/late", models.fine_tune(base, tmp_path / "b", 2))
    with merge(tmp_path / "state", hub, hub=ASKED | {"deny": ("org/ft",)}) as ours:
        assert [t.model for t in once(ours)] == ["org/late"]
        assert once(ours) == []
    hub.clock = lambda: 4e9  # long after: an ordinary poll would stop before it
    publish(hub, "org/newest", models.fine_tune(base, tmp_path / "c", 3))
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        assert {t.model for t in once(ours)} == {"org/ft", "org/newest"}


def test_trouble_of_every_kind_is_survived(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.retrying.FIRST_WAIT", 0.01)
    base = made(tmp_path, hub)
    publish(hub, "org/evil", models.fine_tune(base, tmp_path / "evil", 5))
    hub.commit("org/evil", {"continual.json": b"[" * 200_000})
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    with merge(tmp_path / "state", hub, hub=ASKED | {"repos": ("org/none",)}) as ours:
        source = source_of(ours)
        for fault in (
            faults.Status(404),
            faults.Status(200, {}, b"<html>"),
            faults.Status(200, {}, b"[1]"),
            faults.Status(403),
            faults.Drop(),
        ):
            hub.faults = faults.Times(fault, 99, path="^/api/models$")
            with pytest.raises(Retry):
                source.poll()
        hub.faults = faults.Times(faults.Status(302), 1, path="/resolve/")  # without a Location
        assert {e.name for e in take(ours, source, 2)} == {"org/evil", "org/ft"}
        assert sorted(folded(ours)) == ["org/evil", "org/ft"]
        assert any(
            s.model == "org/none" and "not on the Hub" in s.why for s in watching.survey(ours, watching.watched(ours))
        )


def test_a_token_that_is_refused_is_told_of_and_polling_goes_on(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        hub.faults = faults.Times(faults.Status(401), 2)
        source = source_of(ours)
        told: list[bool] = []

        async def drive() -> None:
            stop = asyncio.Event()
            async for _ in source.events(stop):
                stop.set()

        async def look() -> None:
            driven = asyncio.create_task(drive())
            while not source.denied:
                await asyncio.sleep(0)
            told.append("HF_TOKEN" in str(source.problem))
            await driven

        asyncio.run(look())
        assert told == [True]
        assert (source.denied, source.problem) == (False, None)


def test_a_renamed_repo_is_the_same_repo(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/old", models.fine_tune(base, tmp_path / "a", 1))
    hub.move("org/old", "org/new")
    with merge(tmp_path / "state", hub, hub={"repos": ("org/old",), "settle": 0.0}) as ours:
        assert [t.outcome.name for t in once(ours) if t.outcome] == ["org/new"]
        publish(hub, "org/new", models.fine_tune(base, tmp_path / "b", 2))
        (tried,) = once(ours)
        assert tried.outcome is not None
        assert tried.outcome.reason == "update"


def test_a_newer_commit_takes_the_place_of_the_one_that_waits(tmp_path: Path, hub: Hub) -> None:
    from tests.helpers import pools, quadratic

    base = quadratic.world(tmp_path)
    client = hubs.Client(endpoint=hub.endpoint, token=hubs.hubs.TOKEN)
    with pools.opened(tmp_path / "state", base, client=client, hub={"repos": ("org/ft",), "settle": 0.0}) as ours:
        for i in range(2):
            sha = publish(hub, "org/ft", quadratic.good(base, i))
            assert ours.fold(Event("hub", "hf://org/ft", (1, ""), None, sha)).fate == "deferred"
        assert [w.candidate.revision for w in ours.pool().values()] == [sha]
        assert ours.state.ledger.refusals[-1].entry.reason == "superseded"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"hub": ["repos=org/a b"]}, "no repo"),
        ({"hub": ["authors=org/x"]}, "no user"),
        ({"hub": ["watch=true"]}, r"hub\.bases"),
        ({"hub": ["watch=true", "bases=o/b", "since=soon"]}, r"hub\.since"),
    ],
)
def test_settings_that_find_nothing_are_told_of(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    making.init(models.base(tmp_path / "base"), tmp_path / "state", making.Recipe(rule="mean"))
    with (
        Merge(load({"state": tmp_path / "state", **flags}, environ={})) as ours,
        pytest.raises(Misconfigured, match=words),
    ):
        watching.watched(ours)


def test_an_empty_secret_is_none_and_repos_may_have_the_scheme() -> None:
    found = load({"hub": ["repos=hf://org/a,org/b"]}, environ={"CONTINUAL_WEBHOOK_SECRET": ""})
    assert found.webhook_secret is None
    assert found.hub.repos == ("org/a", "org/b")
    with pytest.raises(Misconfigured, match="nothing to watch"):
        check(load({}, environ={"CONTINUAL_WEBHOOK_SECRET": ""}))
    assert "s3cret" not in repr(load({}, environ={"CONTINUAL_WEBHOOK_SECRET": "s3cret"}))


def test_one_look_takes_the_pushes_that_wait_where_only_webhooks_are_taken(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    sha = publish(hub, "org/ft", models.fine_tune(base, tmp_path / "a", 1))
    asked = {"hub": {"bases": (BASE,), "settle": 0.0}, "webhook_secret": "s3cret"}
    with merge(tmp_path / "state", hub, **asked) as ours:
        source_of(ours).inbox.put("a" * 32, PushRecord("org/ft", sha, 1.0))
        assert [tried.model for tried in once(ours)] == ["org/ft"]
        assert folded(ours) == ["org/ft"]
        assert source_of(ours).inbox.items() == {}
