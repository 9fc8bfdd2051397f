"""What cards say of where a model comes from, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import continual
from continual.config import Settings
from continual.errors import Refuse
from continual.gates import CardGate, Headers, make
from continual.gates.model_card import ModelCard, card_of
from continual.tensors import Folder
from tests.helpers import adapters, models
from tests.unit.gates.cases import Case, fine_tune, headers

OURS = "meta-llama/Llama-3.2-1B"


def carded(place: Path, text: str) -> Headers:
    """A fine-tune with a card, of a base that came from the Hub."""
    seen = fine_tune(place)
    (place / "alice" / "README.md").write_text(f"---\n{text}\n---\n# alice\n")
    return seen._replace(repo=OURS)


def refused(text: str) -> Callable[[Path], Case]:
    return lambda place: Case(CardGate(), carded(place, text))


REFUSED = {
    "card-base": refused("base_model: Qwen/Qwen2.5-1.5B"),
    "card-kind": refused(f"base_model: {OURS}\nbase_model_relation: quantized"),
    "card": refused("base_model: [a, *b]"),
}


@pytest.mark.parametrize(
    "text",
    [
        f"base_model: {OURS}",
        f"base_model:\n- {OURS}\nbase_model_relation: finetune",
        "base_model: unsloth/Llama-3.2-1B-bnb-4bit",
        "base_model: ./base",
        "base_model: 7",
        "license: mit",
        "",
    ],
)
def test_let_in(tmp_path: Path, text: str) -> None:
    CardGate(act="refuse").judge(carded(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"base_model: [{OURS}, org/other]", "a merge of several models"),
        (f"base_model: {OURS}\nbase_model_relation: merge", "a merge of several models"),
        (f"base_model: {OURS}\nbase_model_relation: Quantized", "a quantised copy"),
        ("base_model: org/other\nbase_model_relation: finetune", "names org/other as the base of alice"),
    ],
)
def test_what_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Refuse, match=said):
        CardGate().judge(carded(tmp_path, text))


def test_the_settings_say_what_is_told_of(tmp_path: Path) -> None:
    seen = carded(tmp_path, "base_model: [org/other, org/more]")
    CardGate(names=("org/other",), kinds=()).judge(seen)
    CardGate(act="off").judge(seen)
    with pytest.raises(Refuse, match="names org/other"):
        CardGate(names=("org/else",), kinds=()).judge(seen._replace(repo=None))
    CardGate(kinds=()).judge(seen._replace(repo=None))  # a base without a name says nothing of names
    found = make(Settings(gates=["card.names=org/a,org/b"])).the(CardGate)
    assert found.names == ("org/a", "org/b")


def test_an_adapter_says_its_base_in_its_configuration(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    adapter = adapters.lora(tmp_path / "lora", base, 1)
    (adapter / "README.md").write_text("---\nbase_model: org/other\nbase_model_relation: adapter\n---\n")
    CardGate(act="refuse").judge(headers(base, adapter)._replace(repo=OURS))


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("---\nbase_model: a/b\n---\n", ModelCard(("a/b",))),
        ("\ufeff\n---\r\nbase_model: a/b\r\nlicense: MIT\r\n---\r\ntext", ModelCard(("a/b",), None, "mit")),
        ("# no metadata\n---\nbase_model: a/b\n---\n", ModelCard()),
        ("---\nbase_model: a/b\n", ModelCard()),
        ("", ModelCard()),
    ],
)
def test_cards(tmp_path: Path, text: str, card: ModelCard) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card_of(Folder(tmp_path)) == card


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: [*a, *a]",
        "a: 1\na: 2",
        "- 1",
        "a: [",
        "{" * 2000,
        "a: !!python/object:os.system 1",
        "a: 2026-99-99",
    ],
)
def test_metadata_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(Refuse, match="its metadata cannot be read") as raised:
        card_of(Folder(tmp_path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_warning_is_in_the_record(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    continual.init(base, tmp_path / "state")
    model = models.fine_tune(base, tmp_path / "alice", 1)
    (model / "README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n")
    with continual.open(tmp_path / "state", write=True, workers=1) as merge:
        assert merge.fold(model).fate == "folded"
        (warned,) = merge.state.ledger.folds()[-1].entry.numbers.warnings or ()
    assert (warned.gate, warned.reason) == ("card", "card-kind")
    with continual.open(tmp_path / "state", write=True, workers=1, gates=["card.act=refuse"]) as merge:
        again = models.fine_tune(base, tmp_path / "bob", 2)
        (again / "README.md").write_text("---\nbase_model: [a/b, c/d]\n---\n")
        assert merge.fold(again).reason == "card-kind"
