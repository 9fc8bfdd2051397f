"""What the pages of the documentation point at is there: files, headings, modules, names; and the decisions have one
form."""

from __future__ import annotations

import pydoc
import re
import sys
import types
from pathlib import Path

import pytest

from continual.errors import Refuse
from continual.gates.contract import AtNumbers, Gate, Numbers
from continual.records import Totals
from tests.helpers.pages import DECISIONS, DOCS, PAGES, ROOT, anchors, blocks, links, name, prose
from tests.unit.test_layers import ROOMS

STATUS = r"in force|replaced (?:in part )?by \[(?P<new>\d{4})\]\((?P=new)-[a-z0-9-]+\.md\)(?:, .+)?"
every_page = pytest.mark.parametrize("page", PAGES, ids=name)


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@every_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])(?:continual|tests|ops|state)/[\w./-]*\w", page.read_text())
    generated = re.compile(r"state/(?!FORMAT)|.*(NAME|ROOM)")
    missing = [path for path in named if not generated.match(path) and not (ROOT / path).exists()]
    assert missing == []


@every_page
def test_every_module_that_a_page_runs_exists(page: Path) -> None:
    named = {dotted.replace(".", "/") for dotted in re.findall(r"\btests(?:\.[a-z_]+)+", page.read_text())}
    missing = [path for path in named if not (ROOT / f"{path}.py").exists() and not (ROOT / path).is_dir()]
    assert missing == []
    run = {dotted.replace(".", "/") for dotted in re.findall(r"python -m (tests(?:\.\w+)+)", page.read_text())}
    starts = [p for p in run if not (ROOT / f"{p}.py").exists() and not (ROOT / p / "__main__.py").exists()]
    assert starts == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_every_name_of_the_package_exists(page: Path) -> None:
    named = set(re.findall(r"`(continual(?:\.\w+)+)(?:\(.*?\))?`", prose(page)))
    files = re.compile(r"\.(json|toml|service|md|py)$")
    assert [dotted for dotted in named if not files.search(dotted) and pydoc.locate(dotted) is None] == []


def test_the_index_leads_to_every_page() -> None:
    index = DOCS / "README.md"
    led = {(DOCS / link.partition("#")[0]).resolve() for link in links(index)}
    assert [name(page) for page in PAGES if page not in (index, *DECISIONS) and page.resolve() not in led] == []
    assert "ops/docs/README.md" in links(ROOT / "README.md")


def test_decisions_are_numbered_dated_and_listed() -> None:
    index = (ROOT / "ops/decisions/README.md").read_text()
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    listed = re.findall(r"^\| \[\d{4}\]\(.*$", index, re.MULTILINE)
    shown = []
    for page in DECISIONS:
        heading, empty, facts, *_ = page.read_text().split("\n")
        title = re.fullmatch(rf"# {page.name[:4]} (\S.*)", heading)
        said = re.fullmatch(rf"Date: (\d{{4}}-\d\d-\d\d)\. Status: ({STATUS})\.", facts)
        assert title, f"{name(page)}: its first line is not '# {page.name[:4]} Title'"
        assert empty == ""
        assert said, f"{name(page)}: its third line is not 'Date: YYYY-MM-DD. Status: ….'"
        shown.append(f"| [{page.name[:4]}]({page.name}) | {title[1]} | {said[1]} | {said[2]} |")
    assert shown == listed


def test_the_glossary_has_each_word_once_and_says_where_it_lives() -> None:
    text = prose(ROOT / "ops/docs/words.md")
    words = [word.lower() for word in re.findall(r"^- \*\*(.+?)\*\*", text, re.MULTILINE)]
    assert len(words) > 60
    assert [word for word in words if words.count(word) > 1] == []
    assert len(re.findall(r"`continual\.\w+", text)) > len(words) / 2


def test_the_map_of_the_house_has_every_room_in_its_order() -> None:
    page = (ROOT / "ops/docs/contributing.md").read_text().partition("## A map of the house")[2]
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert listed == [room for room, _ in ROOMS if not room.startswith("__")]


def test_the_gate_that_the_page_shows_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "ops/docs/contributing.md", "python")
    names: dict[str, type[Gate]] = {"__name__": "enough"}
    monkeypatch.setitem(sys.modules, "enough", types.ModuleType("enough"))
    exec(code, names)
    gate = names["EnoughGate"](most=2)  # type: ignore[call-arg]
    assert isinstance(gate, AtNumbers)
    gate.judge(Numbers("alice", 1.0, 1.0, Totals(count=1.0)))
    with pytest.raises(Refuse, match=r"alice: 2 models .* and gates\.enough\.most = 2"):
        gate.judge(Numbers("alice", 1.0, 1.0, Totals(count=2.0)))
