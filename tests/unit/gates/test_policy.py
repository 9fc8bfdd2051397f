"""Limits that a person sets, of models in folders as of those on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from continual.config import Settings
from continual.errors import Refuse
from continual.gates import Headers, PolicyGate, make
from continual.gates.model_card import LARGEST
from tests.unit.gates.cases import Case, fine_tune


def licensed(place: Path, licence: str | None) -> Headers:
    seen = fine_tune(place)
    if licence is not None:
        (place / "alice" / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return seen


def on_hub(place: Path, licence: str | None = None) -> Headers:
    seen = fine_tune(place)
    return seen._replace(candidate=replace(seen.candidate, origin="hf://mallory/alice", licence=licence))


REFUSED = {
    "too-large": lambda place: Case(PolicyGate(max_bytes=1000), fine_tune(place)),
    "licence": lambda place: Case(PolicyGate(licences=("mit", "apache*")), licensed(place, "cc-by-nc-4.0")),
    "author": lambda place: Case(PolicyGate(deny_authors=("mal*",)), on_hub(place)),
    "card": lambda place: Case(PolicyGate(licences=("mit",)), licensed(place, "[")),
}


@pytest.mark.parametrize(
    ("gate", "licence"),
    [
        (PolicyGate(), None),
        (PolicyGate(licences=("mit",)), "MIT"),
        (PolicyGate(licences=("none",)), None),
        (PolicyGate(licences=("Apache-2.0", "MIT")), "apache-2.0"),
        (PolicyGate(licences=("apache-*", "mit")), "[Apache-2.0, MIT]"),
        (PolicyGate(deny_licences=("cc-*",)), "apache-2.0"),
        (PolicyGate(max_bytes=1 << 20, max_tensors=11), None),
        (PolicyGate(authors=("somebody",), deny_authors=("*",)), None),  # a folder has no owner
    ],
)
def test_let_in(tmp_path: Path, gate: PolicyGate, licence: str | None) -> None:
    gate.judge(licensed(tmp_path, licence))


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (PolicyGate(max_tensors=10), "has 11 tensors"),
        (PolicyGate(licences=("mit",)), "licence none is not in"),
        (PolicyGate(deny_licences=("no*",)), "licence none is in"),
    ],
)
def test_refused(tmp_path: Path, gate: PolicyGate, said: str) -> None:
    with pytest.raises(Refuse, match=said):
        gate.judge(licensed(tmp_path, None))


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "[mit, cc-by-nc-4.0]", "\n- mit\n- CC-by-NC-4.0"])
def test_what_is_denied_is_denied_however_it_is_written(tmp_path: Path, licence: str) -> None:
    with pytest.raises(Refuse, match=r"licence cc-by-nc-4\.0 is in"):
        PolicyGate(deny_licences=("CC-BY-NC-*",)).judge(licensed(tmp_path, licence))
    with pytest.raises(Refuse, match=r"licence cc-by-nc-4\.0 is not in"):
        PolicyGate(licences=("mit",)).judge(licensed(tmp_path / "x", licence))


def test_a_licence_beyond_what_is_read_of_a_card_is_not_taken_for_none(tmp_path: Path) -> None:
    seen = licensed(tmp_path, None)
    (tmp_path / "alice" / "README.md").write_text("---\n" + "a: b\n" * LARGEST + "license: cc-by-nc-4.0\n---\n")
    with pytest.raises(Refuse, match="do not end within") as refused:
        PolicyGate(deny_licences=("cc-*",)).judge(seen)
    assert refused.value.reason == "card"
    (tmp_path / "alice" / "README.md").write_text("# alice\n" + "a\n" * LARGEST)
    PolicyGate(deny_licences=("cc-*",)).judge(seen)


def test_on_the_hub(tmp_path: Path) -> None:
    seen = on_hub(tmp_path, "mit")
    PolicyGate(authors=("mallory",), licences=("mit",)).judge(seen)
    for denied in (PolicyGate(deny_authors=("Mallory",)), PolicyGate(deny_licences=("MIT",))):
        with pytest.raises(Refuse):
            denied.judge(seen)
    with pytest.raises(Refuse, match=r"mallory is not in gates\.policy\.authors"):
        PolicyGate(authors=("alice",)).judge(seen)


def test_settings_as_they_are_written() -> None:
    found = make(Settings(gates=["policy.max_bytes=40GB", "policy.licences=mit,apache-2.0"])).the(PolicyGate)
    assert (found.max_bytes, found.licences) == (40 * 10**9, ("mit", "apache-2.0"))
