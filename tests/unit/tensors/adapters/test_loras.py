"""LoRA files of other trainers than PEFT: which weight each name means, how much it adds, and what is refused. That
diffusers makes the same of them is asked in tests/integration/test_loras_of_diffusers.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual.gates.lineage import LineageGate, trace
from continual.tensors import Adapter, LayerVectors, candidate_of, open_model
from continual.tensors.adapters.loras.file import CONFIGURATION
from continual.tensors.adapters.loras.releases import original, unet
from tests.helpers import diffusion
from tests.helpers.adapters import Tensors, based, refused, task_vectors
from tests.helpers.diffusion import component, factors, kohya, modules, pipeline, product, shapes, written


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: pipeline(root / family, family) for family in ("sd15", "sdxl", "flux", "sd3")}


def same(found: Tensors, added: dict[str, torch.Tensor], prefix: str) -> None:
    """Each of the base's weights has got what was added to it, and no other has got anything."""
    assert sorted(name for name in found if name.startswith(prefix)) == sorted(f"{prefix}{m}.weight" for m in added)
    for module, wanted in added.items():
        torch.testing.assert_close(found[f"{prefix}{module}.weight"].double(), wanted, rtol=2e-5, atol=1e-5)


def test_kohya_with_the_names_of_diffusers(bases: dict[str, Path], tmp_path: Path) -> None:
    file, added = kohya("lora_unet", modules(component("sd15", "unet")))
    words, told = kohya("lora_te", modules(component("sd15", "text_encoder"), ends=diffusion.TEXT))
    found, lineage, _ = task_vectors(bases["sd15"], written(tmp_path / "x", file | words))
    same(found, added, "unet.")
    same(found, told, "text_encoder.")
    assert len(found) == len(added) + len(told)
    assert lineage.extra == ()


def test_kohya_with_the_names_of_the_release_of_sdxl(bases: dict[str, Path], tmp_path: Path) -> None:
    meaning = {name.removeprefix("lora_unet_"): module for name, module in diffusion.table()["kohya"].items()}
    flat = {module: name for name, module in meaning.items()}
    found = modules(component("sdxl", "unet"))
    file, added = kohya("lora_unet", {module: found[module] for module in flat}, named=flat.__getitem__)
    one, first = kohya("lora_te1", modules(component("sdxl", "text_encoder"), ends=diffusion.TEXT))
    two, second = kohya("lora_te2", modules(component("sdxl", "text_encoder_2"), ends=diffusion.TEXT))
    vectors, _, _ = task_vectors(bases["sdxl"], written(tmp_path / "x", file | one | two))
    same(vectors, added, "unet.")
    same(vectors, first, "text_encoder.")
    same(vectors, second, "text_encoder_2.")
    assert len(added) > 250


def test_names_with_underscores_lead_back_to_every_module() -> None:
    for family, name in (("sd15", "unet"), ("sdxl", "unet")):
        inside = {full.rpartition(".")[0] for full in component(family, name)}
        theirs = unet(inside)
        assert theirs.keys() == inside
        flat = [one.replace(".", "_") for one in (*theirs.values(), *inside)]
        assert len(set(flat)) == len(flat)


def test_one_component_as_base(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd15", only="unet")
    file, added = kohya("lora_unet", modules(component("sd15", "unet"), within="attentions"))
    same(task_vectors(base, written(tmp_path / "x", file))[0], added, "")


def test_what_a_base_of_one_component_lacks_is_said(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", "sd15", only="unet")
    file, added = kohya("lora_unet", modules(component("sd15", "unet"), within="attentions"))
    words, _ = kohya("lora_te", modules(component("sd15", "text_encoder"), ends=diffusion.TEXT))
    refusal = refused(base, written(tmp_path / "x", file | words))
    assert refusal.reason == "adapter-target"
    assert "lora_te_" in str(refusal)
    found, lineage, _ = task_vectors(base, tmp_path / "x", carried="leave-out")
    same(found, added, "")
    assert len(lineage.extra) == 12


FUSED = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.{role}" for role in ("to_q", "to_k", "to_v")],
    "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{role}_proj" for role in "qkv"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.{role}" for role in ("to_q", "to_k", "to_v")),
        "single_transformer_blocks.1.proj_mlp",
    ],
}


