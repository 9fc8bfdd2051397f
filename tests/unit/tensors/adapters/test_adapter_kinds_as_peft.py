"""Every kind of adapter against PEFT: what PEFT saves, read as task vectors, is what PEFT merges."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from continual.engine.blocks import block_of
from continual.errors import Refuse
from continual.records import Lineage
from continual.tensors import Adapter, LayerVectors, open_model
from tests.helpers.adapters import based, task_vectors
from tests.unit.tensors.adapters.test_adapter_as_peft import bert, gpt2

pytestmark = pytest.mark.slow


def llama(**more: Any) -> Any:
    config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, intermediate_size=24, **more))


def resnet() -> Any:
    shape = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetModel(transformers.ResNetConfig(**shape, layer_type="basic", num_labels=2)).eval()


def depthwise() -> Any:
    """Grouped convolutions: their weight has fewer columns than the layer has inputs."""
    shape = {"num_channels": 3, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_scale_init_value": 0.5}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**shape, num_stages=2)).eval()


def wav2vec2() -> Any:
    """Convolutions along one axis."""
    config = transformers.Wav2Vec2Config(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2Model(config).eval()


def siglip() -> Any:
    """Its head has the attention of torch, whose inputs have one weight and whose outputs another."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape, image_size=8, patch_size=4)).eval()


def trained(model: Any) -> Any:
    """As if it had been trained: everything that PEFT would train has other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                scale = value if "magnitude" in name or "ia3_l" in name else torch.ones_like(value)
                value.add_(torch.randn_like(value) * 0.1 * scale)
    return model


def saved(tmp_path: Path, base: Any, config: Any) -> tuple[Path, Path]:
    """A base and an adapter of it, as transformers and PEFT save them."""
    torch.manual_seed(0)
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(peft.get_peft_model(base, config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def merged(model: Any, adapter: Path) -> Any:
    """The model as PEFT merges the saved adapter into it, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, adapter).double()
        return loaded.merge_and_unload()


def agree_as_blocks(base: Path, adapter: Path, lineage: Lineage, taus: dict[str, torch.Tensor]) -> None:
    """Checks that the triplets that a wide state of adapters keeps are these task vectors."""
    origin = based(base)
    with origin.checkpoint, open_model(adapter) as model:
        assert isinstance(model, Adapter)
        vectors = LayerVectors(origin, model, lineage, origin)
        vectors.begin()
        for spec in origin.specs:
            if spec.name in taus:
                (vector,), expected = vectors.read(spec), taus[spec.name]
                found = block_of(vector, spec, 64, torch.device("cpu"))
                assert found.rank <= vectors.rank(spec.name)
                made = found.dense().view(spec.shape)
                torch.testing.assert_close(made, expected, rtol=1e-5, atol=2e-6, msg=spec.name)


