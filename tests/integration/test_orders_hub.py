"""A candidate that is read from the Hub as it is needed is folded by the process that found it, where others do the
work of folds: the same bits, and nothing is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from continual.api import Merge
from continual.config import Settings
from continual.hub import Hub as Client
from continual.state.strays import strays
from tests.helpers import hubs, models
from tests.helpers.posted import Posted
from tests.loopback import TOKEN, serving


class SentFromHub(Merge):
    """A merge whose work is done by orders."""

    posted: Posted

    @property
    def executor(self) -> Posted:  # type: ignore[override]
        return self.posted


@pytest.mark.parametrize("rule", ["tsv-m", "ties"])
def test_a_candidate_of_the_hub_is_folded_here(tmp_path: Path, rule: str) -> None:
    with serving() as hub:
        base = hubs.made(tmp_path, hub, rule)
        hubs.publish(hub, "someone/tune", models.fine_tune(base, tmp_path / "tune", 1))
        shutil.copytree(tmp_path / "state", tmp_path / "other")
        client = Client(endpoint=hub.endpoint, token=TOKEN)
        with Merge(Settings(state=tmp_path / "other"), write=True, client=client) as merge:
            assert merge.fold("hf://someone/tune").fate == "folded"
            expected = hubs.sums(merge)
        with SentFromHub(Settings(state=tmp_path / "state"), write=True, client=client) as merge:
            merge.posted = Posted()
            assert merge.fold("hf://someone/tune").fate == "folded"
            assert merge.posted.orders == 0
            assert hubs.equal(hubs.sums(merge), expected)
        with SentFromHub(Settings(state=tmp_path / "state")) as merge:  # no order of the tree is left behind
            assert strays(tmp_path / "state", merge.state.format, merge.state.ledger) == []
