"""What the daemon keeps on the newest merge: the link `current`, the release on the Hub, and the servers that are told.
Tasks of their own: none holds up a fold.

Each outlet does one thing at a time; what is folded meanwhile is made up for by the next. One that failed is tried
again after a delay that doubles, or with the next fold.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from continual.api import Merge
from continual.config import HookSettings
from continual.errors import ContinualError, Misconfigured, Retry
from continual.hub import Trouble
from continual.publish import folder, hooks
from continual.publish.hooks import Published
from continual.publish.hub import newest_release
from continual.publish.lora import LoraTarget
from continual.retrying import PARKED, Fault, retry_delay
from continual.service import release as releasing
from continual.service import view_outlets
from continual.service.failures import Failures, contained, told
from continual.state.entries import Entry, HookEntry
from continual.state.parts import HookCall
from continual.state.software import software

T = TypeVar("T")
Recorder = Callable[[Entry], Awaitable[None]]
"""Makes a record on the thread that writes the state."""
HOPELESS = (Fault.TOKEN, Fault.DENIED, Fault.REQUEST)
"""Faults of the Hub that only a person can mend."""


@dataclasses.dataclass(slots=True)
class Waiter:
    """A hook, its number among the settings (from 1), and the newest publication it has not been told of."""

    number: int
    hook: HookSettings
    after: str
    newest: Published | None = None
    fresh: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class Outlets:
    """Everything that follows a fold. `told` is called when something was published."""

    def __init__(self, merge: Merge, failures: Failures, record: Recorder, told: Callable[[], None]) -> None:
        self.merge = merge
        self.settings = merge.settings
        self.failures = failures
        self.metrics = failures.metrics
        self.health = failures.health
        self.record = record
        self.told = told
        self._log = structlog.get_logger("continual")
        first = "current" if self.settings.current else "release"
        self.hooks = [Waiter(number, hook, hook.after or first) for number, hook in enumerate(self.settings.hooks, 1)]
        self._fresh: list[asyncio.Event] = []

    def fresh(self) -> None:
        """Hears that the merged model is another one."""
        for event in self._fresh:
            event.set()

    def tasks(self) -> list[Coroutine[None, None, None]]:
        """The coroutines to run; they end when they are cancelled."""
        found = [self._call(waiter) for waiter in self.hooks]
        if self.settings.current is not None:
            found.append(self._keep("publish", self._current))
        if self.settings.release.repo is not None:
            found.append(self._keep("release", self._release))
        for name, view in self.settings.views.items():
            if view.current is not None:
                found.append(self._keep("publish", partial(self._view_current, name), f"view {name}"))
            if view.repo is not None:
                found.append(self._keep("release", partial(self._view_release, name), f"view {name}"))
        return found

    async def _keep(self, what: str, do: Callable[[int], Awaitable[bool]], which: str = "") -> None:
        """Has `do` publish the newest model whenever there is another one; `do` says whether there is more to do at
        once. `which`: the view that it publishes, empty for the merge."""
        fresh = asyncio.Event()
        self._fresh.append(fresh)
        fresh.set()
        failures = 0
        while True:
            await fresh.wait()
            fresh.clear()
            model = self.merge.state.ledger.model
            if model is None:
                continue
            try:
                if await do(model.seq):
                    fresh.set()
                failures = 0
                self.health.works(what, which or what)
                self.told()
            except Exception as error:  # whatever it is, the folds go on
                failures += 1
                delay = again_after(error, failures) if what == "release" else retry_delay(failures)
                self.metrics.error(what)
                self.health.fails(what, which or what, told(error))
                known = isinstance(error, OSError | ContinualError)
                trace = None if known else error
                more = {"what": which} if which else {}
                self._log.error(
                    f"{what} failed", seq=model.seq, error=told(error), retry_seconds=delay, exc_info=trace, **more
                )
                asyncio.get_running_loop().call_later(delay, fresh.set)

    async def _current(self, seq: int) -> bool:
        """Points the link `current` at an export of record `seq`, and hands it to the hooks. Never more to do."""
        link = self.settings.current
        assert link is not None

        def write(directory: Path) -> Path:
            return self.merge.export(folder.Target(directory, at=seq))

        time = self.merge.state.ledger.get(seq).time
        target = await asyncio.to_thread(contained(partial(folder.keep_current, link, seq, write, time)))
        self._log.info("published", seq=seq, directory=str(target))
        waiting = [
            waiter.hook for waiter in self.hooks if waiter.after == "current" and not self._was_told(waiter, seq)
        ]
        if not waiting:
            return False
        published = Published(state=self.merge.state.id, seq=seq, directory=target)
        ranks = [w.hook.rank for w in self.hooks if w.hook.kind == "vllm-lora" and w.after == "current"]
        if ranks:
            adapter = await asyncio.to_thread(contained(partial(self._lora, link, seq, max(ranks))))
            published = dataclasses.replace(published, lora=adapter)
        self._hand(published, "current")
        return False

    def _lora(self, link: Path, seq: int, rank: int) -> Path:
        """An adapter of the merge, kept beside `current` as that is."""

        def write(directory: Path) -> Path:
            return self.merge.export_lora(LoraTarget(directory, rank, at=seq)).directory

        time = self.merge.state.ledger.get(seq).time
        return folder.keep_current(link.with_name(f"{link.name}-lora"), seq, write, time)

    async def _release(self, newest: int) -> bool:
        """Releases the newest record that changed the model; where every one is wanted, the next after the last that
        was released. Whether there are more."""
        asked = self.settings.release
        state = self.merge.state
        done = newest_release(state.ledger.log, asked.repo or "", asked.branch)
        last = -1 if done is None else done.of
        if last >= newest or not state.ledger.folds(newest):
            if done is not None:  # a kill may have come between the release and its hooks
                was = Published(state=state.id, seq=last, repo=done.repo, commit=done.commit, tag=done.tag)
                self._hand(was, "release")
            return False
        seq = releasing.next_record(self.merge, last) if asked.every else newest
        found = await aside(partial(releasing.release, self.merge, seq, wait=True))
        await self.record(releasing.entry(found))
        self.metrics.released(found.uploaded)
        self._log.info(
            "released",
            seq=seq,
            repo=found.repo,
            commit=found.commit,
            tag=found.tag,
            uploaded_bytes=found.uploaded,
            new=found.new,
        )
        facts = Published(state=state.id, seq=seq, repo=found.repo, commit=found.commit, url=found.url, tag=found.tag)
        self._hand(facts, "release")
        return seq < newest

    async def _view_current(self, name: str, seq: int) -> bool:
        """Points the link of a view at an export of record `seq`, where it reads something else than what is there."""
        directory = await asyncio.to_thread(contained(partial(view_outlets.put, self.merge, name, seq)))
        if directory is not None:
            self._log.info("published", view=name, seq=seq, directory=str(directory))
        return False

    async def _view_release(self, name: str, seq: int) -> bool:
        """Releases a view, where it reads something else than what is out."""
        if await asyncio.to_thread(contained(partial(view_outlets.is_out, self.merge, name, seq))):
            return False
        found = await aside(partial(releasing.release, self.merge, seq, view=name, wait=True))
        done = newest_release(self.merge.state.ledger.log, found.repo, found.branch)
        if done is None or done.of != found.seq:
            await self.record(releasing.entry(found, name))
            self.metrics.released(found.uploaded)
            self._log.info("released", view=name, seq=seq, repo=found.repo, commit=found.commit, tag=found.tag)
        return False

    def _hand(self, published: Published, after: str) -> None:
        """Wakes the hooks that come after such a publication and were not told of it."""
        for waiter in self.hooks:
            if waiter.after == after and not self._was_told(waiter, published.seq or 0):
                waiter.newest = published
                waiter.fresh.set()

    def _was_told(self, waiter: Waiter, seq: int) -> bool:
        """Whether the ledger has a call of such a hook for this record: after a restart nobody is told twice."""
        wanted = (seq, waiter.number, hooks.target(waiter.hook))
        calls = (c.entry for c in reversed(self.merge.state.ledger.log[seq:]) if isinstance(c.entry, HookEntry))
        return any((call.of, call.hook.number, call.hook.target) == wanted for call in calls)

    async def _call(self, waiter: Waiter) -> None:
        """Tells one server of the newest publication, one at a time. Nothing waits for it."""
        while True:
            await waiter.fresh.wait()
            waiter.fresh.clear()
            which = f"{waiter.hook.kind} ({hooks.target(waiter.hook)})"
            try:
                await self._call_once(waiter, which)
            except Exception as error:  # the next publication calls it again
                self.metrics.error("hook")
                self.health.fails("hook", which, told(error))
                trace = None if isinstance(error, ContinualError) else error
                self._log.error("hook failed", what=which, error=told(error), exc_info=trace)

    async def _call_once(self, waiter: Waiter, which: str) -> None:
        """Tells one server, and records what became of it. Raises Retry and Halt where the record cannot be made."""
        published = waiter.newest
        assert published is not None
        found = await aside(partial(hooks.call, waiter.hook, published, self.merge.stopping))
        self.metrics.hook(waiter.hook.kind, ok=found.ok)
        log = self._log.info if found.ok else self._log.error
        log("hook", **found.body(), seq=published.seq)
        if found.ok:
            self.health.works("hook", which)
        else:
            self.health.fails("hook", which, found.message)
        call = HookCall(
            number=waiter.number,
            kind=found.kind,
            target=found.target,
            ok=found.ok,
            attempts=found.attempts,
            seconds=round(found.seconds, 3),
            message=found.message,
        )
        said = f"hook {found.kind} for record {published.seq}: {'done' if found.ok else found.message}"
        await self.record(HookEntry(message=said, software=software(), of=published.seq or 0, hook=call))


def again_after(error: Exception, failures: int) -> float:
    """Seconds until a release that failed for the `failures`-th time is tried again: as any other failure, never before
    a server asked for; what only a person can mend is tried once an hour, and with the next fold."""
    hopeless = isinstance(error, Misconfigured) or (isinstance(error, Trouble) and error.fault in HOPELESS)
    after = error.after if isinstance(error, Retry) else 0.0
    return retry_delay(failures, max(PARKED if hopeless else 0.0, after))


async def aside(call: Callable[[], T]) -> T:
    """What `call` returns, on a thread that nobody waits for when the process ends: an upload may take hours, and one
    that is cut off has done nothing. Raises what `call` raises."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def succeeded(result: T) -> None:
        if not found.done():
            found.set_result(result)

    def failed(error: Exception) -> None:
        if not found.done():
            found.set_exception(error)

    def run() -> None:
        tell: Callable[[], None]
        try:
            tell = partial(succeeded, contained(call)())
        except Exception as error:
            tell = partial(failed, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="publish", daemon=True).start()
    return await found
