"""Exports by orders that went through bytes, or to the workers of a Ray cluster: the bytes of one process, whatever is
exported, and its errors; where a folder is not one for that, nothing is left and it is said."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.config import RaySettings, Settings
from continual.engine.views import ReadView
from continual.errors import Damaged, Halt, Misconfigured, Retry
from continual.executors.contract import Executor, Task
from continual.executors.orders import WorkPiece
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from continual.state import State
from continual.stores import ObjectPath
from tests.helpers import adapters, models, on_cluster
from tests.helpers.posted import Posted

SHAPES = {
    **models.SHAPES,
    "model.layers.0.mlp.experts.down_proj": (3, 8, 16),
    "model.scale": (),
    "model.none.weight": (0, 16),
    "model.odd[name]/x y.weight": (3, 5),
    "model.layers.0.bn.running_var": (5,),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class By(api.Merge):
    """A merge whose work another executor does."""

    other: Executor

    @property
    def executor(self) -> Executor:
        return self.other


Opened = Callable[[Path], api.Merge]


@pytest.fixture(params=["posted", "ray"])
def elsewhere(request: pytest.FixtureRequest) -> Opened:
    return opener(Posted(1 << 12) if request.param == "posted" else on_cluster.executor(2, 1 << 12))


def settings(state: Path, **more: Any) -> Settings:
    return Settings(state=state, max_base_ratio=100.0, max_mean_ratio=1e6, **more)


def opener(executor: Executor) -> Opened:
    def opened(state: Path) -> api.Merge:
        found = By(settings(state), write=True)
        found.other = executor
        return found

    return opened


def made_of(place: Path, rule: str, base: Path, *, scale: str | None = None) -> Path:
    state = place / rule
    making.init(base, state, making.Recipe(rule=rule, scale=scale))
    whole = load_file(base / "model.safetensors")
    tied = torch.equal(whole[EMBEDDING], whole[HEAD])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tied:
            tensors[HEAD] = tensors[EMBEDDING].clone()

    with api.Merge(settings(state), write=True) as merge:
        for number in range(2):
            outcome = merge.fold(models.fine_tune(base, place / f"{rule}-{number}", number, change=change))
            assert outcome.fate == "folded", outcome.message
    return state


def files_in(directory: Path) -> dict[str, bytes]:
    """All files in a directory, without the time at which an export was made."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: re.sub(rb'"exported": "[^"]+"', b"", data) for name, data in found.items()}


def both(tmp_path: Path, state: Path, elsewhere: Opened, export: Callable[[api.Merge, Path], object]) -> None:
    """What one process exports is what others do, and they did it."""
    tmp_path.mkdir(exist_ok=True)
    for number, opened in enumerate((lambda at: api.Merge(settings(at), write=True), elsewhere)):
        with opened(state) as merge:
            export(merge, tmp_path / f"export-{number}")
    alone, others = files_in(tmp_path / "export-0"), files_in(tmp_path / "export-1")
    assert alone.keys() == others.keys()
    for name, data in alone.items():
        assert others[name] == data, name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", shapes=SHAPES)


@pytest.fixture
def tied(tmp_path: Path, base: Path) -> Path:
    """A base whose head is tied to its embedding, and lies in the file too."""
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    return models.write(tmp_path / "tied", tensors, {**models.CONFIG, "tie_word_embeddings": True})


@pytest.mark.parametrize("rule", ["task-arithmetic", "tsv-m"])
def test_a_model_has_the_bytes_of_one_process(tmp_path: Path, tied: Path, elsewhere: Opened, rule: str) -> None:
    state = made_of(tmp_path, rule, tied)
    both(tmp_path, state, elsewhere, lambda merge, at: merge.export(Target(at, dtype="BF16", shard_size=3000)))
    assert len(list((tmp_path / "export-1").glob("*.safetensors"))) > 3


def test_what_an_earlier_export_has_is_taken(tmp_path: Path, base: Path, elsewhere: Opened) -> None:
    state = made_of(tmp_path, "task-arithmetic", base, scale="1.0")
    with api.Merge(settings(state), write=True) as merge:
        merge.export(tmp_path / "first")
        (tmp_path / "current").symlink_to("first")
        name = "model.layers.0.mlp.up_proj.weight"
        one = models.fine_tune(base, tmp_path / "one", 7, size=0.0, change=lambda t: t[name].add_(0.02))
        assert merge.fold(one).fate == "folded"
    both(tmp_path, state, elsewhere, lambda merge, at: merge.export(Target(at, earlier=tmp_path / "current")))
    assert json.loads((tmp_path / "export-1/continual.json").read_text())["made"]["made"] == 1


@pytest.mark.parametrize("rule", ["task-arithmetic", "tsv-m"])
def test_a_state_of_adapters(tmp_path: Path, elsewhere: Opened, rule: str) -> None:
    """As a model and as an adapter, read by a view."""
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    making.init(base, state, making.Recipe(rule=rule, width=16))
    with api.Merge(settings(state), write=True) as merge:
        for number, modules in enumerate((("q_proj", "down_proj"), ("q_proj",), ("up_proj",))):
            lora = adapters.lora(tmp_path / f"lora-{number}", base, number, rank=4, modules=modules)
            assert merge.fold(lora).fate == "folded"

    def export(merge: api.Merge, at: Path) -> None:
        at.mkdir()
        view = ReadView(without=("lora-2",))
        merge.export(at / "model", view=view)
        merge.export_lora(LoraTarget(at / "own", None if rule == "task-arithmetic" else 3))
        merge.export_lora(LoraTarget(at / "narrow", 2, "BF16"), view)

    both(tmp_path, state, elsewhere, export)


def test_an_adapter_of_a_merge_of_whole_tensors(tmp_path: Path, base: Path, elsewhere: Opened) -> None:
    state = made_of(tmp_path, "task-arithmetic", base)
    found = []
    both(tmp_path, state, elsewhere, lambda merge, at: found.append(merge.export_lora(LoraTarget(at, 4, "F16"))))
    assert replace(found[0], directory=found[1].directory) == found[1]


@pytest.mark.slow
def test_a_state_on_an_object_store(tmp_path: Path, base: Path, at: ObjectPath) -> None:
    making.init(base, at, making.Recipe(rule="mean"))
    with api.Merge(settings(at), write=True) as merge:  # type: ignore[arg-type]
        assert merge.fold(models.fine_tune(base, tmp_path / "tune", 1)).fate == "folded"
    both(tmp_path, at, opener(Posted(1 << 12)), lambda merge, to: merge.export(to))  # type: ignore[arg-type]


class Between(Posted):
    """Does something before orders are done, and after."""

    def __init__(
        self, before: Callable[[Sequence[Task[Any]]], Sequence[Task[Any]]], after: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(1 << 12)
        self._before, self._after = before, after

    def map(self, tasks: Sequence[Task[Any]]) -> Iterator[tuple[str, Any]]:
        yield from super().map(self._before(tasks))
        self._after()


def failed(tmp_path: Path, executor: Executor, kind: type[Exception], said: str, rule: str = "mean") -> None:
    """An export fails so, and leaves nothing."""
    there = set(tmp_path.iterdir())
    with opener(executor)(tmp_path / rule) as merge, pytest.raises(kind, match=said):
        merge.export(tmp_path / "export")
    assert set(tmp_path.iterdir()) == there


def test_what_a_worker_cannot_write_the_driver_does(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a folder is on the disk of some machines alone: what was done there is not done again."""
    state, sent = made_of(tmp_path, "mean", base), []

    def lost(tasks: Sequence[Task[Any]]) -> list[Task[Any]]:
        found = list(tasks)
        for number, task in enumerate(tasks):
            if isinstance(task.run, WorkPiece) and number >= 5:
                job = replace(task.run.job, id="other", directory=Path("/nowhere/.export.0a.tmp"))
                found[number] = task._replace(run=replace(task.run, job=job))
        sent.append(len(found))
        return found

    both(tmp_path, state, opener(Between(lost)), lambda merge, at: merge.export(at))
    assert sent == [len(SHAPES), len(SHAPES) - 5]
    assert "/nowhere/.export.0a.tmp is not there" in caplog.text
    both(tmp_path / "lora", state, opener(Between(lost)), lambda merge, at: merge.export_lora(LoraTarget(at, 2)))


@pytest.mark.parametrize("end", [0, 1], ids=["first", "last"])
def test_bytes_that_another_machine_wrote_over_are_told(tmp_path: Path, base: Path, end: int) -> None:
    """As on file systems that keep of one file what the last of two wrote."""
    made_of(tmp_path, "mean", base)

    def written_over() -> None:
        (file,) = tmp_path.glob(".export.*.tmp/model.safetensors")
        whole = bytearray(file.read_bytes())
        data = 8 + int.from_bytes(whole[:8], "little")
        place = data + json.loads(whole[8:data])[EMBEDDING]["data_offsets"][end] - end
        whole[place] ^= 1
        file.write_bytes(whole)

    failed(tmp_path, Between(list, written_over), Misconfigured, "several machines write one file")


def test_a_file_has_its_length_before_anybody_writes_to_it(tmp_path: Path, base: Path) -> None:
    """A client of NFS that believes that it writes the end of a file fills the page with zeros."""
    made_of(tmp_path, "mean", base)
    sizes: dict[str, int] = {}

    def seen(tasks: Sequence[Task[Any]]) -> Sequence[Task[Any]]:
        sizes.update({path.name: path.stat().st_size for path in tmp_path.glob(".*.tmp/*.safetensors")})
        return tasks

    with opener(Between(seen))(tmp_path / "mean") as merge:
        merge.export(Target(tmp_path / "model", shard_size=3000))
        merge.export_lora(LoraTarget(tmp_path / "lora", 2))
    found = [*(tmp_path / "model").glob("*.safetensors"), *(tmp_path / "lora").glob("*.safetensors")]
    assert sizes == {path.name: path.stat().st_size for path in found}


def test_a_disk_that_is_full_there_is_told(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of(tmp_path, "mean", base)

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    failed(tmp_path, Posted(1 << 12), Retry, "cannot write .*export: the disk is full")


def test_a_value_that_the_dtype_cannot_hold_is_told(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    small = models.base(tmp_path / "small")
    tensors = load_file(small / "model.safetensors")
    tensors[name] *= 1e8
    state = made_of(tmp_path, "mean", models.write(tmp_path / "base", tensors))
    there = set(tmp_path.iterdir())
    with opener(Posted(1 << 12))(state) as merge:
        with pytest.raises(Halt, match=f"tensor {name} has values that F16 cannot hold"):
            merge.export(Target(tmp_path / "export", dtype="F16"))
        merge.rescale("1e16")
        with pytest.raises(Halt, match="its factors have values that F16 cannot hold"):
            merge.export_lora(LoraTarget(tmp_path / "lora", 2, "F16"))
    assert set(tmp_path.iterdir()) == there


def test_a_damaged_chunk_and_another_base_are_told(tmp_path: Path, base: Path) -> None:
    state = made_of(tmp_path, "mean", base)

    def changed(tasks: Sequence[Task[Any]]) -> Sequence[Task[Any]]:
        data = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").unlink()
        (base / "model.safetensors").write_bytes(data)
        return tasks

    failed(tmp_path, Between(changed), Retry, "another file")
    with State.open(state) as found:
        generation = state / "generations" / str(found.ledger.head.generation)
    chunk = max(generation.rglob("c*"), key=lambda path: path.stat().st_size)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    failed(tmp_path, Posted(1 << 12), Damaged, chunk.parent.name)


def test_paths_may_be_relative(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_of(tmp_path, "mean", base)
    monkeypatch.chdir(tmp_path)
    with opener(Posted(1 << 12))(Path("mean")) as merge:
        merge.export("first")
        merge.export(Target("second", earlier=Path("first")))
        merge.export_lora(LoraTarget("lora", 2))
    assert json.loads(Path("second/continual.json").read_text())["made"]["made"] == 0
    assert Path("first/model.safetensors").read_bytes() == Path("second/model.safetensors").read_bytes()


def test_what_a_worker_wrote_is_on_its_disk_before_it_says_so(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine cannot sync it."""
    state, events = made_of(tmp_path, "mean", base), []
    write, sync = os.pwrite, os.fsync

    def name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    class Watched(Posted):
        def map(self, tasks: Sequence[Task[Any]]) -> Iterator[tuple[str, Any]]:
            for found in super().map(tasks):
                events.append(("answer", ""))
                yield found

    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: events.append(("write", name(fd))) or write(fd, data, at))
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(("sync", name(fd))) or sync(fd))
    with opener(Watched(1 << 12))(state) as merge:
        merge.export(Target(tmp_path / "model", shard_size=3000))
        merge.export_lora(LoraTarget(tmp_path / "lora", 2))
    waiting: set[str] = set()
    heads = {("write", path.name) for path in tmp_path.rglob("*.safetensors")}
    answers = 0
    for event in events:
        if event in heads and not answers:
            heads.discard(event)  # what the driver writes
        elif event[0] == "write":
            waiting |= {event[1]} if event[1].endswith(".safetensors") else set()
        elif event[0] == "sync":
            waiting.discard(event[1])
        else:
            answers += 1
            assert waiting == set()
    assert answers == 2 * len(SHAPES)


def test_an_order_that_is_done_again_changes_nothing(tmp_path: Path, base: Path) -> None:
    """As one whose worker died after it had written."""

    class Twice(Posted):
        def map(self, tasks: Sequence[Task[Any]]) -> Iterator[tuple[str, Any]]:
            list(super().map(tasks[::-1]))
            yield from super().map(tasks)

    both(tmp_path, made_of(tmp_path, "mean", base), opener(Twice(1 << 12)), lambda merge, at: merge.export(at))


def test_the_driver_alone_writes_where_the_settings_say_so(tmp_path: Path, base: Path) -> None:
    state = made_of(tmp_path, "mean", base)
    posted, done = Posted(), [0]
    for exports in ("workers", "driver"):
        merge = By(settings(state, ray=RaySettings(exports=exports)))
        merge.other = posted
        with merge:
            merge.export(tmp_path / exports)
            done.append(posted.orders)
            merge.export_lora(LoraTarget(tmp_path / f"{exports}-lora", 2))
            done.append(posted.orders)
    assert 0 < done[1] < done[2] == done[3] == done[4]
    assert files_in(tmp_path / "workers") == files_in(tmp_path / "driver")
