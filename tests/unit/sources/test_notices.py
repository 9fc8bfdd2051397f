"""What the kernel tells of changes: real directories."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from continual.sources.notices import Notices, Told
from tests.helpers.folders import WEIGHTS, model


@pytest.fixture
def notices(tmp_path: Path) -> Iterator[Notices]:
    found = Notices()
    found.add(str(tmp_path))
    yield found
    found.close()


def told(notices: Notices, root: Path) -> set[str]:
    notices.fetch()
    found = notices.take()
    assert not found.lost
    return {os.path.relpath(path, root) for path in found.changed}


def test_what_comes_and_goes_and_is_written_is_told(notices: Notices, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert told(notices, tmp_path) == {"a"}
    notices.add(str(tmp_path / "a"))
    (tmp_path / "a/file").write_bytes(WEIGHTS)
    assert told(notices, tmp_path) == {"a"}
    with open(tmp_path / "a/file", "r+b") as file:
        file.write(b"x")
    assert told(notices, tmp_path) == {"a"}
    (tmp_path / "loose").touch()
    assert told(notices, tmp_path) == {"."}
    model(tmp_path.with_name("elsewhere")).rename(tmp_path / "b")
    assert told(notices, tmp_path) == {"b"}


def test_reading_tells_nothing(notices: Notices, tmp_path: Path) -> None:
    path = model(tmp_path / "a")
    notices.add(str(path))
    told(notices, tmp_path)
    (path / "model.safetensors").read_bytes()
    list(path.iterdir())
    os.stat(path / "config.json")
    assert told(notices, tmp_path) == set()


def test_a_directory_that_is_renamed_is_told_of_under_its_new_name(notices: Notices, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    notices.add(str(tmp_path / "a"))
    told(notices, tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert told(notices, tmp_path) == {"a", "b"}
    notices.add(str(tmp_path / "b"))
    (tmp_path / "b/file").touch()
    assert told(notices, tmp_path) == {"b"}


def test_one_that_is_deleted_and_made_again_is_told_of_once_it_is_added(notices: Notices, tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "a").mkdir()
        assert told(notices, tmp_path) == {"a"}
        notices.add(str(tmp_path / "a"))
        (tmp_path / "a/file").touch()
        assert told(notices, tmp_path) == {"a"}
        (tmp_path / "a/file").unlink()
        (tmp_path / "a").rmdir()
        assert "a" in told(notices, tmp_path)


def test_removed_tells_no_more(notices: Notices, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    notices.add(str(tmp_path / "a"))
    told(notices, tmp_path)
    notices.remove(str(tmp_path / "a"))
    (tmp_path / "a/file").touch()
    assert told(notices, tmp_path) == set()


def test_a_link_is_followed_only_where_that_is_asked_for(notices: Notices, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    told(notices, tmp_path)
    notices.add(str(tmp_path / "link"))
    (tmp_path / "a/file").touch()
    assert told(notices, tmp_path) == set()
    notices.add(str(tmp_path / "link"), follow=True)
    (tmp_path / "a/other").touch()
    assert told(notices, tmp_path) == {"link"}


def test_more_than_the_kernel_holds_is_said_to_be_lost(notices: Notices, tmp_path: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [str(tmp_path / name) for name in ("a", "b")]
    for name in names:
        os.mkdir(name)
    for number in range(most // 2 + 2):
        os.rename(names[number % 2], names[number % 2] + "x")
        os.rename(names[number % 2] + "x", names[number % 2])
    notices.fetch()
    assert notices.take().lost
    (tmp_path / "c").mkdir()
    notices.fetch()
    assert notices.take() == Told(frozenset({str(tmp_path / "c")}))


def test_what_nobody_takes_is_bounded(notices: Notices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.sources.notices._HELD", 1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        notices.fetch()
    assert notices.take() == Told(frozenset({str(tmp_path / "a")}), lost=True)
    assert notices.take() == Told(frozenset())


def test_a_limit_of_watches_is_counted_and_no_error(
    notices: Notices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = Notices._called

    def full(_answer: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Notices, "_called", staticmethod(full))
    (tmp_path / "a").mkdir()
    notices.add(str(tmp_path / "a"))
    assert notices.unwatched == {str(tmp_path / "a")}
    monkeypatch.setattr(Notices, "_called", staticmethod(true))
    notices.add(str(tmp_path / "a"))
    assert notices.unwatched == set()
    notices.add(str(tmp_path / "gone"))
    assert notices.unwatched == set()
