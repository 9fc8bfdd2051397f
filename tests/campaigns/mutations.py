"""Mutation campaign: does a test fail when a line of the rooms that hold the promises is wrong?

    python -m tests.campaigns.mutations --work W --sample 400 --seed 0

It copies the repository into W, lets mutmut (https://mutmut.readthedocs.io) make mutants of every function of the rooms
`state`, `engine`, `rules` and `gates`, draws a sample of them with the seed, the same share of each room, and runs for
each drawn mutant the tests that reach its function. A mutant is caught when a test fails, when a test does not end, or
when mypy refuses the mutated line: these are the parts of `ops/check`. What is not caught has survived.

The first call in W runs the tests once to learn which test reaches which function (a quarter of an hour on two cores);
a later call with a larger sample, or after new tests, goes on from there. `--again NAME` runs single mutants again.
The report is W/report.json and, for people, W/report.md: a row for each room, and each survivor with its change.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("state", "engine", "rules", "gates")
TESTS = ("tests/unit", "tests/property", "tests/integration", "tests/faults")
LEFT_OUT = (  # they read the source as text, start processes that see no mutant, or need other programs
    "tests/unit/test_layers.py",
    "tests/unit/test_house.py",
    "tests/unit/test_pages.py",
    "tests/unit/campaigns",
    "tests/integration/test_readme.py",
    "tests/integration/test_demo.py",
    "tests/integration/test_ops.py",
    "tests/integration/test_hub_server.py",
    "tests/integration/test_olah.py",
    "tests/integration/test_daemon.py",
    "tests/integration/test_hub_release_daemon.py",
    "tests/integration/test_round_daemon.py",
    "tests/faults/test_hub_chaos.py",
    "tests/faults/test_kills.py",
    "tests/faults/test_round_kills.py",
    "tests/faults/test_order.py::test_every_durable_write_of_the_package_is_in_the_table",
    "tests/faults/test_order.py::test_nobody_else_syncs_or_renames",
)
CAUGHT = ("killed", "timeout", "segfault", "suspicious", "caught by type check")
SETTINGS = """

