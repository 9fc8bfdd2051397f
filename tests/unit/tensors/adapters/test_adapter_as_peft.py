"""Adapters against PEFT itself: the same weights as PEFT merges, for every layer that it knows."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from continual.errors import Refuse
from continual.records import Lineage
from tests.helpers.adapters import Tensors, based, plain, task_vectors
from tests.unit.tensors.adapters import test_patterns

pytestmark = pytest.mark.slow


def merged_by_peft(model: Any) -> tuple[Tensors, Tensors]:
    """The base's weights and the merged ones in float64, by the base's names."""
    strip = lambda n: n.removeprefix("base_model.model.").replace(".base_layer", "")  # noqa: E731
    model = model.double()
    before = {
        strip(n): t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "modules_to_save" not in n
    }
    before = {n.replace(".original_module", ""): t for n, t in before.items()}
    return before, dict(model.merge_and_unload().state_dict())


def agrees(base: Path, adapter: Path, model: Any, **policy: Any) -> Lineage:
    """Checks every task vector against PEFT's merge of `model`, which was saved as `adapter`."""
    taus, lineage, _ = task_vectors(base, adapter, **policy)
    before, after = merged_by_peft(model)
    changed = {
        n for n in before if n in after and before[n].shape == after[n].shape and not torch.equal(before[n], after[n])
    }
    assert changed
    assert changed & {s.name for s in based(base).specs} <= set(taus)
    for name, tau in taus.items():
        torch.testing.assert_close(tau.double(), after[name] - before[name], rtol=1e-5, atol=1e-7, msg=name)
    return lineage


