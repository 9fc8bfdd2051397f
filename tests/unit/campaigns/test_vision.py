"""The vision suite on a tiny transformer and scikit-learn's digits. The real model is never here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.campaigns.bench.quality import images
from tests.campaigns.bench.quality.suite import fine_tune
from tests.campaigns.bench.quality.vision import SEEN, TEST, VALIDATION, Vision, save

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    """One set, and a transformer of two layers of width 32."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("vision")
    (folder / "images").mkdir()
    images.write("digits", folder, folder / "images" / "digits.safetensors")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    save(Dinov2Model(config), folder / "base")
    return Vision(folder, (folder,), steps=2)


def test_images_of_a_set_are_drawn_evenly_and_at_random() -> None:
    of = {"a": 500, "b": 50, "c": 300, "few": 5}
    pictures = [(np.full((2, 2), at), label) for label, count in of.items() for at in range(count)]
    rows, labels, classes = images.drawn_evenly("some", pictures)
    assert classes == ["a", "b", "c"]
    assert [labels.count(at) for at in range(3)] == [150, 50, 150], "of none more than three times the smallest"
    assert len({int(row[0, 0]) for row, at in zip(rows, labels, strict=True) if at == 0}) == 150
    assert labels[:50] != [0] * 50


def test_an_image_is_made_small_in_three_colours() -> None:
    grey, colours = images.small(np.full((8, 8), 300.0)), images.small(np.zeros((48, 48, 3), np.uint8))
    assert grey.shape == colours.shape == (3, 56, 56)
    assert (grey == 255).all()


def test_the_base_is_asked_about_rows_that_made_no_head(suite: Vision) -> None:
    assert suite.tasks == ("digits",)
    assert len(suite.rows("digits")[1]) >= SEEN + VALIDATION + TEST
    right = suite.correct({}, "digits", "test")
    assert right.shape == (TEST,)
    assert len(suite.correct({}, "digits", "validation")) == VALIDATION
    base = load_file(suite.prepare() / "model.safetensors")
    assert not torch.equal(suite.correct({name: 2 * value for name, value in base.items()}, "digits", "test"), right)
    assert torch.equal(suite.correct({}, "digits", "test"), right), "the base is as it was"


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_fine_tune_is_a_model_directory_or_an_adapter(suite: Vision, form: str) -> None:
    found = fine_tune(suite, "digits", "full" if form == "full" else "lora")
    name = "model.safetensors" if form == "full" else "adapter_model.safetensors"
    base, kept = load_file(suite.prepare() / "model.safetensors"), load_file(found / name)
    if form == "full":
        query = "encoder.layer.0.attention.q_proj.weight"
        assert kept.keys() == base.keys()
        assert not torch.equal(kept[query], base[query])
    else:
        assert len(kept) == 2 * 6 * 2, "two factors for each of six matrices in two layers"


def test_weights_under_other_names_are_not_left_out(suite: Vision) -> None:
    with pytest.raises(KeyError, match=r"attention\.query"):
        suite.correct({"encoder.layer.0.attention.query": torch.zeros(1)}, "digits", "test")
