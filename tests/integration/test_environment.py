"""Trouble that is not the candidate's: files that change or vanish while they are read, a disk that fills up, a state
that cannot be written.

Nothing is settled by any of it, the state is as before, and the same candidate folds once the trouble is over.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from continual import api, making
from continual.config import Settings
from continual.errors import ContinualError, Retry
from continual.state import State
from continual.state.verify import verify
from tests.helpers import models
from tests.helpers.mounting import mounted

pytestmark = pytest.mark.slow


def rewrite(model: Path) -> None:
    other = models.fine_tune(model.parent / "base", model.with_name("other"), 77)
    shutil.copyfile(other / "model.safetensors", model / "model.safetensors")


def cut(model: Path) -> None:
    os.truncate(model / "model.safetensors", 200)


def replace(model: Path) -> None:
    other = models.fine_tune(model.parent / "base", model.with_name("other"), 78)
    (other / "model.safetensors").rename(model / "model.safetensors")


@pytest.mark.parametrize(
    "spoil", [shutil.rmtree, rewrite, cut, replace], ids=["deleted", "rewritten", "cut", "replaced"]
)
@pytest.mark.parametrize("at", ["first tensor", "last tensor"])
def test_what_changes_while_it_is_read_settles_nothing(tmp_path: Path, spoil: Callable[[Path], None], at: str) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    model = models.fine_tune(base, tmp_path / "ft", 1)
    kept = shutil.copytree(model, tmp_path / "kept")
    spoilt = False

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal spoilt
        if stage == "fold" and done == (1 if at == "first tensor" else total) and not spoilt:
            spoilt = True
            spoil(model)

    with api.Merge(Settings(state=tmp_path / "state", workers=1), write=True) as merge:
        with pytest.raises(Retry, match="ft"):
            merge.fold(model, progress=progress)
        assert merge.state.ledger.head.seq == 0
        assert list((tmp_path / "state/generations").iterdir()) == []
        shutil.rmtree(model, ignore_errors=True)
        kept.rename(model)
        assert merge.fold(model).fate == "folded"


def test_a_disk_that_fills_up_in_the_middle_of_a_fold(tmp_path: Path) -> None:
    base = models.base(
        tmp_path / "base", shapes={"a.weight": (512, 1024), "b.weight": (512, 1024), "c.weight": (512, 1024)}
    )
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        state = tmp_path / "disk/state"
        making.init(base, state, making.Recipe(rule="mean"))

        def fill(step: str) -> None:
            if step == "chunks":  # the check for room has passed
                free = shutil.disk_usage(state).free
                (tmp_path / "disk/other").write_bytes(bytes(free - (3 << 20)))

        with (
            api.Merge(Settings(state=state), write=True, on_step=fill) as merge,
            pytest.raises(Retry, match=r"disk is full.*nothing was settled"),
        ):
            merge.fold(models.fine_tune(base, tmp_path / "ft", 1))
        with api.Merge(Settings(state=state), write=True) as merge:
            assert merge.state.ledger.head.seq == 0
            assert verify(merge.state) == []
            with pytest.raises(Retry, match="free"):
                merge.fold(tmp_path / "ft")  # now the check before the fold says it
            (tmp_path / "disk/other").unlink()
            assert merge.fold(tmp_path / "ft").fate == "folded"
            assert verify(merge.state) == []


def test_a_file_size_limit_is_an_environment_too(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", shapes={"a.weight": (512, 1024)})
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    model = models.fine_tune(base, tmp_path / "ft", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merge:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(Retry, match="nothing was settled"):
                merge.fold(model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert merge.fold(model).fate == "folded"


def test_a_read_only_state_can_be_read_and_not_written(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    making.init(base, tmp_path / "state")
    model = models.fine_tune(base, tmp_path / "ft", 1)
    with mounted(tmp_path / "state", "--bind", str(tmp_path / "state")):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "state")], check=True)
        with (
            pytest.raises(ContinualError, match="Read-only"),
            api.Merge(Settings(state=tmp_path / "state"), write=True) as merge,
        ):
            merge.fold(model)
        with State.open(tmp_path / "state") as state:
            assert state.ledger.head.seq == 0
        with api.Merge(Settings(state=tmp_path / "state")) as merge:
            assert merge.plan(model).ok