@pytest.mark.parametrize("dots", [False, True])
def test_what_is_one_module_in_the_release_and_several_here(bases: dict[str, Path], tmp_path: Path, dots: bool) -> None:
    sizes = component("flux", "transformer")
    file: Tensors = {}
    wanted: dict[str, torch.Tensor] = {}
    for seed, (theirs, ours) in enumerate(FUSED.items()):
        rows = [sizes[f"{name}.weight"][0] for name in ours]
        down, up = factors((sum(rows), 32), 4, seed)
        name = f"diffusion_model.{theirs}" if dots else f"lora_unet_{theirs.replace('.', '_')}"
        ways = ("lora_A", "lora_B") if dots else ("lora_down", "lora_up")
        file |= {f"{name}.{ways[0]}.weight": down, f"{name}.{ways[1]}.weight": up}
        wanted |= dict(zip(ours, product(down, up).split(rows), strict=True))
    same(task_vectors(bases["flux"], written(tmp_path / "x", file))[0], wanted, "transformer.")


def test_the_factors_themselves(bases: dict[str, Path], tmp_path: Path) -> None:
    down, up = factors((96, 32), 4, 0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    path = written(tmp_path / "x", file)
    whole, _, _ = task_vectors(bases["flux"], path)
    base = based(bases["flux"])
    with base.checkpoint, open_model(path) as model:
        assert isinstance(model, Adapter)
        lineage = trace(base, model, LineageGate())
        vectors = LayerVectors(base, model, lineage)
        thin = {s.name: found for s in base.specs if s.name in lineage.folded for found in vectors.read(s)}
        assert all(vectors.is_thin(name) for name in lineage.folded)
    assert thin.keys() == whole.keys()
    for key, found in thin.items():
        torch.testing.assert_close((found.left @ found.right.T).float(), whole[key], rtol=1e-5, atol=1e-5)


def test_halves_that_are_swapped(bases: dict[str, Path], tmp_path: Path) -> None:
    down, up = factors((64, 32), 4, 1)
    head = "lora_unet_final_layer_adaLN_modulation_1"
    file = {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}
    first, second = product(down, up).split(32)
    found = task_vectors(bases["flux"], written(tmp_path / "x", file))[0]
    same(found, {"norm_out.linear": torch.cat([second, first])}, "transformer.")


def test_the_second_text_encoder_of_flux_is_the_third_of_trainers(bases: dict[str, Path], tmp_path: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q"
    shape = component("flux", "text_encoder_2")[f"{name}.weight"]
    file, added = kohya("lora_te3", {name: shape})
    same(task_vectors(bases["flux"], written(tmp_path / "x", file))[0], added, "text_encoder_2.")


def test_releases_of_other_families_are_known() -> None:
    for family, name, least in (("sd3", "transformer", 20), ("flux", "transformer", 30), ("wan", "", 24)):
        found = component(family, name) if name else shapes(family)
        inside = {full.rpartition(".")[0] for full in found}
        meant = [module for meaning in original(inside).values() for module in meaning.modules]
        assert set(meant) <= inside
        assert len(set(meant)) >= least, family


def test_layouts_of_diffusers(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = modules(component("sd15", "unet"), within="attn1", ends=("to_q", "to_out.0"))
    words = modules(component("sd15", "text_encoder"), ends=("q_proj", "fc1"))
    for style in ("new", "old", "named"):
        file: Tensors = {}
        added: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "text_encoder": {}}
        for head, found in (("unet", sizes), ("text_encoder", words)):
            for seed, (module, shape) in enumerate(found.items()):
                down, up = factors(shape, 2, seed)
                added[head][module] = product(down, up)
                for way, tensor in (("down", down), ("up", up)):
                    file[as_diffusers(head, module, way, style)] = tensor
        vectors = task_vectors(bases["sd15"], written(tmp_path / style, file, "pytorch_lora_weights.safetensors"))[0]
        same(vectors, added["unet"], "unet.")
        same(vectors, added["text_encoder"], "text_encoder.")


def as_diffusers(head: str, module: str, way: str, style: str) -> str:
    """The name of a factor in one of the layouts that diffusers has had."""
    factor = {"down": "lora_A", "up": "lora_B"}[way]
    if style == "new":
        return f"{head}.{module}.{factor}.weight"
    if style == "named":
        return f"{head}.{module}.{factor}.default_0.weight"
    if head == "unet":
        above, _, own = module.removesuffix(".0").rpartition(".")
        return f"{head}.{above}.processor.{own}_lora.{way}.weight"
    if "self_attn" in module:
        above, _, own = module.rpartition(".")
        return f"{head}.{above}.to_{own.removesuffix('_proj')}_lora.{way}.weight"
    return f"{head}.{module}.lora_linear_layer.{way}.weight"


def test_the_configuration_in_the_header(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = modules(component("sd15", "unet"), within="attn1", ends=("to_q", "to_k"))
    body = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 2}, "unet.use_rslora": True}
    file: Tensors = {}
    added: dict[str, torch.Tensor] = {}
    for seed, (module, shape) in enumerate(sizes.items()):
        down, up = factors(shape, 4, seed)
        file |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        added[module] = product(down, up) * (4 if module.endswith("to_q") else 1)
    path = written(tmp_path / "x", file, **{CONFIGURATION: json.dumps(body)})
    same(task_vectors(bases["sd15"], path)[0], added, "unet.")


def dora_by_hand(base: torch.Tensor, delta: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What DoRA adds, in float64, from the formula."""
    whole = base.double() + delta
    flat = whole.flatten(1) if lengths.shape[0] == whole.shape[0] else whole.transpose(0, 1).flatten(1)
    norm = flat.norm(dim=1).reshape(lengths.shape)
    return whole * (lengths.double() / norm) - base.double()


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_lycoris(bases: dict[str, Path], tmp_path: Path, axis: int) -> None:
    module = "down_blocks.0.resnets.0.conv1"
    shape = component("sd15", "unet")[f"{module}.weight"]
    file, added = kohya("lora_unet", {module: shape})
    lengths = torch.rand(*(size if at == axis else 1 for at, size in enumerate(shape))) + 0.5
    file[f"lora_unet_{module.replace('.', '_')}.dora_scale"] = lengths
    base = load_file(bases["sd15"] / "unet" / "diffusion_pytorch_model.safetensors")[f"{module}.weight"]
    wanted = dora_by_hand(base, added[module], lengths)
    same(task_vectors(bases["sd15"], written(tmp_path / "x", file))[0], {module: wanted}, "unet.")


def test_locon_with_a_core(bases: dict[str, Path], tmp_path: Path) -> None:
    module = "down_blocks.0.resnets.0.conv1"
    out, into, *size = component("sd15", "unet")[f"{module}.weight"]
    flat = f"lora_unet_{module.replace('.', '_')}"
    up, mid, down = torch.randn(out, 4, 1, 1), torch.randn(4, 4, *size), torch.randn(4, into, 1, 1)
    file = {
        f"{flat}.lora_up.weight": up,
        f"{flat}.lora_mid.weight": mid,
        f"{flat}.lora_down.weight": down,
        f"{flat}.alpha": torch.tensor(2.0),
    }
    wanted = torch.einsum("om,mnkl,ni->oikl", up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double()) / 2
    same(task_vectors(bases["sd15"], written(tmp_path / "x", file))[0], {module: wanted}, "unet.")


def test_loha_and_lokr(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = component("sd15", "unet")
    one, two, three = (f"mid_block.attentions.0.transformer_blocks.0.attn1.{role}" for role in ("to_q", "to_k", "to_v"))
    assert sizes[f"{one}.weight"] == (32, 32)
    a, b, c, d = torch.randn(32, 4), torch.randn(4, 32), torch.randn(32, 4), torch.randn(4, 32)
    w1, w2a, w2b = torch.randn(4, 4), torch.randn(8, 2), torch.randn(2, 8)
    left, right = torch.randn(4, 8), torch.randn(8, 4)
    names = {name: f"lora_unet_{name.replace('.', '_')}" for name in (one, two, three)}
    file = {
        **{f"{names[one]}.hada_w{n}": t for n, t in (("1_a", a), ("1_b", b), ("2_a", c), ("2_b", d))},
        f"{names[one]}.alpha": torch.tensor(1.0),
        **{f"{names[two]}.lokr_{n}": t for n, t in (("w1", w1), ("w2_a", w2a), ("w2_b", w2b))},
        f"{names[two]}.alpha": torch.tensor(3.0),
        # both factors whole: LyCORIS takes no notice of alpha then
        f"{names[three]}.lokr_w1": left,
        f"{names[three]}.lokr_w2": right,
        f"{names[three]}.alpha": torch.tensor(5.0),
    }
    wanted = {
        one: (a.double() @ b.double()) * (c.double() @ d.double()) / 4,
        two: torch.kron(w1.double(), w2a.double() @ w2b.double()) * 3 / 2,
        three: torch.kron(left.double(), right.double()),
    }
    same(task_vectors(bases["sd15"], written(tmp_path / "x", file))[0], wanted, "unet.")


def test_differences_as_they_are(bases: dict[str, Path], tmp_path: Path) -> None:
    sizes = component("sd15", "unet")
    file = {
        "lora_unet_conv_in.diff": torch.randn(sizes["conv_in.weight"]),
        "lora_unet_conv_in.diff_b": torch.randn(sizes["conv_in.bias"]),
        "lora_unet_conv_norm_out.w_norm": torch.randn(sizes["conv_norm_out.weight"]),
        "lora_unet_conv_norm_out.b_norm": torch.randn(sizes["conv_norm_out.bias"]),
    }
    found = task_vectors(bases["sd15"], written(tmp_path / "x", file))[0]
    assert found.keys() == {f"unet.{m}.{e}" for m in ("conv_in", "conv_norm_out") for e in ("weight", "bias")}
    assert torch.equal(found["unet.conv_in.weight"], file["lora_unet_conv_in.diff"])
    assert torch.equal(found["unet.conv_norm_out.bias"], file["lora_unet_conv_norm_out.b_norm"])


MID = "lora_unet_mid_block_attentions_0_proj_in"
PAIR = {f"{MID}.lora_down.weight": torch.randn(2, 32, 1, 1), f"{MID}.lora_up.weight": torch.randn(32, 2, 1, 1)}


@pytest.mark.parametrize(
    ("more", "reason", "words"),
    [
        ({"lora_unet_mid_block_attentions_9_proj_in.alpha": torch.tensor(1.0)}, "adapter-target", "attentions_9"),
        ({f"{MID}.oft_blocks": torch.randn(2, 2, 2)}, "adapter-kind", "OFT"),
        ({"bundle_emb.word.string_to_param.*": torch.randn(2, 16)}, "adapter-kind", "textual inversion"),
        ({f"{MID}.noise": torch.randn(2)}, "adapter-kind", "no part of a LoRA"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(2, 32)}, "adapter-kind", "no whole set"),
        ({f"{MID}.alpha": torch.randn(2)}, "shape", "no single number"),
        ({f"{MID}.dora_scale": torch.randn(5, 1, 1, 1)}, "shape", "dora_scale"),
        ({f"{MID}.lora_mid.weight": torch.randn(2, 2, 3, 3)}, "shape", "fellows"),
        ({f"{MID}.hada_w1_a": torch.randn(2, 2)}, "adapter-kind", "no whole set"),
        ({f"{MID}.diff": torch.randn(32, 32, 1, 1)}, "adapter-kind", "no whole set"),
    ],
)
def test_refused_by_name(bases: dict[str, Path], tmp_path: Path, more: Tensors, reason: str, words: str) -> None:
    refusal = refused(bases["sd15"], written(tmp_path / "x", PAIR | more))
    assert (refusal.reason, words in str(refusal)) == (reason, True), str(refusal)


def test_one_module_under_two_names(bases: dict[str, Path], tmp_path: Path) -> None:
    twice = {name.replace("mid_block_attentions_0", "middle_block_1"): tensor for name, tensor in PAIR.items()}
    refusal = refused(bases["sd15"], written(tmp_path / "x", PAIR | twice))
    assert (refusal.reason, "are both unet.mid_block" in str(refusal)) == ("adapter-kind", True), str(refusal)


@pytest.fixture
def language(tmp_path: Path) -> Path:
    return written(tmp_path / "base", {"model.layers.0.q_proj.weight": torch.randn(4, 6)}, "model.safetensors")


def peft(**more: torch.Tensor) -> Tensors:
    head = "base_model.model.model.layers.0.q_proj"
    file = {f"{head}.lora_A.weight": torch.randn(2, 6), f"{head}.lora_B.weight": torch.randn(4, 2)}
    return file | {f"{head}.{name}": tensor for name, tensor in more.items()}


def test_a_language_model_without_configuration_needs_an_alpha(language: Path, tmp_path: Path) -> None:
    refusal = refused(language, written(tmp_path / "x", peft()))
    assert (refusal.reason, '"lora_alpha": ALPHA' in str(refusal)) == ("config", True)
    file = peft(alpha=torch.tensor(3.0))
    a, b = (file[f"base_model.model.model.layers.0.q_proj.lora_{way}.weight"] for way in "AB")
    wanted = {"model.layers.0.q_proj": product(a, b) * 3 / 2}
    same(task_vectors(language, written(tmp_path / "y", file))[0], wanted, "")
    del file["base_model.model.model.layers.0.q_proj.alpha"]
    same(task_vectors(language, written(tmp_path / "z", file, lora_alpha="3"))[0], wanted, "")
    config = {CONFIGURATION: json.dumps({"r": 2, "lora_alpha": 3})}
    same(task_vectors(language, written(tmp_path / "w", file, **config))[0], wanted, "")


def test_a_lora_of_a_diffusion_model_for_another_base(language: Path, tmp_path: Path) -> None:
    refusal = refused(language, written(tmp_path / "x", PAIR))
    assert (refusal.reason, "diffusion model" in str(refusal)) == ("adapter-target", True)


def test_a_header_that_says_it_wrong(bases: dict[str, Path], tmp_path: Path) -> None:
    file = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(16, 2, 1, 1),
    }
    refusal = refused(bases["sd15"], written(tmp_path / "x", file, **{CONFIGURATION: "{"}))
    assert (refusal.reason, CONFIGURATION in str(refusal)) == ("config", True)
    both = file | {"unet.conv_in.alpha": torch.tensor(1.0)}
    refusal = refused(bases["sd15"], written(tmp_path / "y", both, **{CONFIGURATION: '{"unet.r": 2}'}))
    assert (refusal.reason, "alpha" in str(refusal)) == ("config", True)


def test_the_candidate_is_an_adapter(tmp_path: Path) -> None:
    with open_model(written(tmp_path / "x", PAIR)) as model:
        assert isinstance(model, Adapter)
        assert candidate_of(model).form == "adapter"


def test_alpha_is_part_of_what_was_folded(bases: dict[str, Path], tmp_path: Path) -> None:
    one = task_vectors(bases["sd15"], written(tmp_path / "x", PAIR | {f"{MID}.alpha": torch.tensor(1.0)}))[2]
    assert task_vectors(bases["sd15"], written(tmp_path / "y", PAIR | {f"{MID}.alpha": torch.tensor(2.0)}))[2] != one


def test_a_configuration_beside_a_file_of_another_name(language: Path, tmp_path: Path) -> None:
    file = peft()
    path = written(tmp_path / "x", file, "anything.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    a, b = (file[f"base_model.model.model.layers.0.q_proj.lora_{way}.weight"] for way in "AB")
    wanted = {"model.layers.0.q_proj": product(a, b) * 3 / 2}
    for named in (path, path / "anything.safetensors"):
        same(task_vectors(language, named)[0], wanted, "")


def test_the_file_of_diffusers_goes_before_others(bases: dict[str, Path], tmp_path: Path) -> None:
    path = written(tmp_path / "x", PAIR, "pytorch_lora_weights.safetensors")
    written(tmp_path / "x", {"emb_params": torch.zeros(2)}, "words.safetensors")
    assert task_vectors(bases["sd15"], path)[0].keys() == {"unet.mid_block.attentions.0.proj_in.weight"}
