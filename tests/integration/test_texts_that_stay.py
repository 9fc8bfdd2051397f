"""Rows with prompts, and what a language model predicts of text that must stay while coefficients are learned: with
real, tiny transformers models, against a plain loop over single rows, and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from continual.errors import Misconfigured
from continual.objectives import builtin
from continual.objectives.builtin import Rows
from continual.objectives.calibration import load
from continual.tuning import Learning
from tests.helpers.calibrated import Calibrated, changed, made, read, slopes, write
from tests.helpers.command import machine, run
from tests.helpers.tiny import CPU, loaded, transformers
from tests.integration.test_tune_weights_rows import placed

pytestmark = pytest.mark.slow


def answering(place: Path) -> Calibrated:
    """Two tasks of a causal-lm: every row but the first of each has a prompt."""
    found = made("causal-lm", place)
    for file in found.wanted.rows:
        rows = [{"prompt": " ".join(row["text"].split()[1:]), "text": row["text"]} for row in read(file)]
        write(file, [{"text": rows[0]["text"]}, *(row if row["prompt"] else {"text": row["text"]} for row in rows[1:])])
    return found


def plain(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits of every token of a row but the first, the tokens, and where these are of the prompt."""
    prompt, text = (tokenizer(row.get(part, ""))["input_ids"] for part in ("prompt", "text"))
    ids = torch.tensor([[*prompt, *text]])
    return model(ids).logits[0, :-1], ids[0, 1:], torch.arange(1, ids.shape[1]) < len(prompt)


def test_of_a_row_with_a_prompt_the_answer_is_learned(tmp_path: Path) -> None:
    found = answering(tmp_path)
    model, tokenizer = loaded("causal-lm", found.base), transformers.AutoTokenizer.from_pretrained(found.base)
    calibration = found.load()
    for file, dealt, losses in zip(found.wanted.rows, calibration.dealt, calibration.held(), strict=True):
        rows, each = read(file), []
        for place in dealt.judge:
            logits, ids, asked = plain(model, tokenizer, rows[place])
            each.append(functional.cross_entropy(logits[~asked], ids[~asked]).item())
        assert losses.tolist() == pytest.approx(each, rel=1e-4)
    objective = builtin.load(Rows("causal-lm", found.wanted.rows[0], batch=5), found.base, CPU)
    total, count = 0.0, 0
    for row in read(found.wanted.rows[0]):
        logits, ids, asked = plain(model, tokenizer, row)
        total += functional.cross_entropy(logits[~asked], ids[~asked], reduction="sum").item()
        count += int((~asked).sum())
    assert objective.score() == pytest.approx(-total / count, rel=1e-4)
    assert objective.backward() == pytest.approx(total / count, rel=1e-4), "with as many shares"