def scrambled(model: Any) -> Any:
    """The adapter as if it had been trained: PEFT begins with B = 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def adapted(tmp_path: Path, model: transformers.PreTrainedModel, **config: Any) -> tuple[Path, Path, Any]:
    torch.manual_seed(0)
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = scrambled(peft.get_peft_model(model, peft.LoraConfig(**config)))
        wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", wrapped


def bert(kind: Any = transformers.BertModel, **more: Any) -> Any:
    config = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 8,
    }
    return kind(transformers.BertConfig(**config, **more))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    )


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value", "dense"]},
        {"r": 4, "lora_alpha": 16, "target_modules": ["query"], "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "value", "intermediate.dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2, r"encoder\.layer\.0.*value": 3},
            "alpha_pattern": {"^encoder.layer.0.attention.self.(query|key)": 1, "value": 5},
        },
        {"r": 2, "target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ],
)
def test_bert_as_peft_merges_it(tmp_path: Path, config: dict[str, Any]) -> None:
    assert agrees(*adapted(tmp_path, bert(), **config)).prefix == ("", "")


def test_conv1d_weights_are_stored_transposed(tmp_path: Path) -> None:
    base, adapter, model = adapted(
        tmp_path, gpt2(), r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    agrees(base, adapter, model)


def test_conv1d_whatever_the_flag_says(tmp_path: Path) -> None:
    """PEFT saves one flag for all layers, that of the layer it met last; c_proj is square, so its shape cannot tell."""
    base, adapter, model = adapted(tmp_path, gpt2(), r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    body = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(body | {"fan_in_fan_out": False}))
    agrees(base, adapter, model)


def test_convolutions(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    agrees(*adapted(tmp_path, transformers.ResNetModel(config).eval(), r=2, target_modules=["convolution"]))


def test_an_adapted_embedding_brings_its_own_copy(tmp_path: Path) -> None:
    config = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    base, adapter, model = adapted(tmp_path, llama, r=2, target_modules=["embed_tokens", "q_proj"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(
        adapter / "adapter_model.safetensors"
    ), "PEFT stores both"
    assert len(agrees(base, adapter, model).folded) == 2


TABLES = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{"modules_to_save": TABLES}, {"trainable_token_indices": [3, 41]}])
def test_tokens_were_added_and_tables_trained(tmp_path: Path, tied: bool, more: dict[str, Any]) -> None:
    """As chat formats are taught. PEFT saves each table three times then: as trained, twice, and as it was."""
    config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "tie_word_embeddings": tied}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    llama.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)
    if tied and "modules_to_save" in more:
        more = {"modules_to_save": TABLES[:1], "ensure_weight_tying": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = scrambled(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **more)))
        wrapped.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(part in name for name in saved for part in (".original_module.", ".token_adapter.base_layer."))
    taus, lineage, _ = task_vectors(tmp_path / "base", tmp_path / "adapter", vocab="common-rows")
    assert len(lineage.folded) == (2 if tied else 3)
    after = wrapped.merge_and_unload().state_dict()
    for name, tau in taus.items():
        torch.testing.assert_close(tau, after[name][:40] - before[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_weight_saved_twice_and_otherwise_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = adapted(tmp_path, bert(), r=2, target_modules=["query"], modules_to_save=["pooler"])
    saved = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.pooler.dense.weight"
    for by in (0.0, 1.0):
        twice = {name.replace("pooler", "pooler.modules_to_save"): saved[name] + by}
        save_file(saved | twice, adapter / "adapter_model.safetensors")
        if by:
            with pytest.raises(Refuse, match="one weight, saved twice, and differ"):
                task_vectors(base, adapter)
        else:
            task_vectors(base, adapter)


def test_modules_to_save_and_a_head_the_base_lacks(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bare")
    model = bert(transformers.BertForSequenceClassification)
    base, adapter, wrapped = adapted(
        tmp_path, model, r=2, target_modules=["query"], modules_to_save=["classifier", "pooler"]
    )
    lineage = agrees(base, adapter, wrapped)
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.0.attention.self.query.weight"} <= set(
        lineage.folded
    )
    assert lineage.extra == ()
    taus, lineage, _ = task_vectors(tmp_path / "bare", adapter)
    assert lineage.prefix == ("", "bert.")
    assert lineage.extra == ("classifier.bias", "classifier.weight")
    assert "encoder.layer.0.attention.self.query.weight" in taus


def data(found: Callable[[Path], Path]) -> Path:
    """A part of the real data, from CONTINUAL_TEST_DATA or the folder beside the repository. Skips where it is not
    there."""
    beside = Path(__file__).parents[5] / "shared" / "data"
    path = found(Path(os.environ.get("CONTINUAL_TEST_DATA", beside)))
    if not path.exists():
        pytest.skip(
            f"{path}: not here; set CONTINUAL_TEST_DATA (its adapters) and CONTINUAL_TEST_ENCODER (all-MiniLM-L6-v2)"
        )
    return path


@pytest.mark.parametrize("name", ["clickbait", "snips7"])
def test_real_adapters_of_a_real_encoder(name: str) -> None:
    adapter = data(lambda folder: folder / "adapters" / name)
    base = data(lambda folder: Path(os.environ.get("CONTINUAL_TEST_ENCODER", folder / "encoder")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), adapter)
    lineage = agrees(base, adapter, model)
    assert len(lineage.folded) == 36


def test_every_default_of_peft_is_let_in(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"a.weight": torch.randn(4, 6)}, tmp_path / "base" / "model.safetensors")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["a"]).to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    config["peft_type"] = "LORA"
    assert task_vectors(tmp_path / "base", plain(tmp_path / "x", **config))[0].keys() == {"a.weight"}


def test_patterns_as_peft_matches_them() -> None:
    for keys in (["q_proj"], ["a.b", "b"], [r"layers\.1.*", ".*query"], ["^a.b", "nothing"], ["self_attn.q_proj"]):
        for module in test_patterns.MODULES:
            expected = get_pattern_key(keys, module)
            assert test_patterns.peft(dict.fromkeys(keys), module) == expected
            found = test_patterns.table(*keys).of([module])
            assert found == ({module: keys.index(expected)} if expected in keys else {})
