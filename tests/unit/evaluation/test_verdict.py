"""Pass, fail or inconclusive: of metrics, of rows of right and wrong, and of rows of real numbers."""

from __future__ import annotations

import math
import random

import pytest

from continual.config.evaluating import EvaluationSettings
from continual.evaluation.scores import Metric
from continual.evaluation.verdict import Answers, Verdict, decide, quantile
from continual.state.parts import Evaluated

ROWS = (1.0,) * 60 + (0.0,) * 40


def wrong(count: int) -> tuple[float, ...]:
    """`ROWS` with so many fewer right."""
    return (0.0,) * count + ROWS[count:]


def moved(by: float, spread: float, rows: int = 100) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Probabilities of rows before and after, of which the mean falls by just `by`, with a standard deviation of
    `spread`."""
    draw = random.Random(0)
    apart = [draw.gauss(0, 1) for _ in range(rows)]
    middle = math.fsum(apart) / rows
    length = math.sqrt(math.fsum((one - middle) ** 2 for one in apart) / (rows - 1))
    before = tuple(draw.uniform(0.3, 0.9) for _ in range(rows))
    return before, tuple(p - by - spread * (one - middle) / length for p, one in zip(before, apart, strict=True))


def asked(before: Metric, after: Metric, *, less: bool = False, **settings: object) -> Verdict:
    lower = frozenset(["a"] if less else [])
    return decide(
        Answers({"a": after}, lower), Answers({"a": before}, lower), None, EvaluationSettings.model_validate(settings)
    )


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        (0.8, 0.795, "pass"),
        (0.8, 0.78, "fail"),
        (0.8, 0.9, "pass"),
        (ROWS, ROWS, "pass"),  # a fall of two points is not seen in 100 rows 13 times of 100
        (ROWS[:90], ROWS[:90], "inconclusive"),  # in 90 rows 16 times
        (ROWS, wrong(2), "inconclusive"),
        (ROWS, wrong(8), "fail"),
        (ROWS * 10, ROWS * 10, "pass"),
        (ROWS[:1], ROWS[-1:], "fail"),  # of one row nothing is known of chance
        (ROWS, ROWS[:99], "fail"),  # a row that it does not answer is not left out of the mean
        (ROWS, 0.6, "fail"),
        (0.6, ROWS, "fail"),
        ((100.0,) * 60 + (0.0,) * 40, (100.0,) * 60 + (0.0,) * 40, "inconclusive"),  # percents, max_drop is a 100th
        ((100.0,) * 5, (100.0,) * 5, "inconclusive"),
        ((0.0, 0.5, 1.0) * 3, (0.0, 0.5, 1.0) * 3, "inconclusive"),  # marks: nine rows that stay say little
        ((0.0, 0.5, 1.0) * 40, (0.0, 0.5, 1.0) * 40, "pass"),
        ((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4), "pass"),
        ((0.5,) * 100, (0.5,) * 100, "pass"),  # real numbers that do not move
        (*moved(0.0, 0.03), "pass"),
        (*moved(0.02, 0.03), "fail"),
        (*moved(0.02, 0.3), "inconclusive"),
        (*moved(0.009, 0.03), "pass"),  # it falls for sure, and less than it may
        (*moved(-0.05, 0.03), "pass"),
        (*moved(0.2, 0.3), "fail"),
    ],
)
def test_what_is_said_of_a_metric(before: Metric, after: Metric, word: str) -> None:
    assert asked(before, after).word == word


def test_rows_that_all_stay_right_or_wrong_hide_what_the_rule_of_three_says() -> None:
    """Of n rows without a difference a fall of f is hidden with a probability of (1 - f)^n."""
    for miss in (0.05, 0.1, 0.15):
        least = math.log(miss) / math.log(1 - 0.02)
        for rows, word in ((0.9 * least, "inconclusive"), (1.1 * least, "pass")):
            before = (1.0, 0.0) * (int(rows) // 2)
            assert asked(before, before, miss=miss).word == word, (miss, rows)


def test_less_of_a_loss_is_better() -> None:
    assert asked(2.0, 1.0, less=True).word == "pass"
    found = asked(2.0, 2.1, less=True)
    assert (found.word, found.failed[0].drop) == ("fail", pytest.approx(0.1))


def test_limits_are_for_all_metrics_or_by_name() -> None:
    before, after = Answers({"en.acc": 0.5, "fr.acc": 0.5}), Answers({"en.acc": 0.45, "fr.acc": 0.45})

    def failed(**settings: object) -> list[str]:
        found = decide(after, before, before, EvaluationSettings.model_validate(settings))
        return [f"{drop.name} {drop.beside}" for drop in found.failed]

    now = "the merge in force"
    assert failed() == [f"en.acc {now}", f"fr.acc {now}"]
    assert failed(max_drop=0.1) == []
    assert failed(max_drop={"en.*": 0.1}) == [f"fr.acc {now}"]
    assert failed(max_drop={"*": 0.1}, max_drop_base={"fr.acc": 0.02}) == ["fr.acc the base"]
    assert failed(max_drop=0.1, min=0.4) == []
    assert failed(max_drop=0.1, min={"en.acc": 0.46}) == ["en.acc the limit"]
    assert failed(max_drop=0.1, min={"de.acc": 0.46}) == ["de.acc the limit"], "a metric that is not there"


def test_a_metric_that_is_missing_has_failed() -> None:
    found = decide(Answers({"b": 1.0}), Answers({"a": 0.5}), None, EvaluationSettings())
    assert [str(drop) for drop in found.failed] == ["a is missing"]
    assert decide(Answers({"a": 0.5, "new": 0.1}), Answers({"a": 0.5}), None, EvaluationSettings()).word == "pass"


def fold_of(before: float | None, after: float, verdict: str = "pass") -> Evaluated:
    return Evaluated({"a": after}, None if before is None else {"a": before}, verdict=verdict)


def test_a_fall_in_small_steps_is_seen_beside_the_best() -> None:
    """Each step is less than a fold may lower it by."""
    past: list[Evaluated] = [fold_of(None, 0.5), fold_of(0.5, 0.8)]
    wanted = EvaluationSettings(max_drop_best=0.03)
    words = []
    for step in range(1, 6):
        before, after = 0.8 - 0.008 * (step - 1), 0.8 - 0.008 * step
        now, then = Answers({"a": before}), Answers({"a": after})
        assert decide(then, now, None, EvaluationSettings(), past=past).word == "pass"
        found = decide(then, now, None, wanted, past=past)
        words.append(found.word)
        past.append(fold_of(before, after))
    assert words == ["pass", "pass", "pass", "fail", "fail"]
    said = "a is worse by 0.04 than the best of the merges before (evaluation.max_drop_best = 0.03)"
    assert str(found.failed[0]) == said
    assert decide(Answers({"a": 0.79}), Answers({"a": 0.76}), None, wanted, past=past).word == "pass", "it is better"
    past[-1] = fold_of(0.768, 0.76, "fail")  # a person accepted it
    assert decide(Answers({"a": 0.755}), Answers({"a": 0.76}), None, wanted, past=past).word == "pass"
    by_name = EvaluationSettings(max_drop_best={"b": 0.03})
    assert decide(Answers({"a": 0.755}), Answers({"a": 0.76}), None, by_name, past=past[:-1]).word == "pass"


def test_a_loss_that_grows_in_small_steps() -> None:
    past = [Evaluated({"a": 2.0 + 0.1 * step}, {"a": 1.9 + 0.1 * step}, verdict="pass") for step in range(5)]
    now, then = Answers({"a": 2.4}, frozenset("a")), Answers({"a": 2.45}, frozenset("a"))
    settings = EvaluationSettings(max_drop=0.1, max_drop_best=0.3)
    (drop,) = decide(then, now, None, settings, past=past).failed
    assert drop.drop == pytest.approx(0.55)


def test_more_metrics_and_looks_ask_for_more() -> None:
    before, after = moved(0.02, 0.09)  # 2.2 standard errors
    now, then = Answers({"a": before}), Answers({"a": after})
    assert decide(then, now, None, EvaluationSettings()).word == "fail"
    assert decide(then, now, None, EvaluationSettings(), looks=4).word == "inconclusive"
    names = [f"t{number}" for number in range(8)]
    still = dict.fromkeys(names, before)
    found = decide(Answers({"a": after} | still), Answers({"a": before} | still), None, EvaluationSettings())
    assert [drop.name for drop in found.unclear] == ["a"]


@pytest.mark.parametrize(
    ("rows", "chance", "known"),
    [(10, 0.05, 1.8331), (30, 0.001, 3.3962), (100, 0.05 / 24, 2.9334), (1000, 0.25, 0.6747)],
)
def test_quantiles_are_those_of_students_t(rows: int, chance: float, known: float) -> None:
    assert quantile(chance, rows) == pytest.approx(known, rel=0.002)


def test_one_thing_is_asked() -> None:
    for given in ({"command": ["x", "{model}"], "lm_eval": ["t"]}, {"rows": ["a.jsonl"]}, {"lm_eval_args": ["-x"]}):
        with pytest.raises(ValueError, match="name"):
            EvaluationSettings.model_validate(given)
