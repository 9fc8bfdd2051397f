"""Models in several folders from end to end: what is folded, what an export holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.errors import Misconfigured
from continual.publish.folder import Target
from continual.publish.lora import LoraTarget
from tests.helpers import parts
from tests.helpers.models import write


def merge(tmp_path: Path, base: Path, **settings: object) -> api.Merge:
    making.init(base, tmp_path / "state", making.Recipe(rule="mean"))
    return api.open(tmp_path / "state", write=True, **settings)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model by file and name."""
    return {
        f"{path.relative_to(directory).parent}:{name}": tensor
        for path in sorted(directory.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("root", ["", "0_Transformer"])
@pytest.mark.parametrize("theirs", ["", "0_Transformer"])
def test_a_whole_embedder_is_folded_and_exported(tmp_path: Path, root: str, theirs: str) -> None:
    base = parts.embedder(tmp_path / "base", root=root)
    tuned = [parts.embedder(tmp_path / f"ft{seed}", seed, root=theirs) for seed in (1, 2)]
    with merge(tmp_path, base) as merged:
        for one in tuned:
            outcome = merged.fold(one)
            assert outcome.fate == "folded", outcome.message
            assert merged.fold(one).fate == "known"
        out = merged.export(Target(tmp_path / "out"))
        with pytest.raises(Misconfigured, match=r"2_Dense\.linear\.\w+ lies in a folder of its own"):
            merged.export_lora(LoraTarget(tmp_path / "lora", 2))
    assert names(out) == names(base) | {"continual.json"}
    assert (out / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
    assert (out / "2_Dense/config.json").read_bytes() == (base / "2_Dense/config.json").read_bytes()
    mean = {name: sum(tensors(one)[name] for one in tuned) / 2 for name in tensors(tuned[0])}
    for name, tensor in tensors(out).items():
        there = name if name.startswith("2_Dense") else f"{theirs or '.'}:{name.partition(':')[2]}"
        torch.testing.assert_close(tensor, mean[there])
    assert not torch.equal(tensors(out)["2_Dense:linear.weight"], tensors(base)["2_Dense:linear.weight"])


def test_an_export_folded_into_another_state_is_itself(tmp_path: Path) -> None:
    base = parts.embedder(tmp_path / "base")
    with merge(tmp_path, base) as merged:
        assert merged.fold(parts.embedder(tmp_path / "ft", 1)).fate == "folded"
        out = merged.export(Target(tmp_path / "out"))
    (out / "continual.json").unlink()
    (tmp_path / "second").mkdir()
    with merge(tmp_path / "second", base) as other:
        assert other.fold(out).fate == "folded"
        again = other.export(Target(tmp_path / "again", dtype="F32", shard_size=100))
    whole = tensors(out)
    assert {name: torch.equal(whole[name], tensor) for name, tensor in tensors(again).items()} == dict.fromkeys(
        whole, True
    )
    assert (again / "model.safetensors.index.json").is_file()
    assert (again / "2_Dense/model.safetensors").is_file(), "a Dense module is never split"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "cls_token"}, "1_Pooling/config.json has pooling_mode = cls, the base's mean"),
        ({"dense": False}, "has Transformer, Pooling, Normalize; the base's Transformer, Pooling, Dense, Normalize"),
    ],
)
def test_another_make_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    base = parts.embedder(tmp_path / "base")
    tuned = parts.embedder(tmp_path / "ft", 1, **change)  # type: ignore[arg-type]
    with merge(tmp_path, base) as merged:
        outcome = merged.fold(tuned)
        assert (outcome.fate, outcome.commit.entry.reason) == ("refused", "assembly")
        assert said in str(outcome.message)
        file = "1_Pooling/config.json" if "mode" in change else "modules.json"
        (tuned / file).write_bytes((base / file).read_bytes())
        again = merged.fold(tuned)
        assert again.fate == ("folded" if change == {"mode": "cls_token"} else "refused"), "other settings, another key"
    if change == {"mode": "cls_token"}:
        other = parts.embedder(tmp_path / "cls", 2, mode="cls_token")
        with api.open(tmp_path / "state", write=True, gates={"assembly": {"differ": "base"}}) as merged:
            assert merged.fold(other).fate == "folded"


