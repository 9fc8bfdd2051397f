"""Exports: the base's own layout and names, values as the state says, loadable by transformers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.errors import Halt, Misconfigured
from continual.publish import folder
from continual.publish.folder import Target
from tests.helpers import models

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def merge(tmp_path: Path) -> api.Merge:
    base = models.base(tmp_path / "base", dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"not copied")
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    made = api.open(tmp_path / "state", write=True)
    for i in range(2):
        assert made.fold(models.fine_tune(base, tmp_path / f"ft-{i}", i, size=0.3)).fate == "folded"
    return made


def test_layout_values_and_provenance(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        out = merge.export(Target(tmp_path / "out"))
        assert {p.name for p in out.iterdir()} == {
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "continual.json",
        }
        base, merged = load_file(tmp_path / "base/model.safetensors"), load_file(out / "model.safetensors")
        assert list(merged) == list(base)
        for name in merged:
            assert merged[name].dtype == torch.bfloat16
            torch.testing.assert_close(merged[name], (merge.read(name) + base[name].float()).bfloat16(), rtol=0, atol=0)
        told = json.loads((out / "continual.json").read_text())
        assert told["state"] == merge.state.id
        assert [f["name"] for f in told["folded"]] == ["ft-0", "ft-1"]


def test_dtype_and_shards(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        out = merge.export(Target(tmp_path / "out", dtype="F32", shard_size=4000))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 2
        assert all(
            (out / f).stat().st_size < 4000 + 1000 or len([n for n, g in index["weight_map"].items() if g == f]) == 1
            for f in files
        )
        for name, file in index["weight_map"].items():
            with safe_open(out / file, "pt") as opened:
                assert opened.get_tensor(name).dtype == torch.float32
        assert index["metadata"]["total_size"] == 4 * sum(torch.Size(s).numel() for s in models.SHAPES.values())


def test_an_export_at_an_older_record(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        first = merge.state.ledger.folds()[0].seq
        told = json.loads((merge.export(Target(tmp_path / "out", at=first)) / "continual.json").read_text())
        assert [f["name"] for f in told["folded"]] == ["ft-0"]


def test_before_any_fold_the_export_is_the_base(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    with api.open(tmp_path / "state") as merge:
        merged = load_file(merge.export(Target(tmp_path / "out")) / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(merged[name], tensor)


def test_carried_tensors_and_overflow(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.position_ids"] = torch.arange(8)
    tensors[NAME] *= 1e6
    save_file(tensors, base / "model.safetensors")
    making.init(base, tmp_path / "state")
    with api.open(tmp_path / "state") as merge:
        out = merge.export(Target(tmp_path / "out"))
        assert torch.equal(load_file(out / "model.safetensors")["model.position_ids"], torch.arange(8))
        with pytest.raises(Halt, match=NAME):
            merge.export(Target(tmp_path / "half", dtype="F16"))
        assert not (tmp_path / "half").exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_existing_directory_is_left_alone(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        (tmp_path / "out").mkdir()
        with pytest.raises(Misconfigured, match="exists"):
            merge.export(Target(tmp_path / "out"))


def test_a_file_system_without_locks_is_exported_to(
    tmp_path: Path, merge: api.Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with merge:
        (tmp_path / ".out.0a.tmp").mkdir()
        monkeypatch.setattr(fcntl, "flock", none)
        merge.export(Target(tmp_path / "out"))
        monkeypatch.undo()
    assert (tmp_path / "out/continual.json").is_file()
    assert (tmp_path / ".out.0a.tmp").is_dir(), "nobody can tell whether it is being written"


def test_a_new_directory_that_another_export_took_for_a_leftover_is_made_again(
    tmp_path: Path, merge: api.Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not locked yet when the other looks."""
    lock, taken = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        directory = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if directory.parent == tmp_path and len(taken) < 2:
            taken.append(directory)
            directory.rmdir()
            if len(taken) == 1:  # it is about to remove it
                raise BlockingIOError
        lock(fd, operation)

    with merge:
        monkeypatch.setattr(fcntl, "flock", flock)
        merge.export(Target(tmp_path / "out"))
        monkeypatch.undo()
    assert (tmp_path / "out/continual.json").is_file()
    assert len(set(taken)) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_two_exports_to_one_place_one_is_told_that_it_is_there(
    tmp_path: Path, merge: api.Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def other_first(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            target.mkdir()
            (target / "model").touch()
        rename(source, target)

    with merge:
        monkeypatch.setattr(os, "rename", other_first)
        with pytest.raises(Misconfigured, match="out exists"):
            merge.export(Target(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_export_of_another_record_of_the_same_number_is_not_taken_for_it(tmp_path: Path, merge: api.Merge) -> None:
    """A repair, or a backup that was restored, gives a number again."""
    with merge:
        link, seq = tmp_path / "published/current", merge.head

        def write(directory: Path) -> Path:
            return merge.export(Target(directory, at=seq))

        time = merge.state.ledger.get(seq).time
        first = folder.keep_current(link, seq, write, time)
        assert folder.keep_current(link, seq, write, time) == first
        body = json.loads((first / "continual.json").read_text())
        (first / "continual.json").write_text(json.dumps({**body, "time": "2000-01-01T00:00:00.000Z"}))
        second = folder.keep_current(link, seq, write, time)
        assert second.name == f"current-{seq:08d}-1"
        assert json.loads((link / "continual.json").read_text()) | {"exported": ""} == body | {"exported": ""}
        assert sorted(p.name for p in link.parent.iterdir()) == ["current", second.name], "the old one is gone"
        assert folder.keep_current(link, seq, write, time) == first, "whose name is free again"


def test_current_link_moves_in_one_step(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        link = tmp_path / "published" / "current"
        first, second = (f.seq for f in merge.state.ledger.folds())
        for seq in (first, second):
            folder.keep_current(link, seq, lambda d, seq=seq: merge.export(Target(d, at=seq)))  # type: ignore[misc]
            assert json.loads((link / "continual.json").read_text())["seq"] == seq
        assert sorted(p.name for p in link.parent.iterdir()) == ["current", f"current-{second:08d}"]
        (tmp_path / "file").write_text("")
        with pytest.raises(Misconfigured, match="no link"):
            folder.keep_current(tmp_path / "file", 1, lambda d: d)


def test_an_export_that_somebody_else_named_by_a_date_stays(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        link = tmp_path / "published" / "current"
        link.parent.mkdir()
        merge.export(Target(link.parent / "current-20261128"))
        first, last = (fold.seq for fold in merge.state.ledger.folds())
        for seq in (first, last):
            folder.keep_current(link, seq, lambda d, seq=seq: merge.export(Target(d, at=seq)))  # type: ignore[misc]
        merge.export(Target(link.parent / f"current-{last:08d}-7"))  # as of one that was killed
        folder.keep_current(link, last, lambda d: d)
        names = sorted(path.name for path in link.parent.iterdir())
        assert names == ["current", f"current-{last:08d}", "current-20261128"]


def test_what_a_server_was_given_stays_until_it_has_another(tmp_path: Path, merge: api.Merge) -> None:
    with merge:
        link = tmp_path / "published" / "current"

        def put(seq: int, given: int) -> set[str]:
            def served(directory: Path) -> bool:
                return directory.name == f"current-{given:08d}"

            def write(directory: Path) -> Path:
                directory.mkdir()
                (directory / "continual.json").write_text(json.dumps({"seq": seq}))
                return directory

            folder.keep_current(link, seq, write, served=served)
            return {path.name for path in link.parent.iterdir() if path != link}

        def named(*seqs: int) -> set[str]:
            return {f"current-{seq:08d}" for seq in seqs}

        assert put(1, given=0) == named(1)
        assert put(2, given=1) == named(1, 2)
        assert put(3, given=1) == named(1, 2, 3), "it was not given the second"
        assert put(4, given=3) == named(3, 4)


@pytest.mark.slow
def test_transformers_loads_an_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(tmp_path / "ft", max_shard_size="20KB")
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="mean"))
    with api.open(tmp_path / "state", write=True) as merge:
        assert merge.fold(tmp_path / "ft").fate == "folded"
        merge.export(Target(tmp_path / "out"))
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_a_reader_whose_generation_expired_reads_what_is_newest_now(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "s", making.Recipe(rule="mean"))
    with api.open(tmp_path / "s", write=True, keep=1) as writer:
        writer.fold(models.fine_tune(base, tmp_path / "a", 1))
        with api.open(tmp_path / "s") as reader:
            for number in (2, 3):
                writer.fold(models.fine_tune(base, tmp_path / f"b{number}", number))
            assert reader.head == 1
            reader.export(tmp_path / "out")
            assert reader.head == 3
            assert json.loads((tmp_path / "out/continual.json").read_text())["seq"] == 3
            name = next(iter(models.SHAPES))
            assert torch.equal(reader.read(name), writer.read(name))
            with pytest.raises(Misconfigured, match="expired"):
                reader.export(Target(tmp_path / "old", at=1))
        with pytest.raises(Misconfigured, match="expired"):
            writer.read(name, at=1)
