"""A source of a new kind, as a contributor adds one: a module (here), and a row in the list. Everything else follows:
its table in the settings, one look, the daemon, what the status and the page say, a route, a series, its own scheme.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import continual
from continual.api import Merge
from continual.cli.status import text
from continual.config import Settings, load
from continual.errors import Misconfigured
from continual.hub.locate import Opener
from continual.records import Event
from continual.service import once
from continual.service.asking import ask
from continual.service.daemon import Daemon, check
from continual.service.watched import sources_of
from continual.service.web import listen
from continual.sources import roster
from continual.sources.contract import Source, SourceKind, SourceReport, Wiring, table_of
from continual.tensors import Folder, Place
from tests.helpers import models, services

pytestmark = pytest.mark.slow

# --- The module: letters that name models on a shelf


class PostSettings(BaseModel):
    """`[sources.post]`: where the letters lie, and the shelf that they speak of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    box: Path
    shelf: Path
    every: float = 0.05


class PostSource(Source):
    """Letters in a box, each with the name of a model on the shelf; one that is settled is thrown away."""

    name = "post"
    parks = False

    def __init__(self, asked: PostSettings) -> None:
        self.asked = asked
        self.scanned = asyncio.Event()
        self.problem: str | None = None
        self.done: list[str | None] = []

    async def events(self, stop: asyncio.Event) -> AsyncIterator[Event]:
        while not stop.is_set():
            for event in self.ready():
                yield event
            self.scanned.set()
            await asyncio.sleep(self.asked.every)

    def ready(self) -> list[Event]:
        letters = sorted(self.asked.box.glob("*.letter"))
        return [
            Event("post", f"shelf://{letter.read_text()}", (letter.stat().st_mtime_ns, letter.name))
            for letter in letters
        ]

    def settled(self, event: Event, key: str | None) -> None:
        self.done.append(key)
        for letter in self.asked.box.glob("*.letter"):
            if letter.read_text() == event.name:
                letter.unlink()

    def report(self) -> SourceReport:
        return SourceReport((str(self.asked.box),), problem=self.problem, seen=len(self.ready()))

    def notes(self) -> list[str]:
        return [f"{left}: is no letter" for left in sorted(self.asked.box.glob("*.txt"))]

    def routes(self) -> list[Route]:
        async def post(request: Request) -> PlainTextResponse:
            name = request.path_params["name"]
            written = self.asked.box / f"{name}.written"
            written.write_text(name)
            written.rename(written.with_suffix(".letter"))
            return PlainTextResponse("posted", 202)

        return [Route("/post/{name}", post, methods=["POST"])]


def opener(settings: Settings) -> Opener:
    shelf = table_of(settings, "post", PostSettings).shelf

    def found(origin: str, _revision: str | None, source: str) -> Place:
        return OnShelf(shelf / origin.removeprefix("shelf://"), shelf, source)

    return found


class OnShelf(Folder):
    """A model on the shelf."""

    def __init__(self, path: Path, root: Path, source: str) -> None:
        super().__init__(path, root, source)
        self.origin = f"shelf://{path.name}"


def make(wiring: Wiring) -> list[PostSource]:
    return [PostSource(table_of(wiring.settings, "post", PostSettings))]


# --- The row

ROW = SourceKind(name="post", title="the post", make=make, table=PostSettings, scheme="shelf", opener=opener)


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "KINDS", (*roster.KINDS, ROW))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    base = models.base(tmp_path / "base")
    continual.init(base, tmp_path / "state", continual.Recipe(rule="mean"))
    for name in ("box", "shelf"):
        (tmp_path / name).mkdir()
    for seed, name in enumerate(("alice", "bob"), 1):
        models.fine_tune(base, tmp_path / "shelf" / name, seed)
    (tmp_path / "continual.toml").write_text(
        f'state = "{tmp_path / "state"}"\nport = 0\n[sources.post]\nbox = "{tmp_path / "box"}"\nshelf = "nowhere"\n'
    )
    return load({"sources": [f"post.shelf={tmp_path / 'shelf'}"]}, file=tmp_path / "continual.toml", environ={})


