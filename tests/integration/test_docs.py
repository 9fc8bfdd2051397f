"""The examples of the page on the Python API run, one after the other, and do what the page says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import continual
from tests.helpers import models
from tests.helpers.pages import DOCS, blocks
from tests.helpers.tiny import gpt, write_tokenizer

pytestmark = pytest.mark.slow

TEXTS = ("a very good film", "the book is bad", "good film", "not a bad book at all", "the film was very very bad")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the examples name: a base, fine-tunes, another state, rows and a program that scores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    torch.manual_seed(0)
    gpt().save_pretrained("base")
    write_tokenizer(tmp_path / "base")
    for seed, name in enumerate(("alice", "bob", "carol")):
        models.fine_tune(tmp_path / "base", tmp_path / "fine-tunes" / name, seed)
    recipe = continual.Recipe(rule="iso-c", options={"before": ["drop:rate=0.1"]})
    continual.init("base", "other-state", recipe)
    with continual.open("other-state", write=True) as other:
        other.fold("fine-tunes/carol")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4))
    Path("eval.py").write_text(
        "import sys, zlib\nprint(zlib.crc32(open(sys.argv[1] + '/model.safetensors', 'rb').read()))\n"
    )
    return tmp_path


def test_the_examples_of_the_python_page_run_in_order(work: Path) -> None:
    names: dict[str, object] = {}
    found = []
    for number, block in enumerate(blocks(DOCS / "python.md", "python"), 1):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
        with continual.open("state") as merge:
            found.append([commit.entry.kind for commit in merge.state.ledger.log][1:])
    assert found[0] == ["fold", "combine", "unfold"]
    assert found[1] == [*found[0], "tune", "tune", "tune"]
    assert found[2][len(found[1]) :][:2] == ["defer", "round"]
    assert found[2][-1] == "select"
    assert found[3] == found[2]
    outcome, tau = names["outcome"], names["tau"]
    assert isinstance(outcome, continual.Outcome)
    assert (outcome.fate, outcome.name) == ("deferred", "bob")
    assert isinstance(tau, torch.Tensor)
    assert tau.dtype == torch.float32
    assert {t.dtype for t in load_file(work / "half/model.safetensors").values()} == {torch.bfloat16}
    assert (work / "merged/config.json").is_file()
