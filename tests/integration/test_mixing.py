"""A weighted sum written from the one before, on real files: the digests of those that enter, and files that change
meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.errors import Retry
from continual.executors.contract import silent
from continual.selection.members import Member
from continual.selection.mixing import Mix, Mixing, layers, stored_sum
from tests.helpers import quadratic
from tests.helpers.pools import fill
from tests.helpers.weighed import opened

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_model_that_enters_is_known_by_all_of_its_tensors_whatever_its_weights(
    tmp_path: Path, base: Path, by_layer: bool
) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0))
        merge.round()
        (fold,) = merge.state.ledger.folds()
        member = Member(fold.entry.candidate)
        numbers = layers(merge.base, by_layer=by_layer)
        count = 1 + max(numbers.values())
        mixing = Mixing(merge.engine, stored_sum(merge.state), {member.key: member}, numbers)
        for add in ({}, {member.key: (0.0,) * (count - 1) + (0.5,)}):
            with merge.state.begin() as transaction:
                _, digests = mixing.write(transaction, Mix((1.0,) * count, add), [member.key], silent)
            assert digests == {member.key: fold.entry.digest}


def test_a_file_that_changes_while_the_sum_is_written_is_seen(tmp_path: Path, base: Path) -> None:
    candidate = quadratic.good(base, 0)

    def touch(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("fold", 1):
            (candidate / "model.safetensors").touch()

    with opened(tmp_path / "state", base) as merge:
        fill(merge, candidate)
        head = merge.state.ledger.head.seq
        with pytest.raises(Retry, match="changed while it was read"):
            merge.round(touch)
        assert [c.entry.kind for c in merge.state.ledger.log[head + 1 :]] == ["round"]
        assert merge.state.generations() == []