def folded(merge: Merge) -> list[str]:
    return [fold.entry.candidate.origin for fold in merge.state.ledger.folds()]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"post": {"box": "b"}}, r"sources\.post\.shelf"),
        ({"post": {"box": "b", "shelf": "s", "every": "often"}}, r"sources\.post\.every = 'often'"),
        ({"post": {"box": "b", "shelf": "s", "colour": "red"}}, r"sources\.post\.colour"),
        ({"pigeons": {}}, r"sources\.pigeons: there is no such source.*post"),
    ],
)
def test_its_settings_are_a_table_and_wrong_ones_are_named(tables: dict[str, object], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        check(Settings.model_validate({"sources": tables}))


def test_one_look_takes_what_it_gives_and_the_record_can_be_opened_again(tmp_path: Path, settings: Settings) -> None:
    check(settings)
    (tmp_path / "box/1.letter").write_text("alice")
    with Merge(settings, write=True) as merge:
        sources = once.watched(merge)
        (seen,) = once.survey(merge, sources)
        assert (seen.model, seen.origin, seen.source, seen.take) == ("alice", "shelf://alice", "post", True)
        (tried,) = once.once(merge, sources)
        assert tried.outcome is not None
        assert tried.outcome.fate == "folded"
        assert list((tmp_path / "box").iterdir()) == []
        assert merge.look_unfold("alice").name == "alice"
        assert folded(merge) == ["shelf://alice"]
    with Merge(settings.model_copy(update={"sources": {}})) as merge, pytest.raises(Misconfigured, match="shelf://"):
        merge.places.seen(Event("post", "shelf://bob"))


def test_the_daemon_folds_shows_and_serves_it(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "box/1.letter").write_text("alice")
    (tmp_path / "box/<i>.txt").write_text("an advertisement")
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    told: dict[str, object] = {}

    def visit() -> None:
        """What a visitor sees, on a thread beside the daemon, who is then asked to stop."""
        try:
            address = services.until(lambda: daemon.live.url, "it listens")
            services.until(lambda: services.status(address)["folds"] == 1, "the letter is answered")
            request = urllib.request.Request(f"{address}/post/bob", method="POST")
            with urllib.request.urlopen(request, timeout=20) as answer:
                told["posted"] = answer.status
            services.until(lambda: services.status(address)["folds"] == 2, "what was posted is folded")
            told["status"] = ask(settings.state)
            told["page"] = services.get(address)[1]
            told["ready"] = services.get(f"{address}/readyz")[0]
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with Merge(settings, write=True) as merge:
        (source,) = sources_of(merge)
        daemon = Daemon(merge, listen("127.0.0.1", 0, allow_remote=False), [source])
        visitor = threading.Thread(target=visit)
        visitor.start()
        asyncio.run(daemon.run())
        visitor.join()
        assert daemon.halted is None
        assert folded(merge) == ["shelf://alice", "shelf://bob"]
    assert {number: signal.getsignal(number) for number in before} == before, "the handlers of before are back"
    signal.signal(signal.SIGTERM, mine)
    assert isinstance(source, PostSource)
    assert [key is not None for key in source.done] == [True, True]
    body = told["status"]
    assert isinstance(body, dict)
    assert body["post"] == {
        "bases": [str(tmp_path / "box")],
        "polled": None,
        "problem": None,
        "seen": 0,
        "title": "the post",
    }
    assert body["hub"] is None
    assert "watching the post" in text(body)
    assert f"post       {tmp_path / 'box'}; not asked yet, 0 open" in text(body)
    assert body["notes"] == [f"{tmp_path / 'box/<i>.txt'}: is no letter"]
    assert f"note       {tmp_path / 'box/<i>.txt'}: is no letter" in text(body)
    page = str(told["page"])
    assert "/&lt;i&gt;.txt: is no letter" in page
    assert ">Post</h2>" in page
    assert "watching the post" in page
    assert (told["posted"], told["ready"]) == (202, 200)


def test_an_event_that_repeats_while_it_is_folded_is_not_queued_again(tmp_path: Path, settings: Settings) -> None:

    (tmp_path / "box/1.letter").write_text("alice")
    held = threading.Event()
    with Merge(settings, write=True) as merge:
        (source,) = sources_of(merge)
        daemon = Daemon(merge, listen("127.0.0.1", 0, allow_remote=False), [source])
        progress = daemon.live.progress
        seen: list[int] = []

        def slow(stage: str, done: int, total: int) -> None:
            """Holds the fold until the source has given its model many times over."""
            progress(stage, done, total)
            if stage == "fold" and not held.is_set():
                held.wait(0.5)
                seen.append(len(daemon.live.queue.waiting))
                held.set()

        daemon.live.progress = slow  # type: ignore[method-assign]
        stopper = threading.Thread(target=lambda: stop_when(lambda: len(folded(merge)) == 1))
        stopper.start()
        asyncio.run(daemon.run())
        stopper.join()
        assert seen == [0], "it was given ten times meanwhile"
        assert folded(merge) == ["shelf://alice"]


def test_what_its_environment_keeps_from_being_read_is_tried_again_and_is_no_end(
    tmp_path: Path, settings: Settings
) -> None:
    (tmp_path / "box/1.letter").write_text("carol")  # who is not on the shelf yet
    with Merge(settings, write=True) as merge:
        (source,) = sources_of(merge)
        assert isinstance(source, PostSource)
        daemon = Daemon(merge, listen("127.0.0.1", 0, allow_remote=False), [source])

        def comes() -> bool:
            tried = b"continual_retries_total 0.0" not in daemon.metrics.text()
            if tried and not (tmp_path / "shelf/carol").exists():
                assert source.done == []
                (tmp_path / "shelf/bob").rename(tmp_path / "shelf/carol")
            return folded(merge) == ["shelf://carol"]

        stopper = threading.Thread(target=lambda: stop_when(comes))
        stopper.start()
        asyncio.run(daemon.run())
        stopper.join()
        assert daemon.halted is None
        assert folded(merge) == ["shelf://carol"]
        assert merge.state.ledger.refusals == []


def stop_when(true: Callable[[], bool]) -> None:
    try:
        services.until(true, "the fold")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
