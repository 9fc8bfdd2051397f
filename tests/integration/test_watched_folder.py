"""A daemon on a folder in which all kinds of things lie: what is a model is folded, what is none is noted, and nothing
holds up the rest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from continual import making
from continual.state import State
from tests.helpers import models
from tests.helpers.services import LIMIT, daemon, get, status, until, url

pytestmark = pytest.mark.slow


def test_all_kinds_of_things_in_one_folder(tmp_path: Path) -> None:
    base, state, watch = models.base(tmp_path / "base"), tmp_path / "state", tmp_path / "in"
    making.init(base, state, making.Recipe(rule="mean"))
    odd = os.fsdecode(b"caf\xe9\x1b[31m")
    models.fine_tune(base, watch / "run", 1)
    models.fine_tune(base, watch / "run/checkpoint-500", 2)
    models.fine_tune(base, watch / "run/ref", 3)
    models.fine_tune(base, watch / "later/checkpoint-10", 4)
    models.fine_tune(base, watch / odd, 5)
    models.fine_tune(base, watch / "zebra", 6)
    for name in ("pipe", "empty", "quantised"):
        (watch / name).mkdir()
    os.mkfifo(watch / "pipe/model.safetensors")
    (watch / "quantised/model.gguf").write_bytes(b"GGUF")
    (watch / "aaa").symlink_to("aaa")
    (watch / "proc").symlink_to("/proc/self/fd")
    (watch / "loose.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with daemon(state, watch, "--settle", "0.05") as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 3, "what is a model is folded")
        until(lambda: len(status(address)["notes"]) == 5, "what is none is noted")
        notes = "\n".join(status(address)["notes"])
        for said in (
            f"{watch}: aaa is a link that leads nowhere; loose.safetensors lies loose",
            f"{watch}/later: checkpoint-10 is a checkpoint of a run",
            f"{watch}/empty: is no model: it is empty",
            f"{watch}/quantised: is no model: it holds no weights that can be read: model.gguf",
            f"{watch}/proc: is no model",
        ):
            assert said in notes
        assert "model.gguf" in get(f"{address}/")[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
    with State.open(state) as opened:
        folded = [c.entry.candidate.name for c in opened.ledger.folds()]
        refused = {c.entry.candidate.name: c.entry.reason for c in opened.ledger.log if c.entry.fate == "refused"}
    assert sorted(folded) == sorted(["run", "zebra", odd])
    assert refused == {"pipe": "no-file"}
    log = (tmp_path / "daemon.log").read_text()
    assert "\x1b[31m" not in log
    assert log.count("loose.safetensors lies loose") == 1
    with daemon(state, watch, "--settle", "0.05", "--nested") as process:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 6, "with nested = true the others are, too; what is settled stays so")
