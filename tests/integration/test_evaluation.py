"""A command that is asked about the merge before a fold is committed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

import continual
from continual import api
from continual.config import Settings
from continual.errors import Abandoned, Misconfigured, Retry
from continual.state.entries import FoldEntry
from tests.helpers import adapters, models, running, services
from tests.helpers.mounting import mounted

pytestmark = pytest.mark.slow

ASK = """
import array, json, pathlib, sys
model = pathlib.Path(sys.argv[1])
data = (model / "model.safetensors").read_bytes()
end = 8 + int.from_bytes(data[:8], "little")
start, stop = json.loads(data[8:end])["model.norm.weight"]["data_offsets"]
with open(sys.argv[2], "a") as asked:
    print(model, file=asked)
values = array.array("f", data[end + start : end + stop])
value = sum(values) / len(values)
if value > 5:
    sys.exit("cannot run this")
print("some words before")
print(json.dumps({"score": {"task": value}} if value > -5 else {}))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.base(tmp_path / "base")


def moved(base: Path, name: str, by: float) -> Path:
    """A fine-tune that moves what the command looks at."""

    def change(tensors: dict[str, object]) -> None:
        tensors["model.norm.weight"] = load_file(base / "model.safetensors")["model.norm.weight"] + by

    return models.fine_tune(base, base.parent / name, len(name), change=change)  # type: ignore[arg-type]


def opened(
    place: Path, base: Path, more: Mapping[str, object] | None = None, *, width: int | None = None, **evaluation: object
) -> api.Merge:
    (place / "ask.py").write_text(ASK)
    command = [sys.executable, "-S", str(place / "ask.py"), "{model}", str(place / "asked")]
    if not (place / "state").exists():
        continual.init(base, place / "state", continual.Recipe(rule="task-arithmetic", scale="1", width=width))
    odd = {"copies": {"act": "off"}}  # what moves one norm alone is like all others that do
    given = {"state": place / "state", "max_base_ratio": 1e9, "max_mean_ratio": 1e9, "gates": odd} | dict(more or {})
    return api.Merge(Settings.model_validate(given | {"evaluation": {"command": command} | evaluation}), write=True)


def asked(place: Path) -> int:
    return len((place / "asked").read_text().splitlines())


def test_a_fold_that_makes_it_worse_is_refused_and_changes_nothing(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base) as merge:
        outcome = merge.fold(moved(base, "good", 0.1))
        assert outcome.fate == "folded", outcome.message
        evaluated = outcome.commit.of_kind(FoldEntry).numbers.evaluated
        assert evaluated is not None
        assert evaluated.after["score.task"] - (evaluated.before or {})["score.task"] == pytest.approx(0.1, abs=1e-3)
        assert asked(tmp_path) == 2, "the base, and the merge"
        before = merge.read("model.norm.weight")
        outcome = merge.fold(moved(base, "bad", -0.2))
        assert (outcome.fate, outcome.reason) == ("refused", "evaluation")
        assert "score.task is worse by 0.2" in outcome.message
        assert "evaluation.max_drop = 0.01" in outcome.message
        assert merge.read("model.norm.weight").equal(before)
        assert asked(tmp_path) == 3, "the merge in force was asked when it was folded"
        assert merge.fold(moved(base, "fair", 0.0)).fate == "folded"
    assert continual.verify(tmp_path / "state").findings == ()
    assert [child.name for child in (tmp_path / "state" / "generations").iterdir() if child.name[0] != "."] != []


def test_in_a_new_process_the_merge_in_force_is_asked_again(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base) as merge:
        merge.fold(moved(base, "good", 0.1))
    with opened(tmp_path, base) as merge:
        stages: list[str] = []
        outcome = merge.fold(moved(base, "bad", -0.05), progress=lambda stage, *_: stages.append(stage))
        assert (outcome.reason, stages[-1]) == ("evaluation", "evaluate")
    assert asked(tmp_path) == 4


def test_an_accepted_one_is_folded_with_a_warning(tmp_path: Path, base: Path) -> None:
    bad = moved(base, "bad", -0.2)
    with opened(tmp_path, base) as merge:
        assert merge.fold(bad).reason == "evaluation"
        merge.retry("bad", because="the task is retired", by="alice")
        outcome = merge.fold(bad)
        assert (outcome.fate, "warning (evaluation)" in outcome.line()) == ("folded", True)