def test_a_missing_dense_layer_is_refused_unless_it_counts_as_unchanged(tmp_path: Path) -> None:
    base = parts.embedder(tmp_path / "base")
    gone = parts.embedder(tmp_path / "gone", 1)
    (gone / "2_Dense/model.safetensors").unlink()
    plain = write(tmp_path / "plain", parts.weights(parts.ENCODER, 2, 0.01), {"model_type": "bert"})
    with merge(tmp_path, base) as merged:
        for one in (gone, plain):
            outcome = merged.fold(one)
            assert outcome.commit.entry.reason == "missing"
            assert "2_Dense.linear.bias" in str(outcome.message)
    with api.open(tmp_path / "state", write=True, missing="unchanged") as merged:
        for one in (gone, plain):
            merged.retry(one.name)
            assert merged.fold(one).fate == "folded"


def test_weights_where_the_base_has_none_are_refused(tmp_path: Path) -> None:
    base = parts.embedder(tmp_path / "base", dense=False)
    with merge(tmp_path, base, gates={"assembly": {"differ": "base"}}) as merged:
        outcome = merged.fold(parts.embedder(tmp_path / "ft", 1))
        assert outcome.commit.entry.reason == "assembly"
        assert "2_Dense: holds weights, and the base has none there" in str(outcome.message)


def test_pickled_weights_of_a_module_are_refused(tmp_path: Path) -> None:
    tuned = parts.embedder(tmp_path / "ft", 1)
    (tuned / "2_Dense/model.safetensors").rename(tuned / "2_Dense/pytorch_model.bin")
    with merge(tmp_path, parts.embedder(tmp_path / "base")) as merged:
        outcome = merged.fold(tuned)
        assert outcome.commit.entry.reason == "pickle"
        assert "2_Dense/pytorch_model.bin" in str(outcome.message)


def test_an_adapter_brings_the_modules_beside_it(tmp_path: Path) -> None:
    base = parts.embedder(tmp_path / "base")
    tuned = parts.embedder(tmp_path / "ft", 1)
    (tuned / "model.safetensors").unlink()
    module = "base_model.model.encoder.layer.0.output.dense"
    a, b = torch.randn(2, 8) * 0.1, torch.randn(8, 2) * 0.1
    parts.put(
        tuned,
        {
            "adapter_model.safetensors": {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b},
            "adapter_config.json": {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["dense"]},
        },
    )
    with merge(tmp_path, base) as merged:
        outcome = merged.fold(tuned)
        assert outcome.fate == "folded", outcome.message
        out = tensors(merged.export(Target(tmp_path / "out")))
    before = tensors(base)
    torch.testing.assert_close(out["2_Dense:linear.weight"], tensors(tuned)["2_Dense:linear.weight"])
    name = ".:encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(out[name], before[name] + b @ a)


def test_a_state_from_before_reads_what_it_read(tmp_path: Path) -> None:
    """States that are older than this have what lies at the top of their base alone."""
    base = parts.embedder(tmp_path / "base")
    (base / "modules.json").rename(tmp_path / "modules.json")
    with merge(tmp_path, base):
        pass
    (tmp_path / "modules.json").rename(base / "modules.json")
    with api.open(tmp_path / "state", write=True) as merged:
        assert merged.fold(parts.embedder(tmp_path / "ft", 1)).commit.entry.reason == "assembly", (
            "its Dense layer is lost"
        )
        assert merged.fold(parts.embedder(tmp_path / "other", 2, dense=False)).commit.entry.reason == "assembly"
        out = merged.export(Target(tmp_path / "out"))
    assert torch.equal(tensors(out)["2_Dense:linear.weight"], tensors(base)["2_Dense:linear.weight"])


