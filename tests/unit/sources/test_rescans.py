"""When a watched folder is looked at again, and what that costs: real files, the time an argument."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from continual.sources import directories, tree
from tests.helpers.folders import model
from tests.helpers.watched import RESCAN, Watched


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """An empty folder, looked at once; nothing in it is old."""
    (tmp_path / "w").mkdir()
    return Watched(tmp_path / "w")


def tick(path: Path) -> None:
    """Returns when the clock of the file system has gone on."""
    probe = path.with_name("probe")
    probe.touch()
    first = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == first:
        os.utime(probe)


def test_a_known_model_is_not_given_and_costs_no_look_into_its_files(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "new"):
        model(watched.root / name)
    watched.settle(["a", "b"])
    looked = list[str]()
    true = directories.is_whole

    def is_whole(path: str, found: directories.Listing) -> bool:
        looked.append(os.path.basename(path))
        return true(path, found)

    monkeypatch.setattr(directories, "is_whole", is_whole)
    watched.look()
    assert watched.look(5.0) == ["new"]
    watched.look(RESCAN)
    assert watched.look(0.0, everything=True) == []
    assert set(looked) == {"new"}


def test_rescans_find_what_no_notice_told_of(watched: Watched) -> None:
    root = watched.root
    (root / "org").mkdir()
    model(root / "old")
    watched.settle(["old"])
    watched.look()
    tick(root)
    model(root / "one")
    model(root / "org/two")
    os.utime(root / "old/model.safetensors", (9, 9))
    assert watched.look(RESCAN - 1) == []
    watched.look(1.0)
    assert sorted(watched.look(5.0)) == ["old", "one", "org/two"]
    assert watched.tree.next_look(watched.now) <= RESCAN


def test_a_directory_that_changed_within_a_tick_of_the_clock_is_listed_again(watched: Watched) -> None:
    watched.ahead = 0.0
    watched.look()
    model(watched.root / "m")
    found = watched.root.stat()
    node = watched.tree.nodes[str(watched.root)]
    node.stamp = (found.st_ctime_ns, found.st_ino, found.st_dev)  # as if both fell into one tick
    watched.look(RESCAN)
    assert watched.look(5.0) == ["m"]


def test_rescans_take_turns_where_there_is_much_to_look_at(watched: Watched) -> None:
    names = [f"m{number:02}" for number in range(20)]
    for name in names:
        model(watched.root / name)
    watched.settle(names)
    watched.look()
    for name in names:
        os.utime(watched.root / name / "model.safetensors", (5, 5))

    def unseen() -> int:
        return sum(watched.tree._moved(str(watched.root / name)) for name in names)

    watched.step = 0.004  # each model costs so much of the processor
    seen = [unseen()]
    while seen[-1]:
        watched.look(watched.tree.next_look(watched.now))
        seen.append(unseen())
        assert len(seen) < 40
    assert len(seen) > 3, "not all in one rescan"
    assert watched.spent <= 2 * tree.SHARE * watched.now + len(names) * watched.step


def test_what_is_found_new_does_not_put_off_the_next_rescan(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.look()
    whole = directories.is_whole

    def dear(path: str, found: directories.Listing) -> bool:
        watched.spent += 2.0  # as the header of a model of 100,000 tensors
        return whole(path, found)

    monkeypatch.setattr(directories, "is_whole", dear)
    for name in ("first", "second"):  # on a file system of which the kernel tells nothing
        model(watched.root / name)
        assert watched.look(watched.tree.next_look(watched.now)) == []
        assert watched.tree.next_look(watched.now) == pytest.approx(5.01)
        assert watched.look(5.01) == [name]
        assert watched.tree.next_look(watched.now) == pytest.approx(RESCAN - 5.01)


def test_rescans_come_more_rarely_where_one_is_dear(watched: Watched) -> None:
    model(watched.root / "m")
    watched.look()
    watched.step = 1.0
    assert watched.look(RESCAN) == ["m"]
    assert watched.tree.next_look(watched.now) >= 1.0 / tree.SHARE
    model(watched.root / "told")
    watched.look(1.0, "told")
    assert watched.tree.next_look(watched.now) == pytest.approx(5.01)
    assert watched.look(5.01) == ["told"], "what the kernel tells of does not wait for a rescan"
