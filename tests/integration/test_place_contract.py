"""What every kind of place has to answer, whatever is behind it: one suite over all kinds.

A kind of place is a `Shelf` here: it puts files where a place of that kind finds them, changes them, and takes the
model away. A new kind needs a shelf, and its row in `SHELVES`.
"""

from __future__ import annotations

import pickle
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from continual.errors import Refuse, Retry
from continual.hub import Hub as Client
from continual.hub.repo import Repo
from continual.tensors import Folder, Place, candidate_of, open_model, read_json, release_of, unreadable
from tests.loopback import TOKEN, Hub, serving

WEIGHTS = save({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)})
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"model_type": "bert"}', "notes/more.txt": b"x"}


class Shelf(ABC):
    """Where places of one kind find their files."""

    @abstractmethod
    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        """Writes files of the model `name`; what is there already is replaced."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Takes the model away."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """The model's place as it is now, opened anew."""


class Folders(Shelf):
    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        for file, content in files.items():
            path = self.root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.root / name)

    def place(self, name: str) -> Place:
        return Folder(self.root / name, self.root)


class Repos(Shelf):
    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def put(self, name: str, files: Mapping[str, bytes]) -> None:
        self.hub.commit(f"org/{name}", files)

    def remove(self, name: str) -> None:
        self.hub.delete(f"org/{name}")

    def place(self, name: str) -> Place:
        found = Repo(Client(endpoint=self.hub.endpoint, token=TOKEN), f"org/{name}")
        found.must_be_there()  # pins the commit
        return found


class Lent(Folder):
    """A directory under another name."""

    def __init__(self, path: Path, origin: str) -> None:
        super().__init__(path)
        self.origin = origin


@contextmanager
def folders(tmp_path: Path) -> Iterator[Shelf]:
    yield Folders(tmp_path)


@contextmanager
def repos(_: Path) -> Iterator[Shelf]:
    with serving() as hub, pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_ENDPOINT", hub.endpoint)  # of the process that a place is sent to
        yield Repos(hub)


SHELVES: Mapping[str, Callable[[Path], AbstractContextManager[Shelf]]] = {"folder": folders, "repo": repos}


@pytest.fixture(params=SHELVES)
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    with SHELVES[request.param](tmp_path) as found:
        yield found


@pytest.fixture
def place(shelf: Shelf) -> Place:
    shelf.put("alice", FILES)
    return shelf.place("alice")


def test_it_has_a_name_an_origin_and_a_word_for_each_file(place: Place) -> None:
    assert place.name.endswith("alice")
    assert place.origin.endswith("alice")
    assert "alice" in str(place)
    assert place.file("config.json") == f"{place}/config.json"
    assert place.source == "hand"
    assert place.only is None


def test_it_knows_the_files_at_its_top_level(place: Place) -> None:
    assert {"model.safetensors", "config.json"} <= place.names()
    assert not any("/" in name for name in place.names())
    assert not {name for name in place.names() if name.endswith(".txt")}
    assert place.present("config.json")
    assert not place.present("adapter_config.json")


def test_it_knows_the_files_in_its_folders(shelf: Shelf) -> None:
    shelf.put("alice", FILES | {"2_Dense/model.safetensors": WEIGHTS, "2_Dense/deep/config.json": b"{}"})
    place = shelf.place("alice")
    assert "more.txt" in place.names("notes")
    assert place.names("absent") == frozenset()
    assert {name for name in place.names("2_Dense") if "." in name} == {"model.safetensors"}
    assert place.present("2_Dense/deep/config.json")
    assert place.small("notes/more.txt") == b"x"
    weights = place.open(["2_Dense/model.safetensors", "model.safetensors"])
    try:
        assert [file.name for file in weights.stats] == ["2_Dense/model.safetensors", "model.safetensors"]
        assert weights.pread(0, 20, 8) == WEIGHTS[8:28]
    finally:
        weights.close()