[tool.mutmut]
source_paths = ["continual"]
only_mutate = [{rooms}]
also_copy = ["ops", "state", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"]
pytest_add_cli_args_test_selection = [{tests}]
pytest_add_cli_args = ["-p", "no:cacheprovider", "--hypothesis-profile=mutations", {left_out}]
type_check_command = ["{python}", "-m", "tests.campaigns.mutant_types", "mypy"]
process_isolation = "forkserver"
use_git_change_detection = false
track_dependencies = false
use_setproctitle = false
timeout_multiplier = 5.0
timeout_constant = 20.0
"""


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one mutant: its name, the room of its function, and mutmut's word for it."""

    name: str
    room: str
    word: str

    @property
    def caught(self) -> bool:
        """Whether `ops/check` would have failed."""
        return self.word in CAUGHT


def copy(work: Path, rooms: list[str], tests: list[str]) -> Path:
    """Copies the files of this repository as they are now to `work`/tree, and adds the settings of mutmut."""
    tree = work / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    tracked = {name for name in listed if name and (ROOT / name).is_file()}
    for name in sorted(tracked):
        new, old = ROOT / name, tree / name
        if (
            not old.exists() or new.read_bytes() != old.read_bytes()
        ):  # what did not change keeps its time, and its mutants
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(new, old)
    for old in [path for path in tree.rglob("*") if path.is_file()]:
        name = str(old.relative_to(tree))
        if name not in tracked and not name.startswith(("mutants/", ".")) and "__pycache__" not in name:
            old.unlink()
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(
            SETTINGS.format(
                python=sys.executable,
                rooms=", ".join(f'"continual/{room}/*"' for room in rooms),
                tests=", ".join(f'"{path}"' for path in tests),
                left_out=", ".join(f'"--{"deselect" if "::" in path else "ignore"}={path}"' for path in LEFT_OUT),
            )
        )
    return tree


def mutmut(tree: Path, *names: str, jobs: int = 2) -> int:
    """Runs mutmut on the mutants of these names; its exit code."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.pop("PYTHONPATH", None)  # the mutated copy is what is imported
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(jobs), *names]
    return subprocess.run(command, cwd=tree, env=env, check=False).returncode


def fates(tree: Path) -> list[Fate]:
    """Every mutant there is, in the order of names, as mutmut left it."""
    os.chdir(tree)  # mutmut looks for its settings where it is run, at import
    from mutmut.stats import status_by_exit_code

    found = []
    for file in sorted((tree / "mutants" / "continual").rglob("*.meta")):
        room = file.relative_to(tree / "mutants" / "continual").parts[0]
        codes = json.loads(file.read_text())["exit_code_by_key"]
        found += [Fate(name, room, status_by_exit_code[code]) for name, code in sorted(codes.items())]
    return found


def draw(mutants: list[Fate], share: float, seed: int) -> list[Fate]:
    """The same share of each room's mutants; a larger share with the same seed holds every mutant of a smaller one."""
    drawn: list[Fate] = []
    for room in sorted({mutant.room for mutant in mutants}):
        mine = [mutant for mutant in mutants if mutant.room == room]
        random.Random(f"{seed} {room}").shuffle(mine)
        drawn += mine[: max(1, round(share * len(mine)))]
    return drawn


def change(tree: Path, name: str) -> str:
    """The lines that a mutant takes out and puts in."""
    command = [str(Path(sys.executable).with_name("mutmut")), "show", name]
    shown = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False).stdout
    return "\n".join(line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def report(work: Path, tree: Path, sample: list[Fate], total: Counter[str]) -> float:
    """Writes report.json and report.md into `work`; returns the share that was caught."""
    lines = [
        "| room | mutants | drawn | caught | of these by mypy | survived | score |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for room in [*sorted(total), "all"]:
        mine = [mutant for mutant in sample if room in (mutant.room, "all")]
        caught = sum(mutant.caught for mutant in mine)
        typed = sum(mutant.word == "caught by type check" for mutant in mine)
        many = total.total() if room == "all" else total[room]
        score = f"{100 * caught / len(mine):.1f} %" if mine else "-"
        lines.append(f"| {room} | {many} | {len(mine)} | {caught} | {typed} | {len(mine) - caught} | {score} |")
    survivors = {mutant.name: change(tree, mutant.name) for mutant in sample if not mutant.caught}
    for mutant in sample:
        if not mutant.caught:
            lines += ["", f"{mutant.name}: {mutant.word}", "```", survivors[mutant.name], "```"]
    (work / "report.md").write_text("\n".join(lines) + "\n")
    rows = [asdict(mutant) | {"change": survivors.get(mutant.name)} for mutant in sample]
    (work / "report.json").write_text(json.dumps(rows, indent=1))
    return sum(mutant.caught for mutant in sample) / len(sample)


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.mutations", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the copy, the results and the report")
    parser.add_argument("--rooms", default=",".join(ROOMS), help="rooms of continual/, with commas between them")
    parser.add_argument("--sample", type=int, default=400, help="mutants to run; 0: all of them (many hours)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument(
        "--again", nargs="*", default=None, help="run these mutants again, or every survivor of the sample"
    )
    parser.add_argument("--tests", default=",".join(TESTS), help="files and folders of tests, with commas between them")
    asked = parser.parse_args()
    work = asked.work.absolute()
    tree = copy(work, asked.rooms.split(","), asked.tests.split(","))
    if asked.again is None:
        mutmut(tree, "no mutant has this name", jobs=asked.jobs)  # makes the mutants and learns which test reaches them
    mutants = fates(tree)
    share = asked.sample / len(mutants) if asked.sample else 1.0
    drawn = draw(mutants, share, asked.seed)
    names = [mutant.name for mutant in drawn if mutant.word == "not checked"]
    if asked.again is not None:
        names = asked.again or [mutant.name for mutant in drawn if not mutant.caught]
    if names:
        mutmut(tree, *names, jobs=asked.jobs)
    now = {mutant.name: mutant for mutant in fates(tree)}
    sample = [now[mutant.name] for mutant in drawn]
    score = report(work, tree, sample, Counter(mutant.room for mutant in mutants))
    print(f"{len(sample)} of {len(mutants)} mutants, {100 * score:.1f} % caught: {work / 'report.md'}")


if __name__ == "__main__":
    main()
