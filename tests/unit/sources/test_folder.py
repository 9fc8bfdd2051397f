"""The folder source on a real event loop: what it gives and when, what it notes, and that nothing holds it up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from continual.config import Settings
from continual.errors import Misconfigured
from continual.records import Event
from continual.sources import folder
from continual.sources.directories import keys, listed, look
from continual.sources.folder import KIND, FolderSource, scan
from continual.sources.notices import Notices, Told
from continual.sources.tree import Looking
from tests.helpers.folders import WEIGHTS, model, publish

NEVER = Looking(rescan=3600.0)


@asynccontextmanager
async def running(source: FolderSource) -> AsyncIterator[list[str]]:
    """The names of what the source gives, as long as the block runs."""
    stop, found = asyncio.Event(), list[str]()

    async def take() -> None:
        async for event in source.events(stop):
            found.append(event.name)

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


def test_events_of_what_was_there_and_of_what_is_renamed_in(tmp_path: Path) -> None:
    model(tmp_path / "early")

    async def drive() -> list[str]:
        async with running(FolderSource(tmp_path, settle=0.05, looking=NEVER)) as found:
            await until(lambda: found == ["early"])
            model(tmp_path / ".late.tmp").rename(tmp_path / "late")
            await until(lambda: len(found) == 2)
            publish(tmp_path / "org/inner", {})
            await asyncio.sleep(0.2)
            (tmp_path / "org/inner/model.safetensors").write_bytes(WEIGHTS)
            await until(lambda: len(found) == 3)
        return found

    assert asyncio.run(drive()) == ["early", "late", "inner"]


def test_a_burst_beside_many_known_ones_is_seen_in_order(tmp_path: Path) -> None:
    known = set[str]()
    for number in range(300):
        found = look(str(model(tmp_path / f"old{number}")))
        assert found is not None
        known.add(next(keys(found, listed(found.path))))

    async def drive() -> tuple[list[str], float]:
        looking = Looking(rescan=3600.0, known=known.__contains__)
        source = FolderSource(tmp_path, settle=0.2, looking=looking)
        async with running(source) as found:
            await asyncio.wait_for(source.scanned.wait(), 30.0)
            begun = time.monotonic()
            for number in range(20):
                model(tmp_path / f".new{number}", 1000 + number).rename(tmp_path / f"new{number}")
            await until(lambda: len(found) == 20)
            return found, time.monotonic() - begun

    names, seconds = asyncio.run(drive())
    assert sorted(names) == sorted(f"new{number}" for number in range(20))
    assert seconds < 20.0


def test_lost_notices_have_everything_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "m", 1000)
    true = Notices.take
    monkeypatch.setattr(Notices, "take", lambda self: Told(frozenset(), lost=bool(true(self).changed)))

    async def drive() -> None:
        async with running(FolderSource(tmp_path, settle=0.05, looking=NEVER)) as found:
            await until(lambda: found == ["m"])
            with open(path / "model.safetensors", "r+b") as file:  # the directory's time stays as it is
                file.write(WEIGHTS)
            await until(lambda: found == ["m", "m"])

    asyncio.run(drive())


def test_without_notices_it_looks_from_time_to_time_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_self: Notices, _wake: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Notices, "__init__", refused)

    async def drive() -> None:
        source = FolderSource(tmp_path, settle=0.05, looking=Looking(rescan=0.05))
        async with running(source) as found:
            await asyncio.wait_for(source.scanned.wait(), 30.0)
            model(tmp_path / "m")
            await until(lambda: found == ["m"])
            (note,) = source.notes()
            assert "the kernel tells of no changes (Too many open files); the folder is looked at every 0.05 s" in note

    asyncio.run(drive())


def test_folders_beyond_the_limit_of_the_kernel_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(tmp_path / "m")
    true = Notices.add

    def add(self: Notices, path: str, *, follow: bool = False) -> None:
        if path == str(tmp_path):
            true(self, path, follow=follow)
        else:
            self.unwatched.add(path)

    monkeypatch.setattr(Notices, "add", add)

    async def drive() -> None:
        source = FolderSource(tmp_path, settle=0.05, looking=NEVER)
        async with running(source) as found:
            await until(lambda: found)
            (note,) = source.notes()
            assert "does not tell of 1 folders" in note
            assert "fs.inotify.max_user_watches" in note

    asyncio.run(drive())


def test_a_source_that_is_started_again_hears_of_what_it_had_seen(tmp_path: Path) -> None:
    path = model(tmp_path / "m", 1000)

    async def drive() -> None:
        source = FolderSource(tmp_path, settle=0.05, looking=NEVER)
        async with running(source) as found:
            await until(lambda: found == ["m"])
        async with running(source) as found:
            await asyncio.sleep(0.2)
            assert found == []
            with open(path / "model.safetensors", "r+b") as file:
                file.write(WEIGHTS)
            await until(lambda: found == ["m"])

    asyncio.run(drive())


def test_a_pipe_called_like_weights_holds_nothing_up(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/model.safetensors")
    model(tmp_path / "z")

    async def drive() -> list[str]:
        async with running(FolderSource(tmp_path, settle=0.05, looking=NEVER)) as found:
            await until(lambda: len(found) == 2)
        return found

    assert sorted(asyncio.run(drive())) == ["a", "z"]


def test_a_file_system_that_hangs_is_a_problem_and_stop_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    true = folder.Tree.look

    def hang(*args: object, **others: object) -> object:
        answers.wait()
        return true(*args, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(folder.Tree, "look", hang)
    monkeypatch.setattr(folder, "_HUNG", 0.05)

    async def drive() -> None:
        source = FolderSource(tmp_path, settle=0.05, looking=NEVER)
        async with running(source):
            await until(lambda: source.problem)
            assert "has not answered" in str(source.problem)
            assert source.scanned.is_set()
        source = FolderSource(tmp_path, settle=0.05, looking=NEVER)
        async with running(source):
            await until(lambda: source.problem)
            answers.set()
            await until(lambda: source.problem is None)

    asyncio.run(drive())
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "folder")


def test_what_is_no_model_is_noted_and_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loose.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "empty").mkdir()

    async def drive() -> None:
        source = FolderSource(tmp_path, settle=0.01, looking=Looking(rescan=0.05))
        async with running(source):
            await until(lambda: len(source.notes()) == 2)
            await asyncio.sleep(0.3)
            loose, empty = source.notes()
            assert "loose.safetensors lies loose" in loose
            assert f"{tmp_path}/empty: is no model: it is empty" == empty

    asyncio.run(drive())
    said = capsys.readouterr().out
    assert said.count("lies loose") == said.count("is empty") == 1


def test_what_is_settled_is_counted_no_more_and_gone_is_told_from_unreadable(tmp_path: Path) -> None:
    model(tmp_path / "m")
    (tmp_path / "circle").symlink_to("circle")
    source = FolderSource(tmp_path, settle=0.01, looking=NEVER)

    async def drive() -> None:
        async with running(source) as found:
            await until(lambda: found)
            assert source.report().seen == 1
            source.settled(Event("folder", str(tmp_path / "m")), "key")
            assert source.report().seen == 0

    asyncio.run(drive())
    for name, gone in (("m", False), ("circle", False), ("none", True), ("m/config.json/x", True)):
        assert source.is_gone(Event("folder", str(tmp_path / name))) is gone


def test_one_look_leaves_out_what_is_known_and_a_survey_names_its_key(tmp_path: Path) -> None:
    os.utime(model(tmp_path / "old", 1000), (1, 1))
    model(tmp_path / "new", 2000)
    (old,) = [s for s in scan(tmp_path) if s.path.endswith("old")]
    key = next(keys(old, listed(old.path)))
    source = FolderSource(tmp_path, settle=0.01, looking=Looking(known={key}.__contains__))
    assert [event.name for event in source.ready()] == ["new"]
    assert [(sight.event.name, sight.key) for sight in source.survey()] == [("old", key), ("new", None)]


def test_scan_takes_models_in_models_only_where_that_is_asked_for(tmp_path: Path) -> None:
    model(tmp_path / "m")
    model(tmp_path / "m/ref")
    assert [s.path for s in scan(tmp_path)] == [str(tmp_path / "m")]
    assert len(scan(tmp_path, nested=True)) == 2


def test_a_folder_that_cannot_be_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "w").mkdir()
    for watch, state, said in (
        (tmp_path / "none", tmp_path / "s", "no such directory"),
        (tmp_path / "circle", tmp_path / "s", "no such directory"),
        (tmp_path / "w", tmp_path / "w/s", "lies in the watched folder"),
    ):
        with pytest.raises(Misconfigured, match=said):
            KIND.check(Settings(watch=(watch,), state=state))
    KIND.check(Settings(watch=(tmp_path / "w",), state=tmp_path / "s"))
