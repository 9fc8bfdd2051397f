"""The figures of the quality benchmark, on answers whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from continual.demo.digits import Digits as Model
from continual.making import DEFAULT
from tests.campaigns.bench.quality import digits, drawing, figures, report, report_language, sections
from tests.campaigns.bench.quality.campaign import order_of
from tests.campaigns.bench.quality.digits import WAYS, Digits
from tests.campaigns.bench.quality.results import Key, Results
from tests.campaigns.bench.quality.suite import fine_tune

TASKS = ("a", "b", "c", "d", "e")
COSTS = [{"cpu": 0.5, "peak": 2e8, "state": 1e6}] * len(TASKS)


def answers(right: int, of: int = 10) -> str:
    return "1" * right + "0" * (of - right)


@pytest.fixture
def table(tmp_path: Path) -> figures.Table:
    """Two orders of five tasks: one rule without an order (asked about all tasks once), one with."""
    results = Results(tmp_path / "digits-full.jsonl")
    results.add(Key(0, "base", 5, "paper"), test={task: answers(2) for task in TASKS})
    results.add(Key(0, "own", 5, "paper"), test={task: answers(10) for task in TASKS})
    for order in (0, 1):
        tasks = TASKS if order == 0 else TASKS[::-1]
        for rule, score in ((DEFAULT, 8), ("opcm", 6)):
            for count in (2, 4, 5):
                if order and rule == DEFAULT and count == 5:
                    continue
                right = score + (count == 2)  # a point of ten is lost once more are merged
                for read in ("paper", "default", "tuned"):
                    results.add(
                        Key(order, rule, count, read),
                        scale="1.0",
                        factor=1.0,
                        test={t: answers(right) for t in tasks[:count]},
                        costs=COSTS,
                    )
    results.close()
    return figures.load(results.file)


def test_accuracies_are_means_over_tasks_and_orders(table: figures.Table) -> None:
    assert table.accuracy(DEFAULT, 4) == (80.0, 0.0)
    assert table.accuracy(DEFAULT, 5) == (80.0, 0.0), "asked once, counted for both orders"
    assert table.accuracy("base", 4, "paper") == (20.0, 0.0)
    assert table.accuracy("gram", 4) is None
    assert table.transfer(DEFAULT) == pytest.approx(-5.0), "two tasks of four were first seen at 90 %, two at 80 %"


def test_differences_are_paired(table: figures.Table) -> None:
    centre, low, high = table.difference((DEFAULT, "default"), ("opcm", "paper"), 4) or (0.0, 0.0, 0.0)
    assert centre == pytest.approx(20.0)
    assert 0.0 < low < 20.0 < high
    same = table.difference((DEFAULT, "default"), (DEFAULT, "tuned"), 4)
    assert same == (0.0, 0.0, 0.0), "the same answers differ by nothing, however rows are drawn"
    assert table.difference((DEFAULT, "default"), ("gram", "default"), 4) is None


@pytest.mark.slow
def test_adapters_of_digits_share_a_frozen_first_factor_where_their_form_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "STEPS", {"lora": 2, "shared": 2, "seeded": 2})
    digits.save(Model().state_dict(), tmp_path / "base")  # nobody is asked, so it has learned nothing
    suite = Digits(tmp_path)
    found = {
        (form, task): load_file(fine_tune(suite, task, form) / "adapter_model.safetensors")
        for form in ("lora", "shared", "seeded")
        for task in suite.tasks[:2]
    }
    names = [name for name in found["lora", suite.tasks[0]] if "lora_A" in name]
    one, other = (found["shared", task] for task in suite.tasks[:2])
    assert names
    assert all(torch.equal(one[name], other[name]) for name in names)
    assert not any(torch.equal(one[name], other[name]) for name in one if name not in names), "both learned"
    for form, near in (("lora", False), ("seeded", True)):
        one, other = (found[form, task] for task in suite.tasks[:2])
        assert not any(torch.equal(one[name], other[name]) for name in names)
        assert all(torch.allclose(one[name], other[name], atol=0.02) is near for name in names), "they began alike"


def test_results_are_not_made_twice_and_survive_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "digits-full.jsonl"
    first = Results(file)
    first.add(Key(0, "opcm", 2, "paper"), test={"a": "10"})
    with pytest.raises(SystemExit, match="another run writes it"):
        Results(file)
    first.close()
    with file.open("a") as out:
        out.write('{"order": 0, "rule"')  # a kill cut it off
    again = Results(file)
    assert again.known == {Key(0, "opcm", 2, "paper")}
    again.add(Key(0, "opcm", 4, "paper"), test={"a": "11"})
    assert [json.loads(line)["test"] for line in file.read_text().splitlines()] == [{"a": "10"}, {"a": "11"}]
    again.close()


def test_orders_are_shuffles_that_do_not_change() -> None:
    assert sorted(order_of(list(WAYS), 1)) == sorted(WAYS)
    assert order_of(list(WAYS), 1) == order_of(list(WAYS), 1) != order_of(list(WAYS), 2)


def test_the_page_has_every_rule_and_what_decides(table: figures.Table) -> None:
    page = sections.written("", list(report.page([table])))
    assert f"**{DEFAULT}**" in page
    assert "opcm as its paper ships it" in page
    assert "+20.0 [" in page
    assert f"| {DEFAULT} | digits | 0.50 | 200 | 1 |" in page


def test_the_page_of_a_language_model_says_what_broke(tmp_path: Path) -> None:
    results = Results(tmp_path / "language-lora-kept.jsonl")
    whole = {"perplexity": 30.0, "facts": 1.0}
    results.add(Key(0, "base", 2, "paper"), test={"a": answers(2), "b": answers(4)}, watched=whole)
    each = {"a": {"watched": {"perplexity": 40.0, "facts": 1.0}}, "b": {"watched": {"perplexity": 32.0, "facts": 0.5}}}
    results.add(Key(0, "own", 2, "paper"), test={"a": answers(10), "b": answers(9)}, each=each)
    for rule, read, right, perplexity in (
        ("task-arithmetic", "default", 6, 35.0),
        ("task-arithmetic", "sum", 8, 50.0),
        ("iso-c", "default", 6, 31.0),
        ("iso-c", "spread:0.5", 9, 31.0),
        ("tsv-even", "default", 5, 32.0),
        ("opcm", "paper", 4, 33.0),
    ):
        found = {"perplexity": perplexity, "facts": 0.75}
        test = {"a": answers(right), "b": answers(right)}
        results.add(Key(0, rule, 2, read), scale="1.0", factor=1.0, test=test, watched=found)
    results.add(Key(0, "tsv-even", 2, "alone"), test={"a": answers(10), "b": answers(8)}, apart=1e-7)
    results.add(Key(1, "tsv-even", 1, "default"), scale="1.0", factor=1.0, test={"a": answers(9)}, watched=whole)
    results.close()
    table = figures.load(results.file)
    page = sections.written("", list(report_language.page([table])))
    assert "## LoRA adapters in a state of adapters, up to 2" in page
    _, promised, alone, _, shown, compared = page.rstrip("\n").split("\n\n")
    assert promised.split("\n")[2:] == [  # a scale that was named is no best without data
        "| LoRA adapters, 1 of 2 | tsv-even | 90.0 | none other asked |  |  | 30.0 (42.0) | 100 % |",
        "| LoRA adapters, 2 of 2 | tsv-even | 50.0 | task-arithmetic, sum | -30.0 [-50.0, -10.0] | "
        "+10.0 [+0.0, +25.0] | 32.0 (42.0) | 75 % |",
    ]
    assert alone.split("\n")[2:] == ["| LoRA adapters, mean of 2 | tsv-even | 90.0 | 95.0 | 1.0e-07 |"]
    assert shown.split("\n")[2:] == [
        "| base |  | 20.0 (30.0, 100 %) | 30.0 (30.0, 100 %) |",
        "| each model, own task |  | 100.0 (36.0, 75 %) | 95.0 (36.0, 75 %) |",
        "| iso-c | spread:0.5 |  | 90.0 (31.0, 75 %) |",
        "| task-arithmetic | sum |  | 80.0 (50.0, 75 %) |",
        "| iso-c | default |  | 60.0 (31.0, 75 %) |",
        "| task-arithmetic | default |  | 60.0 (35.0, 75 %) |",
        "| **tsv-even** | default | 90.0 (30.0, 100 %) | 50.0 (32.0, 75 %) |",
        "| opcm | paper |  | 40.0 (33.0, 75 %) |",
    ]
    assert compared.split("\n")[3].startswith("| task-arithmetic | sum |  | +30.0 [+")
    assert len(compared.split("\n")) == 7, "and not the default by itself"
    report.write(tmp_path, tmp_path)
    whole_page = f"# Merge quality on a language model, measured\n\n{page}"
    assert (tmp_path / "quality-language.md").read_text() == whole_page
    assert not (tmp_path / "quality.md").exists(), "of which there are no results"


def test_a_suite_that_was_not_tuned_is_shown_by_rule_and_way_of_reading(tmp_path: Path) -> None:
    results = Results(tmp_path / "text8-lora-kept.jsonl")
    tasks = ("a", "b", "c")
    results.add(Key(0, "base", 3, "paper"), test={task: answers(2) for task in tasks})
    results.add(Key(0, "own", 3, "paper"), test={task: answers(10) for task in tasks})
    for order, count, rule, read, right in (
        (0, 2, "tsv-even", "default", 7),
        (1, 2, "tsv-even", "default", 9),
        (0, 2, "opcm", "paper", 5),
        (0, 3, "tsv-even", "default", 6),
        (0, 3, "iso-c", "default", 7),
        (0, 3, "opcm", "paper", 5),
        (1, 3, "opcm", "paper", 3),
    ):
        test = {task: answers(right) for task in tasks[:count]}
        results.add(Key(order, rule, count, read), scale="1.0", factor=1.0, test=test, costs=COSTS)
    results.close()
    page = sections.written("", list(report.page([figures.load(results.file)])))
    assert "## text, LoRA adapters in a state of adapters, 3 tasks" in page
    assert "| rule | read | 2 models (2 orders) | 3 models (2 orders) |" in page
    assert "| **tsv-even** | default | 80.0 | 60.0 |" in page, "no order changes what all of them make"
    assert "| opcm | paper | 1 order: 50.0 | 40.0 |" in page
    name = "| text: LoRA adapters in a state of adapters, 3 of 3 (2 orders)"
    assert f"{name} | tsv-even | 60.0 | iso-c, default | -10.0 [" in page
    assert "Around the default's number" not in page, "as nothing was tuned"


def test_a_cell_says_that_it_was_asked_in_fewer_orders(table: figures.Table) -> None:
    assert report_language.head(table, 4) == "4 models (2 orders)"
    assert table.asked(DEFAULT, 5, "default") == [0]
    assert report_language.orders(table, 5) == 2, "opcm's"


def test_the_plot_is_of_the_tables_of_the_page(table: figures.Table) -> None:
    (panel,) = drawing.panels(sections.written("", list(report.page([table]))))
    assert panel.title == "digits, full fine-tunes, 5 tasks"
    assert panel.line(DEFAULT, "default") == [(4, 80.0), (5, 80.0)]
    assert panel.line("base", "paper") == [(4, 20.0), (5, 20.0)]
    assert panel.line("gram", "default") == []


PAGE = """# Results

