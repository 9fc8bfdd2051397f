"""The merge of a real state, read at every scale: lengths are what the policy says, whether the totals know them or a
pass has to find them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from continual import api, making
from continual.config import Settings
from continual.executors.contract import silent
from continual.publish.folder import Target
from continual.rules import RULES
from tests.helpers import models
from tests.helpers.streams import FOLDING

pytestmark = pytest.mark.slow

SPECTRAL = [name for name in FOLDING if RULES[name].spectral]
COUNT = 3


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


@pytest.fixture
def tuned(tmp_path: Path, base: Path) -> list[Path]:
    return [
        models.ship(models.fine_tune(base, tmp_path / f"model-{i}", i, size=0.02 * (i + 1)), i) for i in range(COUNT)
    ]


def folded(place: Path, base: Path, asked: making.Recipe, tuned: list[Path], name: str = "state") -> api.Merge:
    making.init(base, place / name, asked)
    merge = api.Merge(Settings(state=place / name, max_mean_ratio=100), write=True)
    for model in tuned:
        assert merge.fold(model).fate == "folded"
    return merge


def lengths(merge: api.Merge) -> tuple[float, float]:
    """Norm of what is read: of the matrices, and of everything else."""
    squares = [0.0, 0.0]
    for spec in merge.state.format.tensors:
        squares[spec.kind != "matrix"] += float(merge.read(spec.name).double().square().sum())
    return math.sqrt(squares[0]), math.sqrt(squares[1])


def own(base: Path, model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    origin = load_file(base / "model.safetensors")
    return {n: (t - origin[n]).double() for n, t in load_file(model / "model.safetensors").items()}


@pytest.mark.parametrize("name", FOLDING)
def test_norm_makes_the_merge_as_long_as_it_says_under_every_rule(
    tmp_path: Path, base: Path, tuned: list[Path], name: str
) -> None:
    with folded(tmp_path, base, making.Recipe(rule=name, scale="norm"), tuned) as merge:
        mean = merge.state.ledger.totals.norm_sum / COUNT
        assert math.hypot(*lengths(merge)) == pytest.approx(mean, rel=1e-5)
        target = Target(tmp_path / "out")
        merge.export(target)  # the length is known by now, and the same
        assert merge.reading().factor() == pytest.approx(merge.reading().settle(merge.executor, silent))


@pytest.mark.parametrize("name", FOLDING)
def test_a_fold_between_two_readings_makes_the_second_as_long_as_it_has_to_be(
    tmp_path: Path, base: Path, tuned: list[Path], name: str
) -> None:
    """The merge is open all the time: a length that was measured for one generation says nothing of the next."""
    with folded(tmp_path, base, making.Recipe(rule=name, scale="norm"), tuned[:1]) as merge:
        for count, model in enumerate(tuned[1:], 2):
            before = math.hypot(*lengths(merge))
            assert before == pytest.approx(merge.state.ledger.totals.norm_sum / (count - 1), rel=1e-5)
            seq = merge.state.ledger.head.seq
            assert merge.fold(model).fate == "folded"
            after = math.hypot(*lengths(merge))
            assert after == pytest.approx(merge.state.ledger.totals.norm_sum / count, rel=1e-5)
            assert after > 1.1 * before
            assert merge.reading(seq).settle(merge.executor, silent) != merge.reading().settle(merge.executor, silent)


def narrow(base: Path, directory: Path, seed: int, *, size: float = 0.02) -> Path:
    """A fine-tune most of whose task vector is one direction of each matrix."""

    def lean(tensors: dict[str, torch.Tensor]) -> None:
        random = torch.Generator().manual_seed(seed)
        for tensor in tensors.values():
            if tensor.ndim == 2:
                left, right = (torch.randn(side, generator=random) for side in tensor.shape)
                tensor += (0.2 * size * torch.outer(left, right)).to(tensor.dtype)

    return models.fine_tune(base, directory, seed, size=size, change=lean)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spread_is_the_law_of_its_page(tmp_path: Path, base: Path, name: str) -> None:
    tuned = [narrow(base, tmp_path / f"narrow-{i}", i) for i in range(COUNT)]
    with folded(tmp_path, base, making.Recipe(rule=name, scale="spread:0.7"), tuned) as merge:
        matrices = {s.name for s in merge.state.format.tensors if s.kind == "matrix"}
        norms, rests, spreads = [], [], []
        for model in tuned:
            tau = own(base, model)
            square = sum(float(tau[n].square().sum()) for n in matrices)
            top = sum(float(torch.linalg.matrix_norm(tau[n], 2)) ** 2 for n in matrices)
            norms.append(math.sqrt(square))
            rests.append(math.sqrt(sum(float(t.square().sum()) for n, t in tau.items() if n not in matrices)))
            spreads.append(math.sqrt(square / top))
        rho = sum(r * n for r, n in zip(spreads, norms, strict=True)) / sum(norms)
        found = lengths(merge)
        assert found[0] == pytest.approx(0.7 * rho**1.5 * sum(norms) / COUNT, rel=1e-2)
        assert found[1] == pytest.approx(sum(rests) / COUNT, rel=1e-4)


def test_unfolding_and_combining_keep_what_spread_stands_on(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    with (
        folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned) as merge,
        folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned[:2], "two") as two,
    ):
        merge.unfold(merge.look_unfold("model-2"))
        assert merge.state.ledger.totals.body() == pytest.approx(two.state.ledger.totals.body(), rel=1e-6)
        assert lengths(merge) == pytest.approx(lengths(two), rel=1e-4)
    with folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned[2:], "third") as third:
        third.combine(tmp_path / "two")
        assert third.state.ledger.totals.body()["spread_sum"] > 0
        with folded(tmp_path, base, making.Recipe(rule="iso-c"), tuned, "all") as whole:
            assert third.state.ledger.totals.body() == pytest.approx(whole.state.ledger.totals.body(), rel=1e-6)
            assert lengths(third) == pytest.approx(lengths(whole), rel=1e-4)


def test_one_odd_model_is_held_by_what_each_record_says(tmp_path: Path, base: Path) -> None:
    """Folded, unfolded and combined, and in an older state, whose records do not say it of every model."""
    alike = [narrow(base, tmp_path / f"alike-{i}", 7 + i) for i in range(4)]
    odd = narrow(base, tmp_path / "odd", 3, size=0.2)
    recipe = making.Recipe(rule="iso-c")
    with folded(tmp_path, base, recipe, [odd, *alike]) as merge, folded(tmp_path, base, recipe, alike, "four") as four:
        plain, found = lengths(four), lengths(merge)
        assert all(1.0 < with_it / without < 1.3 for with_it, without in zip(found, plain, strict=True))
        totals = replace(merge.reading().totals, each=merge.reading().totals.each[1:])
        by_mean = merge.reading().options.factors(totals, merge.reading().size())
        assert merge.reading().factor() < 0.5 * by_mean[0], "what an older state is read by"
        merge.unfold(merge.look_unfold("odd"))
        assert lengths(merge) == pytest.approx(plain, rel=1e-4)
    with folded(tmp_path, base, recipe, [odd], "alone") as alone:
        alone.combine(tmp_path / "four")
        assert lengths(alone) == pytest.approx(found, rel=1e-4)


def test_the_scale_changes_without_folding_and_comes_back(tmp_path: Path, base: Path, tuned: list[Path]) -> None:
    with folded(tmp_path, base, making.Recipe(), tuned) as merge:
        first, generation = merge.read("model.layers.0.mlp.up_proj.weight"), merge.state.ledger.head.generation
        assert str(merge.rescale("paper")) == "1.0"
        assert not torch.equal(merge.read("model.layers.0.mlp.up_proj.weight"), first)
        assert str(merge.rescale("auto")) == "spread:1.0"
        assert torch.equal(merge.read("model.layers.0.mlp.up_proj.weight"), first)
        assert merge.state.ledger.head.generation == generation
