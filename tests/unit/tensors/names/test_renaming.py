"""One weight, one canonical name, whatever classes and files call it, in two versions of transformers."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual.errors import Refuse
from continual.gates.lineage import LineageGate, trace
from continual.records import Lineage
from continual.tensors import Checkpoint, TaskVectors, describe, open_model
from continual.tensors.names import renaming
from continual.tensors.names.renaming import canonical, canonical_names, difference, is_known, loaded
from tests.helpers import architectures

Named = dict[str, torch.Tensor]
OLD: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parents[3] / "data" / "names_of_transformers_4.json").read_text()
)
"""What transformers 4.57 calls the weights of these models: in its files, and once they are loaded."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Models by name, each made and written once."""
    done: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in done:
            model = architectures.made(name)
            done[name] = (architectures.written(model, tmp_path_factory.mktemp(name) / "base"), model)
        return done[name]

    return get


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_canonical_names_are_one_for_one_in_files_and_classes(name: str, models: Any) -> None:
    path, model = models(name)
    config = json.loads((path / "config.json").read_text())
    family = config["model_type"]
    files = set(load_file(path / "model.safetensors"))
    modules = {parameter for parameter, _ in model.named_parameters()}
    everywhere = [files, modules, *({*names} for names in OLD.get(name, {}).values())]
    for names in everywhere:
        short = [canonical(one, family) for one in names]
        assert [one for one, n in Counter(short).items() if n > 1] == []
    assert {loaded(one, config) for one in files} >= modules, "an adapter is written under the names of the class"
    assert {canonical(one, family) for one in files} >= {canonical(one, family) for one in modules}


def test_names_that_would_become_one_keep_their_own() -> None:
    names = ["model.layers.0.w", "layers.0.w", "model.norm.w"]
    assert canonical_names(names, "") == {names[0]: names[0], names[1]: names[1], names[2]: "norm.w"}
    names = ["model.a.b", "module.a.b", "model.model.a.b.c"]
    assert len(set(canonical_names(names, "").values())) == len(names)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("a.LayerNorm.weight", "a.LayerNorm.gamma", ("weight", "gamma")),
        (
            "language_model.model.layers.0.w",
            "model.language_model.layers.0.w",
            ("language_model.model", "model.language_model"),
        ),
        ("layers.3.w", "layers.3._orig_mod.w", ("*", "*._orig_mod")),
        ("vit.encoder.layer.1.x.w", "vit.layers.1.x.w", ("encoder.layer", "layers")),
        ("visual.x", "model.visual.x", ("visual", "model.visual")),
    ],
)
def test_what_differs_is_said_once_for_all_layers(ours: str, theirs: str, said: tuple[str, str]) -> None:
    assert difference(ours, theirs) == said


def wrapped(name: str) -> str:
    head, dot, rest = name.partition(".")
    return f"module.{head}._orig_mod.{rest}" if dot else name


def tensorflow(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def weight_norm(name: str) -> str:
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def folded(base: Path, ours: Path, **policy: Any) -> tuple[str, dict[str, torch.Tensor], Lineage]:
    """The digest of what would be folded, the task vectors and the lineage."""
    with open_model(base) as checkpoint, open_model(ours) as model:
        assert isinstance(checkpoint, Checkpoint)
        described = describe(checkpoint)
        lineage = trace(described, model, LineageGate(**policy))
        vectors = TaskVectors(described, model, lineage)
        read = {name: vectors.vector(name) for name in lineage.folded}
        return vectors.digest({n: v.digest for n, v in read.items()}), {n: v.tau for n, v in read.items()}, lineage


def republished(path: Path, tensors: Named, config: Path) -> Path:
    path.mkdir()
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_bytes((config / "config.json").read_bytes())
    return path


def same(base: Path, plain: Path, renamed: Path) -> Lineage:
    digest, taus, lineage = folded(base, plain)
    other, others, found = folded(base, renamed)
    assert (other, found.folded, found.unchanged) == (digest, lineage.folded, ())
    assert all(torch.equal(taus[name], others[name]) for name in taus)
    assert any(bool(tau.any()) for tau in taus.values())
    return found


def otherwise(name: str, config: dict[str, Any]) -> dict[str, Callable[[str], str]]:
    """Every other way to name the weights of a model."""
    family = config["model_type"]

    def of_version_4(kind: str) -> Callable[[str], str]:
        older = {canonical(n, family): n for n in OLD.get(name, {}).get(kind, [])}
        leading = ("", "text_model.", "vision_model.")  # a leading part is no renaming

        def old(one: str) -> str:
            short = canonical(one, family)
            return next((older[stem + short] for stem in leading if stem + short in older), one)

        return old

    return {
        "class": lambda one: loaded(one, config),
        "wrapped": wrapped,
        "tensorflow": tensorflow,
        "weight norm": weight_norm,
        "file of version 4": of_version_4("file"),
        "class of version 4": of_version_4("module"),
    }


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_fine_tune_under_other_names_is_the_same_fine_tune(name: str, models: Any, tmp_path: Path) -> None:
    """Bit for bit, digest included; and the other way about, as base and fine-tune change sides."""
    path, _ = models(name)
    config = json.loads((path / "config.json").read_text())
    base = load_file(path / "model.safetensors")
    torch.manual_seed(1)
    tuned = {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()}
    ours = republished(tmp_path / "tuned", tuned, path)
    for how, rename in otherwise(name, config).items():
        if all(rename(one) == one for one in base):
            continue
        other = republished(tmp_path / how, {rename(n): t for n, t in tuned.items()}, path)
        lineage = same(path, ours, other)
        assert lineage.renamings or lineage.prefix != ("", ""), how
        same(republished(tmp_path / f"base {how}", {rename(n): t for n, t in base.items()}, path), other, ours)


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("", "vae.encoder.mid_block.attentions.0.query.weight", "vae.encoder.mid_block.attentions.0.to_q.weight"),
        ("", "decoder.mid_block.attentions.0.proj_attn.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("", "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight", "text_encoder.encoder.layers.0.mlp.fc1.weight"),
        ("video_llava", "model.image_tower.vision_model.post.weight", "image_tower.post.weight"),
        ("altclip", "vision_model.encoder.layer.0.x.weight", "vision_model.encoder.layers.0.x.weight"),
        (
            "gemma3n",
            "model.language_model.per_layer_model.language_model_projection.weight",
            "model.per_layer_model_projection.weight",
        ),
        ("vit_msn", "vit.embeddings.cls_token", "embeddings.cls_token"),
        ("vit_mae", "decoder.decoder_encoder.layer.0.output.dense.bias", "decoder.decoder_layers.0.mlp.fc2.bias"),
    ],
)
def test_two_names_of_one_weight(family: str, one: str, other: str) -> None:
    assert canonical(one, family) == canonical(other, family)


