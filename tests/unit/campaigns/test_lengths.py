"""What the default's length costs, on answers whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.bench.quality import figures
from tests.campaigns.bench.quality.lengths import Cell, Law, Merged, cells, fitted, page
from tests.campaigns.bench.quality.results import Key, Results

EACH = [(2.0, 1.0)] * 4


def answers(right: int) -> str:
    """Twenty rows, of which every second half is right alike."""
    return "1" * right + "0" * (20 - right)


def one(best: float, each: list[tuple[float, float]] = EACH) -> Merged:
    """Accuracy falls by a quarter with every factor two from the best multiple."""
    steps = {0.25: -2, 0.5: -1, 1.0: 0, 2.0: 1, 4.0: 2}
    return Merged(each, {m: {"a": answers(20 - 5 * abs(s - steps[best]))} for m, s in steps.items()})


def saved(folder: Path, suite: str, best: float) -> figures.Table:
    """The results of one suite in which this multiple is the best."""
    results = Results(folder / f"{suite}-full.jsonl")
    results.add(Key(0, "base", 4, "paper"), test={task: answers(2) for task in "abcd"})
    for multiple, asked in one(best).asked.items():
        read = "default" if multiple == 1.0 else f"spread:{multiple!r}"
        more = {"each": EACH} if read == "default" else {}
        told = dict.fromkeys("abcd", asked["a"])
        results.add(Key(0, "tsv-m", 4, read), scale=f"spread:{multiple!r}", factor=1.0, test=told, **more)
    results.close()
    return figures.load(results.file)


def test_a_law_follows_spread_norm_and_number() -> None:
    assert Law().length(EACH) == pytest.approx(2.0**1.5)
    assert Law(2.0, 1.0, 0.5).length([(3.0, 2.0)] * 16) == pytest.approx(2 * 3 * 2 * 2)
    assert Law().length([*EACH, (2.0, 100.0)]) == pytest.approx(2.0**1.5 * (4 + 1.5) / 5), "an odd one is held"


def test_accuracy_is_a_smooth_curve_over_the_logarithm_between_what_was_asked() -> None:
    merged = one(2.0)
    assert merged.at(2.0) == 100.0
    assert merged.at(0.5**0.5) == pytest.approx(62.5), "a line where its neighbours lie on one"
    assert merged.at(2.0**0.5) == pytest.approx(87.5 + 25 / 8), "the top has no slope"
    nearly = Merged(EACH, {0.5: {"a": answers(11)}, 1.0: {"a": answers(14)}, 2.0: {"a": answers(13)}})
    assert nearly.at(1.2) > 70.0, "the top may lie between two"
    assert merged.at(64.0) == merged.at(4.0) == 75.0
    assert merged.under(Law(1.0, 2.5)) == pytest.approx(100.0), "ρ of 2 and a power more make it twice as long"


def test_what_is_tuned_is_judged_on_rows_that_did_not_choose(tmp_path: Path) -> None:
    (cell,) = cells([saved(tmp_path, "digits", 2.0)])
    centre, low, high = cell.gap()
    assert centre == pytest.approx(-25.0)
    assert low < centre < high
    lucky = Merged(EACH, {1.0: {"a": "1" * 10 + "0" * 10}, 2.0: {"a": "10" * 10}})
    gap = Cell(cell.table, 1, [lucky]).gap()[0]
    assert gap == pytest.approx(25.0), "right in the even rows alone: what they choose loses in the odd"


def test_what_is_fitted_has_not_seen_the_suite_that_is_left_out(tmp_path: Path) -> None:
    found = list(cells([saved(tmp_path, "digits", 2.0), saved(tmp_path, "text", 1.0)]))
    assert fitted(found[:1], (1.5,), (0.0,)).c == 2.0
    assert fitted(found[1:], (1.5,), (0.0,)).c == 1.0
    told = "\n".join(page(found))
    assert "| digits | c | 1.00·ρ^1.5 | +0.0 | +0.0 |" in told
    assert "| text | c | 2.00·ρ^1.5 | +25.0 | +25.0 |" in told
