"""LoRA adapters written by hand: what their task vectors are, and every configuration that is more than plain LoRA
refused by its name."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from continual.errors import Refuse, Retry
from continual.tensors import Adapter, candidate_of, open_model
from tests.helpers.adapters import Tensors, plain, refused, task_vectors
from tests.helpers.kinds_of_adapters import ROLES, seed_of, tensors_of


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(
        {"a.weight": torch.randn(4, 6), "b.weight": torch.randn(3), "c.weight": torch.randn(4, 4)},
        tmp_path / "base" / "model.safetensors",
    )
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scale_b_a(small: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 6).to(dtype), torch.randn(4, 2).to(dtype)
    taus, lineage, _ = task_vectors(small, plain(tmp_path / "x", {"a.lora_A.weight": a, "a.lora_B.weight": b}))
    torch.testing.assert_close(taus["a.weight"].double(), 2 * b.double() @ a.double(), rtol=1e-5, atol=1e-6)
    assert lineage.unchanged == ("b.weight", "c.weight")


def test_digest_knows_factors_and_scale(small: Path, tmp_path: Path) -> None:
    weights = {
        "base_model.model.a.lora_A.weight": torch.randn(2, 6),
        "base_model.model.a.lora_B.weight": torch.randn(4, 2),
    }
    first = task_vectors(small, plain(tmp_path / "x", weights))[2]
    assert task_vectors(small, plain(tmp_path / "y", weights, lora_dropout=0.3, target_modules="a"))[2] == first
    assert task_vectors(small, plain(tmp_path / "z", weights, lora_alpha=8))[2] != first
    assert task_vectors(small, plain(tmp_path / "w", {n: t + 1 for n, t in weights.items()}))[2] != first


def test_the_configuration_is_part_of_the_candidate(tmp_path: Path) -> None:
    def key() -> str:
        with open_model(tmp_path / "x") as model:
            assert isinstance(model, Adapter)
            return candidate_of(model, source="folder").key

    plain(tmp_path / "x")
    first = key()
    assert key() == first
    (tmp_path / "x" / "adapter_config.json").write_text(
        (tmp_path / "x" / "adapter_config.json").read_text().replace("4", "8")
    )
    assert key() != first


def test_a_configuration_rewritten_while_it_is_read(tmp_path: Path) -> None:
    with open_model(plain(tmp_path / "x")) as model:
        os.utime(tmp_path / "x" / "adapter_config.json", ns=(1, 1))
        with pytest.raises(Retry, match="adapter_config"):
            model.check_unchanged()


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "vera_only"},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"trainable_token_indices": [1, 2]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"megatron_config": {"tensor_parallel": 2}},
        {"loftq_config": {"loftq_bits": 4}},
        {"kasa_config": {"beta": 1e-4}},
        {"use_bdlora": {"nblocks": 2}},
        {"a_key_of_the_future": "on"},
        *(
            {"init_lora_weights": word}
            for word in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica")
        ),
        {"peft_type": "RANDLORA"},
        {"peft_type": ["LORA"]},
    ],
)
def test_more_than_plain_lora_is_refused_by_name(small: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    refusal = refused(small, plain(tmp_path / "x", **config))
    assert refusal.reason == "adapter-kind"
    key, value = next(iter(config.items()))
    assert (str(value) if key == "peft_type" else key) in str(refusal)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": -2},
        {"r": 2.5},
        {"r": True},
        {"r": None},
        {"r": "2"},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"lora_alpha": None},
        {"lora_alpha": -1},
        {"lora_alpha": 1e300},
        {"rank_pattern": {"a": 0}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"a": "x"}},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"(?i)query": 1}},
        {"rank_pattern": {".*" + "x" * 1500: 1}},
        {"use_rslora": "yes"},
        {"modules_to_save": "classifier"},
        {"modules_to_save": [1]},
    ],
)
def test_configuration_values_that_make_no_sense(small: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    begun = time.process_time()
    refusal = refused(small, plain(tmp_path / "x", **config))
    assert refusal.reason == "config"
    assert next(iter(config)) in str(refusal)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000])
def test_a_configuration_that_is_no_object(small: Path, tmp_path: Path, text: str) -> None:
    (plain(tmp_path / "x") / "adapter_config.json").write_text(text)
    assert refused(small, tmp_path / "x").reason == "config"


A, B = torch.zeros(2, 6), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("weights", "reason", "words"),
    [
        ({"a.lora_A.weight": A}, "adapter-kind", "no pair"),
        ({"a.lora_B.weight": B}, "adapter-kind", "no pair"),
        ({"a.lora_A.weight": A, "a.lora_embedding_B": B}, "adapter-kind", "no pair"),
        ({"a.lora_A.weight": A, "a.lora_A.default.weight": A, "a.lora_B.weight": B}, "adapter-kind", "same factor"),
        (
            {"a.lora_A.weight": A, "a.lora_B.weight": B, "a.lora_magnitude_vector": B},
            "adapter-kind",
            "lora_magnitude_vector",
        ),
        ({"a.lora_A.weight": A, "a.lora_B.weight": B, "a.lora_B.bias": B}, "adapter-kind", "lora_B.bias"),
        ({"a.lora_A.weight": A, "a.lora_B.weight": B, "b.weight": torch.zeros(3)}, "adapter-kind", "b.weight"),
        ({"a.lora_A.weight": A[:1], "a.lora_B.weight": B}, "shape", "rank 2"),
        ({"a.lora_A.weight": torch.zeros(3, 6), "a.lora_B.weight": torch.zeros(4, 3)}, "shape", "rank 2"),
        ({"a.lora_A.weight": A[:, :5].clone(), "a.lora_B.weight": B}, "shape", "[4, 5]"),
        ({"a.lora_A.weight": A[0], "a.lora_B.weight": B}, "shape", "rank 2"),
        ({"b.lora_A.weight": A, "b.lora_B.weight": B}, "shape", "b.weight"),
        ({"a.lora_A.weight": A.double(), "a.lora_B.weight": B}, "dtype", "F64"),
        ({"a.lora_A.weight": A.to(torch.int8), "a.lora_B.weight": B}, "dtype", "I8"),
        ({"z.lora_A.weight": A, "z.lora_B.weight": B}, "adapter-target", "z.weight"),
        (
            {"a.lora_A.weight": A, "a.lora_B.weight": B, "q.lora_A.weight": A, "q.lora_B.weight": B},
            "adapter-target",
            "q.weight",
        ),
    ],
)
def test_tensors_that_do_not_fit(small: Path, tmp_path: Path, weights: Tensors, reason: str, words: str) -> None:
    weights = {f"base_model.model.{name}": t.clone() for name, t in weights.items()}
    refusal = refused(small, plain(tmp_path / "x", weights))
    assert refusal.reason == reason
    assert words in str(refusal)


def test_only_a_head_the_base_lacks(small: Path, tmp_path: Path) -> None:
    adapter = plain(
        tmp_path / "x", {"base_model.model.classifier.weight": torch.zeros(2, 4)}, modules_to_save=["classifier"]
    )
    assert refused(small, adapter).reason == "adapter-target"


def test_a_rank_that_no_weight_needs(small: Path, tmp_path: Path) -> None:
    """The file has a hole where the factors are: nothing of it is on the disk, and reading it would take all memory."""
    adapter, rank = plain(tmp_path / "x", r=1 << 30, lora_alpha=4), 1 << 30
    sizes = {"base_model.model.a.lora_A.weight": [rank, 6], "base_model.model.a.lora_B.weight": [4, rank]}
    header, end = {}, 0
    for name, shape in sizes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(adapter / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    refusal = refused(small, adapter)
    assert refusal.reason == "shape"
    assert f"rank {rank}" in str(refusal)


def test_more_names_of_saved_modules_than_can_be_compared(small: Path, tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(1000)]
    weights = {f"base_model.model.n{i}.weight": torch.zeros(1) for i in range(1100)}
    adapter = plain(tmp_path / "x", weights, modules_to_save=[*names, *(f"n{i}" for i in range(1000, 1100))])
    refusal = refused(small, adapter)
    assert refusal.reason == "config"
    assert "modules_to_save" in str(refusal)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_in_the_place_of_a_file(small: Path, tmp_path: Path, name: str) -> None:
    adapter = plain(tmp_path / "x")
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    assert refused(small, adapter).reason == "no-file"


def written(path: Path, kind: str, shapes: dict[str, list[int]], **config: Any) -> Path:
    """An adapter of a kind whose file has holes for tensors: only the header is there."""
    path.mkdir()
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    body = {**(seed_of(kind) if kind != "LORA" else {"peft_type": "LORA", "r": 2, "lora_alpha": 4}), **config}
    (path / "adapter_config.json").write_text(json.dumps(body))
    return path


def shapes_of(kind: str) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors_of(kind).items()}


@pytest.mark.parametrize("kind", ROLES)
def test_every_kind_is_read_at_its_smallest(small: Path, tmp_path: Path, kind: str) -> None:
    assert "a.weight" in task_vectors(small, written(tmp_path / "x", kind, shapes_of(kind)))[0]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ROLES for name in shapes_of(kind)])
def test_a_tensor_of_a_kind_that_is_too_large_or_not_there(small: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Each claims a terabyte in a file with a hole: what does not fit is refused before anything is read."""
    shapes = shapes_of(kind)
    for number, axis in enumerate(range(len(shapes[name]))):
        large = [1 << 36 if i == axis else size for i, size in enumerate(shapes[name])]
        path = written(tmp_path / f"x{number}", kind, shapes | {name: large})
        assert refused(small, path).reason == "shape"
    del shapes[name]
    lacking = refused(small, written(tmp_path / "y", kind, shapes)) if shapes else None
    assert lacking is None or lacking.reason == "adapter-kind"


