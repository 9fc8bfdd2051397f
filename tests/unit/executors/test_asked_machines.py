"""What machines of a cluster are asked, and what they say: looked at here, and by both machines of a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from continual.executors.asked_machines import FILES, LookBench, MachineLook, PlaceSeen, ask_machines, seen_here
from continual.executors.driving import Began, Came, SendOrder
from continual.executors.links import Answers, ClusterLink, link_to
from tests.helpers import on_cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    (made / "alice").mkdir(parents=True)
    (made / "alice" / "model.safetensors").write_bytes(b"abc")
    (made / "alice" / "link").symlink_to("model.safetensors")
    os.mkfifo(made / "alice" / "fifo")
    return made


def wrong(place: PlaceSeen) -> list[str]:
    (look,) = LookBench([place]).work(("look",))
    assert look.whole > look.free > 0
    return [told for path, told in look.wrong if path == place.path]


def test_what_is_the_same_is_right_and_each_other_thing_is_said(folder: Path, tmp_path: Path) -> None:
    place = PlaceSeen(folder, seen_here(folder), written=True)
    assert [file.name for file in place.files] == ["alice/model.safetensors"]
    assert wrong(place) == []
    os.utime(folder / "alice" / "model.safetensors", ns=(1, 1))
    assert wrong(place) == ["has another alice/model.safetensors"]
    (folder / "alice" / "model.safetensors").unlink()
    assert wrong(place) == ["has no alice/model.safetensors"]
    assert wrong(PlaceSeen(tmp_path / "none")) == ["is not there"]


def test_of_a_folder_without_files_its_time_is_compared(tmp_path: Path) -> None:
    (empty,) = seen_here(tmp_path)
    assert empty.name == ""
    assert wrong(PlaceSeen(tmp_path, (empty,))) == []
    assert wrong(PlaceSeen(tmp_path, (empty._replace(mtime_ns=1),))) == ["is another folder, by its time"]


def test_of_many_files_some_are_compared(tmp_path: Path) -> None:
    for number in range(3 * FILES):
        (tmp_path / f"{number:03}").touch()
    assert [file.name for file in seen_here(tmp_path)] == [f"{number:03}" for number in range(FILES)]


def test_a_folder_that_may_not_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert wrong(PlaceSeen(folder)) == []
    assert wrong(PlaceSeen(folder, written=True)) == [f"cannot be written to by the user {os.geteuid()}:{os.getegid()}"]


@pytest.fixture
def link() -> ClusterLink:
    return link_to(on_cluster.address(), lambda: None)


def test_every_machine_is_asked(link: ClusterLink, folder: Path) -> None:
    places = [PlaceSeen(folder, seen_here(folder), written=True), PlaceSeen(folder / "none")]
    found = dict(ask_machines(link, places, 60.0))
    assert found.keys() == {"127.0.0.2", "127.0.0.3"}
    for look in found.values():
        assert isinstance(look, MachineLook)
        assert look.wrong == ((folder / "none", "is not there"),)


def test_one_that_does_not_answer_is_not_waited_for(link: ClusterLink) -> None:
    found = dict(ask_machines(link, [], 0.0))
    assert found == dict.fromkeys(
        ("127.0.0.2", "127.0.0.3"), "has not answered within 0 s: no worker of Ray has started there"
    )


class Hanging:
    """Three machines: an answer that nobody can read, one that begins and no more, one that does not begin."""

    nodes = [{"NodeID": str(n), "NodeManagerAddress": f"10.0.0.{n}"} for n in range(3)]  # noqa: RUF012 - not changed

    def order(self, order: SendOrder, to: Answers) -> int:
        number = int(order.only)
        if number < 2:
            to.put(Began(number, f"10.0.0.{number}", order.only))
        if number == 0:
            to.put(Came(number, b"cnot.here\nError\n."))
        return number

    def job(self, *_: object) -> None: ...

    drop = job


def test_what_is_known_of_those_that_do_not_answer_is_said() -> None:
    found = dict(ask_machines(Hanging(), [], 0.1))  # type: ignore[arg-type]
    assert found == {
        "10.0.0.0": "cannot do orders: its answer cannot be read here: ModuleNotFoundError: No module named 'not'",
        "10.0.0.1": "has not answered within 0 s: a folder may stand still there",
        "10.0.0.2": "has not answered within 0 s: no worker of Ray has started there",
    }