def agrees(make: Callable[[], Any], base: Path, adapter: Path, **policy: Any) -> Lineage:
    """Checks every task vector of `adapter`, and that nothing else is changed, against PEFT's merge."""
    taus, lineage, _ = task_vectors(base, adapter, **policy)
    fresh = make()
    fresh.load_state_dict(type(fresh).from_pretrained(base).state_dict())
    before = {name: value.clone().double() for name, value in fresh.state_dict().items()}
    after = merged(fresh, adapter).state_dict()
    for name, value in before.items():
        if not torch.equal(value, after[name]) and name in load_file(base / "model.safetensors"):
            assert name in taus, name
    for name, tau in taus.items():
        expected = after[name] - before[name]
        # rounding to float32 is relative to what is subtracted
        torch.testing.assert_close(tau.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert any(tau.count_nonzero() for tau in taus.values())
    agree_as_blocks(base, adapter, lineage, taus)
    return lineage


def drawn(**config: Any) -> Any:
    """VeRA whose shared matrices are not in the file. PEFT warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.VeraConfig(save_projection=False, **config)


ATTENTION = ["q_proj", "v_proj", "o_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "dora": (llama, peft.LoraConfig(r=2, use_dora=True, target_modules=ATTENTION)),
    "dora-conv1d": (
        gpt2,
        peft.LoraConfig(r=2, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    ),
    "dora-conv2d": (resnet, peft.LoraConfig(r=2, use_dora=True, target_modules=["convolution"])),
    "dora-embedding": (llama, peft.LoraConfig(r=2, use_dora=True, use_rslora=True, target_modules=["embed_tokens"])),
    "lora-conv1d": (
        wav2vec2,
        peft.LoraConfig(r=2, target_modules=["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"]),
    ),
    "lora-bias": (bert, peft.LoraConfig(r=2, lora_bias=True, lora_alpha=5, target_modules=["query", "dense"])),
    "lora-bias-conv2d": (depthwise, peft.LoraConfig(r=2, lora_bias=True, target_modules=["patch_embeddings"])),
    "bias-all": (bert, peft.LoraConfig(r=2, bias="all", target_modules=["query"], modules_to_save=["pooler"])),
    "bias-only": (bert, peft.LoraConfig(r=2, bias="lora_only", target_modules=["query", "value"])),
    "tokens-in-lora": (llama, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5, 39])),
    "tokens-tied": (
        lambda: llama(tie_word_embeddings=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 0]}),
    ),
    "tokens": (llama, peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["embed_tokens"])),
    "eva": (bert, peft.LoraConfig(r=2, init_lora_weights="eva", eva_config=peft.EvaConfig(), target_modules=["query"])),
    "adalora": (
        llama,
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=ATTENTION),
    ),
    "adalora-conv1d": (
        gpt2,
        peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["c_proj"], fan_in_fan_out=True),
    ),
    "loha": (llama, peft.LoHaConfig(r=3, alpha=5, target_modules=ATTENTION, rank_pattern={"q_proj": 2})),
    "loha-conv2d": (resnet, peft.LoHaConfig(r=3, target_modules=["convolution"])),
    "loha-effective": (resnet, peft.LoHaConfig(r=3, target_modules=["convolution"], use_effective_conv2d=True)),
    "loha-conv1d": (wav2vec2, peft.LoHaConfig(r=2, target_modules=["conv_layers.0.conv", "conv_layers.1.conv"])),
    "lokr": (llama, peft.LoKrConfig(r=2, alpha=3, target_modules=ATTENTION, alpha_pattern={"v_proj": 7})),
    "lokr-both": (llama, peft.LoKrConfig(r=1, target_modules=ATTENTION, decompose_both=True, decompose_factor=4)),
    "lokr-whole": (llama, peft.LoKrConfig(r=64, target_modules=ATTENTION)),
    "lokr-conv2d": (resnet, peft.LoKrConfig(r=1, target_modules=["convolution"])),
    "lokr-conv2d-whole": (resnet, peft.LoKrConfig(r=64, target_modules=["convolution"])),
    "lokr-effective": (resnet, peft.LoKrConfig(r=1, target_modules=["convolution"], use_effective_conv2d=True)),
    "lokr-conv1d": (wav2vec2, peft.LoKrConfig(r=1, target_modules=["conv_layers.0.conv", "conv_layers.1.conv"])),
    "ia3": (bert, peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])),
    "ia3-conv1d": (
        gpt2,
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3-conv2d": (
        resnet,
        peft.IA3Config(
            target_modules=["convolution", "layer.0.convolution"], feedforward_modules=["layer.0.convolution"]
        ),
    ),
    "ia3-groups": (depthwise, peft.IA3Config(target_modules=["dwconv"], feedforward_modules=["dwconv"])),
    "ia3-groups-out": (depthwise, peft.IA3Config(target_modules=["dwconv"], feedforward_modules=[])),
    "vera": (llama, peft.VeraConfig(r=4, target_modules=ATTENTION)),
    "vera-conv1d": (gpt2, peft.VeraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "oft": (llama, peft.OFTConfig(oft_block_size=8, target_modules=ATTENTION)),
    "oft-terms": (llama, peft.OFTConfig(r=2, oft_block_size=0, num_cayley_neumann_terms=3, target_modules=ATTENTION)),
    "oft-exact": (
        bert,
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, bias="oft_only", target_modules=["query"]),
    ),
    "oft-shared": (llama, peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=ATTENTION)),
    "oft-constrained": (llama, peft.OFTConfig(oft_block_size=8, coft=True, eps=0.5, target_modules=ATTENTION)),
    "oft-conv2d": (resnet, peft.OFTConfig(oft_block_size=9, target_modules=["convolution"])),
    "oft-embedding": (llama, peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens"])),
    "boft": (llama, peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION)),
    "boft-conv2d": (resnet, peft.BOFTConfig(boft_block_size=4, target_modules=["layer.0.convolution"])),
    "hra": (llama, peft.HRAConfig(r=3, target_modules=ATTENTION)),
    "hra-orthogonal": (bert, peft.HRAConfig(r=4, apply_GS=True, bias="hra_only", target_modules=["query"])),
    "hra-conv2d": (resnet, peft.HRAConfig(r=2, target_modules=["layer.0.convolution"])),
    "ln": (bert, peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "shira": (llama, peft.ShiraConfig(r=2, target_modules=ATTENTION)),
    "miss": (llama, peft.MissConfig(r=5, target_modules=ATTENTION)),
    "miss-mini": (llama, peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=ATTENTION)),
    "miss-bat": (bert, peft.MissConfig(r=4, init_weights="bat", bias="MiSS_only", target_modules=["query"])),
    "fourierft": (llama, peft.FourierFTConfig(n_frequency=50, scaling=99, target_modules=ATTENTION)),
    "fourierft-conv1d": (
        gpt2,
        peft.FourierFTConfig(n_frequency=30, n_frequency_pattern={"c_proj": 9}, target_modules=["c_attn", "c_proj"]),
    ),
    "lora-attention": (siglip, peft.LoraConfig(r=2, target_modules=["head.attention"])),
    "adalora-conv2d": (resnet, peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=["convolution"])),
    "vera-drawn": (llama, drawn(r=4, projection_prng_key=7, target_modules=ATTENTION)),
    "vera-drawn-conv1d": (gpt2, drawn(r=4, target_modules=["c_attn", "c_proj"])),
    "vera-bias": (bert, peft.VeraConfig(r=4, target_modules=["query", "key"], bias="vera_only")),
}


@pytest.mark.parametrize("name", CASES)
def test_as_peft_merges_it(tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    agrees(make, *saved(tmp_path, make(), config))


@pytest.mark.parametrize(
    "name", ["dora-conv1d", "loha", "lokr-both", "ia3-conv1d", "vera", "tokens-in-lora", "adalora"]
)
def test_the_base_and_its_task_vectors_say_what_the_adapter_says(tmp_path: Path, name: str) -> None:
    """Logits of the adapter in use, not merged by PEFT, against those of θ₀ + τ."""
    make, config = CASES[name]
    base, adapter = saved(tmp_path, make(), config)
    taus, _, _ = task_vectors(base, adapter)
    kind = type(make())
    ids = torch.arange(8)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter).double().eval()
    ours = kind.from_pretrained(base).double().eval()
    with torch.no_grad():
        for weight, tau in taus.items():
            ours.get_parameter(weight).add_(tau.double())
        plain = kind.from_pretrained(base).double().eval()(ids).logits
        torch.testing.assert_close(ours(ids).logits, used(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain, used(ids).logits, atol=1e-3)


@pytest.mark.parametrize("word", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base(tmp_path: Path, word: str) -> None:
    """Saved as it is it is refused; saved as a converted LoRA it is one."""
    torch.manual_seed(0)
    bert().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.BertModel.from_pretrained(tmp_path / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=word, target_modules=["query"]))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "first")
        model.peft_config["default"].init_lora_weights = word
        trained(model).save_pretrained(tmp_path / "raw")
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "first")
    with pytest.raises(Refuse, match="init_lora_weights"):
        task_vectors(tmp_path / "base", tmp_path / "raw")
    taus, _, _ = task_vectors(tmp_path / "base", tmp_path / "adapter")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = model.merge_and_unload().state_dict()
    for name, tau in taus.items():
        torch.testing.assert_close(tau, after[name] - before[name], rtol=1e-4, atol=1e-6, msg=name)


def test_adalora_after_it_gave_up_ranks(tmp_path: Path) -> None:
    """PEFT goes on dividing by the rank that it began with."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), config))
        model.peft_config["default"].rank_pattern = {
            f"model.layers.0.self_attn.{name}.lora_E.default": kept
            for name, kept in (("q_proj", [True, False, True, False]), ("v_proj", [False, False, False, True]))
        }
        model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.self_attn.v_proj.lora_A"].shape[0] == 1
    agrees(llama, tmp_path / "base", tmp_path / "adapter")
