"""Settings that change while the daemon runs: SIGHUP has them read again. Which of them take effect at once, and which
only at the next start, stands here for every one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from continual import gates
from continual.api import Merge
from continual.config import Settings
from continual.errors import ContinualError
from continual.executors import links
from continual.hub import must_be_online
from continual.publish import bom
from continual.service import logs, telling, view_settings
from continual.service.control.turns import Turns
from continual.service.supervised import Supervisor
from continual.signing import signer as signing
from continual.sources.contract import Source

AT_ONCE = frozenset(
    {
        "bom",
        "drain",
        "evaluation",
        "executor",
        "gates",
        "keep",
        "keep_bytes",
        "lineage",
        "log_file",
        "log_json",
        "log_level",
        "max_base_ratio",
        "max_mean_ratio",
        "memory",
        "missing",
        "ray",
        "signing",
        "tied",
        "updates",
        "views",
        "vocab",
        "weight",
        "weights",
        "workers",
    }
)
"""Settings that are read at use: a change counts from the next candidate on."""
AT_START = frozenset(
    {
        "admin_token",
        "allow_remote",
        "allowed_hosts",
        "base",
        "before",
        "current",
        "device",
        "heads",
        "hooks",
        "host",
        "hub",
        "lease",
        "nested",
        "notify",
        "objective",
        "options",
        "otlp",
        "port",
        "promote_token",
        "reading",
        "release",
        "rescan",
        "rounds",
        "rows",
        "rule",
        "select",
        "settle",
        "sources",
        "state",
        "tokenizer",
        "watch",
        "webhook_secret",
    }
)
"""Settings from which the parts of the daemon are made: a change needs a restart."""


class Reloading:
    """Reads the settings of a running daemon again, by `read`, and has those that can change changed at a turn of the
    thread that folds. `reloaded` is called when they have."""

    def __init__(
        self,
        merge: Merge,
        turns: Turns,
        read: Callable[[], Settings] | None,
        sources: Sequence[Source] = (),
        reloaded: Callable[[], None] = lambda: None,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._merge = merge
        self._supervisor = supervisor or Supervisor()
        self._reloaded = reloaded
        self._sources = sources
        self._turns = turns
        self._read = read
        self._log = structlog.get_logger("continual")
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def ask(self) -> None:
        """Has the settings read again, on the event loop: the handler of the signal. One that comes meanwhile has them
        read once more: the file may have changed after it was read."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._reload_all())

    async def _reload_all(self) -> None:
        self._supervisor.reloading()
        try:
            while self._again:
                self._again = False
                await self._reload()
        finally:
            self._supervisor.ready()

    async def _reload(self) -> None:
        """Says what changed and what needs a restart. Settings that cannot be used change nothing, and that is said."""
        if self._read is None:
            self._log.warning("not reloaded", error="this daemon was not started from a settings file")
            return
        try:
            found = await asyncio.to_thread(self._read)
            changed = await self._turns.ask("reload", lambda: self._adopt(found))
        except ContinualError as error:
            self._log.error("not reloaded", error=str(error), hint="the settings stay as they were")
            return
        now = sorted(changed & AT_ONCE)
        if {"log_file", "log_json", "log_level"} & changed:
            logs.configure(json=found.log_json, level=found.log_level, file=found.log_file)
        again = self._reopen() if changed & AT_ONCE else 0
        if "views" in changed:
            self._reloaded()
        more = {"looked_at_again": again} if again else {}
        self._log.info("reloaded", changed=now, needs_restart=sorted(changed & AT_START), **more)

    def _reopen(self) -> int:
        """Has the sources give the candidates that were refused by settings which have changed. Returns how many there
        are."""
        found = self._merge.standing.reopened()
        for source in self._sources if found else ():
            source.reopen(found)
        return len(found)

    def _adopt(self, found: Settings) -> frozenset[str]:
        """Puts the settings that can change in force; returns which differ. Raises Misconfigured, and then nothing has
        changed."""
        before = self._merge.settings
        changed = frozenset(name for name in type(before).model_fields if getattr(found, name) != getattr(before, name))
        wanted = before.model_copy(update={name: getattr(found, name) for name in changed & AT_ONCE})
        if "views" in changed:
            self._check_views(wanted)
        signing.check(wanted.signing)
        if wanted.bom:
            bom.check()
        if wanted.log_file is not None:
            logs.Appended(wanted.log_file)
        # other threads ask the merge for its gates: never by settings of which none can be made
        gates.make(wanted).the(gates.SignatureGate).check()
        self._merge.settings = wanted
        try:
            _ = self._merge.engine  # made anew, with gates of the new settings
        except ContinualError:
            self._merge.settings = before
            raise
        links.only(wanted.ray.address if wanted.executor == "ray" else None)
        return changed

    def _check_views(self, wanted: Settings) -> None:
        """Raises Misconfigured for views that cannot be read or put out, as at the start."""
        view_settings.check(wanted)
        telling.check(wanted)
        view_settings.must_be_readable(self._merge, wanted)
        if any(view.repo for view in wanted.views.values()):
            must_be_online()
