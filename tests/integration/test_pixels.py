"""The convolution by which a model sees images: the merge has the mean of it, however long the rest is made, and an
earlier state goes on with it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from continual.making import Recipe
from continual.tensors.names import kinds
from tests.helpers import models

PATCHES = "embeddings.patch_embeddings.projection.weight"
SHAPES = {
    PATCHES: (16, 3, 2, 2),
    "embeddings.cls_token": (1, 1, 16),
    "encoder.layer.0.attention.attention.query.weight": (16, 16),
    "encoder.layer.0.norm1.weight": (16,),
}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    base = models.base(tmp_path / "base", shapes=SHAPES)
    return [base, *(models.fine_tune(base, tmp_path / f"model-{i}", i) for i in range(4))]


def changes(paths: list[Path]) -> torch.Tensor:
    """How each model changed it."""
    base, *tuned = (load_file(path / "model.safetensors")[PATCHES] for path in paths)
    return torch.stack([found - base for found in tuned])


def folded(state: Path, tuned: list[Path]) -> continual.Merge:
    merge = continual.open(state, write=True)
    for path in tuned:
        assert merge.fold(path).fate == "folded"
    return merge


@pytest.mark.parametrize("rule", ["tsv-m", "gram", "opcm"])
def test_it_is_the_mean_and_what_else_is_no_matrix_is_as_long_as_in_a_model(
    rule: str, paths: list[Path], tmp_path: Path
) -> None:
    continual.init(paths[0], tmp_path / "state", Recipe(rule=rule))
    with folded(tmp_path / "state", paths[1:]) as merge:
        assert torch.allclose(merge.read(PATCHES), changes(paths).mean(0), atol=1e-7)
        norm = "encoder.layer.0.norm1.weight"
        token = merge.read(norm)
    base, *tuned = (load_file(path / "model.safetensors")[norm] for path in paths)
    mean = sum(found - base for found in tuned) / len(tuned)
    assert token.norm() > 1.4 * mean.norm()


def test_a_state_that_has_it_as_a_matrix_goes_on_so(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(kinds, "sees_pixels", lambda _name, _shape: False)
        continual.init(paths[0], tmp_path / "state", Recipe(rule="tsv-m"))
    with folded(tmp_path / "state", paths[1:]) as merge:
        assert {spec.name: spec.kind for spec in merge.base.specs}[PATCHES] == "matrix"
        found, mean = merge.read(PATCHES), changes(paths).mean(0)
        assert found.norm() > 1.4 * mean.norm()