@pytest.mark.parametrize(("by", "said"), [(100.0, "exit code 1"), (-100.0, "no metric")])
def test_a_command_that_fails_on_the_new_merge_refuses_it(tmp_path: Path, base: Path, by: float, said: str) -> None:
    with opened(tmp_path, base) as merge:
        outcome = merge.fold(moved(base, "odd", by))
        assert (outcome.reason, said in outcome.message) == ("evaluation", True), outcome.message


def test_a_command_that_cannot_be_asked_settles_nothing(tmp_path: Path, base: Path) -> None:
    tuned = moved(base, "good", 0.1)
    with opened(tmp_path, base, command=["/no/such/program", "{model}"]) as merge, pytest.raises(Misconfigured):
        merge.fold(tuned)
    slow = [sys.executable, "-c", "import time; time.sleep(60)", "{model}"]
    with opened(tmp_path, base, command=slow, timeout=0.2) as merge:
        with pytest.raises(Retry, match="not done after"):
            merge.fold(tuned)
        assert merge.state.ledger.head.seq == 0
    with opened(tmp_path, base) as merge:
        assert merge.fold(tuned).fate == "folded"


def test_rows_that_may_be_chance(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rows.py").write_text(
        "import json, pathlib, sys\n"
        "first = 'base' in sys.argv[1]\n"
        "print(json.dumps({'a': [1.0, 1.0, 0.0, 0.0] if first else [0.0, 0.0, 1.0, 0.0]}))\n"
    )
    command = [sys.executable, str(tmp_path / "rows.py"), "{model}"]
    tuned = moved(base, "tuned", 0.1)
    with opened(tmp_path, base, command=command) as merge:
        outcome = merge.fold(tuned)
        assert (outcome.reason, "whether that is chance" in outcome.message) == ("unclear", True)
        merge.retry("tuned")
    with opened(tmp_path, base, command=command, inconclusive="fold") as merge:
        assert merge.fold(tuned).fate == "folded"


FILE = 'sys.argv[2].partition("=")[2]'
COUNTED = f"""
import json, pathlib, sys
rows = pathlib.Path({FILE}).read_text().split()
print(sys.argv[1], file=open(sys.argv[3], "a"))
print(json.dumps(dict(a=[float(row) for row in rows])))
"""


@pytest.mark.parametrize("named", [True, False])
def test_rows_that_are_changed_while_it_runs(tmp_path: Path, base: Path, named: bool) -> None:
    """What was said of the merge in force by other rows is asked again: where the command names their file, and where
    there are more rows now or fewer."""
    rows = tmp_path / "rows"
    (tmp_path / "counted.py").write_text(COUNTED if named else COUNTED.replace(FILE, repr(str(rows))))
    rows.write_text("0.5 0.6 0.7 0.8")
    command = [sys.executable, "-S", str(tmp_path / "counted.py"), "{model}", f"--rows={rows if named else 'x'}"]
    with opened(tmp_path, base, command=[*command, str(tmp_path / "asked")]) as merge:
        assert merge.fold(moved(base, "first", 0.1)).fate == "folded"
        assert asked(tmp_path) == 2
        rows.write_text("0.1 0.2 0.3 0.4" if named else "0.1 0.2 0.3 0.4 0.5")
        outcome = merge.fold(moved(base, "second", 0.2))
        assert outcome.fate == "folded", outcome.message
        assert asked(tmp_path) == 4
        assert merge.fold(moved(base, "third", 0.3)).fate == "folded"
        assert asked(tmp_path) == 5


def test_rows_that_are_changed_while_they_are_asked_settle_nothing(tmp_path: Path, base: Path) -> None:
    program = tmp_path / "program.py"
    edited = "open(sys.argv[0], 'a').write('#')"
    program.write_text(f"import sys; 'base' in sys.argv[1] or {edited}; print('{{\"a\": 0.5}}')")
    with opened(tmp_path, base, command=[sys.executable, str(program), "{model}"]) as merge:
        with pytest.raises(Retry, match="first: what the evaluation asks by was changed"):
            merge.fold(moved(base, "first", 0.1))
        assert merge.head == 0


def test_one_that_does_not_answer_a_row_is_refused(tmp_path: Path, base: Path) -> None:
    command = printing("import sys; print('{\"a\": [1, 0, 1, 1]}' if 'base' in sys.argv[1] else '{\"a\": [1, 1, 1]}')")
    with opened(tmp_path, base, command=command) as merge:
        outcome = merge.fold(moved(base, "first", 0.1))
        assert outcome.reason == "evaluation"
        assert "a has 3 rows, and that of the merge in force has 4 rows" in outcome.message


