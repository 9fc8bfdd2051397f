"""States of adapters over quantised bases: they fold, read and export adapters as over the model that was quantised,
and say what cannot be had of packed numbers."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.errors import Damaged, Misconfigured, Refuse
from continual.publish.lora import LoraTarget
from tests.helpers import adapters, command, models, packing
from tests.helpers.packing import FORMS

IDS = torch.tensor([[1, 7, 3, 39, 0, 12]])
# PEFT asks transformers for what that has deprecated
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base", dtype=torch.bfloat16)


def folded(state: Path, base: Path, tuned: list[Path]) -> Path:
    making.init(base, state, making.Recipe(rule="iso-c", width=32))
    with api.open(state, write=True) as merge:
        for model in tuned:
            outcome = merge.fold(model)
            assert outcome.fate == "folded", outcome.message
    return state


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_merge_is_that_over_the_model_that_was_quantised(tmp_path: Path, base: Path, form: str) -> None:
    tuned = [adapters.lora(tmp_path / f"lora-{i}", base, i, rank=2 + i) for i in range(2)]
    dense = folded(tmp_path / "dense", base, tuned)
    packed = folded(tmp_path / "state", packing.packed(base, tmp_path / "packed", form), tuned)
    for state, directory in ((dense, "one"), (packed, "two")):
        with api.open(state) as merge:
            merge.export_lora(LoraTarget(tmp_path / directory, None))
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert api.verify(packed).findings == ()


def test_a_whole_model_takes_the_one_that_was_quantised(tmp_path: Path, base: Path) -> None:
    tuned = [adapters.lora(tmp_path / "lora", base, 1)]
    dense = folded(tmp_path / "dense", base, tuned)
    packed = packing.packed(base, tmp_path / "packed", "gptq")
    state = folded(tmp_path / "state", packed, tuned)
    with api.open(dense) as merge:
        merge.export(tmp_path / "one")
    said = command.run("export", tmp_path / "two", "--state", state)
    assert said.returncode != 0
    for part in (f"base {packed} is quantised (GPTQ)", "--as-lora", "base = DIR (--base)"):
        assert part in said.stderr
    assert not (tmp_path / "two").exists()
    with api.Merge(Settings(state=state, base=base)) as merge:
        merge.export(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    shapes = {**models.SHAPES, "model.layers.1.mlp.up_proj.weight": (16, 48)}
    other = models.base(tmp_path / "other", shapes=shapes)
    with (
        api.Merge(Settings(state=state, base=other)) as merge,
        pytest.raises(Damaged, match=r"layers\.1\.mlp\.up_proj\.weight is \[48, 16\] there, and \[16, 48\] here"),
    ):
        merge.export(tmp_path / "three")
    with api.Merge(Settings(state=state, base=packed)) as merge, pytest.raises(Misconfigured, match="as well"):
        merge.export(tmp_path / "three")


def test_a_state_of_whole_tensors_refuses_it_as_before(tmp_path: Path, base: Path) -> None:
    packed = packing.packed(base, tmp_path / "packed", "nf4")
    with pytest.raises(Refuse) as refusal:
        making.init(packed, tmp_path / "state")
    assert refusal.value.reason == "quantised"
    assert "continual init --adapters" in str(refusal.value)
    found = making.survey(packed, making.Recipe(width=8))
    assert (found.packed, found.rule, found.scale) == ("bitsandbytes", "tsv-even", "spread:1.0")
    assert making.survey(base).rule == "tsv-flow"
    said = command.run("init", packed, "--adapters", "--state", tmp_path / "state")
    assert "The base is quantised (bitsandbytes): adapters are folded and exported" in said.stdout
    assert "rule tsv-even, scale spread:1.0" in said.stdout


def test_fisher_needs_full_fine_tunes(tmp_path: Path, base: Path) -> None:
    with pytest.raises(Misconfigured, match="weighs each parameter by fisher"):
        making.init(base, tmp_path / "weighed", making.Recipe(rule="fisher", width=8))
    assert not (tmp_path / "weighed").exists()


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_peft_loads_what_is_exported(tmp_path: Path, form: str) -> None:
    """Two LoRAs that PEFT wrote, folded over a quantised copy: what PEFT makes of the export on the original model
    answers as the model with both merged into it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    packed = packing.packed(tmp_path / "base", tmp_path / "org_base-4bit", form)
    state, tuned = tmp_path / "state", []
    making.init(packed, state, making.Recipe(rule="task-arithmetic", scale="1", width=16))
    for seed in range(2):
        torch.manual_seed(10 + seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        targets = ["q_proj", "v_proj", "down_proj"][seed:]
        lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        lora.save_pretrained(tmp_path / f"lora-{seed}")
        tuned.append(tmp_path / f"lora-{seed}")
    with api.open(state, write=True) as merge:
        for directory in tuned:
            assert merge.fold(directory).fate == "folded"
        merge.export_lora(LoraTarget(tmp_path / "out", None))
    said = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(packed)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for directory in tuned:
        expected = peft.PeftModel.from_pretrained(expected, directory).merge_and_unload()
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(IDS).logits, expected.eval()(IDS).logits, rtol=0, atol=1e-5)
