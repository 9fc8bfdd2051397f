"""Commands that only look at a state load none of the packages that take long to load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

STATES = Path(__file__).parents[1] / "data"
HEAVY = ("torch", "zarr", "transformers", "safetensors", "huggingface_hub")
COMMANDS = (
    "status",
    "status --json",
    "log",
    "log -n 0 --json",
    "show 1",
    "tag",
    "scale",
    "pool",
    "why nothing",
    "verify",
    "repair --dry-run",
    "pause",
    "resume",
    "tag here --at 1",
    "scale 0.5",
    "rules",
    "rules tsv-m",
    "run --help",
    "--version",
)
RUN = """
import contextlib, io, json, sys
from continual.cli.main import main
commands, states, heavy = json.loads(sys.argv[1])
for state, command in [(state, command) for state in states for command in commands]:
    words = command.split()
    alone = words[0] in ("rules", "run") or words[0].startswith("-")
    sys.argv = ["continual", *words, *([] if alone else ["--state", state])]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
    print(json.dumps([command, code, [name for name in heavy if name in sys.modules]]))
"""


def test_commands_that_look_load_nothing_heavy(tmp_path: Path) -> None:
    """In one process, of whole tensors and of adapters: what one of them loaded would show in all that follow."""
    states = [str(shutil.copytree(STATES / form, tmp_path / form)) for form in ("state-format-1", "state-format-3")]
    asked = json.dumps([COMMANDS, states, HEAVY])
    done = subprocess.run([sys.executable, "-c", RUN, asked], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(command, loaded) for command, _, loaded in told] == [(command, []) for command in COMMANDS] * len(states)
    assert {command for command, code, _ in told if code != 0} == {"why nothing"}


def test_a_status_at_rest_loads_neither_what_folds_nor_what_serves(tmp_path: Path) -> None:
    state = str(shutil.copytree(STATES / "state-format-1", tmp_path / "state"))
    heavy = ("starlette", "prometheus_client", "watchdog", "continual.engine.engine", "continual.publish.folder")
    inner = (
        "continual.gates",
        "continual.tensors",
        "continual.hub",
        "continual.selection.round",
        "continual.tuning.choosing",
    )
    asked = json.dumps([["status", "status --json"], [state], [*HEAVY, *heavy, *inner]])
    done = subprocess.run([sys.executable, "-c", RUN, asked], capture_output=True, text=True, check=True)
    assert [json.loads(line)[1:] for line in done.stdout.splitlines()] == [[0, []]] * 2