By hand.

## one

Why: by hand.

| a | b |
|---|---|
| old | 1 |

```
# no heading
```

| c | d |
|---|---|
| by hand | 2 |

## All

| suite | right |
|---|---|
| other | 3 |
| **this** | 4 |

## How to run it
"""


def test_what_is_written_by_hand_and_by_other_runs_stays_on_the_page() -> None:
    head, line = "| suite | right |", "|---|---|"
    made = [
        sections.Section("new", [["| x |", "|---|", "| 5 |"]]),
        sections.Section("one", [["| a | b | c |", "|---|---|---|", "| fresh | 6 | 7 |"]]),
        sections.Section("All", [[head, line, "| this | 8 |", "| another | 9 |"]], keys=1),
    ]
    page = sections.written(PAGE, made)
    one = "## one\n\nWhy: by hand.\n\n| a | b | c |\n|---|---|---|\n| fresh | 6 | 7 |\n\n```\n# no heading\n```\n"
    all_of = f"## All\n\n{head}\n{line}\n| other | 3 |\n| this | 8 |\n| another | 9 |\n"
    kept = "| c | d |\n|---|---|\n| by hand | 2 |\n"
    begin = "# Results\n\nBy hand.\n\n## new\n\n| x |\n|---|\n| 5 |\n"
    assert page == "\n".join((begin, one, kept, all_of, "## How to run it\n"))
    assert sections.written(page, made) == page, "the same again changes nothing"
    other = [sections.Section("All", [["| suite | wrong |", line]], keys=1)]
    with pytest.raises(SystemExit, match="All: the table that is there has other columns"):
        sections.written(page, other)


def test_the_plot_of_this_repository_has_every_table_and_the_default() -> None:
    folder = Path(__file__).parents[3] / "ops" / "docs"
    told = (folder / "quality.svg").read_text()
    titles = [panel.title for panel in drawing.panels((folder / "quality.md").read_text())]
    assert len(titles) > 2
    missing = [text for text in (*titles, f"{DEFAULT} (default)") if f"<!-- {text} -->" not in told]
    assert not missing, "python -m tests.campaigns.bench.quality.drawing ops/docs"