def test_ranks_that_no_weight_needs_of_other_kinds(small: Path, tmp_path: Path) -> None:
    r = 1 << 20
    loha = {"hada_w1_a": [4, r], "hada_w1_b": [r, 6], "hada_w2_a": [4, r], "hada_w2_b": [r, 6]}
    lokr = {"lokr_w1_a": [2, r], "lokr_w1_b": [r, 2], "lokr_w2": [2, 3]}
    cores = {"lokr_w1": [2, 2], "lokr_t2": [r, r, 1, 1], "lokr_w2_a": [r, 2], "lokr_w2_b": [r, 3]}
    for number, (kind, roles) in enumerate([("LOHA", loha), ("LOKR", lokr), ("LOKR", cores)]):
        shapes = {f"base_model.model.a.{role}": shape for role, shape in roles.items()}
        path = written(tmp_path / f"x{number}", kind, shapes, r=r, rank_pattern={})
        assert f"rank {r}" in str(refused(small, path))
    vera = {"base_model.vera_A": [r, 6], "base_model.vera_B": [4, r]}
    vera |= {"base_model.model.a.vera_lambda_b": [4], "base_model.model.a.vera_lambda_d": [r]}
    assert f"rank {r}" in str(refused(small, written(tmp_path / "v", "VERA", vera, r=r)))
    ada = {
        "base_model.model.a.lora_A": [r, 6],
        "base_model.model.a.lora_B": [4, r],
        "base_model.model.a.lora_E": [r, 1],
    }
    assert f"rank {r}" in str(refused(small, written(tmp_path / "a", "ADALORA", ada)))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("TRAINABLE_TOKENS", {"token_indices": [3, 3]}),
        ("TRAINABLE_TOKENS", {"token_indices": [-1, 3]}),
        ("TRAINABLE_TOKENS", {"token_indices": [True, 3]}),
        ("TRAINABLE_TOKENS", {"token_indices": [0, 1 << 40]}),
        ("TRAINABLE_TOKENS", {"token_indices": "03"}),
        ("TRAINABLE_TOKENS", {"token_indices": {"b": [0, 3]}}),
        ("LOHA", {"alpha": "x"}),
        ("LOKR", {"r": 0}),
        ("LOKR", {"alpha_pattern": {"a": -1}}),
        ("ADALORA", {"init_r": None}),
        ("VERA", {"r": 1.5}),
        ("OFT", {"num_cayley_neumann_terms": 1000}),
        ("OFT", {"eps": -1}),
        ("FOURIERFT", {"random_loc_seed": "x"}),
    ],
)
def test_settings_of_other_kinds_that_make_no_sense(
    small: Path, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    refusal = refused(small, written(tmp_path / "x", kind, shapes_of(kind), **config))
    assert refusal.reason == "config"
    assert next(iter(config)) in str(refusal)


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("LOHA", {"init_weights": "abba"}, "init_weights"),
        ("LOKR", {"a_key_of_the_future": 1}, "a_key_of_the_future"),
        ("IA3", {"bias": "all"}, "bias"),
        ("ADALORA", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("LORA", {"trainable_token_indices": [1]}, "trainable_token_indices"),
        ("OFT", {"peft_version": None}, "before 0.18"),
        ("MISS", {"init_weights": "orthogonal"}, "init_weights"),
    ],
)
def test_settings_of_other_kinds_that_are_not_understood(
    small: Path, tmp_path: Path, kind: str, config: dict[str, Any], words: str
) -> None:
    refusal = refused(small, written(tmp_path / "x", kind, shapes_of(kind), **config))
    assert refusal.reason == "adapter-kind"
    assert words in str(refusal)


