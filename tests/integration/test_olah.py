"""Against olah, a mirror of the Hub that others wrote: it serves a git repository to the real client, read-only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from continual.publish.folder import Target
from tests.helpers import hubs, models, services
from tests.helpers.command import process

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")]


def repository(directory: Path, model: Path) -> str:
    """A git repository with a model in one commit; its sha."""
    shutil.copytree(model, directory)
    (directory / "README.md").write_bytes(hubs.card(license="mit"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(directory)]
    for words in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "a model"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """olah, serving the repositories in `mirror`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "olah.toml"
    config.write_text(
        f"""
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{tmp_path / "olah"}"
mirror-scheme = "http"
mirror-netloc = "127.0.0.1:{port}"
mirrors-path = ["{tmp_path / "mirror"}"]
[accessibility]
offline = true
"""
    )
    command = [str(Path(sys.executable).with_name("olah-cli")), "-c", str(config), "--log-path", str(tmp_path / "logs")]
    with (
        open(tmp_path / "olah.log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path) as server,
    ):
        try:

            def answers() -> bool:
                assert server.poll() is None, (tmp_path / "olah.log").read_text()
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api/models/org/base/revision/main", timeout=5
                ) as answer:
                    return bool(answer.status == 200)

            services.until(answers, "olah answers")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def commits(tmp_path: Path) -> dict[str, str]:
    base = models.base(tmp_path / "base")
    mirror = tmp_path / "mirror/models/org"
    mirror.mkdir(parents=True)
    found = {"base": repository(mirror / "base", base)}
    return found | {"ft": repository(mirror / "ft", models.fine_tune(base, tmp_path / "ft", 1))}


def test_a_base_and_a_fine_tune_from_a_mirror(tmp_path: Path, commits: dict[str, str], endpoint: str) -> None:
    env = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PATH": os.environ["PATH"],
        "CONTINUAL_STATE": str(tmp_path / "state"),
    }
    for words in (("init", f"org/base@{commits['base']}", "--rule", "mean"), ("fold", f"hf://org/ft@{commits['ft']}")):
        done = process(*words, env=env)
        assert done.returncode == 0, done.stderr
    with continual.open(tmp_path / "state") as merge:
        (fold,) = merge.state.ledger.folds()
        assert fold.entry.candidate is not None
        assert fold.entry.candidate.key == f"hub:org/ft@{commits['ft']}"
        merged = load_file(merge.export(Target(tmp_path / "merged")) / "model.safetensors")
    tuned = load_file(tmp_path / "ft/model.safetensors")
    assert merged.keys() == tuned.keys()
    for name, tensor in tuned.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-7)  # one model, so the mean is that one
