"""The rooms of the house and what each may never see, read from the imports."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.helpers import house

# A room sees only rooms that stand above it, and never those named beside it. So the maths sees no files, the state no
# maths, what makes a merge nothing of the service, the service nothing of the command line. Who needs a new arrow takes
# the name out of the row, and says in the commit why
ROOMS = (
    ("errors", ""),
    ("outside", ""),
    ("records", ""),
    ("lazily", ""),
    ("linalg", ""),
    ("timing", ""),
    ("retrying", ""),
    ("stores", "outside records linalg lazily retrying"),
    ("config", ""),
    ("executors", "config"),
    ("rules", "config executors retrying"),
    ("blocks", "config executors retrying"),
    ("state", "blocks config executors linalg rules"),
    ("objectives", "blocks executors rules state"),
    ("texts", "blocks executors objectives rules"),
    ("tensors", "blocks config executors rules state texts"),
    ("signing", "blocks executors rules state texts"),
    ("gates", "blocks executors rules state texts"),
    ("hub", "blocks executors gates rules state texts"),
    ("sources", "blocks executors gates rules texts"),
    ("engine", "objectives sources texts"),
    ("publish", "gates objectives sources texts"),
    ("removal", "blocks config gates hub linalg objectives publish sources texts"),
    ("tuning", "gates hub sources texts"),
    ("evaluation", "gates hub publish sources texts"),
    ("selection", "hub publish sources texts"),
    ("making", "gates selection sources texts tuning"),
    ("replay", "blocks config hub linalg objectives publish sources texts removal tuning evaluation making"),
    ("api", "texts"),
    ("forecast", "gates linalg objectives selection sources tuning"),
    ("service", "linalg objectives"),
    ("demo", "config engine gates hub rules selection sources tensors tuning"),
    ("cli", "gates linalg objectives tensors"),
    ("__main__", "engine rules service state tensors"),
    ("__init__", ""),
)
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
    assert house.circles(house.module_imports(KNOWN)) == []


def test_no_class_has_the_name_of_another() -> None:
    count = Counter(name for name, _, _ in house.classes(KNOWN))
    twice = {name for name, times in count.items() if times > 1}
    assert twice == set()


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


# The rooms of `tensors`, by the same law: each sees only those above it. What stands beside them sees all
TENSORS = ("checkpoints", "names", "adapters", "bases", "matched", "layouts", "vectors")


def test_no_room_of_tensors_sees_one_below() -> None:
    def place(name: str) -> int:
        inner = name.split(".")[2] if name.count(".") > 2 else ""
        return TENSORS.index(inner) if inner in TENSORS else len(TENSORS)

    wrong = [
        f"{name} imports {target}"
        for name, module in KNOWN.items()
        if module.room == "tensors" and name != "continual.tensors"
        for target in sorted(module.imports(KNOWN))
        if KNOWN[target].room == "tensors" and target.count(".") > 2 and place(target) > place(name)
    ]
    assert wrong == []
    assert {name.split(".")[2] for name in KNOWN if name.startswith("continual.tensors.")} - {"model"} == set(TENSORS)


def test_torch_is_taken_from_one_place_alone() -> None:
    """Where loading it waits until it is used. The demonstration trains models, and uses it at once."""
    direct = [
        name
        for name, module in KNOWN.items()
        if module.room not in ("lazily", "demo") and re.search(r"^\s*(import|from) torch\b", module.text, re.M)
    ]
    assert direct == [], "write `from continual.lazily import Tensor, torch`"
