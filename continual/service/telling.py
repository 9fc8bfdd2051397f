"""Who is told of a publication: the hooks of the settings, each by a task of its own. What is published, and when, is
decided in `outlets.py`; how a server is told, in `publish/hooks.py`."""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import re
from collections.abc import Coroutine
from functools import partial

import structlog

from continual.api import Merge
from continual.config import HookSettings, Settings
from continual.errors import ContinualError, Misconfigured
from continual.publish import hooks
from continual.publish.published import Published
from continual.service.aside import Recorder, aside
from continual.service.failures import Failures, told
from continual.service.outgoing import outgoing
from continual.state.entries import HookEntry
from continual.state.parts import HookCall
from continual.state.software import software

_GLOB = re.compile(r"[*?[]")


def check(settings: Settings) -> None:
    """Raises Misconfigured for hooks that cannot be called, or that are told of views which are not there or come in a
    form that the server cannot load."""
    hooks.check(settings.hooks)
    for number, hook in enumerate(settings.hooks, 1):
        if hook.after == "candidate" and not any(_has_canary(settings, hook.view)):
            of = "release" if hook.view is None else "views.NAME"
            raise Misconfigured(f"hook {number} ({hook.kind}): after = candidate, and {of}.canary is not set")
        if hook.view is not None and (wrong := _wrong(hook, hook.view, settings)):
            raise Misconfigured(f"hook {number} ({hook.kind}): view = {hook.view}: {wrong}")


def _has_canary(settings: Settings, word: str | None) -> list[bool]:
    """Of each view that a word names, or of the merge, whether it has a canary."""
    if word is None:
        return [settings.release.canary is not None]
    return [view.canary is not None for name, view in settings.views.items() if fnmatch.fnmatchcase(name, word)]


def _wrong(hook: HookSettings, word: str, settings: Settings) -> str | None:
    named = [name for name in settings.views if fnmatch.fnmatchcase(name, word)]
    if not named and not _GLOB.search(word):
        return f"the settings name no such view; there are {', '.join(settings.views) or 'none'}"
    if hook.kind not in ("sglang", "vllm") and not hook.serves_lora:
        return None
    if hook.serves_lora and len({hook.served_as(name) for name in named}) < len(named):
        return f"{' and '.join(named[:2])} would be served under one name, {hook.name}: write {{view}} into it"
    for name in named:
        view = settings.views[name]
        if view.current is None:
            return f"views.{name}.current is not set, and the server loads what lies there"
        if not hook.serves_lora and view.as_lora is not None:
            return f"views.{name}.as_lora is set, and this kind loads a whole model: use {hook.kind}-lora"
        if hook.serves_lora and view.as_lora is not None and view.format != "peft":
            return f"views.{name}.format = {view.format}, and the server loads adapters of PEFT"
    return None


@dataclasses.dataclass(slots=True)
class Waiter:
    """A hook, its number among the settings (from 1), and the newest publication of each view (None: of the merge) that
    it has not been told of."""

    number: int
    hook: HookSettings
    newest: dict[str | None, Published] = dataclasses.field(default_factory=dict)
    fresh: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def hears(self, settings: Settings, view: str | None, after: str) -> bool:
        """Whether it is told of a view, or of the merge, after this kind of publication: the link `current`, a
        release, or either as a canary."""
        word = self.hook.view
        if (word is None) != (view is None) or not fnmatch.fnmatchcase(view or "", word or ""):
            return False
        first = "current" if outgoing(settings, view).current else "release"
        return (self.hook.after or first) == after


