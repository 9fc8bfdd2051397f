"""What a worker gives back where something goes wrong: in the words of this machine, and where it was."""

from __future__ import annotations

import errno
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from continual.errors import Busy, Damaged, Misconfigured, Refuse, Retry
from continual.executors import away, driving
from continual.executors.away import WorkAnswer, answered, software
from continual.executors.orders import WorkJob


class Locked(Exception):
    """What others raise may hold what no bytes can hold."""

    def __init__(self) -> None:
        super().__init__("it is locked")
        self.lock = threading.Lock()


class Worded(Exception):
    """What others raise may be put into bytes, and not be made of them again."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"it has the code {code}")


RAISED: dict[str, Exception] = {
    "refuse": Refuse("zero", "model: it is zero", by=("x",)),
    "retry": Retry("file: another one", after=7.0),
    "damaged": Damaged("chunk: its checksum is another"),
    "busy": Busy("it is open", 12, "http://there"),
    "setting": Misconfigured("/state: no state there"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "/state/c/0"),
    "memory": MemoryError(),
    "bug": KeyError("x"),
    "locked": Locked(),
    "worded": Worded(code=5),
}
SAID = {
    "refuse": "model: it is zero",
    "retry": "file: another one (on the machine 10.0.0.3)",
    "damaged": "chunk: its checksum is another (on the machine 10.0.0.3)",
    "busy": "it is open (on the machine 10.0.0.3)",
    "setting": "/state: no state there (on the machine 10.0.0.3); nothing was settled",
    "disk": "[Errno 28] No space left on device (on the machine 10.0.0.3): '/state/c/0'",
    "memory": "on the machine 10.0.0.3",
    "bug": "'x'",
    "locked": "Locked: it is locked",
    "worded": "Worded: it has the code 5",
}


@dataclass(frozen=True)
class Raising(WorkJob[int]):
    def open(self) -> Raiser:
        return Raiser()


class Raiser:
    def work(self, names: Sequence[str]) -> list[int]:
        raise RAISED[names[0]]

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(away, "_here", lambda: ("10.0.0.3", "ab"))


def answer(name: str, versions: dict[str, str] | None = None) -> WorkAnswer:
    job = pickle.dumps(Raising("raising"))
    where, said = answered(job, (name,), versions or software())
    assert where == ("10.0.0.3", "ab")
    assert isinstance(said, bytes)
    found = pickle.loads(said)
    assert isinstance(found, WorkAnswer)
    return found


@pytest.mark.parametrize("name", RAISED)
def test_an_error_says_the_same_and_where_it_was(name: str) -> None:
    found = answer(name).error
    assert str(found) == SAID[name]
    # a daemon does not halt because of one machine
    other = {"locked": RuntimeError, "worded": RuntimeError, "setting": Retry}
    assert isinstance(found, other.get(name, type(RAISED[name])))


def test_a_refusal_is_that_of_any_machine() -> None:
    found = answer("refuse").error
    assert isinstance(found, Refuse)
    assert (found.reason, found.by) == ("zero", ("x",))
    assert not hasattr(found, "__notes__")


def test_only_what_nobody_expected_has_a_trace() -> None:
    assert not hasattr(answer("retry").error, "__notes__")
    notes = getattr(answer("bug").error, "__notes__", [])
    assert notes[0].startswith("on the machine 10.0.0.3:\n")
    assert "raise RAISED" in notes[0]


def test_other_software_is_named() -> None:
    found = answer("bug", software() | {"torch": "1.0"}).error
    assert isinstance(found, Retry)
    assert "torch" in str(found)
    assert "and the driver has 1.0: install the same on every machine (on the machine 10.0.0.3)" in str(found)


IN_WORDS = """\x1b[36mray::answered()\x1b[39m (pid=28953, ip=10.0.0.7)
RuntimeError: The remote function failed to import on the worker. This may be because of sys.path ['/x']:

\x1b[36mray::answered()\x1b[39m (pid=28953, ip=10.0.0.7)
ModuleNotFoundError: No module named 'continual'"""


def test_where_continual_cannot_be_loaded_its_words_say_why_and_where() -> None:
    """Ray says where in the words alone; without it one such machine would end every fold."""
    error = RuntimeError(IN_WORDS)
    assert driving._where(error) == "10.0.0.7"
    assert driving._line(error) == "ModuleNotFoundError: No module named 'continual'"
    assert driving._where(RuntimeError("nothing")) == ""
