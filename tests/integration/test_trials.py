"""What a trial adds to the model in memory, and what it leaves behind, on real files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api
from continual.errors import Retry
from continual.executors.contract import silent
from continual.objectives.parameters import HeldIn
from continual.selection.active import NONE
from continual.selection.frank_wolfe import MergedVector, Search, SearchSpace, choose
from continual.selection.judging import judge
from continual.selection.members import Member, Opened, over
from continual.selection.steps import Stepping, Taken
from tests.helpers import quadratic
from tests.helpers.pools import QUERY, fill, loaded, objective, opened, plainly


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return quadratic.world(tmp_path)


def space_of(merge: api.Merge) -> SearchSpace:
    """All that wait, at the base."""
    reading = merge.reading()
    reading.settle(merge.executor, silent)
    members = [Member(waiting.candidate) for waiting in merge.pool().values()]
    return SearchSpace(loaded(merge), MergedVector(reading.vector, reading.need, fixed=True), NONE, members)


def searching(merge: api.Merge) -> Search:
    """A search over all that wait, at the base, the gradient taken."""
    search = Search(space_of(merge), merge.asked(), silent)
    search.gradient(search.start())
    return search


def best_share(base: Path, candidate: Path) -> float:
    """The share of a task vector that lowers the loss of the driving rows most: exact, as that is a parabola."""
    origin = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    tau, loss = plainly(base, candidate), objective(base)

    def at(share: float) -> float:
        return float(loss({name: tensor + share * tau[name] for name, tensor in origin.items()}))

    rises, falls = at(1.0) - at(0.0), at(-1.0) - at(0.0)
    return (falls - rises) / (2 * (falls + rises))


@pytest.mark.parametrize(("length", "share"), [(0.5, 0.3), (5.0, None), (40.0, 0.03)])
def test_a_trial_adds_the_best_share_within_its_bounds(
    tmp_path: Path, base: Path, length: float, share: float | None
) -> None:
    """A long task vector has its best share near 0, and a tenth of `trial` is added all the same."""
    candidate = quadratic.good(base, 0, share=length)
    best = best_share(base, candidate)
    assert (share is None) == (0.03 < best < 0.3)
    with opened(tmp_path / "state", base, max_base_ratio=1e6) as merge:
        fill(merge, candidate)
        search = searching(merge)
        (key,) = search.keys
        without = search.held(search.start())
        search.relevant(key, search.start())
        search.put(search.start())
        search.model.move(search.members[key], best if share is None else share)
        expected = judge(without, search.model.calibration.held())
    found = search.judged[key]
    assert (found.change, found.error, found.z) == tuple(pytest.approx(figure, rel=1e-3) for figure in expected)


def test_nothing_is_left_of_a_trial_at_the_next_point(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0), quadratic.good(base, 1))
        search = searching(merge)
        start = search.start()
        held = {name: tensor.detach().clone() for name, tensor in search.model.calibration.model.named_parameters()}
        for key in search.keys:
            search.relevant(key, start)
        search.put(start)
        for name, tensor in search.model.calibration.model.named_parameters():
            assert torch.equal(tensor, held[name]), name


def test_the_gradient_of_a_tensor_that_two_parameters_hold_is_the_sum_of_theirs(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        model = loaded(merge)
        first = model.parameters[QUERY][0].tensor
        second = torch.nn.Parameter(first.detach().clone())  # as where a model does not share what its base ties
        model.parameters[QUERY].append(HeldIn(second))
        model.clear()
        first.grad, second.grad = torch.full_like(first, 2.0), torch.full_like(second, 0.5)
        assert model.along(lambda spec: torch.ones(spec.shape)) == [2.5 * first.numel()]


def test_a_member_that_changes_while_it_is_read_is_no_figure(tmp_path: Path, base: Path) -> None:
    candidate = quadratic.good(base, 0)

    def rewrite(_member: Member, _found: Opened) -> str:
        file = candidate / "model.safetensors"
        file.write_bytes(file.read_bytes())
        return "a figure"

    with opened(tmp_path / "state", base) as merge:
        fill(merge, candidate)
        members = [Member(waiting.candidate) for waiting in merge.pool().values()]
        with pytest.raises(Retry, match="changed while it was read"):
            over(merge.engine, members, rewrite, "score", silent)


def test_the_gradient_is_let_go_when_the_choice_ends(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path / "state", base) as merge:
        fill(merge, quadratic.good(base, 0))
        space = space_of(merge)
        taken: list[bool] = []

        def hear(_taken: Taken) -> None:
            taken.append(any(tensor.grad is not None for tensor in space.model.calibration.model.parameters()))

        choose(space, merge.asked(), Stepping.of(merge.asked().settings), silent, hear)
        assert any(taken)
        assert all(tensor.grad is None for tensor in space.model.calibration.model.parameters())