def test_ten_small_steps_down_are_seen_beside_the_best(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base, max_drop_best=0.025) as merge:
        for step in range(3):
            assert merge.fold(moved(base, "step" + "s" * step, -0.008)).fate == "folded"
        outcome = merge.fold(moved(base, "one-too-many", -0.008))
        assert (outcome.reason, "than the best of the merges before" in outcome.message) == ("evaluation", True)
        merge.state.rollback(1)
        assert merge.fold(moved(base, "another-step", -0.008)).fate == "folded"


def printing(what: str) -> list[str]:
    return [sys.executable, "-S", "-c", what, "{model}"]


def test_what_makes_no_statement_on_the_model_refuses_nobody(tmp_path: Path, base: Path) -> None:
    """A directory that is not there, a command that names no model, a metric that no command prints."""
    tuned, said = moved(base, "good", 0.1), printing("print('{\"loss\": 1}')")
    for evaluation, words in (
        ({"directory": tmp_path / "none"}, "evaluation.directory = .*none: no such directory"),
        ({"command": said, "lower": ["los"]}, "no metric los; there is loss"),
        ({"command": ["/no/such/program", "{model}"]}, "evaluation.command, asked about the base: .*cannot be started"),
        ({"command": ["eval.py"]}, "write {model}"),
    ):
        with opened(tmp_path, base, **evaluation) as merge:
            with pytest.raises(Misconfigured, match=words):
                merge.fold(tuned)
            assert merge.head == 0


def test_a_command_that_is_gone_when_the_merge_with_it_is_asked_refuses_nobody(tmp_path: Path, base: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport os\nprint('{{\"a\": 1}}')\nos.unlink({str(program)!r})\n")
    program.chmod(0o755)
    with opened(tmp_path, base, command=[str(program), "{model}"]) as merge:
        with pytest.raises(Misconfigured, match=r"asked about the merge with good: .*cannot be started"):
            merge.fold(moved(base, "good", 0.1))
        assert merge.head == 0


def test_a_merge_that_is_read_otherwise_is_asked_again(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base) as merge:
        merge.fold(moved(base, "good", 1.0))
        merge.rescale("0.1")
        outcome = merge.fold(moved(base, "fair", 0.0))
        assert outcome.fate == "folded", outcome.message
        evaluated = outcome.commit.of_kind(FoldEntry).numbers.evaluated
        assert evaluated is not None
        assert evaluated.before is not None
        assert evaluated.before["score.task"] == pytest.approx(evaluated.after["score.task"], abs=0.01)
    assert asked(tmp_path) == 4, "the base, the merge, the merge read otherwise, the next"


def test_another_evaluation_looks_again_at_whom_it_refused(tmp_path: Path, base: Path) -> None:
    bad = moved(base, "bad", -0.2)
    with opened(tmp_path, base) as merge:
        outcome = merge.fold(bad)
        assert outcome.reason == "evaluation"
        assert "continual quarantine accept bad --because" in outcome.line()
        assert merge.fold(bad).fate == "known"
    with opened(tmp_path, base, timeout=50.0) as merge:
        assert merge.fold(bad).fate == "known"
    with opened(tmp_path, base, max_drop=0.5) as merge:
        assert merge.fold(bad).fate == "folded"


def test_a_long_last_line_is_read_whole(tmp_path: Path, base: Path) -> None:
    command = printing("print('{\"a\": [' + '0.123456789, ' * 50_000 + '1]}')")
    with opened(tmp_path, base, command=command) as merge:
        evaluated = merge.fold(moved(base, "good", 0.1)).commit.of_kind(FoldEntry).numbers.evaluated
    assert evaluated is not None
    assert evaluated.after["a"] == pytest.approx(0.12347, abs=1e-4)


def test_a_command_that_fails_on_a_full_disk_refuses_nobody(tmp_path: Path, base: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    filling = printing(f"import sys; 'base' in sys.argv[1] or open({str(disk / 'full')!r}, 'wb').write(bytes(1 << 22))")
    filling[3] += "; print('{\"a\": 1}')"
    small = mounted(disk, "-t", "tmpfs", "-o", "size=2M", "tmpfs")
    with small, opened(tmp_path, base, command=filling, directory=disk) as merge:
        with pytest.raises(Retry, match=r"exit code \d+, and the disk of .* is full"):
            merge.fold(moved(base, "good", 0.1))
        assert merge.head == 0


def test_a_stop_ends_the_command(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base, command=printing("import time; time.sleep(600)")) as merge:
        threading.Timer(0.3, merge.give_up).start()
        with pytest.raises(Abandoned, match="continual is stopping"):
            merge.fold(moved(base, "good", 0.1))
        assert merge.head == 0


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path, base: Path) -> None:
    where = tmp_path / "models"
    where.mkdir()
    with opened(tmp_path, base, directory=where) as merge:
        merge.fold(moved(base, "first", 0.1))
    killed = (
        "import os, sys, pathlib; from continual import api\n"
        "with api.open(sys.argv[1], write=True, evaluation={'command': [sys.executable, '-S', '-c', "
        "'import os; os.kill(os.getppid(), 9)', '{model}'], 'directory': sys.argv[3]}) as merge:\n"
        "    merge.fold(sys.argv[2])\n"
    )
    tuned = moved(base, "good", 0.1)
    ended = subprocess.run([sys.executable, "-c", killed, tmp_path / "state", tuned, where], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(where.iterdir())) == 1
    with opened(tmp_path, base, directory=where) as merge:
        assert merge.fold(tuned).fate == "folded"
    assert list(where.iterdir()) == []
    assert continual.verify(tmp_path / "state").findings == ()


def test_a_state_of_adapters_is_asked_too(tmp_path: Path, base: Path) -> None:
    with opened(tmp_path, base, width=32) as merge:
        outcome = merge.fold(adapters.lora(tmp_path / "lora", base, 1, modules=("up_proj",)))
        assert outcome.fate == "folded", outcome.message
        assert outcome.commit.of_kind(FoldEntry).numbers.evaluated is not None
    assert asked(tmp_path) == 2


def test_its_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="max_drop"):
        Settings.model_validate({"evaluation": {"max_drop": -1}})
    assert json.loads(Settings().model_dump_json())["evaluation"]["command"] == []