@pytest.mark.parametrize("form", ["one", "shards", "fp16"])
def test_a_whole_pipeline_is_folded_and_exported(tmp_path: Path, form: str) -> None:
    base = parts.pipeline(tmp_path / "base", form=form)
    tuned = [parts.pipeline(tmp_path / f"ft{seed}", seed, form="fp16", checker=seed == 1) for seed in (1, 2)]
    with merge(tmp_path, base) as merged:
        for one in tuned:
            outcome = merged.fold(one)
            assert outcome.fate == "folded", outcome.message
        out = merged.export(Target(tmp_path / "out"))
        split = merged.export(Target(tmp_path / "split", shard_size=300))
    assert names(out) == names(base) | {"continual.json"}
    first, second, start, found = (tensors(one) for one in (*tuned, base, out))
    for name, tensor in found.items():
        if name.startswith("safety_checker"):
            assert torch.equal(tensor, start[name])
            continue
        tau = sum(one[name].float() - start[name].half().float() for one in (first, second)) / 2
        torch.testing.assert_close(tensor.float(), start[name].float() + tau, rtol=1e-3, atol=1e-4)
    index = json.loads((split / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(parts.UNET)
    assert {path.name for path in (split / "unet").glob("*.safetensors")} == set(index.values())


def test_one_component_folds_into_a_state_of_it(tmp_path: Path) -> None:
    base = parts.pipeline(tmp_path / "base")
    tuned = parts.pipeline(tmp_path / "ft", 1, form="shards")
    (tmp_path / "repo").mkdir()
    with merge(tmp_path, base / "unet") as merged:
        outcome = merged.fold(tuned)
        assert outcome.commit.entry.reason == "assembly"
        assert "publish the folder of that component alone" in str(outcome.message)
        assert merged.fold(tuned / "unet").fate == "folded"
        parts.pipeline(tmp_path / "other", 2)
        (tmp_path / "other/unet").rename(tmp_path / "repo/unet")
        assert merged.fold(tmp_path / "repo").fate == "folded", "a repo with that folder alone"
        out = merged.export(Target(tmp_path / "out"))
    assert names(out) == {"diffusion_pytorch_model.safetensors", "config.json", "continual.json"}


def test_one_component_counts_in_a_state_of_the_pipeline_if_the_rest_is_unchanged(tmp_path: Path) -> None:
    base = parts.pipeline(tmp_path / "base")
    tuned = parts.pipeline(tmp_path / "ft", 1) / "unet"
    with merge(tmp_path, base) as merged:
        outcome = merged.fold(tuned)
        assert outcome.commit.entry.reason == "missing"
        assert "text_encoder." in str(outcome.message)


def test_two_variants_are_refused_by_both_names(tmp_path: Path) -> None:
    tuned = parts.pipeline(tmp_path / "ft", 1, form="fp16")
    file = tuned / "unet/diffusion_pytorch_model.fp16.safetensors"
    file.with_name("diffusion_pytorch_model.non_ema.safetensors").write_bytes(file.read_bytes())
    with merge(tmp_path, parts.pipeline(tmp_path / "base")) as merged:
        outcome = merged.fold(tuned)
    assert outcome.commit.entry.reason == "index"
    assert (
        "diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.non_ema.safetensors could both be"
        in str(outcome.message)
    )


def test_another_kind_of_prediction_is_refused(tmp_path: Path) -> None:
    tuned = parts.pipeline(tmp_path / "ft", 1)
    parts.put(tuned, {"scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}})
    with merge(tmp_path, parts.pipeline(tmp_path / "base")) as merged:
        outcome = merged.fold(tuned)
    assert outcome.commit.entry.reason == "assembly"
    assert "prediction_type is v_prediction, the base's epsilon" in str(outcome.message)
