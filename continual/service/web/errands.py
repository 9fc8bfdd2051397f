"""Errands: commands that were asked for over the web, and what came of each. They are done as those of the control
socket are, at their turn between two folds. The newest are remembered; the log has a line for each, the ledger what it
changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from continual.errors import ContinualError
from continual.service.control import parley
from continual.service.control.parley import Hearing
from continual.service.control.requests import Request
from continual.texts import Json

MOST = 20
"""Errands that are remembered."""
Perform = Callable[[Request, Hearing, str], Coroutine[None, None, dict[str, Json]]]
"""Does what is asked for when its turn comes; the last argument says who asked, for the log."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A command that was asked for: its number, when (RFC 3339, UTC) and by whom. `state`: `waits`, `done` or `failed`;
    `doing`: how far it is; `notes`: lines for people. Then the `answer`, as the control socket gives it, or the error:
    its kind and its message."""

    number: int
    time: str
    by: str
    title: str
    asked: Mapping[str, object]
    state: str = "waits"
    doing: str = ""
    notes: tuple[str, ...] = ()
    answer: Mapping[str, object] = field(default_factory=dict)
    kind: str = ""
    message: str = ""


class Errands:
    """The errands of a daemon. All methods are called on the event loop."""

    def __init__(self, perform: Perform) -> None:
        self._perform = perform
        self._known: dict[int, Errand] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._last = 0
        self.version = 0

    @property
    def newest(self) -> list[Errand]:
        """Those that are remembered, the newest first."""
        return list(self._known.values())[::-1]

    def get(self, number: int) -> Errand | None:
        """An errand by its number; None where it is not remembered."""
        return self._known.get(number)

    def begin(self, request: Request, by: str) -> Errand:
        """Has a command done, and remembers it."""
        self._last += 1
        number = self._last
        body = request.model_dump(mode="json", exclude_defaults=True)
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        errand = Errand(number, now, by, request.title, {"command": request.command, **body})
        self._known[number] = errand
        for old in [one for one in self._known if self._known[one].state != "waits"][: max(0, len(self._known) - MOST)]:
            del self._known[old]
        self.version += 1
        self._tasks[number] = asyncio.get_running_loop().create_task(self._do(number, request, by))
        return errand

    async def settled(self, number: int, seconds: float) -> Errand | None:
        """The errand when it is done, or after so many seconds."""
        if (task := self._tasks.get(number)) is not None:
            await asyncio.wait({task}, timeout=seconds)
        return self.get(number)

    async def _do(self, number: int, request: Request, by: str) -> None:
        loop = asyncio.get_running_loop()

        def progress(stage: str, done: int, total: int) -> None:
            loop.call_soon_threadsafe(lambda: self._set(number, doing=f"{stage} {done}/{total}"))

        def note(text: str) -> None:
            loop.call_soon_threadsafe(lambda: self._note(number, text))

        try:
            answer = await self._perform(request, Hearing(progress, note), by)
            self._set(number, state="done", doing="", answer=answer)
        except ContinualError as error:
            told = parley.error_body(error)
            self._set(number, state="failed", doing="", kind=str(told["kind"]), message=str(told["message"]))
        except Exception as error:  # the log has its trace
            self._set(number, state="failed", doing="", kind="Bug", message=f"a bug of ours: {type(error).__name__}")
        finally:
            self._tasks.pop(number, None)

    def _note(self, number: int, text: str) -> None:
        if (errand := self.get(number)) is not None:
            self._set(number, notes=(*errand.notes, text)[-50:])

    def _set(self, number: int, **values: object) -> None:
        if (errand := self.get(number)) is not None:
            self._known[number] = replace(errand, **values)  # type: ignore[arg-type]
            self.version += 1