@pytest.mark.parametrize("path", ["../bob/config.json", "notes/../config.json", "/etc/hostname", "notes//more.txt"])
def test_nothing_outside_of_it_is_named(shelf: Shelf, path: str) -> None:
    shelf.put("bob", FILES)
    shelf.put("alice", FILES)
    place = shelf.place("alice")
    for ask in (place.names, place.present, place.small, lambda name: place.open([name])):
        with pytest.raises(Refuse) as raised:
            ask(path)
        assert raised.value.reason == "outside"


def test_a_model_in_folders_is_one_model_whose_key_is_that_of_all_its_parts(shelf: Shelf) -> None:
    dense = save({"linear.weight": torch.ones(2, 2)})
    modules = b'[{"path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "a.Dense"}]'
    shelf.put("alice", FILES | {"modules.json": modules, "2_Dense/model.safetensors": dense})
    with open_model(shelf.place("alice")) as model:
        assert set(model.tensors) == {"w", "b", "2_Dense.linear.weight"}  # type: ignore[union-attr]
        assert torch.equal(model.read("2_Dense.linear.weight"), torch.ones(2, 2))  # type: ignore[union-attr]
    first = key_of(shelf.place("alice"))
    assert first == key_of(shelf.place("alice"))
    shelf.put("alice", {"2_Dense/model.safetensors": save({"linear.weight": torch.zeros(2, 2)})})
    assert key_of(shelf.place("alice")) != first
    shelf.put("alice", {"2_Dense/model.safetensors": b"no header"})
    known = unreadable(shelf.place("alice")).key
    shelf.put("alice", {"2_Dense/model.safetensors": b"no header either"})
    assert unreadable(shelf.place("alice")).key != known


def test_small_files_are_read_whole(place: Place) -> None:
    assert place.small("config.json") == FILES["config.json"]
    assert read_json(place, "config.json") == {"model_type": "bert"}


def test_a_file_that_is_not_there_is_an_error_with_its_name(place: Place) -> None:
    with pytest.raises((Refuse, Retry), match=r"absent\.json"):
        place.small("absent.json")
    with pytest.raises((Refuse, Retry), match=r"absent\.safetensors"):
        place.open(["absent.safetensors"])


def test_a_configuration_file_that_is_too_large_is_refused_without_being_read(shelf: Shelf) -> None:
    shelf.put("bob", {"config.json": b" " * ((64 << 20) + 1)})
    with pytest.raises(Refuse, match=r"config\.json.* are too many for a configuration file"):
        shelf.place("bob").small("config.json")


def test_any_part_of_a_weight_file_is_read_by_its_position(place: Place) -> None:
    weights = place.open(["model.safetensors", "config.json"])
    try:
        assert [(file.name, file.size) for file in weights.stats] == [
            (name, len(FILES[name])) for name in ("model.safetensors", "config.json")
        ]
        weights.expect([(0, 8, len(WEIGHTS) - 8)])
        for start in range(0, len(WEIGHTS), 7):
            length = min(7, len(WEIGHTS) - start)
            weights.will_need(0, start, length)
            assert weights.pread(0, length, start) == WEIGHTS[start : start + length]
        into = bytearray(5)
        weights.preadv(1, memoryview(into), 2)
        assert bytes(into) == FILES["config.json"][2:7]
        assert weights.pread(0, 0, 0) == b""
        weights.check_unchanged()
    finally:
        weights.close()


def test_nothing_lies_behind_the_end_of_a_file(place: Place) -> None:
    weights = place.open(["model.safetensors"])
    try:
        with pytest.raises((Refuse, Retry), match=r"model\.safetensors"):
            weights.pread(0, 10, len(WEIGHTS) - 3)
    finally:
        weights.close()


def test_a_model_is_opened_there(place: Place) -> None:
    with open_model(place) as model:
        assert torch.equal(model.read("w"), torch.arange(6.0).view(2, 3))  # type: ignore[union-attr]
        model.check_unchanged()
        candidate = candidate_of(model)
    assert (candidate.name, candidate.origin, candidate.source) == (place.name, place.origin, "hand")
    assert (candidate.form, candidate.nbytes) == ("full", 28)
    assert (candidate.revision, candidate.licence) == (place.revision, place.licence)
    assert place.settled_key in (None, candidate.key)


