"""A folder as a place: what is there, what cannot be told, and names that nobody can print."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse, Retry
from continual.tensors import Folder, open_model, unreadable
from continual.tensors.checkpoints import place


def test_what_is_present(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "nowhere").symlink_to("gone")
    found = Folder(tmp_path)
    assert found.present("file")
    assert not any(map(found.present, ("self", "nowhere", "gone", "file/below")))


def test_what_cannot_be_told_is_said_by_whoever_opens_it(tmp_path: Path) -> None:
    long = "x" * 300
    assert Folder(tmp_path).present(long)
    with pytest.raises(Refuse, match="File name too long") as refusal:
        Folder(tmp_path).small(long)
    assert refusal.value.reason == "no-file"


def test_a_place_that_is_gone_or_loops(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    for name in ("self", "gone"):
        with pytest.raises(Refuse) as refusal:
            Folder(tmp_path / name).must_be_there()
        assert refusal.value.reason == "gone"
        with pytest.raises(Retry):
            Folder(tmp_path / name).names()
        unreadable(Folder(tmp_path / name))


def test_more_files_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "MOST_FILES", 3)
    for i in range(4):
        (tmp_path / f"{i}.safetensors").write_bytes(b"")
    with pytest.raises(Refuse, match="more than 3 files") as refusal:
        open_model(tmp_path)
    assert refusal.value.reason == "index"
    assert len(Folder(tmp_path).look()) == 3


@pytest.mark.parametrize("name", [b"\xff.safetensors", b"a\x1b[2J.safetensors"])
def test_a_file_whose_name_cannot_be_printed(tmp_path: Path, name: bytes) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "w")
    os.rename(tmp_path / "w", os.path.join(os.fsencode(tmp_path), name))
    with pytest.raises(Refuse, match="cannot be printed") as refusal:
        open_model(tmp_path)
    assert str(refusal.value).isprintable()
    os.rename(os.path.join(os.fsencode(tmp_path), name), os.path.join(os.fsencode(tmp_path), name + b".bin"))
    with pytest.raises(Refuse, match="pickled") as refusal:
        open_model(tmp_path)
    assert str(refusal.value).isprintable()
