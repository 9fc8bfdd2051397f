"""Fine-tunes with another vocabulary from a folder and from the Hub, folded by the texts of their tokens: what the
record says, and that they are read the same way again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from continual import api, making
from continual.config import Settings
from continual.errors import Refuse
from tests.helpers import models, tokens
from tests.helpers.hubs import equal, made, merge, publish, sums
from tests.loopback import Hub, serving

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def words(count: int) -> list[str]:
    return [f"word {row}" for row in range(count)]


def turned(tuned: Path, directory: Path, order: list[int], texts: list[str]) -> Path:
    """A fine-tune with its rows in another order, and its tokenizer."""
    tensors = load_file(tuned / "model.safetensors")
    for name in (EMBED, HEAD):
        tensors[name] = tensors[name][order]
    return tokens.write(models.write(directory, tensors), texts)


def test_another_order_is_the_same_model(tmp_path: Path) -> None:
    base = tokens.write(models.base(tmp_path / "base"), words(40))
    tuned = models.fine_tune(base, tmp_path / "tuned", 1)
    order = list(range(39, -1, -1))
    other = turned(tuned, tmp_path / "other", order, words(40)[::-1])
    making.init(base, tmp_path / "state", making.Recipe(rule="task-arithmetic"))
    with api.Merge(Settings(state=tmp_path / "state", vocab="refuse"), write=True) as merged:
        refused = merged.fold(other)
        assert (refused.fate, refused.reason) == ("refused", "vocab")
        assert "vocab = by-token" in refused.line()
        assert "looks at it again" in refused.line()
    with api.Merge(Settings(state=tmp_path / "state", vocab="by-token"), write=True) as merged:
        plan = merged.plan(other)
        assert (plan.ok, plan.tokens) == (True, ("",))
        assert merged.fold(other).fate == "folded"
        assert merged.fold(tokens.write(tuned, words(40))).fate == "duplicate"
        (numbers,) = [fold.entry.numbers for fold in merged.state.ledger.folds()]
        assert numbers.tokens is not None
        (rows,) = numbers.tokens
        assert (rows.tables, rows.rows, rows.left_out, rows.lacking) == ((HEAD, EMBED), 40, (), ())
        assert rows.runs == tuple((row, 39 - row, 1) for row in range(40))


@pytest.mark.parametrize("rule", ["task-arithmetic", "opcm"])
def test_it_is_unfolded_as_it_was_folded(tmp_path: Path, rule: str) -> None:
    """Also where the setting is another by then; not where the tokenizer is."""
    base = tokens.write(models.base(tmp_path / "base"), words(40))
    first, second = (models.fine_tune(base, tmp_path / f"ft{i}", i) for i in range(2))
    order = [*range(30), 38, 39, *range(30, 36), 38, 38]
    texts = [*words(30), "word 38", "word 39", *words(36)[30:], "<a>", "<b>"]
    other = turned(first, tmp_path / "other", order, texts)
    making.init(base, tmp_path / "state", making.Recipe(rule=rule))
    with api.Merge(Settings(state=tmp_path / "state", vocab="by-token"), write=True) as merged:
        assert merged.fold(second).fate == "folded"
        line = merged.fold(other).line()
        assert "left out, as the base has no such token: <a>, <b>" in line
        assert "unchanged, as it has no such token: word 36, word 37" in line
    gone = "other" if rule == "task-arithmetic" else second.name  # opcm folds the other once more
    with api.Merge(Settings(state=tmp_path / "state"), write=True) as merged:
        kept = shutil.copy(other / "tokenizer.json", tmp_path / "kept.json")
        tokens.write(other, texts[::-1])
        with pytest.raises(Refuse, match="does not hold what was folded"):
            merged.unfold(merged.look_unfold(gone))
        shutil.copy(kept, other / "tokenizer.json")
        merged.unfold(merged.look_unfold(gone))
        (left,) = merged.state.ledger.folds()
        assert left.entry.candidate.name == (second.name if gone == "other" else "other")


@pytest.mark.parametrize("scattered", [False, True])
def test_from_the_hub(tmp_path: Path, hub: Hub, scattered: bool) -> None:
    shapes = {**models.SHAPES, EMBED: (3000, 16), HEAD: (3000, 16)}
    base = tokens.write(made(tmp_path, hub, shapes=shapes), words(3000))
    tuned = models.fine_tune(base, tmp_path / "tuned", 1)
    order = list(range(2999, -1, -1)) if scattered else [*range(1500, 3000), *range(1500)]
    texts = words(3000)
    other = turned(tuned, tmp_path / "other", order, [texts[row] for row in order])
    publish(hub, "org/other", other)
    making.init(base, tmp_path / "local", making.Recipe(rule="task-arithmetic"))
    with merge(tmp_path / "state", hub, vocab="by-token") as ours, merge(tmp_path / "local", hub) as local:
        found = ours.fold("hf://org/other")
        assert found.fate == "folded", found.message
        assert local.fold(tuned).commit.entry.digest == found.commit.entry.digest
        assert equal(sums(ours), sums(local))
        assert hub.journal.sent(origin="") < 2 * (other / "model.safetensors").stat().st_size + 200_000
