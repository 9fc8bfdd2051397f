"""The contract of a source, kept by every kind there is: what is given, in which order, when again, and what trouble
does.

A new kind adds its world to `WORLDS`: how something is published there, and how it is out of reach for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import save

from continual.config import Settings, load
from continual.errors import Retry
from continual.hub import Hub as Client
from continual.hub.locate import Places
from continual.records import Event
from continual.service.series import TABLE
from continual.sources import roster
from continual.sources.contract import REPORTING, Source, Wiring
from tests import loopback
from tests.helpers.hubs import BASE, card
from tests.loopback import Hub, faults, serving

NAMES = ("pear", "apple", "fig")
"""Published in this order, which is not that of the alphabet."""
LONG = 3600.0
WEIGHTS = save({"a.weight": torch.zeros(4, 4)})


class World(Protocol):
    """Where one kind of source looks."""

    def publish(self, name: str) -> None: ...
    def settings(self, *, often: bool) -> Settings: ...
    def places(self, settings: Settings) -> Places: ...
    def key(self, event: Event) -> str: ...
    def lose(self) -> None: ...
    def find(self) -> None: ...


class FolderWorld:
    """A folder, which can be renamed away."""

    def __init__(self, path: Path) -> None:
        self.root = path / "watched"
        self.root.mkdir()
        self.published = 0

    def publish(self, name: str) -> None:
        self.published += 1
        model = self.root / name
        model.mkdir()
        file = model / "model.safetensors"
        file.write_bytes(WEIGHTS)
        os.utime(file, (1_000_000 + self.published,) * 2)

    def settings(self, *, often: bool) -> Settings:
        return Settings(watch=(self.root,), settle=0.01, rescan=0.05 if often else LONG)

    def places(self, settings: Settings) -> Places:
        return Places(settings)

    def key(self, event: Event) -> str:
        return f"folder:{event.origin}"

    def lose(self) -> None:
        self.root.rename(self.root.with_name("away"))

    def find(self) -> None:
        self.root.with_name("away").rename(self.root)


class HubWorld:
    """The loopback Hub, which can refuse every request."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.now = 1_000_000.0
        hub.clock = lambda: self.now

    def publish(self, name: str) -> None:
        self.now += 10.0
        self.hub.create(f"org/{name}")
        self.hub.commit(f"org/{name}", {"model.safetensors": WEIGHTS, "README.md": card()})

    def settings(self, *, often: bool) -> Settings:
        asked = {"watch": True, "bases": (BASE,), "settle": 0.0, "poll": 0.05 if often else LONG}
        return load({"hub": asked}, environ={})

    def places(self, settings: Settings) -> Places:
        return Places(settings, client=Client(endpoint=self.hub.endpoint, token=loopback.TOKEN))

    def key(self, event: Event) -> str:
        return f"hub:{event.name}@{event.revision}"

    def lose(self) -> None:
        self.hub.faults = faults.Times(faults.Status(403), 10_000)

    def find(self) -> None:
        self.hub.faults = None


@contextlib.contextmanager
def of_folders(path: Path) -> Iterator[World]:
    yield FolderWorld(path)


@contextlib.contextmanager
def of_the_hub(_path: Path) -> Iterator[World]:
    with serving() as hub:
        yield HubWorld(hub)


WORLDS = {"watch": of_folders, "hub": of_the_hub}


class Scene:
    """A world, a state, and the keys that are settled in it."""

    def __init__(self, kind: str, world: World, state: Path) -> None:
        self.kind = kind
        self.world = world
        self.state = state
        self.known: set[str] = set()

    def source(self, *, often: bool = True) -> Source:
        """The source, as a process that has just started makes it."""
        settings = self.world.settings(often=often)
        wiring = Wiring(settings, self.world.places(settings), self.state, self.known.__contains__, ())
        (found,) = roster.make(wiring)
        assert found.name == self.kind
        return found

    def settle(self, source: Source, event: Event) -> None:
        """Does what the daemon does when a candidate was folded."""
        key = self.world.key(event)
        self.known.add(key)
        source.settled(event, key)


@pytest.fixture(params=WORLDS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "state").mkdir()
    with WORLDS[request.param](tmp_path) as world:
        yield Scene(request.param, world, tmp_path / "state")


@contextlib.asynccontextmanager
async def given(source: Source) -> AsyncIterator[list[Event]]:
    """What the source gives, as long as the block runs; then it is stopped."""
    stop = asyncio.Event()
    found: list[Event] = []

    async def take() -> None:
        async for event in source.events(stop):
            found.append(event)

    task = asyncio.create_task(take())
    try:
        yield found
    finally:
        stop.set()
        await asyncio.wait_for(task, 10.0)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30.0):
        while not true():
            await asyncio.sleep(0.01)