def test_projections_that_are_not_in_the_file(small: Path, tmp_path: Path) -> None:
    """They are drawn, as wide as all that was adapted: a weight that the base lacks makes them unknown."""
    shapes = {name: shape for name, shape in shapes_of("VERA").items() if "lambda" in name}
    assert refused(small, written(tmp_path / "x", "VERA", shapes)).reason == "adapter-kind"
    assert task_vectors(small, written(tmp_path / "y", "VERA", shapes, save_projection=False))[1].folded == (
        "a.weight",
    )
    more = {name.replace(".a.", ".score."): shape for name, shape in shapes.items()}
    refusal = refused(small, written(tmp_path / "z", "VERA", shapes | more, save_projection=False))
    assert refusal.reason == "adapter-target"
    assert "save_projection" in str(refusal)
    seed = refused(small, written(tmp_path / "s", "VERA", shapes, save_projection=False, projection_prng_key="x"))
    assert "projection_prng_key" in str(seed)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "TRAINABLE_TOKENS", "IA3", "VERA", "ADALORA"])
def test_the_digest_knows_every_tensor_of_a_kind(small: Path, tmp_path: Path, kind: str) -> None:
    tensors = tensors_of(kind)
    digests = {task_vectors(small, plain(tmp_path / "x", tensors, **settings(kind)))[2]}
    for name, tensor in tensors.items():
        digests.add(task_vectors(small, plain(tmp_path / "x", tensors | {name: tensor + 1}, **settings(kind)))[2])
    assert len(digests) == 1 + len(tensors)


