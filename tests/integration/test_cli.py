"""The command: exit codes, machine output, what each message says, help for all, and its cost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.core import TyperGroup

from continual.cli.main import app
from tests.helpers import models, stores
from tests.helpers.command import machine, parsers, process, run
from tests.helpers.pages import DOCS

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    base = models.base(tmp_path / "base")
    assert run("init", base, "--rule", "opcm", "-o", "alpha=0.4", "--state", tmp_path / "state").returncode == 0
    return base, tmp_path / "state"


def test_a_day_with_the_command(tmp_path: Path, place: tuple[Path, Path]) -> None:
    base, state = place
    good = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    bad = models.fine_tune(base, tmp_path / "bad", 9, change=lambda t: t["model.norm.weight"].fill_(float("nan")))
    plans = machine("plan", *good, "--state", state)
    assert [p["ok"] for p in plans] == [True] * 3
    done = process("fold", good[0], bad, good[1], "--state", state, "--json")
    assert done.returncode == 1, done.stderr
    assert [t["fate"] for t in json.loads(done.stdout)] == ["folded", "refused", "folded"]
    again = run("fold", good[0], "--state", state)
    assert (again.returncode, "already settled" in again.stdout) == (0, True)
    assert run("fold", bad, "--state", state).returncode == 1
    records = machine("log", "--state", state)
    assert [r["kind"] for r in records] == ["init", "fold", "refuse", "fold"]
    assert machine("show", 1, "--state", state)["candidate"]["name"] == "ft-0"
    assert run("tag", "first", "--at", 1, "--state", state).returncode == 0
    assert machine("tag", "--state", state) == {"first": 1}
    dry = machine("rollback", 1, "--dry-run", "--state", state)
    assert [c["seq"] for c in dry["undone"]] == [3]
    assert machine("rollback", "first", "--dry-run", "--state", state) == dry
    assert run("rollback", "first", "--yes", "--state", state).returncode == 0
    assert machine("status", "--state", state)["folds"] == 1
    (line,) = [line for line in run("status", "--state", state).stdout.splitlines() if line.startswith("rule ")]
    assert line.startswith("rule       opcm (alpha=0.4, variant=block), scale "), line
    assert run("retry", "ft-1", "--state", state).returncode == 0
    assert machine("fold", good[1], "--state", state)[0]["fate"] == "folded"
    assert Path(
        machine("export", tmp_path / "out", "--at", 1, "--dtype", "bf16", "--state", state)["directory"]
    ).is_dir()
    assert machine("verify", "--state", state) == {"ok": True, "findings": [], "strays": []}
    assert "ft-2" not in run("log", "--state", state).stdout
    assert "first" in run("tag", "--state", state).stdout
    (state / "HEAD").write_text("nothing\n")
    for command in ("status", "log", "verify", "export"):
        told = run(command, *([tmp_path / "o"] if command == "export" else []), "--state", state)
        assert (told.returncode, told.stderr.count("'continual repair --dry-run' says what is whole")) == (4, 1)


@pytest.mark.parametrize("command", ["fold", "plan"])
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("size.most=1", "gates.size: no such gate; known are own-release, policy, updates, assembly, lineage"),
        ("norms.most=1", "gates.norms.most: unknown; the settings of this gate are: act"),
        ("lineage.vocab=common-rows", "gates.lineage.vocab: vocab is a setting of that name; set it there"),
    ],
)
def test_a_setting_of_a_gate_reaches_the_gates(
    tmp_path: Path, place: tuple[Path, Path], command: str, flag: str, words: str
) -> None:
    base, state = place
    done = run(command, models.fine_tune(base, tmp_path / "ft", 1), "--gate", flag, "--state", state)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_damage_is_found_and_named(tmp_path: Path, place: tuple[Path, Path]) -> None:
    base, state = place
    assert run("fold", models.fine_tune(base, tmp_path / "ft", 1), "--state", state).returncode == 0
    chunk = max((p for p in (state / "generations").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[7] ^= 4
    chunk.write_bytes(data)
    told = process("verify", "--state", state)
    assert (told.returncode, told.stdout[:18]) == (4, "damaged: 1 finding")
    assert chunk.name in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("log", "--state", "{tmp}/none"), 2, ("none", "continual init")),
        (("init", "{tmp}/none", "--state", "{tmp}/s"), 2, ("none", "no such directory")),
        (("init", "{tmp}/base", "--rule", "best", "--state", "{tmp}/s"), 2, ("best", "opcm")),
        (("init", "{tmp}/base", "--rule", "opcm", "-o", "alhpa=1", "--state", "{tmp}/s"), 2, ("alhpa", "alpha")),
        (("init", "{tmp}/base", "-o", "alpha", "--state", "{tmp}/s"), 2, ("key=value",)),
        (("init", "{tmp}/base", "--scale", "big", "--state", "{tmp}/s"), 2, ("big", "norm")),
        (("init", "{tmp}/base", "--state", "{tmp}/state"), 2, ("state",)),
        (("show", "99", "--state", "{tmp}/state"), 2, ("99",)),
        (("rollback", "99", "--yes", "--state", "{tmp}/state"), 2, ("99",)),
        (("rollback", "nobody", "--yes", "--state", "{tmp}/state"), 2, ("nobody", "continual tag")),
        (("retry", "nobody", "--state", "{tmp}/state"), 2, ("nobody",)),
        (("export", "{tmp}/base", "--state", "{tmp}/state"), 2, ("exists",)),
        (("export", "{tmp}/o", "--dtype", "int4", "--state", "{tmp}/state"), 2, ("int4",)),
        (("run", "--state", "{tmp}/state"), 2, ("--watch",)),
        (("run", "--state", "{tmp}/state", "--watch", "{tmp}/nowhere"), 2, ("nowhere",)),
        (("fold", "{tmp}/nowhere", "--state", "{tmp}/state"), 2, ("nowhere",)),
    ],
)
def test_wrong_input_says_what_to_do(
    tmp_path: Path, place: tuple[Path, Path], arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    assert place[1].is_dir()
    alone = process if arguments[0] == "run" else run
    done = alone(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_settings_from_the_environment_and_unknown_ones(place: tuple[Path, Path]) -> None:
    assert run("log", env={"CONTINUAL_STATE": str(place[1])}).returncode == 0
    done = run("log", "--state", place[1], env={"CONTINUAL_KEPE": "1"})
    assert (done.returncode, "CONTINUAL_KEPE" in done.stderr) == (2, True)


def test_a_writer_while_another_writes_exits_with_its_pid(tmp_path: Path, place: tuple[Path, Path]) -> None:
    from continual import api

    with api.open(place[1], write=True):
        done = process("fold", models.fine_tune(place[0], tmp_path / "ft", 1), "--state", place[1])
        assert done.returncode == 5
        assert str(os.getpid()) in done.stderr
        assert run("log", "--state", place[1]).returncode == 0


def commands(group: Any, path: tuple[str, ...] = ("continual",)) -> dict[str, str]:
    """Every command below a group, by its words, and the help it has."""
    found = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            found |= commands(command, (*path, name))
            if not command.invoke_without_command:
                continue
        found[" ".join((*path, name))] = command.help or ""
    return found


def test_every_command_has_help_and_a_line_in_the_reference() -> None:
    found = commands(parsers(app))
    assert len(found) > 20
    table = re.findall(r"^\| `(continual(?: [a-z][a-z-]*)+)", (DOCS / "commands.md").read_text(), re.MULTILINE)
    assert sorted(row.strip() for row in table) == sorted(found)
    assert [name for name, help_ in found.items() if not help_] == []


def test_help_and_completion_are_cheap() -> None:
    """Imports only: CPU time of a child, with torch and zarr left alone. The bar is 0.3 s; what is asserted is that
    nothing heavy is imported."""
    code = (
        "import sys, continual.cli.main; print([m for m in ('torch', 'zarr', 'numpy', 'pydantic', 'rich', "
        "'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert process("--help").returncode == 0
    asked = {**os.environ, "_CONTINUAL_COMPLETE": "complete_bash", "COMP_WORDS": "continual ro", "COMP_CWORD": "1"}
    completed = subprocess.run(
        [Path(sys.executable).parent / "continual"], capture_output=True, text=True, check=False, env=asked
    )
    assert "rollback" in completed.stdout


@pytest.mark.parametrize("command", ["status", "log"])
def test_a_look_at_a_state_loads_nothing_for_numbers(tmp_path: Path, command: str) -> None:
    stores.make(tmp_path / "s").close()
    code = (
        "import atexit, sys, continual.cli.main; atexit.register(lambda: print([m for m in ('torch', 'zarr', 'numpy') "
        "if m in sys.modules], file=sys.stderr)); continual.cli.main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--state", str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_rules_are_listed() -> None:
    found = json.loads(run("rules", "--json").stdout)
    listed = found["rules"]
    assert [t["name"] for t in found["transforms"]] == ["trim", "drop", "breadcrumbs"]
    assert {"name": "opcm", "order_free": False, "unfold": False}.items() <= next(
        r for r in listed if r["name"] == "opcm"
    ).items()
    table = run("rules").stdout
    assert all(r["name"] in table and r["summary"] in table for r in listed)
    assert "A state of one of gram, flow is read by each of them." in table
    for name, wanted in (("gram", "ridge=0.1"), ("drop", "rate=0.9")):
        told = run("rules", name)
        assert all(part in told.stdout for part in (wanted, "paper", "options")), told
        assert [row["name"] for rows in json.loads(run("rules", name, "--json").stdout).values() for row in rows] == [
            name
        ]
    assert "no rule of that name" in run("rules", "grams").stderr


def test_adapter_with_a_huge_alpha_is_refused(tmp_path: Path, place: tuple[Path, Path]) -> None:
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1e6, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    done = machine("fold", adapter, "--state", place[1], code=1)
    assert done[0]["reason"] == "norm-base"


def test_unfold_combine_and_scale_from_the_command(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    settings = tmp_path / "continual.toml"
    settings.write_text('rule = "mean"\nbefore = ["drop:rate=0.5"]\n')
    for place in ("one", "two"):
        assert run("init", base, "--state", tmp_path / place, "--config", settings).returncode == 0
    tuned = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    one, two = ("--state", tmp_path / "one"), ("--state", tmp_path / "two")
    assert run("fold", tuned[0], tuned[1], *one, "--weight", "2").returncode == 0
    assert run("fold", tuned[2], *two).returncode == 0
    assert [c["candidate"]["name"] for c in machine("combine", tmp_path / "two", *one, "--dry-run")["added"]] == [
        "ft-2"
    ]
    assert "Added as record 3: 1 model of" in run("combine", tmp_path / "two", *one).stdout
    assert run("combine", tmp_path / "two", *one).returncode == 2
    dry = run("unfold", "ft-0", *one, "--dry-run")
    assert "ft-0 (record 1) is read once more and subtracted" in dry.stdout
    assert run("unfold", "ft-0", *one).returncode == 0
    assert run("unfold", "ft-0", *one).returncode == 2
    assert [r["kind"] for r in machine("log", *one)] == ["init", "fold", "fold", "combine", "unfold"]
    assert "unfolded" in run("log", *one).stdout
    assert run("scale", *one).stdout == "scale 1.0\n"
    assert machine("scale", "norm:2", "--lines", "0.5:0.5", *one) == {
        "policy": "norm",
        "value": 2.0,
        "lines": [0.5, 0.5],
    }
    assert machine("status", *one)["scale"] == "norm:2.0, lines 0.5:0.5"
    assert run("scale", "loud", *one).returncode == 2
    assert run("fold", tuned[0], *one, env={"CONTINUAL_RULE": "opcm"}).returncode == 2


def test_rollback_undoes_what_a_dry_run_says_after_combine(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    tuned = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    one, two = ("--state", tmp_path / "one"), ("--state", tmp_path / "two")
    for state, fine_tunes in ((one, tuned[:1]), (two, tuned[1:])):
        assert run("init", base, "--rule", "mean", *state).returncode == 0
        assert run("fold", *fine_tunes, *state).returncode == 0
    assert run("combine", tmp_path / "two", *one).returncode == 0
    assert run("unfold", "ft-1", *one).returncode == 0
    assert run("rollback", 2, "--yes", *one).returncode == 0, "back to the record that combined them"
    for to, names in ((3, ["ft-1"]), (1, ["ft-1", "ft-2"]), (0, ["ft-0", "ft-1", "ft-2"]), (2, [])):
        dry = machine("rollback", to, "--dry-run", *one)
        assert [c["candidate"]["name"] for c in dry["undone"]] == names
        done = machine("rollback", to, "--yes", *one)
        assert done["undone"] == dry["undone"]
        assert machine("show", done["record"], *one)["numbers"] == {"to": to, "undone": len(names)}
        assert run("rollback", 2, "--yes", *one).returncode == 0


def test_unfold_shows_its_cost_where_others_are_folded_again(tmp_path: Path, place: tuple[Path, Path]) -> None:
    base, state = place
    tuned = [models.fine_tune(base, tmp_path / f"ft-{i}", i) for i in range(3)]
    assert run("fold", *tuned, "--state", state).returncode == 0
    plan = machine("unfold", "ft-1", "--state", state, "--dry-run")["plan"]
    assert (plan["exact"], plan["start"], [m["name"] for m in plan["again"]]) == (False, 1, ["ft-2"])
    assert plan["read_bytes"] > 0
    done = run("unfold", "ft-1", "--yes", "--state", state)
    assert "1 later model will be folded again on the merge of record 1" in done.stdout
    assert machine("status", "--state", state)["folds"] == 2
