"""Which folders make one model, and which of the files in a folder are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from continual.errors import Refuse
from continual.tensors import Checkpoint, Folder, open_model
from continual.tensors.checkpoints.compound import MOST, parts_of
from continual.tensors.checkpoints.place import is_within
from continual.tensors.checkpoints.weight_sets import index_for
from tests.helpers import parts

STEM = "diffusion_pytorch_model"


def folders(place: Path) -> list[tuple[str, str]]:
    return [(part.folder, part.prefix) for part in parts_of(Folder(place))]


def test_the_transformer_comes_first_and_has_its_own_names(tmp_path: Path) -> None:
    rest = [("1_Pooling", "1_Pooling."), ("2_Dense", "2_Dense."), ("3_Normalize", "3_Normalize.")]
    assert folders(parts.embedder(tmp_path / "top")) == [("", ""), *rest]
    assert folders(parts.embedder(tmp_path / "below", root="0_Transformer")) == [("0_Transformer", ""), *rest]


def test_the_modules_of_a_router_are_parts(tmp_path: Path) -> None:
    path = parts.embedder(tmp_path / "two")
    kinds = {"query_0_StaticEmbedding": "a.StaticEmbedding", "document_0_Transformer": "a.Transformer"}
    tensors = parts.weights({"embedding.weight": (3, 2)}, 0, 0.0)
    parts.put(
        path,
        {
            "modules.json": [{"path": "", "type": "sentence_transformers.base.modules.router.Router"}],
            "router_config.json": {"types": kinds, "structure": {}},
            **{f"{name}/model.safetensors": tensors for name in kinds},
        },
    )
    (path / "model.safetensors").unlink()
    with open_model(path) as model:
        assert isinstance(model, Checkpoint)
        assert set(model.tensors) == {f"{name}.embedding.weight" for name in kinds}


def test_a_model_in_one_folder_has_one_part(tmp_path: Path) -> None:
    path = parts.put(tmp_path / "plain", {"model.safetensors": parts.weights(parts.ENCODER, 0, 0.0)})
    assert folders(path) == [("", "")]
    assert folders(path / "model.safetensors") == [("", "")]


def test_the_tensors_of_a_pipeline_are_named_by_its_components(tmp_path: Path) -> None:
    with open_model(parts.pipeline(tmp_path / "ft", form="shards")) as model:
        assert isinstance(model, Checkpoint)
        assert set(model.tensors) == {
            *(f"unet.{name}" for name in parts.UNET),
            *(f"text_encoder.{name}" for name in parts.TEXT),
            *(f"vae.{name}" for name in parts.VAE),
        }
        assert model.files[0].name == f"unet/{STEM}-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "no valid JSON"),
        (b"{}", "no list of modules"),
        (b"[]", "no list of modules"),
        (b"[3]", "3 is no module"),
        (b'[{"path": "", "type": null}]', "is no module"),
        (b'[{"path": "../other", "type": "a.Dense"}]', "names ../other, which is no folder in the model"),
        (b'[{"path": "/etc", "type": "a.Dense"}]', "names /etc, which is no folder in the model"),
        (b'[{"path": "a\\u0000b", "type": "a.Dense"}]', "which is no folder in the model"),
        (b'[{"path": "x", "type": "a.Dense"}, {"path": "x", "type": "a.Dense"}]', "names the folder x twice"),
    ],
)
def test_what_is_no_list_of_modules_is_refused(tmp_path: Path, body: bytes, said: str) -> None:
    path = parts.put(parts.embedder(tmp_path / "ft"), {"modules.json": body})
    with pytest.raises(Refuse) as refused:
        open_model(path)
    assert refused.value.reason == "config"
    assert said in str(refused.value)


def test_a_component_outside_of_the_pipeline_is_refused(tmp_path: Path) -> None:
    path = parts.put(tmp_path / "ft", {"model_index.json": {"../vae": ["diffusers", "AutoencoderKL"]}})
    with pytest.raises(Refuse, match=r"names \.\./vae, which is no folder in the model"):
        open_model(path)
    many = {f"c{i}": ["diffusers", "UNet"] for i in range(MOST + 1)}
    with pytest.raises(Refuse, match=f"names {MOST + 1} folders; at most {MOST} are read"):
        open_model(parts.put(tmp_path / "many", {"model_index.json": many}))


def test_a_part_that_is_a_link_out_of_the_watched_folder_is_refused(tmp_path: Path) -> None:
    path = parts.embedder(tmp_path / "in/ft", 1)
    (path / "2_Dense").rename(tmp_path / "elsewhere")
    (path / "2_Dense").symlink_to(tmp_path / "elsewhere")
    with open_model(path):
        pass
    with pytest.raises(Refuse) as refused:
        open_model(path, root=tmp_path / "in")
    assert refused.value.reason == "outside"


def test_tensors_beside_the_index_of_a_component_are_refused(tmp_path: Path) -> None:
    path = parts.pipeline(tmp_path / "ft", form="shards")
    index = {"weight_map": dict.fromkeys(parts.UNET, f"{STEM}-00001-of-00002.safetensors")}
    parts.put(path, {f"unet/{STEM}.safetensors.index.json": index})
    with pytest.raises(Refuse, match=rf"ft/unet: its index says that tensor \S+ is in {STEM}-00001-of-00002"):
        open_model(path)


def test_the_index_is_named_as_loaders_look_for_it() -> None:
    assert index_for(["model.safetensors"]) is None
    assert index_for([f"{STEM}.fp16.safetensors"]) is None
    assert index_for(["other.safetensors"]) == "model.safetensors.index.json"
    assert index_for([f"{STEM}-00001-of-00001.safetensors"]) == f"{STEM}.safetensors.index.json"
    assert index_for([f"{STEM}.fp16-00001-of-00001.safetensors"]) == f"{STEM}.safetensors.index.fp16.json"
    assert index_for(["model-00001-of-00001.fp16.safetensors"]) == "model.safetensors.index.fp16.json"


@pytest.mark.parametrize("path", ["", "/a", "a//b", "a/../b", "..", ".", "a/.", "a\0b", "a/" * 8 + "b"])
def test_a_path_that_leads_out_is_told(path: str) -> None:
    assert not is_within(path)
    assert is_within("2_Dense/model.safetensors")
