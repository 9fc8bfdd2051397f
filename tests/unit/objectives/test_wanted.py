"""Settings of a calibration that cannot be used are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from continual.errors import Misconfigured
from tests.helpers.pools import wanted

ROW = (Path("rows.jsonl"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"objective": "accuracy"},
            "objective = 'accuracy': use one of causal-lm, classification, heads, or module:function",
        ),
        ({"objective": "a b:c"}, "objective = 'a b:c'"),
        ({"objective": "causal-lm"}, "rows: the objective causal-lm needs a JSONL file"),
        ({"objective": "causal-lm", "rows": ROW, "batch": 0}, "batch = 0"),
        ({"objective": "causal-lm", "rows": ROW, "held": 1.0}, "held = 1.0"),
        ({"objective": "causal-lm", "rows": ROW, "held": float("nan")}, "held = nan"),
        (
            {"objective": "causal-lm", "rows": ROW, "dtype": "int8"},
            "dtype = 'int8': use one of float32, bfloat16, float16",
        ),
        (
            {"objective": "causal-lm", "rows": ROW, "unsupervised": True},
            "unsupervised .* causal-lm needs no labels anyway",
        ),
        (
            {"objective": "causal-lm", "rows": ROW, "heads": ROW},
            "heads are for the objective heads; causal-lm takes none",
        ),
        (
            {"objective": "heads", "rows": ROW},
            "heads: one JSON file of prompts for each file of rows; there are 0 for 1",
        ),
        ({"objective": "m:f", "rows": ROW}, "rows is for the built-in objectives; with m:f"),
        ({"objective": "m:f", "heads": ROW}, "heads is for the built-in"),
        ({"objective": "m.n:f", "checkpointing": True}, "checkpointing is for the built-in"),
        ({"objective": "m:f", "unsupervised": True}, "unsupervised is for the built-in"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        wanted(**settings)
