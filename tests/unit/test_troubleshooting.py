"""The page about what goes wrong has every message of the code, and says of each what to do."""

from __future__ import annotations

import ast

import pytest

from continual.errors import REFUSALS
from tests.helpers import house, messages
from tests.helpers.pages import anchors

TEXT = messages.PAGE.read_text()
SECTIONS = messages.sections(TEXT)


def test_every_message_has_its_section_and_its_row() -> None:
    assert len(messages.messages()) > 800
    lost = [m for m, found in messages.placed(SECTIONS).items() if found is None and not messages.speechless(m)]
    assert lost == [], "name these in a marker of the page"
    assert messages.written(TEXT) == TEXT, "run python -m tests.helpers.messages"


def test_every_section_has_cause_and_remedy_and_something_to_list() -> None:
    used = set(messages.placed(SECTIONS).values())
    assert [s.title for s in SECTIONS if s not in used] == []
    assert [s.title for s in SECTIONS if "*Cause*:" not in s.prose or "*Remedy*:" not in s.prose] == []
    words = [word for section in SECTIONS for word in section.words]
    assert len(words) == len(set(words)), "two sections ask for one kind of message"


def test_every_reason_of_a_refusal_has_a_section() -> None:
    named = {word.partition("/")[2] for section in SECTIONS for word in section.words if word.startswith("Refuse/")}
    assert [reason for reason in REFUSALS if reason not in named] == []


def test_every_kind_of_message_is_explained() -> None:
    table = TEXT.partition("## Kinds of messages")[2].partition("\n## ")[0]
    assert [kind for kind in messages.KINDS.values() if f"\n| {kind}" not in table] == []
    assert "damaged" in anchors(messages.PAGE)


def test_hardly_a_message_says_only_what_another_said() -> None:
    """Those that pass on what a library or the system said, and nothing else, are known by place."""
    silent = {m.where.partition(":")[0] for m in messages.messages() if messages.speechless(m)}
    assert len(silent) < 45, sorted(silent)


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ('def f(a):\n raise Refuse("gone", f"{a}: went")', ["…: went"]),
        ('def f(a):\n raise Retry(f"{a}" + (" one" if a else " two"))', ["… one", "… two"]),
        ('SAID = "never {} again"\ndef f(a):\n raise Halt(SAID.format(a))', ["never … again"]),
        ('def g():\n return "by another"\ndef f(a):\n said = g()\n raise Busy(f"held {said}")', ["held by another"]),
        ('def f(a):\n x = []\n x.append(f"bad {a}")\n raise Misconfigured("\\n".join(x))', ["bad …"]),
        ('def f(a):\n raise Halt({"a": "first", "b": "second"}[a])', ["first", "second"]),
    ],
)
def test_a_text_is_followed_to_where_it_is_made(code: str, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = house.Module("continual.made", house.ROOT / "made.py")
    module.__dict__["tree"] = ast.parse(code)
    monkeypatch.setattr(house, "modules", lambda: {"continual.made": module})
    assert [m.text for m in messages.messages.__wrapped__()] == texts
