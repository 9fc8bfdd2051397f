"""What is seen in a watched folder: real files, the time an argument."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from continual.sources import directories
from continual.sources.directories import INDEX, forbidden
from tests.helpers import parts
from tests.helpers.folders import WEIGHTS, model, publish, sharded
from tests.helpers.watched import RESCAN, Watched


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    """An empty folder, looked at once; nothing in it is old."""
    (tmp_path / "w").mkdir()
    return Watched(tmp_path / "w")


def test_what_is_no_model_and_what_is_not_published_yet(watched: Watched) -> None:
    root = watched.root
    publish(root / "notes", {"README.md": b"x"})
    for name in (".hidden", "upload.tmp", "a/b/c/d", "org/model"):
        model(root / name)
    publish(root / "half", {"model.safetensors.incomplete": WEIGHTS})
    watched.look()
    assert watched.look(5.0) == ["org/model"]


def test_order_is_time_of_the_index_then_name(watched: Watched) -> None:
    root = watched.root
    model(root / "late", 300)
    model(root / "b", 200)
    model(root / "a", 200)
    publish(root / "first", {INDEX: sharded("1.safetensors"), "1.safetensors": WEIGHTS}, 100)
    os.utime(root / "first/1.safetensors", (999, 999))
    watched.look()
    assert watched.look(5.0) == ["first", "a", "b", "late"]


def test_links_are_looked_at_and_not_followed_further(watched: Watched, tmp_path: Path) -> None:
    model(tmp_path / "elsewhere/m")
    (watched.root / "up").symlink_to(tmp_path)
    (watched.root / "proc").symlink_to("/proc")
    (watched.root / "itself").symlink_to("itself")
    (watched.root / "m").symlink_to(tmp_path / "elsewhere/m")
    model(watched.root / "z")
    watched.look()
    assert sorted(watched.look(5.0)) == ["m", "z"]
    assert "itself is a link that leads nowhere" in watched.notes()["."]


@pytest.mark.parametrize("nested", [False, True])
def test_what_lies_in_a_model_belongs_to_it_unless_asked_for(tmp_path: Path, nested: bool) -> None:
    watched = Watched(tmp_path, nested=nested)
    model(tmp_path / "trl")
    model(tmp_path / "trl/ref")
    publish(tmp_path / "st", {"modules.json": b"[]", "config.json": b"{}"})
    model(tmp_path / "st/2_Dense")
    model(tmp_path / "run/checkpoint-500")
    model(tmp_path / "checkpoint-7")
    watched.look()
    inner = ["checkpoint-7", "run/checkpoint-500", "st/2_Dense", "trl/ref"]
    assert sorted(watched.look(5.0)) == sorted(["trl", *(inner if nested else ())])
    said = "" if nested else "checkpoint-500 is a checkpoint of a run: rename it, or set nested = true"
    assert said in watched.notes().get("run", "")


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_in_folders_is_given_once_and_again_when_a_part_changes(tmp_path: Path, nested: bool) -> None:
    watched = Watched(tmp_path, nested=nested)
    watched.look()
    parts.pipeline(tmp_path / "pipe", 1, form="shards")
    parts.embedder(tmp_path / "words", 1)
    dense = tmp_path / "words/2_Dense/model.safetensors"
    content = dense.read_bytes()
    dense.unlink()
    assert watched.look(0.0, "pipe", "words") == []
    assert watched.look(5.0) == ["pipe"]
    dense.write_bytes(content)
    assert watched.look(10.0, "words/2_Dense") == []
    assert watched.look(5.0) == ["words"]
    unet = tmp_path / "pipe/unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    unet.write_bytes(unet.read_bytes())
    assert watched.look(1.0, "pipe/unet") == []
    assert watched.look(5.0) == ["pipe"]
    assert watched.look(RESCAN) == []
    os.utime(unet, ns=(5, 5))
    assert watched.look(RESCAN + 1) == [], "a rescan sees it, where no notice was given"
    assert watched.look(5.0) == ["pipe"]


def test_a_folder_of_a_model_is_looked_at_however_deep_it_lies_and_also_when_it_goes(watched: Watched) -> None:
    path = parts.embedder(watched.root / "words", 1, root="0_Router/query")
    watched.look(0.0, "words")
    assert watched.look(5.0) == ["words"]
    os.utime(path / "0_Router/query/model.safetensors", ns=(5, 5))
    watched.look(1.0, "words/0_Router/query")
    assert watched.look(5.0) == ["words"]
    (path / "2_Dense").rename(watched.root / ".away")
    watched.look(1.0, "words/2_Dense")
    waits = watched.tree.settling.seen(str(path))
    assert waits is not None
    assert not waits.whole


def test_a_run_that_becomes_a_model_gives_only_that(watched: Watched) -> None:
    root = watched.root
    model(root / "run/checkpoint-500")
    model(root / "run/final")
    watched.look()
    publish(root / "run/new", {"model.safetensors": WEIGHTS})
    (root / "run/new/model.safetensors").rename(root / "run/model.safetensors")
    watched.look(1.0, "run")
    assert watched.look(10.0) == ["run"], "run/final waited, and is a part of it now"
    (root / "run/model.safetensors").unlink()
    watched.look(1.0, "run")
    assert watched.look(5.0) == ["run/final"]


def test_the_watched_folder_itself_is_no_model(watched: Watched) -> None:
    (watched.root / "model.safetensors").write_bytes(WEIGHTS)
    model(watched.root / "m")
    watched.look()
    assert watched.look(5.0) == ["m"]
    assert "model.safetensors lies loose" in watched.notes()["."]
    (watched.root / "model.safetensors").unlink()
    watched.look(1.0, ".")
    assert watched.notes() == {}


def test_what_stays_without_a_model_is_noted_once_it_is_still(watched: Watched) -> None:
    root = watched.root
    for name, files in (
        ("empty", {}),
        ("notes", {"README.md": b"x"}),
        ("gguf", {"m.gguf": b"x"}),
        ("packed", {"m.tar.gz": b"x"}),
        ("configured", {"config.json": b"{}"}),
    ):
        publish(root / name, dict(files))
    watched.look()
    watched.look(299.0)
    assert watched.notes() == {}
    (root / "notes/more").write_text("x")
    watched.look(0.5, "notes")
    assert watched.tree.next_look(watched.now) <= 0.51
    watched.look(0.5)
    assert set(watched.notes()) == {"empty", "gguf", "packed", "configured"}
    assert watched.notes()["empty"] == f"{root}/empty: is no model: it is empty"
    model(root / "empty/m")
    watched.look(0.1, "empty", "empty/m")
    assert "empty" not in watched.notes()
    assert watched.look(5.0) == ["empty/m"]
    publish(root / "x", {"model.safetensors": WEIGHTS})
    (root / "x/model.safetensors").rename(root / "configured/model.safetensors")
    watched.look(1.0, "configured")
    assert "configured" not in watched.notes()
    assert "configured" in watched.look(5.0)


def test_a_known_model_that_is_rewritten_is_given_again(watched: Watched) -> None:
    path = model(watched.root / "a")
    watched.settle(["a"])
    watched.look()
    assert watched.look(5.0) == []
    (path / "model.safetensors").write_bytes(WEIGHTS + b" ")
    (path / "model.safetensors").write_bytes(WEIGHTS)
    os.utime(path / "model.safetensors", (1, 1))
    watched.look(1.0, "a")
    assert watched.look(5.0) == ["a"]


def test_a_settled_model_that_somebody_wants_again_is_given_again(watched: Watched) -> None:
    model(watched.root / "a")
    watched.look()
    assert watched.look(5.0) == ["a"]
    watched.known.add("its key")
    watched.tree.settled(str(watched.root / "a"), "its key")
    assert watched.look(RESCAN) == []
    watched.known.clear()
    watched.look(RESCAN)
    assert watched.look(5.0) == ["a"]


def test_a_folder_that_goes_is_a_problem_until_it_is_back(watched: Watched) -> None:
    model(watched.root / "m")
    watched.look()
    away = watched.root.with_name("away")
    watched.root.rename(away)
    watched.look(RESCAN)
    assert watched.tree.problem == f"{watched.root}: the folder cannot be reached"
    assert watched.tree.nodes == {}
    away.rename(watched.root)
    watched.look(RESCAN)
    assert watched.tree.problem is None
    assert watched.look(5.0) == ["m"]


def test_a_folder_that_is_a_file_or_cannot_be_listed_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for name, said in (("file", "cannot be reached"), ("circle", "cannot be looked at: Too many levels")):
        watched = Watched(tmp_path / name)
        watched.look()
        assert said in str(watched.tree.problem)


def test_an_error_of_ours_is_noted_of_that_directory_alone(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        model(watched.root / name)
    true = directories.model_in

    def spoiled(path: str, found: directories.Listing) -> directories.FolderSighting | None:
        if path.endswith("/b"):
            raise RecursionError("deep")
        return true(path, found)

    monkeypatch.setattr(directories, "model_in", spoiled)
    watched.look()
    assert watched.look(5.0) == ["a", "c"]
    assert "an error of continual itself: RecursionError('deep')" in watched.notes()["b"]
    monkeypatch.setattr(directories, "model_in", true)
    watched.look(RESCAN)
    assert watched.look(5.0) == ["b"]
    assert watched.notes() == {}


def test_too_many_folders_are_noted_and_the_first_are_looked_at(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        model(watched.root / name)
    monkeypatch.setattr(directories, "MOST", 3)
    watched.look()
    assert watched.look(5.0) == ["a", "b"]
    assert any("holds more than 3 folders" in note for note in watched.tree.noted.said.values())


def test_a_name_that_is_too_long_a_path_is_noted_and_starves_nobody(tmp_path: Path) -> None:
    root = tmp_path
    while len(str(root)) < 3800:
        root /= "n" * 200
    here = os.getcwd()
    os.makedirs(root)
    try:
        os.chdir(root)
        os.makedirs("a" * 250 + "/" + "b" * 250)
        model(Path("z"))
    finally:
        os.chdir(here)
    watched = Watched(root)
    watched.look()
    assert watched.look(5.0) == ["z"]
    assert any("File name too long" in note for note in watched.notes().values())


def test_names_that_are_no_text_are_looked_at(watched: Watched) -> None:
    name = os.fsdecode(b"caf\xe9")
    model(watched.root / name)
    publish(watched.root / (name + "2"), {})
    watched.look()
    assert watched.look(5.0) == [name]
    watched.look(300.0)
    assert [note.encode() for note in watched.notes().values()] == [
        f"{watched.root}/caf\\xe92: is no model: it is empty".encode()
    ]


@contextmanager
def somebody_else() -> Iterator[None]:
    """What is done here is done without the rights of root."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_what_may_not_be_looked_at_is_noted_and_starves_nobody(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:-1]):
        path.chmod(path.stat().st_mode | 0o055)
    for name in ("a", "shut", "z"):
        model(tmp_path / "w" / name)
    (tmp_path / "w/shut").chmod(0)
    (tmp_path / "w/z/model.safetensors").chmod(0)
    watched = Watched(tmp_path / "w")
    with somebody_else():
        watched.look()
        assert watched.look(5.0) == ["a", "z"], "why a file cannot be read is for who opens it"
        assert watched.notes() == {"shut": f"{tmp_path}/w/shut: cannot be looked at: Permission denied"}
        assert forbidden(tmp_path / "w") is None
    (tmp_path / "w").chmod(0o700)
    with somebody_else():
        watched.look(RESCAN)
        assert watched.tree.problem == f"{tmp_path}/w: the folder cannot be looked at: Permission denied"
    for name in ("w", "w/shut"):
        (tmp_path / name).chmod(0o755)
    with somebody_else():
        watched.look(RESCAN)
        assert watched.look(5.0) == ["shut"], "the others were given"
    assert watched.tree.problem is None
