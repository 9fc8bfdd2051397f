"""What an open page hears: something new once, how far a fold is, nothing twice; and what a stream may not do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from continual import api, making
from continual.config import Settings
from continual.records import Event
from continual.service.queue import Queue
from continual.service.status import Live
from continual.service.web import events
from continual.service.web.events import Events
from continual.sources.folder import FolderSource
from tests.helpers import models


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        yield Live(merge, Queue(), clock=lambda: 0.0)


def asked(query: str = "", last: str | None = None) -> Request:
    headers = [] if last is None else [(b"last-event-id", last.encode())]
    scope = {"type": "http", "method": "GET", "path": "/events", "query_string": query.encode(), "headers": headers}
    return Request(scope)


async def heard(answer: Response) -> list[str]:
    """All that a stream says until it ends."""
    assert isinstance(answer, StreamingResponse)
    return [str(bytes(part), "ascii") async for part in answer.body_iterator]  # type: ignore[arg-type]


def test_a_page_hears_of_what_is_new_and_of_nothing_twice(live: Live, tmp_path: Path) -> None:
    async def run() -> None:
        told = Events(live.stamp, live, life=0.06, every=0.01)
        old = live.stamp()
        quiet = await heard(await told.answer(asked(f"stamp={old}")))
        assert quiet == ["retry: 1000\n\n"], "the page shows all of it"
        live.merge.fold(models.fine_tune(tmp_path / "base", tmp_path / "alice", 1))
        new = live.stamp()
        once = await heard(await told.answer(asked(f"stamp={old}")))
        assert once[1:] == [f"id: {new}\nevent: change\ndata: {new}\n\n"]
        assert await heard(await told.answer(asked(f"stamp={old}", last=new))) == quiet, "the next stream goes on"

    asyncio.run(run())


@pytest.mark.parametrize("change", ["queue", "try", "paused", "ending", "wrong", "command"])
def test_the_stamp_is_another_one_after_whatever_can_be_seen(live: Live, change: str) -> None:
    source = FolderSource(Path("/in"))
    live.queue.put(Event("folder", "/in/alice"), source)
    before = live.stamp()
    if change == "queue":
        live.queue.put(Event("folder", "/in/bob"), source)
    elif change == "try":
        taken = live.queue.take(0.0)
        assert taken is not None
        live.queue.again(taken, 0.0)
    elif change == "paused":
        live.paused = "2026-01-01T00:00:00Z"
    elif change == "ending":
        live.ending = "stops on SIGTERM"
    elif change == "wrong":
        live.health.fails("hook", "http", "it does not answer")
    else:
        live.begin_command("tag")
    assert live.stamp() != before


def test_progress_is_told_with_a_name_that_cannot_steer(live: Live) -> None:
    async def run() -> None:
        live.begin(Event("folder", "/in/a\u202e\n\ndata: forged\udce9"))
        live.progress("fold", 1, 2)
        lines = await heard(
            await Events(live.stamp, live, life=0.03, every=0.01).answer(asked(f"stamp={live.stamp()}"))
        )
        assert lines[1:] == [
            'event: progress\ndata: {"model": "a\\\\u202e\\\\n\\\\ndata: forged\\\\udce9", "stage": "fold", '
            '"done": 1, "total": 2}\n\n'
        ]
        assert lines[1].count("\n\n") == 1

    asyncio.run(run())


def test_streams_end_when_the_daemon_does_and_there_are_only_so_many(live: Live) -> None:
    async def run() -> None:
        told = Events(live.stamp, live, life=60.0, every=0.01)
        answers = [await told.answer(asked()) for _ in range(events.MOST)]
        streams = [asyncio.create_task(heard(answer)) for answer in answers]
        await asyncio.sleep(0.03)
        assert (await told.answer(asked())).status_code == 503
        live.merge.give_up()
        await asyncio.wait_for(asyncio.gather(*streams), 5)
        assert (await told.answer(asked())).status_code == 200, "they have given their places back"

    asyncio.run(run())
