"""What stands for flock on an object store: an object that its holder writes again and again, and that is worth nothing
once it was not written for as long as its lease. FORMAT.md, *On an object store*, has the rules of the clocks.

Whether somebody else's lease has run out is judged by the store's clock alone: the time at which the store says that it
was written last, against that of an object that was written just now. Whether one's own has is judged by one's own
clock, which goes on while the machine sleeps, from before the last write that was answered.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from datetime import datetime

from continual.errors import Misconfigured
from continual.stores import ObjectPath

PROBE = ".probe-"
"""What the name of an object begins with that is made to ask a store for its time."""
BEATS = 6
"""How often it is written in one lease."""
_COARSE = 2.0
"""Seconds by which two times of a store may be wrong against each other: they are whole seconds."""


def boottime() -> float:
    """Seconds that this machine is up, asleep or not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def now(path: ObjectPath) -> datetime:
    """The time by the clock of the store that has the state in `path`. It is asked by a key of its own that is created
    twice: raises Misconfigured where the store allows it. Raises OSError."""
    key = f"{path.key}/lock/{PROBE}{secrets.token_hex(8)}"
    objects = path.objects
    try:
        for data in (b"one", b"two"):
            try:
                objects.create(key, data)
            except FileExistsError:  # the second, or the first where its answer was lost and obstore asked again
                break
        if bytes(objects.get(key)[0]) != b"one":
            raise Misconfigured(
                f"{path}: this store overwrites what it is asked to create (it ignores If-None-Match), so two writers "
                "would overwrite each other's records: use one that honours conditional writes"
            )
        return objects.head(key).modified
    finally:
        objects.delete([key])


def ran_out(written: datetime, now_: datetime, lease: float) -> bool:
    """Whether the lease of what was last written then is over, by the store's clock."""
    return (now_ - written).total_seconds() > lease + _COARSE


class Heartbeat:
    """Writes an object again and again, from a thread of its own. `body` gives its contents, `lost` whether somebody
    else has taken what it stands for."""

    def __init__(self, at: ObjectPath, body: Callable[[], bytes], lost: Callable[[], bool], since: float) -> None:
        self._at, self._body, self._lost_to = at, body, lost
        self._until = since + at.objects.lease
        self._taken = False
        self.trouble: OSError | None = None
        """Why it could not be written the last time."""
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def left(self) -> float:
        """Seconds for which it is held if no further write is answered; none, or less, where it is lost."""
        return 0.0 if self._taken else self._until - boottime()

    def beat(self) -> None:
        """Writes it now. Raises OSError. Where it has run out it is not written any more: somebody may have taken what
        it stands for."""
        with self._turn:
            if self._stop.is_set() or self.left() <= 0:
                return
            begun = boottime()
            try:
                self._at.objects.put_now(self._at.key, self._body())
                self._taken = self._lost_to()
            except OSError as error:
                self.trouble = error
                raise
            self.trouble = None
            if not self._taken:
                self._until = begun + self._at.objects.lease

    def end(self) -> None:
        """Writes it no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._at.objects.lease / BEATS):
            try:
                self.beat()
            except OSError:  # the next beat tries again, and whoever needs the lease asks how long it lasts
                continue