def test_a_command_is_asked_for_more_rows(tmp_path: Path, base: Path) -> None:
    """Of 50 rows half a point is not known; of 100 and 200 neither, of all 400 it is."""
    (tmp_path / "rows.py").write_text(
        "import json, pathlib, random, sys\n"
        "first, draw, noise = 'base' in sys.argv[1], random.Random(0), random.Random(7)\n"
        "values = [draw.random() + (0 if first else noise.gauss(0, 0.2)) for _ in range(int(sys.argv[2]))]\n"
        "print(sys.argv[2], file=open(sys.argv[3], 'a'))\n"
        "print(json.dumps({'a': values}))\n"
    )
    command = [sys.executable, str(tmp_path / "rows.py"), "{model}", "{rows}", str(tmp_path / "asked")]
    with opened(tmp_path, base, command=command, first_rows=50, max_rows=400) as merge:
        outcome = merge.fold(moved(base, "tuned", 0.1))
        assert outcome.fate == "folded", outcome.message
        evaluated = outcome.commit.of_kind(FoldEntry).numbers.evaluated
        assert evaluated is not None
        rows = evaluated.rows or 0
    wanted = [50, 100, 200, 400]
    assert (tmp_path / "asked").read_text().split() == [str(n) for n in wanted if n <= rows for _ in range(2)]
    assert rows > 50


WAITING = """
import json, pathlib, sys, time
place = pathlib.Path(sys.argv[2])
(place / "waiting").write_text(sys.argv[1])
while not (place / "go").exists():
    time.sleep(0.02)
print(json.dumps({"a": 0.5}))
"""


def waiting(place: Path) -> list[str]:
    (place / "waits.py").write_text(WAITING)
    return [sys.executable, str(place / "waits.py"), "{model}", str(place)]


def test_web_and_sources_go_on_meanwhile(tmp_path: Path, base: Path) -> None:
    (tmp_path / "watched").mkdir()
    given = {"watch": (tmp_path / "watched",), "settle": 0.2, "rescan": 0.2}
    with opened(tmp_path, base, given, command=waiting(tmp_path)) as merge:
        daemon = running.made(merge)

        def visit(address: str) -> None:
            moved(base, "first", 0.1).rename(tmp_path / "watched" / "first")
            services.until(lambda: (tmp_path / "waiting").exists(), "the command was started")
            moved(base, "second", 0.2).rename(tmp_path / "watched" / "second")
            services.until(lambda: services.status(address)["queue"], "the second waits")
            assert services.status(address)["current"]["model"] == "first"
            (tmp_path / "go").touch()
            services.until(lambda: services.status(address)["head"] == 2, "both are folded")

        running.until(daemon, visit)
    assert asked_folds(tmp_path) == 2


def asked_folds(place: Path) -> int:
    with continual.open(place / "state") as merge:
        return len(merge.state.ledger.folds())
