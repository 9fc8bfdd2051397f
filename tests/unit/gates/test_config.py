"""Configurations that have the same weights compute something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from continual.errors import Refuse
from continual.gates import ConfigGate, Headers
from tests.helpers import models
from tests.unit.gates.cases import Case, headers

OURS = {"rope_theta": 10000.0, "num_attention_heads": 4, "hidden_act": "silu", "vocab_size": 40}


def configured(place: Path, **theirs: object) -> Headers:
    base = models.base(place / "base")
    (base / "config.json").write_text(json.dumps({**models.CONFIG, **OURS, "text_config": {"head_dim": 8}}))
    model = models.fine_tune(base, place / "alice", 1)
    (model / "config.json").write_text(json.dumps({**models.CONFIG, **OURS, **theirs}))
    return headers(base, model)


REFUSED = {"other-config": lambda place: Case(ConfigGate(), configured(place, rope_theta=500000.0))}


@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"vocab_size": 48},
        {"sliding_window": 512},
        {"rope_theta": None},
        {"torch_dtype": "float16"},
        {"rope_theta": 10000},
    ],
)
def test_let_in(tmp_path: Path, theirs: dict[str, object]) -> None:
    ConfigGate(act="refuse").judge(configured(tmp_path, **theirs))


def test_another_kind_of_model(tmp_path: Path) -> None:
    """Weights of the same names and shapes; that of a model with a text model in it is another one by its nature."""
    base = models.base(tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**models.CONFIG, "model_type": "llama"}))
    model = models.fine_tune(base, tmp_path / "alice", 1)
    (model / "config.json").write_text(json.dumps({**models.CONFIG, "model_type": "mistral"}))
    with pytest.raises(Refuse, match=r"model_type = mistral \(the base: llama\)"):
        ConfigGate().judge(headers(base, model))
    (model / "config.json").write_text(json.dumps({**models.CONFIG, "model_type": "gemma3", "text_config": {}}))
    ConfigGate().judge(headers(base, model))


def test_what_is_told(tmp_path: Path) -> None:
    seen = configured(tmp_path, num_attention_heads=8, text_config={"head_dim": 4})
    with pytest.raises(Refuse, match=r"num_attention_heads = 8 \(the base: 4\), text_config.head_dim = 4"):
        ConfigGate().judge(seen)
    ConfigGate(act="off").judge(seen)
    ConfigGate(but=("num_attention_heads", "text_config.head_dim")).judge(seen)
