"""A Hub that is hostile, or broken beyond belief, over real sockets: polls and questions end in time and within memory,
what is good is still taken, nobody is sent our token, and a stop is a stop."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from continual.errors import Abandoned, Refuse, Retry
from continual.hub import Hub as Client
from continual.hub import Trouble, wire
from continual.hub import client as hub_client
from continual.service.watched import wiring_of
from continual.sources import polling
from continual.sources.hub import HubSource
from tests.helpers import hubs, models, services
from tests.helpers.hubs import BASE, made, merge, publish
from tests.loopback import TOKEN, Hub, environment, faults, hostile, serving
from tests.loopback.hostile import row
from tests.loopback.journal import Request

pytestmark = pytest.mark.slow

ASKED = {"watch": True, "bases": (BASE,), "relations": ("finetune",), "settle": 0.0, "poll": 0.05}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a minute, a few seconds."""
    monkeypatch.setattr(wire, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr("continual.hub.line.next_try", lambda *_: None)


def client(hub: Hub, stop: threading.Event | None = None, hurry: threading.Event | None = None) -> Client:
    return Client(endpoint=hub.endpoint, token=TOKEN, stop=stop, hurry=hurry)


def source_of(ours: Any) -> HubSource:
    return HubSource(wiring_of(ours))


ANSWERS = {
    "a head that trickles": hostile.trickled(),
    "a body that trickles": hostile.trickled_body(),
    "a body without an end": hostile.flood(),
    "heads without an end": hostile.heads(),
    "a bomb": hostile.bomb(),
    "a bomb of another kind": hostile.bomb(coding="deflate"),
    "a bomb in an error": hostile.bomb(status=500),
    "a bomb in a redirect": hostile.bomb(status=302, Location="/api/models"),
    "brotli": faults.Status(200, {"Content-Encoding": "br"}, b"\x8b\x02\x80[]\x03"),
    "gzip that is none": faults.Status(200, {"Content-Encoding": "gzip"}, b"[]"),
    "gzip in gzip": faults.Status(200, {"Content-Encoding": "gzip, gzip"}, b"[]"),
    "depth": faults.Status(200, {}, b"[" * 3_000_000),
    "a number of many digits": faults.Status(200, {}, b"[" + b"9" * 1_000_000 + b"]"),
    "less than it says": hostile.Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]"),
    "a length that is none": hostile.Raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n[]"),
    "two lengths": hostile.Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n[]"),
    "no HTTP": hostile.Raw(b"\x16\x03\x01" * 1000),
    "nothing": hostile.Raw(b""),
    "a head of megabytes": hostile.Raw(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 1_000_000),
    "redirected to itself": faults.Status(302, {"Location": "/api/models"}),
    "redirected to a file": faults.Status(302, {"Location": "file:///etc/passwd"}),
    "redirected nowhere": faults.Status(302, {"Location": "http://["}),
    "a limit of many digits": faults.Status(429, {"RateLimit": f'"api";r=0;t={"9" * 400}'}),
    "a wait of many digits": faults.Status(503, {"Retry-After": "9" * 400}),
    "a wait until the year 9999": faults.Status(503, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_listing_that_is_none_ends_in_time_and_spoils_no_other(tmp_path: Path, hub: Hub, kind: str) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with merge(tmp_path / "state", hub, hub=ASKED | {"authors": ("org",), "deny": (BASE,)}) as ours:
        source = source_of(ours)
        hub.faults = lambda r: ANSWERS[kind] if r.path == "/api/models" and "author" not in r.query else None
        begun = time.monotonic()
        with pytest.raises(Retry) as trouble:
            source.poll()
        assert time.monotonic() - begun < 10
        assert "nothing was settled" in str(trouble.value)
        assert trouble.value.after <= 3600.0
        limited = isinstance(trouble.value, Trouble) and trouble.value.fault == "rate limit"
        assert limited or "hub:org/ft@" + hub.head("org/ft") in source.cursor.seen
        hub.faults = None
        source.poll()
        assert "hub:org/ft@" + hub.head("org/ft") in source.cursor.seen
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_gzip_is_read_where_it_unpacks_to_a_listing(tmp_path: Path, hub: Hub) -> None:
    made(tmp_path, hub)
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        hub.faults = hostile.at(
            "/api/models", hostile.packed([row("org/packed", tags=[f"base_model:finetune:{BASE}"])])
        )
        assert source_of(ours).poll() == 1
    assert list(hub.journal)[-1].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("kind", ["numbers", "itself", "circle", "elsewhere", "long"])
def test_pages_without_an_end_end_and_nobody_gets_our_token(
    tmp_path: Path, hub: Hub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "PAGES", 20)
    made(tmp_path, hub)
    tag = [f"base_model:finetune:{BASE}"]
    with serving() as evil, merge(tmp_path / "state", hub, hub=ASKED) as ours:
        links: dict[str, Callable[[int], str]] = {
            "numbers": lambda n: f"/api/models?cursor={n}",
            "itself": lambda _: "/api/models?cursor=same",
            "circle": lambda n: f"/api/models?cursor={n % 3}",
            "elsewhere": lambda n: f"{evil.endpoint}/api/models?cursor={n}",
            "long": lambda n: f"/api/models?cursor={'9' * 20_000}{n}",
        }
        hub.faults = hostile.Endless(links[kind], lambda n: [row(f"evil/m{n}", tags=tag)])
        source = source_of(ours)
        for look in (1, 2):
            with nullcontext() if kind in ("numbers", "elsewhere") else pytest.raises(Trouble):
                source.poll()
            assert len(hub.journal) <= 50 * look
        # the second look goes on where the first one stopped
        assert len(source.cursor.seen) >= {"numbers": 39, "elsewhere": 39, "circle": 3}.get(kind, 1)
        assert len(evil.journal) == 0


def test_a_long_listing_is_read_to_its_end_by_several_looks_and_a_restart(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "PAGES", 3)
    made(tmp_path, hub)
    hub.page_size = 2
    clock = iter(range(1_000_000, 100_000_000, 1000))
    hub.clock = lambda: float(next(clock))
    names = [f"org/m{n:02}" for n in range(20)]
    for name in names:
        hub.commit(name, {"README.md": hubs.card()})
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        seen: set[str] = set()
        for look in range(6):
            source = source_of(ours)  # each as after a restart
            if look == 2:
                hub.commit("org/new", {"README.md": hubs.card()})
            source.poll()
            seen = {sighting.repo for sighting in source.cursor.seen.values()}
            assert look < 3 or "org/new" in seen
        assert seen == {*names, "org/new"}
        assert source.cursor.rests == {}
        assert list(source.cursor.swept) == [f"base_model:finetune:{BASE}"]


def test_a_rest_that_is_too_old_is_read_anew(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "PAGES", 2)
    made(tmp_path, hub)
    hub.page_size = 1
    for n in range(6):
        hub.commit(f"org/m{n}", {"README.md": hubs.card()})
    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        source = source_of(ours)
        source.poll()
        assert source.cursor.rests
        hub.faults = lambda r: faults.Status(400) if "cursor" in r.query else None
        with pytest.raises(Trouble):
            source.poll()
        hub.faults = None
        monkeypatch.setattr(polling, "PAGES", 20)
        source.poll()
        assert len(source.cursor.seen) == 6


def test_repos_that_do_not_fit_get_a_record_or_a_note_and_the_others_are_folded(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    good = publish(hub, "org/good", models.fine_tune(base, tmp_path / "ft", 1))
    bad = publish(hub, "org/bad", models.fine_tune(base, tmp_path / "bad", 2))

    def spoil(rows: Any) -> Any:
        if isinstance(rows, list):
            spoiled = [r | {"tags": None} if r["id"] == "org/bad" else r for r in rows]
            return [row("../.."), row("evil/\ud800"), row("evil/sha", sha="x"), *spoiled]
        return rows | {"siblings": [{"rfilename": "../x", "size": "1"}]} if rows["id"] == "org/bad" else rows

    with merge(tmp_path / "state", hub, hub=ASKED) as ours:
        hub.faults = lambda r: hostile.changed(spoil) if r.path.startswith("/api/models") else None
        source = source_of(ours)
        source.poll()
        assert {s.repo: s.sha for s in source.cursor.seen.values()} == {"org/good": good, "org/bad": bad}
        assert len(source.notes()) == 2  # those without a name share one
        assert any("evil/sha" in note and "hash of a commit" in note for note in source.notes())
        fates = {}
        for event in source.ready():
            outcome = ours.fold(event)
            fates[outcome.name] = (outcome.fate, outcome.reason)
        assert fates == {"org/good": ("folded", None), "org/bad": ("refused", "malformed")}
        assert "../x" in ours.state.ledger.refusals[-1].entry.message
        for note in source.notes():
            note.encode()


def test_a_named_repo_that_does_not_fit_gets_a_record(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/bad", models.fine_tune(base, tmp_path / "bad", 2))
    with merge(tmp_path / "state", hub, hub={"repos": ("org/bad", "org/none"), "settle": 0.0}) as ours:
        hub.faults = hostile.at("/api/models/org/bad", hostile.changed(lambda one: one | {"private": "no"}))
        source = source_of(ours)
        (event,) = source.ready()
        assert ours.fold(event).reason == "malformed"
        assert any("org/none" in note for note in source.notes())


def test_a_redirect_to_another_host_goes_there_without_the_token(tmp_path: Path, hub: Hub) -> None:
    base = made(tmp_path, hub)
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    with serving() as evil:
        elsewhere = faults.Status(307, {"Location": f"{evil.endpoint}/api/models/org/ft?blobs=true"})
        hub.faults = hostile.at("/api/models/org/ft", elsewhere)
        with pytest.raises(Refuse, match="not on the Hub"):
            client(hub).info("org/ft")
        assert len(evil.journal) == 1
        assert "authorization" not in next(iter(evil.journal)).headers


def test_a_tree_whose_pages_have_no_end_and_nothing_in_them(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "_TREE", 20)

    def faulty(request: Request) -> faults.Fault | None:
        if "/tree/" not in request.path:
            return hostile.said(row("org/ft", siblings=[{"rfilename": "model.safetensors"}]))
        return hostile.said([], Link=f'<{request.path}?cursor={len(list(hub.journal))}>; rel="next"')

    hub.faults = faulty
    with pytest.raises(Refuse, match="the list of its files has no end") as refusal:
        client(hub).info("org/ft")
    assert refusal.value.reason == "malformed"
    assert len(list(hub.journal)) == 21


@pytest.mark.parametrize("kind", ["a head that trickles", "a body that trickles", "a body without an end"])
@pytest.mark.parametrize("how", ["stop", "hurry"])
def test_every_wait_ends_when_continual_stops(hub: Hub, kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ANSWER_SECONDS", 60.0)
    if how == "hurry" and kind == "a body without an end":
        return  # it brings bytes enough, and ends by their number
    hub.faults = lambda _: ANSWERS[kind]
    event = threading.Event()
    asked = client(hub, **{how: event})
    calls: list[Callable[[], object]] = [
        lambda: asked.info("org/ft"),
        lambda: asked.ask("it", lambda: asked.api.list_repo_refs("org/ft")),
    ]
    for call in calls:
        event.clear()
        threading.Timer(0.3, event.set).start()
        begun = time.monotonic()
        with pytest.raises((Abandoned, Trouble)):
            call()
        assert time.monotonic() - begun < 5.0


@pytest.mark.parametrize("what", ["the listing", "a tensor"])
def test_the_daemon_ends_soon_after_a_signal_while_a_server_trickles(tmp_path: Path, hub: Hub, what: str) -> None:
    base = made(tmp_path, hub)
    (tmp_path / "in").mkdir()
    publish(hub, "org/ft", models.fine_tune(base, tmp_path / "ft", 1))
    slow: list[Request] = []

    def trickle(request: Request) -> faults.Fault | None:
        listing = request.path == "/api/models"
        if listing if what == "the listing" else request.origin == "cdn":
            slow.append(request)
            return hostile.trickled_body() if listing else faults.Slow(10.0)
        return None

    hub.faults = trickle
    flags = ("--hub", "watch=true", "--hub", f"bases={BASE}", "--hub", "settle=0", "--drain", "60")
    env = environment(hub, tmp_path)
    with services.daemon(tmp_path / "state", tmp_path / "in", *flags, environment=env) as process:
        address = services.url(process, tmp_path / "state")
        services.until(lambda: slow, "the Hub trickles")
        begun = time.monotonic()
        assert services.get(f"{address}/healthz")[0] == 200
        assert time.monotonic() - begun < 5.0
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - begun < 15.0  # a second or two on a machine that does nothing else
    log = (tmp_path / "daemon.log").read_text()
    assert "Traceback" not in log
