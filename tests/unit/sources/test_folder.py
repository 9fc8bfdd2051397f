"""The folder source: which directories are models, in which order, and when one is whole and still. Time is an
argument; files are real."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from continual.records import FileStat
from continual.sources.folder import INDEX, FolderSighting, FolderSource, Settling, forbidden, look, scan

WEIGHTS = save({"a.weight": torch.zeros(4, 4)})


def publish(path: Path, files: dict[str, bytes], when: int | None = None) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
        if when is not None:
            os.utime(path / name, (when, when))
    return path


def sharded(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


def whole(path: Path) -> bool:
    found = look(path)
    assert found is not None
    return found.whole


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"model.safetensors": WEIGHTS}, True),
        ({"model.safetensors": WEIGHTS[:-1]}, False),
        ({"model.safetensors": WEIGHTS[:5]}, False),
        (
            {"model.safetensors": (1 << 63).to_bytes(8, "little") + WEIGHTS},
            True,
        ),  # malformed: to be refused, not waited for
        ({"model.safetensors": b"\x04\0\0\0\0\0\0\0nope"}, True),
        ({INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS}, False),
        (
            {INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS[:-4]},
            False,
        ),
        ({INDEX: sharded("1.safetensors", "2.safetensors"), "1.safetensors": WEIGHTS, "2.safetensors": WEIGHTS}, True),
        ({INDEX: b"no json", "1.safetensors": WEIGHTS}, True),
        ({"adapter_config.json": b"{}"}, False),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS[:-1]}, False),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}, True),
        ({"pytorch_model.bin": b"x"}, True),
    ],
)
def test_whole_is_all_files_at_full_length(tmp_path: Path, files: dict[str, bytes], complete: bool) -> None:
    assert whole(publish(tmp_path / "m", files)) is complete


def test_what_is_no_model_and_what_is_not_published_yet(tmp_path: Path) -> None:
    publish(tmp_path / "notes", {"README.md": b"x"})
    publish(tmp_path / ".hidden", {"model.safetensors": WEIGHTS})
    publish(tmp_path / "upload.tmp", {"model.safetensors": WEIGHTS})
    publish(tmp_path / "half", {"model.safetensors.incomplete": WEIGHTS})
    publish(tmp_path / "a/b/c/d", {"model.safetensors": WEIGHTS})
    publish(tmp_path / "org/model", {"model.safetensors": WEIGHTS})
    assert [s.path for s in scan(tmp_path)] == [tmp_path / "org/model"]
    assert look(tmp_path / "gone") is None


def test_order_is_time_of_the_index_then_name(tmp_path: Path) -> None:
    publish(tmp_path / "late", {"model.safetensors": WEIGHTS}, 300)
    publish(tmp_path / "b", {"model.safetensors": WEIGHTS}, 200)
    publish(tmp_path / "a", {"model.safetensors": WEIGHTS}, 200)
    publish(tmp_path / "first", {INDEX: sharded("1.safetensors"), "1.safetensors": WEIGHTS}, 100)
    os.utime(tmp_path / "first/1.safetensors", (999, 999))
    assert [s.path.name for s in scan(tmp_path)] == ["first", "a", "b", "late"]


def test_links_are_looked_at_and_not_followed_further(tmp_path: Path) -> None:
    publish(tmp_path / "elsewhere/m", {"model.safetensors": WEIGHTS})
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched/up").symlink_to(tmp_path)
    (tmp_path / "watched/m").symlink_to(tmp_path / "elsewhere/m")
    assert [s.path.name for s in scan(tmp_path / "watched")] == ["m"]


def test_a_state_inside_or_around_is_found(tmp_path: Path) -> None:
    publish(tmp_path / "w/deep/state", {"format.json": b"{}"})
    (tmp_path / "w/deep/state/commits").mkdir()
    assert forbidden(tmp_path / "w") == tmp_path / "w/deep/state"
    assert forbidden(tmp_path / "w/deep/state/commits") == (tmp_path / "w/deep/state").resolve()
    assert forbidden(tmp_path / "w/deep/state/../..") is not None


def seen(path: str, version: int, complete: bool = True) -> FolderSighting:
    return FolderSighting(Path(path), (FileStat("model.safetensors", 1, version, 1),), complete, (version, path))


def test_ready_once_after_the_settle_time() -> None:
    settling = Settling(5.0)
    assert settling.ready([seen("a", 1)], 0.0) == []
    assert settling.next_look([seen("a", 1)], 1.0) == 4.0
    assert settling.ready([seen("a", 1)], 4.9) == []
    assert settling.ready([seen("a", 2)], 5.0) == [], "it changed: the time begins again"
    assert settling.ready([seen("a", 2)], 10.0) == [seen("a", 2)]
    assert settling.ready([seen("a", 2)], 99.0) == []
    assert settling.next_look([seen("a", 2)], 99.0) is None
    assert settling.ready([seen("a", 3)], 100.0) == []
    assert settling.ready([seen("a", 3)], 105.0) == [seen("a", 3)], "rewritten: it is another model"


def test_gone_and_come_again_is_ready_again() -> None:
    settling = Settling(1.0)
    settling.ready([seen("a", 1)], 0.0)
    assert settling.ready([seen("a", 1)], 1.0) == [seen("a", 1)]
    settling.ready([], 2.0)
    settling.ready([seen("a", 1)], 3.0)
    assert settling.ready([seen("a", 1)], 4.0) == [seen("a", 1)]


def test_one_that_never_becomes_whole_is_handed_on_at_last() -> None:
    settling = Settling(5.0)
    settling.ready([seen("a", 1, complete=False)], 0.0)
    assert settling.ready([seen("a", 1, complete=False)], 299.0) == []
    assert settling.ready([seen("a", 1, complete=False)], 300.0) == [seen("a", 1, complete=False)]


@given(st.lists(st.tuples(st.floats(0.01, 10.0), st.integers(0, 2)), min_size=1, max_size=30))
def test_never_ready_within_the_settle_time_of_a_change(steps: list[tuple[float, int]]) -> None:
    settling, now, version, changed = Settling(3.0), 0.0, -1, 0.0
    for wait, next_version in steps:
        now += wait
        if next_version != version:
            version, changed = next_version, now
        if settling.ready([seen("a", version)], now):
            assert now - changed >= 3.0


def test_events_of_what_was_there_and_of_what_is_renamed_in(tmp_path: Path) -> None:
    async def drive() -> list[str]:
        publish(tmp_path / "w/early", {"model.safetensors": WEIGHTS})
        source, stop, found = FolderSource(tmp_path / "w", settle=0.05, rescan=30.0), asyncio.Event(), []
        async with asyncio.timeout(20):
            async for event in source.events(stop):
                found.append(event.name)
                if len(found) == 1:
                    publish(tmp_path / "w/.late.tmp", {"model.safetensors": WEIGHTS}).rename(tmp_path / "w/late")
                if len(found) == 2:
                    stop.set()
        return found

    assert asyncio.run(drive()) == ["early", "late"]
