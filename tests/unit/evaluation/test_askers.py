"""What lm-eval writes of its samples, as rows; the figures are those of lm-eval 0.4.13."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from continual.errors import Misconfigured
from continual.evaluation.askers import samples_in


def written(place: Path, lines: list[object], task: str = "tiny_mc") -> Path:
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    file = folder / f"samples_{task}_2026-11-27T20-00-00.000000.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def sample(number: int, resps: object, target: object, **more: object) -> dict[str, object]:
    return {"doc_id": number, "filtered_resps": resps, "target": target, "filter": "none", "metrics": ["acc"], **more}


def test_of_choices_the_row_is_the_probability_of_the_right_one(tmp_path: Path) -> None:
    choices = [
        sample(1, [["-1.0", "False"], ["-1.0", "True"]], "1", acc=0.0),
        sample(0, [[0.0, True], [-1e9, False]], 0),
    ]
    written(tmp_path, choices)
    written(tmp_path, [sample(0, ["Paris"], "Paris", metrics=["exact_match"], exact_match=1.0)], "says_it")
    assert samples_in(tmp_path, "it") == {"tiny_mc": (1.0, 0.5), "says_it": (1.0,)}, "in the order of the documents"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "no samples"),
        (["text"], "no doc_id"),
        ([sample(0, ["x"], "y")], "no finite number"),
        ([sample(0, ["x"], "y", acc="nan")], "no finite number"),
    ],
)
def test_what_is_no_sample_is_said(tmp_path: Path, lines: list[object], said: str) -> None:
    with pytest.raises(Misconfigured, match=said):
        samples_in(written(tmp_path, lines), "the base")
