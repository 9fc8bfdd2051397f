"""What the default's length costs, on answers whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.campaigns.bench.quality import figures
from tests.campaigns.bench.quality.lengths import (
    HEADING,
    Cell,
    Law,
    Merged,
    cells,
    fitted,
    gap,
    laws,
    page,
    together,
    told,
)
from tests.campaigns.bench.quality.results import Key, Results
from tests.campaigns.bench.quality.sections import Section, written

EACH = [(1.5, 1.0)] * 4


def answers(right: int) -> str:
    """Twenty rows, of which every second half is right alike."""
    return "1" * right + "0" * (20 - right)


STEPS = {0.25: -2, 0.5: -1, 1.0: 0, 2.0: 1, 4.0: 2}


def right(best: float) -> dict[float, int]:
    """Of twenty rows, by multiple: a quarter is lost with every factor two from the best."""
    return {m: 20 - 5 * abs(s - STEPS[best]) for m, s in STEPS.items()}


def one(best: float, each: list[tuple[float, float]] = EACH) -> Merged:
    return Merged(each, {m: 5.0 * found for m, found in right(best).items()})


def saved(folder: Path, suite: str, best: float) -> figures.Table:
    """The results of one suite in which this multiple is the best."""
    folder.mkdir(exist_ok=True)
    results = Results(folder / f"{suite}-full.jsonl")
    results.add(Key(0, "base", 4, "paper"), test={task: answers(2) for task in "abcd"})
    for multiple, found in right(best).items():
        scale = f"spread:{multiple!r}"
        read = "default" if multiple == 1.0 else scale
        more = {"each": EACH} if read == "default" else {}
        told = dict.fromkeys("abcd", answers(found))
        results.add(Key(0, "tsv-flow", 4, read), scale=scale, factor=1.0, test=told, **more)
    published = dict.fromkeys("abcd", answers(1))
    results.add(Key(0, "tsv-flow", 4, "paper"), scale="number:1.0", factor=1.0, test=published)
    results.close()
    return figures.load(results.file)


def test_a_law_follows_spread_norm_and_number() -> None:
    assert Law().length(EACH) == pytest.approx(1.5**1.5)
    assert Law(2.0, 1.0, 0.5).length([(3.0, 2.0)] * 16) == pytest.approx(2 * 3 * 2 * 2)
    assert Law().length([*EACH, (1.5, 100.0)]) == pytest.approx(1.5**1.5 * (4 + 1.5) / 5), "an odd one is held"
    assert Law(2.0).length([(9.0, 1.0)] * 16) == 2 * 8.0, "as spread holds them"


def test_accuracy_is_a_smooth_curve_over_the_logarithm_between_what_was_asked() -> None:
    merged = one(2.0)
    assert merged.at(2.0) == 100.0
    assert merged.at(0.5**0.5) == pytest.approx(62.5), "a line where its neighbours lie on one"
    assert merged.at(2.0**0.5) == pytest.approx(87.5 + 25 / 8), "the top has no slope"
    nearly = Merged(EACH, {0.5: 55.0, 1.0: 70.0, 2.0: 65.0})
    assert nearly.at(1.2) > 70.0, "the top may lie between two"
    assert merged.at(64.0) == merged.at(4.0) == 75.0
    twice = one(2.0, [(2.0, 1.0)] * 16).under(Law(1.0, 2.5))
    assert twice == pytest.approx(100.0), "ρ of 2 and a power more make it twice as long"


def test_what_is_tuned_is_judged_on_rows_that_did_not_choose(tmp_path: Path) -> None:
    (cell,) = cells([saved(tmp_path, "digits", 2.0)])
    assert cell.gap.startswith("-25.0 [")
    tuned = [{m: {"a": answers(found)} for m, found in right(2.0).items()}]
    centre, low, high = gap(tuned)
    assert centre == pytest.approx(-25.0)
    assert low < centre < high
    lucky = {1.0: {"a": "1" * 10 + "0" * 10}, 2.0: {"a": "10" * 10}}
    assert gap([lucky])[0] == pytest.approx(25.0), "right in the even rows alone: what they choose loses in the odd"


def test_what_is_fitted_has_not_seen_the_suite_that_is_left_out(tmp_path: Path) -> None:
    found = list(cells([saved(tmp_path, "digits", 2.0), saved(tmp_path, "text", 1.0)]))
    assert fitted(found[:1], (1.5,), (0.0,)).c == 2.0
    assert fitted(found[1:], (1.5,), (0.0,)).c == 1.0
    said = "\n".join(laws(found))
    assert "| tsv-flow | digits | c | 1.00·ρ^1.5 | +0.0 | +0.0 |" in said
    assert "| tsv-flow | text | c | 2.00·ρ^1.5 | +25.0 | +25.0 |" in said
    apart = "\n".join(laws([found[0], replace(found[1], rule="tsv-m")]))
    assert "| tsv-flow | none | c | 2.00·ρ^1.5 |" in apart, "each rule has a law of its own"
    assert "| tsv-m | none | c | 1.00·ρ^1.5 |" in apart


def test_cells_of_other_runs_are_taken_from_the_page(tmp_path: Path) -> None:
    found = list(cells([saved(tmp_path, "digits", 2.0), saved(tmp_path, "text", 1.0)]))
    before = written(f"# Page\n\n## {HEADING}\n\nBy hand.\n\n## Next\n", [Section(HEADING, tables(found))])
    again = list(told(before))
    assert [cell.name for cell in again] == [cell.name for cell in found]
    assert tables(again) == tables(found), "what is on the page says as much as the results"
    (better,) = cells([saved(tmp_path / "new", "text", 2.0)])
    assert together([better], again) == [again[0], better], "what was asked again takes the place of what was there"


def tables(found: list[Cell]) -> list[list[str]]:
    return [list(table) for table in page(found)]