def settings(kind: str) -> dict[str, Any]:
    return {"r": None, "lora_alpha": None, **seed_of(kind)}


def test_forms_of_turning_that_are_not_understood(small: Path, tmp_path: Path) -> None:
    old = written(tmp_path / "x", "OFT", shapes_of("OFT"))
    body = json.loads((old / "adapter_config.json").read_text())
    del body["oft_block_size"]
    (old / "adapter_config.json").write_text(json.dumps(body))
    assert "before 0.14" in str(refused(small, old))
    shapes = shapes_of("BOFT") | {"base_model.model.a.boft_R": [2, 2, 3, 3]}
    two = refused(small, written(tmp_path / "y", "BOFT", shapes, boft_n_butterfly_factor=2))
    assert two.reason == "adapter-kind"
    assert "butterfly" in str(two)


def test_places_outside_of_the_weight(small: Path, tmp_path: Path) -> None:
    """They are values: only who reads them knows."""
    values, places = torch.randn(2), torch.tensor([[0, 4], [5, 0]], dtype=torch.int32)
    weights = {"a.shira_weight": values, "a.shira_indices": places}
    model = plain(tmp_path / "x", weights, **seed_of("SHIRA"), lora_alpha=None)
    with pytest.raises(Refuse, match="shira_indices names places outside"):
        task_vectors(small, model)
    places[0, 1] = 3
    taus, _, _ = task_vectors(small, plain(tmp_path / "y", weights, **seed_of("SHIRA"), lora_alpha=None))
    assert taus["a.weight"][0, 5] == values[0]
    assert taus["a.weight"][3, 0] == values[1]
    assert taus["a.weight"].count_nonzero() == 2
    places[:, 1] = places[:, 0]  # one place twice: both count
    twice = plain(tmp_path / "z", weights, **seed_of("SHIRA"), lora_alpha=None)
    torch.testing.assert_close(task_vectors(small, twice)[0]["a.weight"][0, 5], values.sum())
