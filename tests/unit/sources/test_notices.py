"""What the kernel tells of changes: real directories."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from continual.sources.notices import Notices
from tests.helpers.folders import WEIGHTS, model


class Hearing(NamedTuple):
    """Notices, and a directory outside of what the test is about, whose changes mark the end of what came before."""

    notices: Notices
    marks: Path
    root: Path

    def add(self, name: str, *, follow: bool = False) -> None:
        self.notices.add(str(self.root / name), follow=follow)

    def told(self) -> set[str]:
        """What was told by now, relative to the root; nothing may be lost."""
        changed, lost = self.taken()
        assert not lost
        return {os.path.relpath(path, self.root) for path in changed}

    def taken(self) -> tuple[set[str], bool]:
        """What was told by now, and whether something was lost."""
        mark = self.marks / str(len(list(self.marks.iterdir())))
        changed, lost, end = set[str](), False, time.monotonic() + 30
        while str(mark) not in changed:
            assert time.monotonic() < end, "the mark is not told of"
            if not mark.exists():
                mark.mkdir()
            found = self.notices.take()
            changed |= found.changed
            if found.lost:  # with it what marks the end may be lost
                lost, mark = True, mark.with_name(f"{mark.name}x")
            time.sleep(0.002)
        return {path for path in changed if not path.startswith(str(self.marks))}, lost


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Hearing]:
    found = Notices(lambda: None)
    (marks := tmp_path / "marks").mkdir()
    (root := tmp_path / "root").mkdir()
    found.add(str(marks))
    found.add(str(root))
    yield Hearing(found, marks, root)
    found.close()


def test_what_comes_and_goes_and_is_written_is_told(heard: Hearing) -> None:
    (heard.root / "a").mkdir()
    assert heard.told() == {"a"}
    heard.add("a")
    (heard.root / "a/file").write_bytes(WEIGHTS)
    assert heard.told() == {"a"}
    with open(heard.root / "a/file", "r+b") as file:
        file.write(b"x")
    assert heard.told() == {"a"}
    (heard.root / "loose").touch()
    assert heard.told() == {"."}
    model(heard.root.with_name("elsewhere")).rename(heard.root / "b")
    assert heard.told() == {"b"}


def test_reading_tells_nothing(heard: Hearing) -> None:
    path = model(heard.root / "a")
    heard.add(path.name)
    heard.told()
    (path / "model.safetensors").read_bytes()
    list(path.iterdir())
    os.stat(path / "config.json")
    assert heard.told() == set()


def test_a_directory_that_is_renamed_is_told_of_under_its_new_name(heard: Hearing) -> None:
    (heard.root / "a").mkdir()
    heard.add("a")
    heard.told()
    (heard.root / "a").rename(heard.root / "b")
    assert heard.told() == {"a", "b"}
    heard.add("b")
    (heard.root / "b/file").touch()
    assert heard.told() == {"b"}


def test_one_that_is_deleted_and_made_again_is_told_of_once_it_is_added(heard: Hearing) -> None:
    for _ in range(2):
        (heard.root / "a").mkdir()
        assert heard.told() == {"a"}
        heard.add("a")
        (heard.root / "a/file").touch()
        assert heard.told() == {"a"}
        (heard.root / "a/file").unlink()
        (heard.root / "a").rmdir()
        assert "a" in heard.told()


def test_removed_tells_no_more(heard: Hearing) -> None:
    (heard.root / "a").mkdir()
    heard.add("a")
    heard.told()
    heard.notices.remove(str(heard.root / "a"))
    (heard.root / "a/file").touch()
    assert heard.told() == set()


def test_a_link_is_followed_only_where_that_is_asked_for(heard: Hearing) -> None:
    (heard.root / "a").mkdir()
    (heard.root / "link").symlink_to("a")
    heard.told()
    heard.add("link")
    (heard.root / "a/file").touch()
    assert heard.told() == set()
    heard.add("link", follow=True)
    (heard.root / "a/other").touch()
    assert heard.told() == {"link"}


def test_more_than_the_kernel_holds_is_said_to_be_lost(heard: Hearing) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [str(heard.root / name) for name in ("a", "b")]
    for name in names:
        os.mkdir(name)
    with heard.notices._lock:  # watchdog's thread stands still, as on a busy machine
        for number in range(most // 2 + 3000):
            os.rename(names[number % 2], names[number % 2] + "x")
            os.rename(names[number % 2] + "x", names[number % 2])
    assert heard.taken()[1]
    (heard.root / "c").mkdir()
    assert heard.told() == {"c"}


def test_what_nobody_takes_is_bounded(heard: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.sources.notices._HELD", 3)
    for number in range(200):  # so many that some come before what came before them is taken
        (heard.root / str(number)).mkdir()
    changed, lost = heard.taken()
    assert lost
    assert len(changed) < 200


def test_whoever_waits_is_woken(tmp_path: Path) -> None:
    woken = threading.Event()
    notices = Notices(woken.set)
    notices.add(str(tmp_path))
    (tmp_path / "a").mkdir()
    assert woken.wait(30)
    notices.close()


def test_a_limit_of_watches_is_counted_and_no_error(heard: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    (heard.root / "a").mkdir()
    with monkeypatch.context() as limited:
        limited.setattr(heard.notices._inotify, "add_callback", full)
        heard.add("a")
    assert heard.notices.unwatched == {str(heard.root / "a")}
    heard.add("a")
    assert heard.notices.unwatched == set()
    heard.add("gone")
    assert heard.notices.unwatched == set()
