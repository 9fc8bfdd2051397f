"""Commands on a state of adapters over a quantised base, alone and beside a running daemon: each does the same, none
needs the base."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from continual import api, making
from continual.cli import main
from continual.engine.views import ReadView
from continual.publish.lora import LoraTarget
from continual.service.control import parley
from continual.state import State
from tests.helpers import adapters, models, packing
from tests.helpers.command import Done, run
from tests.helpers.services import LIMIT, daemon, until, url

pytestmark = pytest.mark.slow


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state of three adapters, the third of which does not leave room for all, and another of one; the base is gone
    since."""
    base = models.base(tmp_path / "base")
    packed = packing.packed(base, tmp_path / "packed", "gptq")
    for name, numbers in (("state", (0, 1, 2)), ("other", (3,))):
        making.init(packed, tmp_path / name, making.Recipe(width=8))
        with api.open(tmp_path / name, write=True) as merge:
            for number in numbers:
                assert merge.fold(adapters.lora(tmp_path / f"lora-{number}", base, number)).fate == "folded"
    shutil.rmtree(packed)
    shutil.rmtree(base)
    yield tmp_path / "state"
    assert api.verify(tmp_path / "state").findings == ()


def names(state: Path) -> list[str]:
    with State.open(state) as opened:
        return [fold.entry.candidate.name for fold in opened.ledger.folds()]


def even(done: Done, state: Path) -> Done:
    """What was printed, without what differs from one run to the next."""

    def of(text: str) -> str:
        text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text.replace(str(state), "STATE"))
        text = re.sub(r"in \d+\.\d s", "in N s", text)
        return re.sub(r'"(generation|crc|prev)": "?\w+"?|\b[0-9a-f]{16}\b', "ID", text)

    return Done(done.returncode, of(done.stdout), of(done.stderr))


LINES = (
    ("unfold", "lora-1", "--dry-run"),
    ("unfold", "lora-1", "--yes"),
    ("rollback", "3", "--yes", "--json"),
    ("unfold", "lora-0", "--yes", "--json"),
    ("tag", "first", "--json"),
    ("scale", "norm:2"),
    ("scale", "--rule", "mean", "--json"),
    ("pool", "round"),
    ("release",),
    ("rollback", "99", "--yes"),
)


def test_each_does_the_same_beside_a_daemon_as_alone(tmp_path: Path, state: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(state, alone)
    (tmp_path / "in").mkdir()
    with daemon(state, tmp_path / "in") as process:
        url(process, state)
        until((state / parley.NAME).exists, "the socket is there")
        for words in LINES:
            beside = even(run(*words, "--state", state), state)
            assert beside == even(run(*words, "--state", alone), alone), words
            assert beside.returncode in (0, 2), beside.stderr
        shutil.move(tmp_path / "lora-3", tmp_path / "in/lora-3")
        until(lambda: "lora-3" in names(state), "it is folded")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    assert names(state) == ["lora-1", "lora-2", "lora-3"]


def test_combined_copied_damaged_and_repaired(tmp_path: Path, state: Path) -> None:
    def done(*words: object, at: Path = state, code: int = 0) -> str:
        found = run(*words, "--state", at)
        assert found.returncode == code, found
        return found.stdout + found.stderr

    assert "1 model of" in done("combine", tmp_path / "other", "--dry-run")
    done("combine", tmp_path / "other")
    assert names(state) == ["lora-0", "lora-1", "lora-2", "lora-3"]
    done("backup", tmp_path / "backup", "--copy")
    assert "clean" in done("verify", at=tmp_path / "backup")
    with api.open(state) as merge:
        generation = merge.state.generation_of(merge.state.ledger.head)
        merge.export_lora(LoraTarget(tmp_path / "before", None), ReadView(only=("lora-3",), rule="mean"))
    assert generation is not None
    damaged = "model.layers.0.self_attn.q_proj.weight"
    chunk = Path(generation.path(generation.form.layout.place(damaged, "u").files()[0]))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 255
    chunk.chmod(0o644)
    chunk.write_bytes(data)
    told = done("verify", code=4)
    assert "is damaged" in told
    assert damaged in told
    done("repair", "--yes")
    assert names(state) == ["lora-0", "lora-1", "lora-2"]  # the newest whole one
    done("combine", tmp_path / "backup", code=2)  # three of them are here already
    done("combine", tmp_path / "other")
    with api.open(state) as merge:
        merge.export_lora(LoraTarget(tmp_path / "after", None), ReadView(only=("lora-3",), rule="mean"))
    before, after = (tmp_path / d / "adapter_model.safetensors" for d in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_a_repair_says_where_what_comes_back_cannot_be_read(tmp_path: Path) -> None:
    """A weight that the rule which reads it by now does not take."""
    base, state = models.base(tmp_path / "base"), tmp_path / "state"
    making.init(base, state, making.Recipe(width=16, rule="mean"))
    for seed, (name, weight) in enumerate({"heavy": "2", "light": "1"}.items()):
        with api.open(state, write=True, weight=weight) as merge:
            assert merge.fold(adapters.lora(tmp_path / name, base, seed)).fate == "folded"
    with api.open(state, write=True) as merge:
        merge.unfold(merge.look_unfold("heavy"))
        merge.rescale(rule="isotropic")
        merge.check_readable()
        generation = merge.state.generation_of(merge.state.ledger.head)
    assert generation is not None
    own = next(file for file in generation.directory.rglob("c.*") if file.stat().st_nlink == 1)
    own.chmod(0o644)
    own.write_bytes(b"")
    found = CliRunner().invoke(main.app, ["repair", "--yes", "--json", "--state", str(state)])
    assert found.exit_code == 0, found.output
    assert names(state) == ["heavy", "light"]
    said = json.loads(found.stdout)["unreadable"]
    assert said.startswith("isotropic reads every model with weight 1, and heavy has the weight 2")
    with api.open(state, write=True) as merge:
        merge.rescale(rule="mean")
        merge.check_readable()
