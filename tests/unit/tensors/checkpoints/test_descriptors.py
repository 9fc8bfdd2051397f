"""Files of models within a bound of descriptors: read as if all were open, and a change never goes unnoticed."""

from __future__ import annotations

import json
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from continual.errors import Refuse, Retry
from continual.outside import open_regular
from continual.tensors import Checkpoint, open_model
from continual.tensors.checkpoints import descriptors, files
from continual.tensors.checkpoints.checkpoint import MOST_SHARDS
from continual.tensors.checkpoints.descriptors import Descriptors
from continual.tensors.checkpoints.files import Files


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Descriptors]:
    few = Descriptors(3)
    monkeypatch.setattr(files, "SHARED", few)
    yield few
    assert len(few) == 0


def written(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    return paths


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_few_are_open_and_all_are_read(tmp_path: Path, shared: Descriptors) -> None:
    before = open_files()
    opened = Files(written(tmp_path, 20), tmp_path)
    for _ in range(2):
        for i in range(20):
            assert opened.pread(i, 3, 50) == bytes([i]) * 3
            assert len(shared) <= 3
            assert open_files() <= before + 3
    opened.will_need(0, 0, 10)
    opened.check_unchanged()
    opened.close()
    assert open_files() == before


def test_many_threads_share_few_descriptors(tmp_path: Path, shared: Descriptors) -> None:
    opened = Files(written(tmp_path, 12), None)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for step in range(300):
            i = (seed * 7 + step * 5) % 12
            if opened.pread(i, 4, step % 90) != bytes([i]) * 4 or len(shared) > 3:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    opened.close()


def test_a_file_that_does_not_open_holds_up_no_other(
    tmp_path: Path, shared: Descriptors, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung, good = (Files([path], None) for path in written(tmp_path, 2))
    for file in list(shared._open):
        shared._drop(file)
    asked, answer = threading.Event(), threading.Event()

    def slow(path: Path) -> int:
        if path.name == "0.bin":
            asked.set()
            assert answer.wait(30)
        return open_regular(path)

    monkeypatch.setattr(descriptors, "open_regular", slow)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(hung.pread(0, 1, 0)), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert asked.wait(10)
    other = threading.Thread(target=lambda: found.append(good.pread(0, 1, 0)), daemon=True)
    other.start()
    other.join(10)
    assert found == [b"\x01"]
    hung.close()  # while it is opened: closed for good when its readers are done
    answer.set()
    for thread in threads:
        thread.join(10)
    assert found == [b"\x01", b"\x00", b"\x00"]
    good.close()


def _replaced(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.utime(path.parent / "new", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(path.parent / "new", path)


def _rewritten(path: Path) -> None:
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(1, 1))


def _cut(path: Path) -> None:
    os.truncate(path, 10)


def _deleted(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [_replaced, _rewritten, _cut, _deleted])
@pytest.mark.usefixtures("shared")
def test_a_change_behind_a_closed_descriptor_is_noticed(tmp_path: Path, change: object) -> None:
    opened = Files(written(tmp_path, 8), None)
    for i in range(8):
        opened.pread(i, 1, 0)  # the first ones are closed by now
    change(tmp_path / "0.bin")  # type: ignore[operator]
    with pytest.raises(Retry, match=r"0\.bin"):
        opened.pread(0, 1, 99)
    with pytest.raises(Retry, match=r"0\.bin"):
        opened.check_unchanged()
    opened.close()


@pytest.mark.usefixtures("shared")
def test_a_file_that_becomes_a_fifo(tmp_path: Path) -> None:
    opened = Files(written(tmp_path, 8), None)
    (tmp_path / "0.bin").unlink()
    os.mkfifo(tmp_path / "0.bin")
    with pytest.raises(Refuse, match=r"0\.bin: is no regular file"):
        opened.pread(0, 1, 0)
    opened.close()


def test_idle_files_are_given_back_where_the_process_has_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Descriptors(1000)
    monkeypatch.setattr(files, "SHARED", many)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 20, hard))
    try:
        opened = Files(written(tmp_path, 100), None)
        assert all(opened.pread(i, 1, 0) == bytes([i]) for i in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if opened is not None:
            opened.close()


def sharded(folder: Path, count: int) -> Path:
    folder.mkdir()
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(save({f"t{i}": torch.tensor([float(i)])}))
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.usefixtures("shared")
def test_eleven_hundred_shards_where_the_process_may_open_a_few(tmp_path: Path) -> None:
    model = sharded(tmp_path / "model", 1100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 10, hard))
    try:
        with open_model(model) as opened:
            assert isinstance(opened, Checkpoint)
            assert [float(opened.read(f"t{i}")) for i in range(1100)] == list(map(float, range(1100)))
            opened.check_unchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_shards_are_refused(tmp_path: Path) -> None:
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(MOST_SHARDS + 1)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refuse, match=f"names {MOST_SHARDS + 1} shards") as refusal:
        open_model(tmp_path)
    assert refusal.value.reason == "index"


def test_the_bound_is_a_share_of_what_the_process_may_open() -> None:
    assert descriptors.SHARED.most <= max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)