class Telling:
    """The hooks that wait to be told."""

    def __init__(self, merge: Merge, failures: Failures, record: Recorder) -> None:
        self._merge = merge
        self._metrics = failures.metrics
        self._health = failures.health
        self._tracing = failures.tracing
        self._record = record
        self._waiters = [Waiter(number, hook) for number, hook in enumerate(merge.settings.hooks, 1)]
        self._log = structlog.get_logger("continual")

    def tasks(self) -> list[Coroutine[None, None, None]]:
        """The coroutines to run, one a hook; they end when they are cancelled."""
        return [self._call(waiter) for waiter in self._waiters]

    def waits(self, published: Published, after: str) -> bool:
        """Whether a hook comes after such a publication and was not told of it."""
        return any(self._hears(waiter, published, after) for waiter in self._waiters)

    def rank(self, view: str | None, after: str = "current") -> int | None:
        """The rank of the adapter that is to lie beside a whole model for the servers that load one; None: none."""
        heard = [waiter.hook for waiter in self._waiters if waiter.hears(self._merge.settings, view, after)]
        return max((hook.rank for hook in heard if hook.serves_lora), default=None)

    def served(self, view: str | None, after: str = "current") -> frozenset[str] | None:
        """The marks of the adapters that servers were given last of a view, or (None) of the merge, and may read again
        at any time. None where no server is given one."""
        heard = [waiter for waiter in self._waiters if waiter.hears(self._merge.settings, view, after)]
        given = [waiter for waiter in heard if waiter.hook.serves_lora]
        calls = self._merge.state.publications
        last = [calls.call(view, waiter.number, hooks.target(waiter.hook)) for waiter in given]
        return frozenset(call.mark for call in last if call is not None and call.mark) if given else None

    def hand(self, published: Published, after: str) -> None:
        """Wakes the hooks that come after such a publication and were not told of it."""
        for waiter in self._waiters:
            if self._hears(waiter, published, after):
                waiter.newest[published.view] = published
                waiter.fresh.set()

    def forget(self, view: str | None) -> None:
        """Nobody is told of a view any more that the settings do not name any more, nor of what went wrong with it."""
        for waiter in self._waiters if view not in self._merge.settings.views else ():
            waiter.newest.pop(view, None)
            self._health.works("hook", _which(waiter, view))

    def _hears(self, waiter: Waiter, published: Published, after: str) -> bool:
        """Whether it is told of this. After a restart nobody is told twice: the ledger has every call."""
        if not waiter.hears(self._merge.settings, published.view, after):
            return False
        seq = published.seq or 0
        wanted = (published.view, waiter.number, hooks.target(waiter.hook))
        said = (c.entry for c in reversed(self._merge.state.ledger.log[seq:]) if c.kind == "publish")
        calls = (entry for entry in said if isinstance(entry, HookEntry))
        last = next((c for c in calls if (c.view, c.hook.number, c.hook.target) == wanted), None)
        return last is None or last.of != seq or (last.mark is not None and last.mark != published.mark)

    async def _call(self, waiter: Waiter) -> None:
        """Tells one server of what is new, one publication at a time. Nothing waits for it."""
        while True:
            await waiter.fresh.wait()
            waiter.fresh.clear()
            while waiter.newest:
                view = next(iter(waiter.newest))
                which = _which(waiter, view)
                try:
                    await self._call_once(waiter, waiter.newest.pop(view), which)
                except Exception as error:  # the next publication calls it again
                    self._metrics.error("hook")
                    self._fails(which, view, told(error))
                    trace = None if isinstance(error, ContinualError) else error
                    self._log.error("hook failed", what=which, error=told(error), exc_info=trace)

    def _fails(self, which: str, view: str | None, message: str) -> None:
        """Degraded by a call that failed; not where its view was taken out meanwhile: nobody would call again."""
        if view is None or view in self._merge.settings.views:
            self._health.fails("hook", which, message)

    async def _call_once(self, waiter: Waiter, published: Published, which: str) -> None:
        """Tells one server, and records what became of it. Raises Retry and Halt where the record cannot be made."""
        with self._tracing.span("hook", kind=waiter.hook.kind, seq=published.seq, view=published.view) as span:
            found = await aside(partial(hooks.call, waiter.hook, published, self._merge.stopping))
            span.set_attribute("continual.ok", found.ok)
        self._metrics.hook(waiter.hook.kind, ok=found.ok)
        log = self._log.info if found.ok else self._log.error
        log("hook", **found.body(), seq=published.seq, **({"view": published.view} if published.view else {}))
        if found.ok:
            self._health.works("hook", which)
        else:
            self._metrics.error("hook")
            self._fails(which, published.view, found.message)
        call = HookCall(
            number=waiter.number,
            kind=found.kind,
            target=found.target,
            ok=found.ok,
            attempts=found.attempts,
            seconds=round(found.seconds, 3),
            message=found.message,
        )
        of = f"record {published.seq}" + (f" of the view {published.view}" if published.view else "")
        said = f"hook {found.kind} for {of}: {'done' if found.ok else found.message}"
        await self._record(
            HookEntry(
                message=said,
                software=software(),
                of=published.seq or 0,
                hook=call,
                view=published.view,
                mark=published.mark,
            )
        )


def _which(waiter: Waiter, view: str | None) -> str:
    """What is called, and of what, as the status names it."""
    return f"{waiter.hook.kind} ({hooks.target(waiter.hook)})" + (f", view {view}" if view else "")
