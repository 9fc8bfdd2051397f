"""Which files of a directory are the model."""

from __future__ import annotations

import pytest

from continual.errors import Refuse
from continual.tensors.checkpoints.weight_sets import WeightSet, weight_set

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
UNET = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.safetensors", "config.json"], WeightSet(file="model.safetensors")),
        ([*SHARDS, INDEX], WeightSet(listing=INDEX)),
        (["model.safetensors", *SHARDS, INDEX], WeightSet(file="model.safetensors")),
        ([*SHARDS, INDEX, "consolidated.safetensors"], WeightSet(listing=INDEX)),
        (["consolidated.safetensors", "params.json"], WeightSet(file="consolidated.safetensors")),
        (["consolidated.safetensors", "weights.safetensors"], WeightSet(file="weights.safetensors")),
        (["model.safetensors", "model.fp16.safetensors"], WeightSet(file="model.safetensors")),
        (["model.fp16.safetensors"], WeightSet(file="model.fp16.safetensors")),
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], WeightSet(file=f"{UNET}.safetensors")),
        (
            [
                f"{UNET}-00001-of-00002.safetensors",
                f"{UNET}-00002-of-00002.safetensors",
                f"{UNET}.safetensors.index.json",
            ],
            WeightSet(listing=f"{UNET}.safetensors.index.json"),
        ),
        (
            [
                f"{UNET}.fp16-00001-of-00002.safetensors",
                f"{UNET}.fp16-00002-of-00002.safetensors",
                f"{UNET}.safetensors.index.fp16.json",
            ],
            WeightSet(listing=f"{UNET}.safetensors.index.fp16.json"),
        ),
        (["model-00001-of-00001.safetensors"], WeightSet(file="model-00001-of-00001.safetensors")),
        (["optimizer.safetensors", "net.safetensors"], WeightSet(file="net.safetensors")),
        (["README.md", "pytorch_model.bin"], None),
    ],
)
def test_decided_by_name(names: list[str], found: WeightSet | None) -> None:
    assert weight_set(names, "m") == found


@pytest.mark.parametrize(
    ("names", "two"),
    [
        (["a.safetensors", "b.safetensors"], ("a.safetensors", "b.safetensors")),
        (["model.bf16.safetensors", "model.fp16.safetensors"], ("model.bf16.safetensors", "model.fp16.safetensors")),
        (SHARDS, tuple(SHARDS)),
        (["a.safetensors.index.json", "b.safetensors"], ("a.safetensors.index.json", "b.safetensors")),
    ],
)
def test_what_names_do_not_decide_is_refused_with_both(names: list[str], two: tuple[str, str]) -> None:
    with pytest.raises(Refuse) as refusal:
        weight_set(names, "place/m")
    assert refusal.value.reason == "index"
    for words in ("place/m", *two, "model.safetensors"):
        assert words in str(refusal.value)