async def looks(world: World, name: str, found: list[Event]) -> None:
    """Waits until the source has looked again: what is published now has come, and so would anything before it."""
    world.publish(name)
    await until(lambda: any(event.name.endswith(name) for event in found))


def names(events: list[Event]) -> list[str]:
    return [event.name.rpartition("/")[2] for event in events]


def test_every_kind_is_tried_here() -> None:
    assert {kind.name for kind in roster.KINDS} == set(WORLDS)
    assert [kind.name for kind in roster.KINDS if kind.reports] == list(REPORTING)


def test_what_is_there_comes_oldest_first_and_then_what_is_published(scene: Scene) -> None:
    for name in NAMES:
        scene.world.publish(name)

    async def drive() -> None:
        source = scene.source()
        async with given(source) as found:
            await until(lambda: len(found) == 3)
            assert names(found) == list(NAMES)
            assert [event.order for event in found] == sorted(event.order for event in found)
            assert len({event.key for event in found}) == 3
            await looks(scene.world, "later", found)
            assert names(found) == [*NAMES, "later"]
            assert found[-1].order > found[-2].order

    asyncio.run(drive())


def test_scanned_is_set_by_the_first_look_also_where_nothing_is_there(scene: Scene) -> None:
    async def drive() -> None:
        source = scene.source(often=False)
        assert not source.scanned.is_set()
        async with given(source) as found:
            await asyncio.wait_for(source.scanned.wait(), 20.0)
            assert found == []

    asyncio.run(drive())


def test_what_is_not_settled_comes_again_after_a_restart(scene: Scene) -> None:
    for name in NAMES:
        scene.world.publish(name)

    async def drive() -> None:
        source = scene.source()
        async with given(source) as found:
            await until(lambda: len(found) == 3)
            scene.settle(source, found[0])
        async with given(scene.source()) as again:
            await until(lambda: set(NAMES[1:]) <= set(names(again)))

    asyncio.run(drive())


def test_what_is_settled_does_not_come_again(scene: Scene) -> None:
    scene.world.publish("apple")

    async def drive() -> None:
        source = scene.source()
        async with given(source) as found:
            await until(lambda: found)
            scene.settle(source, found[0])
            for name in ("one", "two"):
                await looks(scene.world, name, found)
            assert names(found) == ["apple", "one", "two"]
            for event in found[1:]:
                scene.settle(source, event)
            await until(lambda: source.report().seen == 0)

    asyncio.run(drive())


def test_stop_ends_it_at_once_though_it_would_wait_for_an_hour(scene: Scene) -> None:
    async def drive() -> float:
        source = scene.source(often=False)
        async with given(source):
            await asyncio.wait_for(source.scanned.wait(), 20.0)
            await asyncio.sleep(0.1)
            begun = time.monotonic()
        return time.monotonic() - begun

    assert asyncio.run(drive()) < 5.0


def test_trouble_in_the_environment_is_said_and_ends_nothing(scene: Scene) -> None:
    scene.world.publish("apple")
    scene.world.lose()

    async def drive() -> None:
        source = scene.source()
        async with given(source) as found:
            await until(lambda: source.problem)
            await asyncio.wait_for(source.scanned.wait(), 20.0)  # the other sources are not held up
            assert found == []
            scene.world.find()
            await until(lambda: found)
            assert names(found) == ["apple"]
            await until(lambda: source.problem is None)

    asyncio.run(drive())


def test_one_look_takes_what_is_ready_and_trouble_is_tried_again(scene: Scene) -> None:
    for name in NAMES:
        scene.world.publish(name)
    scene.world.lose()
    source = scene.source()
    with contextlib.suppress(Retry):
        assert source.ready() == []
    scene.world.find()
    time.sleep(0.05)
    events = sorted(source.ready(), key=lambda event: event.order)
    assert names(events) == list(NAMES)
    for event in events[:2]:
        assert not source.is_gone(event)
        scene.settle(source, event)
    source.finish()
    assert "fig" in names(scene.source().ready())


def test_a_survey_sees_everything_and_changes_nothing(scene: Scene) -> None:
    for name in NAMES:
        scene.world.publish(name)
    source = scene.source()
    seen = [list(source.survey()) for _ in range(2)]
    assert seen[0] == seen[1]
    assert sorted(names([sight.event for sight in seen[0]])) == sorted(NAMES)
    assert {(sight.left_out, sight.waits) for sight in seen[0]} == {(None, None)}
    assert list(scene.state.rglob("*")) == []
    assert sorted(names(source.ready())) == sorted(NAMES)


def test_it_measures_only_series_that_exist(scene: Scene) -> None:
    source = scene.source()
    known = {row.name for row in TABLE}
    assert set(source.series()) <= known
    assert source.report().problem is None
