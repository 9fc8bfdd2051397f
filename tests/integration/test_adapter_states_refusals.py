"""What a state that keeps adapters as they are keeps out, or folds in part, on real files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual import api, making
from continual.config import Settings
from tests.helpers import adapters, models
from tests.helpers.adapter_states import folded, merged, opened, same


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


def _full(directory: Path, base: Path) -> Path:
    return models.fine_tune(base, directory, 1)


def _dora(directory: Path, base: Path) -> Path:
    head = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{head}.lora_A.weight": torch.ones(2, 16), f"{head}.lora_B.weight": torch.ones(16, 2)}
    magnitudes = {f"{head}.lora_magnitude_vector": torch.ones(16)}
    return adapters.plain(directory, weights | magnitudes, use_dora=True, base_model_name_or_path=str(base))


def _saved(directory: Path, base: Path) -> Path:
    made = adapters.lora(directory, base, 1)
    weights = load_file(made / "adapter_model.safetensors") | {"base_model.model.model.norm.weight": torch.ones(16)}
    return adapters.plain(made, weights, r=4, modules_to_save=["norm"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_full, "is a full fine-tune, and this state keeps adapters"),
        (_dora, r"model\.layers\.0\.self_attn\.q_proj\.weight by something that depends on the weights of the base"),
        (_saved, r"model\.norm\.weight by something .* gates\.form\.whole = leave-out folds the rest without it"),
    ],
)
def test_what_takes_the_weights_of_the_base_is_refused_on_request(
    tmp_path: Path, base: Path, make: Callable[[Path, Path], Path], said: str
) -> None:
    making.init(base, tmp_path / "state", making.Recipe(rule="mean", width=64))
    with api.Merge(Settings(state=tmp_path / "state", gates={"form": {"whole": "refuse"}}), write=True) as merge:
        outcome = merge.fold(make(tmp_path / "model", base))
        assert (outcome.fate, outcome.reason) == ("refused", "form")
        assert re.search(said, outcome.message), outcome.message


def test_the_rest_of_an_adapter_is_folded_where_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    model = _saved(tmp_path / "model", base)
    making.init(base, tmp_path / "state", making.Recipe(rule="mean", width=64))
    asked = {"form": {"whole": "leave-out"}}
    with api.Merge(Settings(state=tmp_path / "state", gates=asked), write=True) as merge:
        outcome = merge.fold(model)
        assert outcome.fate == "folded"
        assert outcome.line().endswith("left out, as this state has no place for it: model.norm.weight")
        refused = merge.fold(_dora(tmp_path / "dora", base))
        assert (refused.fate, refused.reason) == ("refused", "form")
    plain = adapters.lora(tmp_path / "plain", base, 1)
    same(merged(tmp_path / "state"), merged(folded(tmp_path / "other", base, [plain], name="mean")))


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, base: Path) -> None:
    broken = adapters.lora(tmp_path / "broken", base, 1)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[3] = torch.nan
    adapters.plain(broken, weights, r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    with opened(tmp_path / "state", base) as merge:
        outcome = merge.fold(broken)
        assert (outcome.fate, outcome.reason) == ("refused", "non-finite")
        assert merge.state.ledger.head.generation is None


def test_what_is_zero_in_float32_is_refused_as_in_a_state_of_whole_tensors(tmp_path: Path, base: Path) -> None:
    small = adapters.lora(tmp_path / "small", base, 1, lora_alpha=1e-30)
    tensors = {name: 1e-15 * value for name, value in load_file(small / "adapter_model.safetensors").items()}
    save_file(tensors, small / "adapter_model.safetensors")
    for width in (64, None):
        with opened(tmp_path / f"state-{width}", base, width=width) as merge:
            outcome = merge.fold(small)
            assert (outcome.fate, outcome.reason) == ("refused", "zero"), width
