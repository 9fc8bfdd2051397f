"""Ten kills of the campaign in `kills.py`; the README says how to run all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.faults import kills

pytestmark = pytest.mark.slow


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    result = kills.campaign(tmp_path / "kills", 10)
    assert result["kills"] == 10
    assert isinstance(result["between begin and acknowledgement"], int)
    assert result["between begin and acknowledgement"] >= 5
