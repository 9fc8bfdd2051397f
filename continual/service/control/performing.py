"""What the daemon does when it is asked: the work at its turn on the thread that writes the state, and what follows
from it for the parts that run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from continual.api import Merge
from continual.errors import ContinualError
from continual.service import release as releasing
from continual.service.aside import aside
from continual.service.control import acting
from continual.service.control.acting import Answer
from continual.service.control.parley import Hearing
from continual.service.control.requests import PromoteRequest, ReleaseRequest, Request, RetryRequest
from continual.service.control.turns import Turns
from continual.service.status import Live
from continual.sources.contract import Source
from continual.state.entries import Entry

Recorder = Callable[[Entry], Awaitable[None]]


class Performing:
    """Does requests for a daemon on the open `merge`. `record` makes a record at its turn; `promoted` is called when
    somebody has a canary promoted."""

    def __init__(
        self,
        merge: Merge,
        live: Live,
        turns: Turns,
        record: Recorder,
        sources: Sequence[Source],
        promoted: Callable[[], None] = lambda: None,
    ) -> None:
        self._promoted = promoted
        self._merge = merge
        self._live = live
        self._turns = turns
        self._record = record
        self._sources = sources
        self._log = structlog.get_logger("continual")

    async def perform(self, request: Request, hear: Hearing, by: str = "") -> Answer:
        """Does it when its turn comes, and returns the answer; `by`: who asked, for the log. Raises what `acting.act`
        raises; what is no error of continual is a bug, and logged with its trace."""
        said = {"command": request.title, "asked": request.model_dump(exclude_defaults=True)}
        if by:
            said["by"] = by
        try:
            answer = await self._do(request, hear)
        except ContinualError as error:
            self._log.info("command failed", **said, error=str(error))
            raise
        except Exception:
            self._log.exception("command failed", **said)
            raise
        self._log.info("command", **said)
        if isinstance(request, RetryRequest):
            self._again()
        return answer

    async def _do(self, request: Request, hear: Hearing) -> Answer:
        if isinstance(request, ReleaseRequest):  # an upload may take hours: the folds go on meanwhile
            hear.progress("release", 0, 1)
            if request.dry_run:
                return await aside(partial(acting.look_release, self._merge, request))
            out = await aside(partial(acting.release, self._merge, request))
            await self._record(releasing.entry(out.released, request.view))
            self._promoted()  # a canary may be out by now
            return out.answer
        if isinstance(request, PromoteRequest):
            answer = await asyncio.to_thread(acting.promote, self._merge, request, alone=False)
            self._promoted()
            return answer
        return await self._turns.ask(request.title, partial(self._act, request, hear))

    def _act(self, request: Request, hear: Hearing) -> Answer:
        """On the thread that writes the state."""

        def progress(stage: str, done: int, total: int) -> None:
            self._live.progress(stage, done, total)
            hear.progress(stage, done, total)

        progress("begin", 0, 1)  # nothing is begun for a client that has gone
        return acting.act(self._merge, request, Hearing(progress, hear.note))

    def _again(self) -> None:
        """Has the sources give what somebody wants looked at again."""
        retried = self._merge.state.ledger.retried()
        for source in self._sources:
            source.again(retried)
