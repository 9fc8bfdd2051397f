"""A disk that fills up while a generation is written: nothing is settled, and it goes on when there is room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from continual.errors import Retry
from continual.state import Transaction
from continual.state.verify import verify
from tests.helpers import stores
from tests.helpers.mounting import mounted


def write_all(transaction: Transaction) -> None:
    for name in stores.SHAPES:
        transaction.write(name, "sum", stores.value(name, 2))


def test_a_full_disk_settles_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=24M", "tmpfs"), stores.make(disk / "s") as state:
        stores.fold(state, 1)
        with state.begin() as transaction:
            (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
            with pytest.raises(Retry, match="disk is full"):
                write_all(transaction)
        with pytest.raises(Retry, match="free some space"):
            state.begin()
        (disk / "ballast").unlink()
        assert stores.fold(state, 2) == 2
        assert verify(state) == []