def test_what_it_predicts_of_prompts_is_one_more_task(tmp_path: Path) -> None:
    found = answering(tmp_path)
    calibration, start = found.load(), loaded("causal-lm", found.base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.base)
    without = calibration.backward()
    assert calibration.drift() is None
    calibration.remember()
    assert calibration.drift() == pytest.approx(0.0, abs=1e-6)
    assert calibration.backward() == pytest.approx(without, abs=1e-6)
    with torch.no_grad():
        for number, parameter in enumerate(calibration.model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    now, wanted = calibration.model, []
    for file, text in zip(found.wanted.rows, calibration.kept, strict=True):
        rows = read(file)
        assert len(text.judge) < len(rows) / 2, "one has no prompt, and of those of a word there is nothing to predict"
        for place in text.judge:
            (before, _, asked), (after, _, _) = (plain(model, tokenizer, rows[place]) for model in (start, now))
            p, q = (logits[asked].detach().double().log_softmax(-1) for logits in (before, after))
            wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert max(wanted) > 0.01
    assert calibration.drift() == pytest.approx(math.fsum(wanted) / len(wanted), rel=1e-3)
    assert calibration.loss() < calibration.backward(), "the loss that drives has it, too"
    calibration.model.double()
    calibration.backward()
    gradient = slopes(calibration.model)
    length = float(torch.stack([g.double().norm() for g in gradient.values()]).norm())
    ends = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for name, parameter in calibration.model.named_parameters():
                parameter += step * gradient[name] / length
        ends.append(calibration.backward())
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(length, rel=1e-3)


def test_rows_and_texts_that_cannot_be_used(tmp_path: Path) -> None:
    found = answering(tmp_path)
    for row, said in (
        ({"prompt": 3, "text": "good"}, "line 1: the prompt is 3"),
        ({"prompt": "good", "text": ""}, "line 1: prompt and text need a token each"),
        ({"prompt": " ", "text": "good"}, "line 1: prompt and text need a token each"),
        ({"prompt": "good " * 40, "text": "bad"}, "within 32 together"),
    ):
        file = write(tmp_path / "wrong.jsonl", [row] * 4)
        with pytest.raises(Misconfigured, match=said):
            load(changed(found.wanted, rows=(file,)), found.base, CPU)
    few = write(tmp_path / "few.jsonl", [{"text": "a good book"}] * 3)
    with pytest.raises(Misconfigured, match=r"few\.jsonl: of its 3 rows"):
        load(replace(found.wanted, keep=few), found.base, CPU)
    with pytest.raises(Misconfigured, match="texts that must stay are for the objective causal-lm"):
        Learning("a.b:c", keep=few)
    for drift in (0.0, -1.0, math.nan):
        with pytest.raises(Misconfigured, match="write a number over 0"):
            Learning("a.b:c", drift=drift)


def test_coefficients_leave_what_is_predicted_of_texts(tmp_path: Path) -> None:
    place = placed(tmp_path, "causal-lm", "tsv-m", "0.5")
    answers = [
        {"prompt": f"the {thing} is {word}", "text": f"the {thing} was not {word}"}
        for thing in ("film", "book")
        for word in ("good", "bad", "very good", "very bad", "a film", "a book")
    ]
    rows = write(tmp_path / "answers.jsonl", answers)
    free = Learning("causal-lm", (rows,), calibration={"batch": 12}, candidates=5, drift=math.inf, dry_run=True)
    kept = replace(free, drift=1.0)
    with place.open() as merge:
        found = merge.tune_layers(free)
        assert found.entry.drift is None
        assert all(trial.drift is None for trial in found.entry.trials)
        near = merge.tune_layers(kept)
        assert near.entry.drift == 1.0
        drifts = [trial.drift or 0.0 for trial in near.entry.trials]
        assert drifts[0] == pytest.approx(0.0, abs=1e-6)
        assert 0 < max(drifts[1:]) < 1.0
        assert near.before == pytest.approx(found.before, rel=1e-5), "the rows that judge say what they said"
        again = merge.tune_layers(kept)
        assert [(t.score, t.loss, t.drift) for t in again.entry.trials] == [
            (t.score, t.loss, t.drift) for t in near.entry.trials
        ]
        nowhere = merge.tune_layers(replace(kept, drift=min(drifts[1:]) / 100, dry_run=False))
        assert nowhere.commit is None, "each went too far, however good it is for the rows that judge"
        assert max(trial.score for trial in nowhere.entry.trials) > nowhere.before
        texts = write(tmp_path / "texts.jsonl", [{"text": row["prompt"]} for row in answers])
        named = merge.tune_layers(replace(kept, keep=texts, models=True))
        assert named.entry.drift == 1.0
        assert max(trial.drift or 0.0 for trial in named.entry.trials) > 0
    argv = ["tune", "--what", "layers", "--rows", rows, "--objective", "causal-lm", "--state", place.state]
    body = machine(*argv, "--candidates", 3, "--keep", texts, "--drift", 0.5, "--dry-run")
    assert body["drift"] == 0.5
    assert body["evaluation"]["keep"]["name"] == "texts.jsonl"
    assert len([trial["drift"] for trial in body["trials"]]) == 3
    done = run(*argv, "--candidates", 3)
    assert done.returncode == 0, done.stderr
    assert "of 0.02 that may be" in done.stdout or "within a drift of 0.02 nats a token" in done.stdout
    bare = run(*argv[:4], tmp_path / "rows.jsonl", *argv[5:], "--candidates", 3, "--dry-run")
    assert "the rows have no prompts, so nothing says what must stay" in bare.stderr
    assert "nothing says what must stay" not in done.stderr
    wrong = run(*argv[:1], *argv[3:], "--drift", 1)
    assert wrong.returncode == 2
    assert "--keep and --drift are for --what layers" in wrong.stderr
