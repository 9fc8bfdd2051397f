"""The rooms of the house and what each may never see, read from the imports."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers import house

# A room sees only rooms that stand above it, and never those named beside it. So the maths sees no files, the state no
# maths, what makes a merge nothing of the service, the service nothing of the command line. Who needs a new arrow takes
# the name out of the row, and says in the commit why
ROOMS = (
    ("errors", ""),
    ("records", "errors"),
    ("linalg", "errors records"),
    ("retrying", "records linalg"),
    ("config", "records linalg retrying"),
    ("executors", "records linalg retrying config"),
    ("rules", "retrying config executors"),
    ("state", "linalg retrying config executors rules"),
    ("provenance", "linalg retrying config executors rules state"),
    ("objectives", "retrying config executors rules state provenance"),
    ("texts", "linalg retrying config executors objectives"),
    ("tensors", "linalg retrying config executors rules state objectives texts"),
    ("gates", "linalg retrying config executors rules state objectives texts"),
    ("hub", "linalg executors rules state objectives texts gates"),
    ("sources", "linalg executors rules objectives texts gates"),
    ("engine", "retrying config objectives texts sources"),
    ("publish", "objectives texts sources gates"),
    ("tuning", "linalg retrying config texts gates hub sources"),
    ("selection", "retrying texts hub sources publish"),
    ("api", "linalg retrying objectives texts sources"),
    ("service", "linalg objectives"),
    ("demo", "linalg retrying config rules tensors gates hub sources engine executors selection tuning"),
    ("cli", "linalg retrying objectives tensors gates hub sources"),
    ("__main__", "service engine state rules tensors"),
    ("__init__", "service engine state rules tensors"),
)
CIRCLES: list[list[str]] = [["continual.state.store", "continual.state.verify"]]
CLASSES_TWICE = {"Asked", "Hub", "Loaded", "Piece", "Plan", "Row", "Space", "Task"}
FILES_TWICE = {"__init__", "contract", "folder", "hub", "names", "status"}

KNOWN = house.modules()


def test_every_room_has_a_row() -> None:
    assert sorted(name for name, _ in ROOMS) == sorted(house.arrows(KNOWN))


@pytest.mark.parametrize(("row", "room"), list(enumerate(name for name, _ in ROOMS)), ids=str)
def test_no_room_sees_what_it_may_never_see(row: int, room: str) -> None:
    above = {name for name, _ in ROOMS[:row]} - set(ROOMS[row][1].split())
    wrong = [
        f"{name} imports {target}"
        for name, module in KNOWN.items()
        if module.room == room
        for target in sorted(module.imports(KNOWN))
        if KNOWN[target].room not in {room, *above}
    ]
    assert wrong == []


def test_no_module_leads_back_to_itself() -> None:
    found = house.circles(house.module_imports(KNOWN))
    assert [circle for circle in found if circle not in CIRCLES] == []


def test_no_class_has_the_name_of_another() -> None:
    count = Counter(name for name, _, _ in house.classes(KNOWN))
    twice = {name for name, times in count.items() if times > 1}
    assert twice - CLASSES_TWICE == set()


def test_no_two_files_have_one_name_but_those_that_do_one_thing_in_two_rooms() -> None:
    count = Counter(module.file.stem for module in KNOWN.values())
    twice = {name for name, times in count.items() if times > 1}
    assert twice - FILES_TWICE == set()


def test_durable_writes_only_in_state() -> None:
    calls = [
        f"{name}: {call}"
        for name, module in KNOWN.items()
        if module.room not in ("state", "demo")
        for call in ("os.fsync", "os.link(", "os.rename", "os.replace", ".rename(", ".replace_with")
        if call in module.text
    ]
    assert calls == []