def key_of(place: Place) -> str:
    with open_model(place) as model:
        return candidate_of(model).key


def test_the_key_is_that_of_the_files_as_they_are(shelf: Shelf, place: Place) -> None:
    first = key_of(place)
    assert key_of(shelf.place("alice")) == first, "opened again it is the same candidate"
    shelf.put("bob", FILES)
    assert key_of(shelf.place("bob")) != first, "the same files at another place are another candidate"
    shelf.put("alice", {"model.safetensors": save({"w": torch.zeros(2, 3)})})
    assert key_of(shelf.place("alice")) != first, "and so are other files at this place"


def test_what_is_replaced_while_it_is_read_is_noticed_or_read_as_it_was(shelf: Shelf, place: Place) -> None:
    with open_model(place) as model:
        shelf.put("alice", {"model.safetensors": save({"w": torch.zeros(2, 3)})})
        assert torch.equal(model.read("w"), torch.arange(6.0).view(2, 3))  # type: ignore[union-attr]
        if place.settled_key is not None:  # pinned to a commit: what comes after it is not seen
            model.check_unchanged()
        else:
            with pytest.raises(Retry, match=r"model\.safetensors"):
                model.check_unchanged()


def test_it_goes_to_another_process_as_it_is(shelf: Shelf, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its kind, under its name, and read there in the same way, where the working directory is another."""
    with open_model(place) as model:
        candidate = candidate_of(model)
        sent = pickle.dumps(place)
    monkeypatch.chdir("/")
    there: Place = pickle.loads(sent)
    assert type(there) is type(place)
    for name in ("name", "origin", "source", "only", "revision", "licence", "settled_key"):
        assert getattr(there, name) == getattr(place, name), name
    assert str(there) == str(place)
    with open_model(there) as model:
        assert candidate_of(model) == candidate
        assert torch.equal(model.read("w"), torch.arange(6.0).view(2, 3))  # type: ignore[union-attr]
        assert there.small("config.json") == FILES["config.json"]
    assert type(pickle.loads(pickle.dumps(there))) is type(place)
    assert shelf.place("alice").files() == there.files()


def test_a_folder_of_another_kind_stays_one(tmp_path: Path) -> None:
    """As a source of its own may have."""
    found: Lent = pickle.loads(pickle.dumps(Lent(tmp_path / "a", "shop://a")))
    assert (type(found), found.origin, found.path) == (Lent, "shop://a", tmp_path / "a")


def test_a_model_that_is_gone_is_refused_as_gone(shelf: Shelf, place: Place) -> None:
    place.must_be_there()
    shelf.remove("alice")
    with pytest.raises(Refuse) as raised:
        shelf.place("alice").must_be_there()
    assert raised.value.reason == "gone"
    assert "alice" in str(raised.value)


def test_a_model_whose_headers_cannot_be_read_is_known_by_its_place_and_files(shelf: Shelf) -> None:
    shelf.put("carol", {"model.safetensors": b"no header"})
    place = shelf.place("carol")
    with pytest.raises(Refuse, match="carol"):
        open_model(place)
    found = unreadable(place)
    assert (found.name, found.origin, found.nbytes) == (place.name, place.origin, 9)
    assert found.key == unreadable(shelf.place("carol")).key
    shelf.put("carol", {"model.safetensors": b"no header either"})
    assert unreadable(shelf.place("carol")).key != found.key


def test_only_a_release_of_ours_is_one(shelf: Shelf, place: Place) -> None:
    assert release_of(place) is None
    shelf.put("dora", FILES | {"continual.json": b'{"state": "0123", "seq": 4}'})
    assert release_of(shelf.place("dora")) is not None
    shelf.put("emil", FILES | {"continual.json": b"not even JSON"})
    assert release_of(shelf.place("emil")) is None