def test_one_tower_of_a_base_that_was_published_alone(models: Any) -> None:
    whole, _ = models("clip")
    text, _ = models("clip_text")
    _, taus, lineage = folded(whole, text, missing="unchanged")
    assert lineage.prefix == ("text_model.", "")
    assert lineage.extra == ()
    tensors = load_file(text / "model.safetensors")
    assert len(taus) == len(tensors)
    assert all(name.startswith("text_model.") for name in taus)
    with pytest.raises(Refuse, match="missing = unchanged"):
        folded(whole, text)


def test_a_whole_model_for_a_base_that_is_one_tower(models: Any) -> None:
    whole, _ = models("clip")
    text, _ = models("clip_text")
    _, taus, lineage = folded(text, whole)
    assert lineage.prefix == ("", "text_model.")
    assert taus.keys() == load_file(text / "model.safetensors").keys()
    assert lineage.extra == tuple(sorted(n for n in load_file(whole / "model.safetensors") if "text_model." not in n))


def test_the_text_model_of_a_base_that_sees(models: Any, tmp_path: Path) -> None:
    """As tools that train the text alone write it: nothing of the text is lost, and the rest is missing."""
    path, _ = models("gemma3")
    tensors = load_file(path / "model.safetensors")
    text = {
        "model." + n.removeprefix("language_model.model."): t + 0.1
        for n, t in tensors.items()
        if n.startswith("language_model.model.")
    }
    alone = republished(tmp_path / "text", text, path)
    _, taus, lineage = folded(path, alone, missing="unchanged")
    assert (len(taus), lineage.extra) == (len(text), ())
    assert all(bool(tau.any()) for tau in taus.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "llava", "qwen2vl", "gemma3", "dinov2", "neox", "clip"])
@pytest.mark.parametrize("names", ["class", "file"])
def test_an_adapter_has_the_names_of_the_class_and_the_base_those_of_its_file(
    name: str, names: str, models: Any, tmp_path: Path
) -> None:
    """PEFT writes what the loaded model calls its modules, which under transformers 4 was often what the file does."""
    peft = pytest.importorskip("peft")
    path, model = models(name)
    config = json.loads((path / "config.json").read_text())
    torch.manual_seed(5)
    wrapper = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for parameter_name, parameter in wrapper.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapper.save_pretrained(tmp_path / "adapter")
    merged = dict(wrapper.merge_and_unload().named_parameters())
    file = load_file(path / "model.safetensors")
    if names == "file":
        back = {loaded(one, config).removesuffix(".weight"): one.removesuffix(".weight") for one in file}
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        head = "base_model.model."
        renamed = {}
        for factor, tensor in weights.items():
            module, dot, rest = factor.removeprefix(head).partition(".lora_")
            renamed[f"{head}{back[module]}{dot}{rest}"] = tensor
        save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    _, taus, lineage = folded(path, tmp_path / "adapter")
    assert lineage.extra == ()
    for one, tensor in file.items():
        change = merged[loaded(one, config)].detach() - tensor
        if one in taus:
            torch.testing.assert_close(taus[one], change, rtol=0, atol=1e-5)
        else:
            assert not change.any()


def test_two_names_of_one_tensor_are_refused_unless_they_agree(models: Any, tmp_path: Path) -> None:
    path, _ = models("llama")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    double = "model.layers.0.mlp._orig_mod.up_proj.weight"
    twice = republished(tmp_path / "twice", tensors | {double: tensors[name]}, path)
    assert folded(path, twice)[2].extra == ()
    differing = republished(tmp_path / "differ", tensors | {double: tensors[name] + 1}, path)
    with pytest.raises(Refuse) as refusal:
        folded(path, differing)
    assert refusal.value.reason == "tied"
    assert name in str(refusal.value)
    assert double in str(refusal.value)


def test_every_family_that_transformers_renames_is_in_the_table_or_refused_for_adapters() -> None:
    """Whoever installs a newer transformers learns here which family it loads under other names."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    table = mapping._build_checkpoint_conversion_mapping()
    same = {  # parts that no adapter has, or another model's names for this class
        "legacy",
        "esm",
        "phimoe",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "gemma3n_text",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    }
    unknown = []
    for family, alike in ({name: name for name in table} | mapping._MODEL_TO_CONVERSION_PATTERN).items():
        steps = table.get(family) or table.get(alike, [])
        renames = any(type(step).__name__ != "WeightConverter" for step in steps)
        known = family in renaming._FAMILIES or family in renaming._MULTIMODAL
        if family.islower() and renames and not known and family not in same and is_known({"model_type": family}):
            unknown.append(family)
    assert unknown == []
