"""Orders of one piece of work on their way to a cluster and back: which are out, what becomes of one that does not come
back, and which machine is to do it then. An attempt that was given up can do no harm: it writes where nobody reads, or
the same bytes to the same places.
"""

from __future__ import annotations

import logging
import pickle
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from continual.errors import Abandoned, NotHere, Refuse, Retry
from continual.executors.away import WorkAnswer, answer_of, software
from continual.executors.cluster_figures import FIGURES, DrivenWork
from continual.executors.contract import Task
from continual.executors.driving import Began, Came, SendOrder
from continual.executors.links import Answers, ClusterLink
from continual.executors.orders import order_of
from continual.executors.patience import Patience, addresses, cores, fitting, ids_of
from continual.retrying import order_bound, start_bound

T = TypeVar("T")
LOOK = 0.5
"""Seconds after which it is looked whether to stop."""
DEATHS = 3
"""Orders in a row that are lost on a machine until it is avoided: a worker may be killed for once."""
_log = logging.getLogger("continual.executors")


class SendLimits(NamedTuple):
    """`workers`: orders at a time at most (0: twice as many as the cluster has cores); `tries`: how often one is sent
    out again; `seconds`: how long a machine may work on one (None: by what others took)."""

    workers: int
    tries: int
    seconds: float | None


class _Order(Generic[T]):
    """An order, through all its tries: how often it was sent out again, how often because of its time, and because no
    worker began with it; by which ids Ray knows the machines that it was on and did not come back from; when it was
    sent, where it is now, and since when."""

    def __init__(self, group: Sequence[Task[T]]) -> None:
        self.group = group
        self.name = group[0].name
        self.nbytes = sum(task.reads for task in group)
        self.tries = 0
        self.slow = 0
        self.waits = 0
        self.was_on: dict[str, frozenset[str]] = {}
        self.machine = ""
        self.node = ""
        self.began: float | None = None
        self.sent = 0.0
        self.options: dict[str, Any] = {}
        self.avoids: frozenset[str] = frozenset()
        self.could: frozenset[str] = frozenset()
        """What Ray was told of it as it was sent, the ids of machines that may not do it, and of those that could."""

    def left(self, ids: frozenset[str]) -> None:
        """It is not where it was any more, which Ray knows under these ids."""
        if self.machine:
            self.was_on[self.machine] = ids
        self.tries += 1
        self.machine, self.node, self.began = "", "", None

    def is_late(self, now: float) -> bool:
        """Whether a worker should have begun with it by now."""
        return self.began is None and now - self.sent > start_bound(self.waits)

    @property
    def ids(self) -> frozenset[str]:
        """Of all machines that it did not come back from."""
        return frozenset[str]().union(*self.was_on.values())


class Sending(Generic[T]):
    """The orders of one call of `map`. `options` says what Ray is told of one; `go_on` raises where it is to stop."""

    def __init__(
        self,
        link: ClusterLink,
        limits: SendLimits,
        options: Callable[[Sequence[Task[T]]], dict[str, Any]],
        driven: DrivenWork,
        go_on: Callable[[], None],
    ) -> None:
        self._link, self._limits, self._options, self._driven, self._go_on = link, limits, options, driven, go_on
        self._answers, self._patience = Answers(), Patience()
        self._running: dict[int, _Order[T]] = {}
        self._jobs: set[str] = set()
        self._slowest = self._looked = self._begun_looked = 0.0
        self._alive: frozenset[str] | None = None
        """Ids of the machines that were there at the last look."""
        self._deaths: dict[str, int] = {}
        self._begins: dict[str, float] = {}
        """When a machine last began with an order."""
        self._apart: set[str] = set()
        """Ids of machines that do not see what this work needs."""
        self._accused: set[str] = set()
        """Machines that are avoided because of this work, while nobody else has done what they could not."""

    def run(self, groups: Sequence[Sequence[Task[T]]]) -> Iterator[tuple[str, T]]:
        """Has all of them done; what each task gave, by its name. Raises what `go_on` does, the error of an order that
        is a refusal, or that no machine could do, and Retry."""
        waiting = deque(_Order(group) for group in groups)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < (self._limits.workers or 2 * cores(self._link)):
                    self._send(waiting.popleft())
                waiting.extendleft(self._overdue())
                came = self._heard()
                order = None if came is None else self._running.pop(came.number, None)
                if came is None or order is None:
                    continue
                answer = self._answer(order, came)
                if answer is None:
                    waiting.appendleft(order)
                    continue
                for task, result in zip(order.group, answer.results, strict=True):
                    yield task.name, result  # type: ignore[misc]
        except BaseException:
            FIGURES.avoided.forgive(self._link.address, self._accused)
            raise
        finally:
            self._link.end(list(self._running), self._answers)
            for job in self._jobs:
                self._link.job(job, None)

    def _send(self, order: _Order[T]) -> None:
        """Sends an order out, and its job before the first one."""
        what, options = order_of(order.group), self._options(order.group)
        assert what is not None
        if what.job.id not in self._jobs:
            self._link.job(what.job.id, pickle.dumps(what.job))
            self._jobs.add(what.job.id)
        avoid = self._avoid(order, options)
        order.sent, order.options, order.avoids = time.monotonic(), options, frozenset(avoid)
        order.could = fitting(self._link, options) - order.avoids
        number = self._link.order(SendOrder(0, what.job.id, what.names, software(), options, avoid), self._answers)
        self._running[number] = order
        self._driven.sent(order.name, len(order.group))

    def _heard(self) -> Came | None:
        """What came of an order; None where nothing came for a moment, or that one has begun."""
        try:
            came = self._answers.get(timeout=LOOK)
        except queue.Empty:
            self._go_on()
            oldest = next(iter(self._running.values()), None)
            if oldest is not None:
                begun = any(one.began is not None for one in self._running.values())
                self._patience.look(self._link, len(self._running), self._options(oldest.group), begun=begun)
            return None
        self._go_on()
        if came is None:
            self._running.clear()
            raise self._link.gone()
        if isinstance(came, Came):
            self._patience.renew()
            return came
        self._begun(came)
        return None

    def _begun(self, began: Began) -> None:
        order = self._running.get(began.number)
        if order is not None:
            order.machine, order.node, order.began = began.machine, began.node, time.monotonic()
            self._begins[began.machine] = order.began
            self._driven.began(order.name, began.machine)

    def _answer(self, order: _Order[T], came: Came) -> WorkAnswer | None:
        """The answer to an order; None where it is to be sent out again. Raises its error where it is not."""
        if came.lost:
            self._lost(order, _died(came.why))
            return None
        answer = came.why if came.answer is None else answer_of(came.answer)
        if isinstance(answer, str):
            order.machine = order.machine or came.machine
            where = f" on the machine {order.machine}" if order.machine else ""
            self._elsewhere(
                order,
                Retry(
                    f"a worker of the cluster cannot do the order that begins with {order.name} ({answer}{where}): "
                    "is continual installed on every machine, in the same version? Nothing was settled"
                ),
            )
            return None
        if answer.error is not None:
            order.machine = answer.machine
            self._elsewhere(order, answer.error)
            return None
        self._done(order, answer)
        return answer

    def _done(self, order: _Order[T], answer: WorkAnswer) -> None:
        self._slowest = max(self._slowest, answer.seconds)
        self._deaths.pop(answer.machine, None)
        self._accused -= order.was_on.keys() - {answer.machine}
        FIGURES.avoided.works(self._link.address, answer.machine)
        self._driven.came(order.name, answer.machine, order.nbytes, answer.seconds)

    def _elsewhere(self, order: _Order[T], error: Exception) -> None:
        """Has an order that a machine could not do done by another. Raises the error where it is that of the candidate,
        or no other machine is left: it is not the machine then."""
        machine, ids = order.machine, ids_of(self._link, order.machine, order.node)
        name, options = order.name, self._options(order.group)
        order.left(ids)
        others = fitting(self._link, options) - order.ids - self._apart
        if isinstance(error, Refuse | Abandoned) or not machine or order.tries > self._limits.tries or not others:
            raise error
        self._driven.failed(name)
        if isinstance(error, NotHere):
            if not ids <= self._apart:
                _log.warning("the machine %s gets no orders of this work: %s", machine, error)
            self._apart |= ids
            return
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._accuse(machine, ids, why, f"its order that begins with {name} is sent to another")

    def _lost(self, order: _Order[T], why: str) -> None:
        """Has an order that was lost with its worker done again. Raises Retry where that was too often."""
        machine, ids = self._again(order, why)
        where = f" on the machine {machine}" if machine else ""
        _log.warning("a worker died%s, and its order that begins with %s is sent out again: %s", where, order.name, why)
        if machine:
            self._deaths[machine] = self._deaths.get(machine, 0) + 1
            if self._deaths[machine] >= DEATHS:
                why = f"{DEATHS} orders in a row were lost there with their workers, the last one: {why}"
                self._accuse(machine, ids, why, "its orders are sent to others")

    def _overdue(self) -> list[_Order[T]]:
        """Orders on which a machine works for too long: they are ended there, and are to be sent out again. Raises
        Retry where that was too often."""
        now, found = time.monotonic(), list[_Order[T]]()
        if now < self._looked + LOOK:
            return found
        self._looked = now
        found += self._stranded() + self._not_begun(now)
        for number, order in list(self._running.items()):
            bound = self._limits.seconds or order_bound(self._slowest, order.slow, order.nbytes)
            if order.began is None or now - order.began <= bound:
                continue
            del self._running[number]
            self._link.drop(number)
            order.slow += 1
            why = f"it worked on one for more than {bound:.0f} s, and ray.order_timeout sets another bound"
            machine, ids = self._again(order, why)
            self._accuse(machine, ids, why, f"that order, which begins with {order.name}, is ended and sent to another")
            found.append(order)
        return found

    def _stranded(self) -> list[_Order[T]]:
        """Orders that wait for a machine which none is any more: those that may do them, or have what they reserve,
        have gone. They are sent out anew, to whoever is there."""
        alive = frozenset(str(node["NodeID"]) for node in self._link.nodes)
        if alive == self._alive:
            return []
        self._alive = alive
        return self._taken_back(
            number
            for number, one in self._running.items()
            if one.began is None
            and not fitting(self._link, one.options) - one.avoids
            and fitting(self._link, self._options(one.group))
        )

    def _not_begun(self, now: float) -> list[_Order[T]]:
        """Orders with which nobody begins, though not all machines are at work on others of this process: they are sent
        out anew. A machine is avoided on which none began, while others began with some: its workers may not start."""
        if now < self._begun_looked + start_bound(0) / 20:  # many may wait for long
            return []
        self._begun_looked = now
        late = [(n, one) for n, one in self._running.items() if one.is_late(now)]
        found, working = list[int](), {one.machine for one in FIGURES.seen().out} if late else set()
        working |= {one.machine for one in self._running.values() if one.began is not None}
        for number, order in late:
            machines = addresses(self._link, order.could)  # one that has joined since may have to start its workers
            heard = machines & (working | {name for name, when in self._begins.items() if when >= order.sent})
            for machine in machines - heard if heard else ():
                why = f"none of its workers began with an order for {now - order.sent:.0f} s, and those of others did"
                then = f"the order that begins with {order.name} goes to those"
                self._accuse(machine, ids_of(self._link, machine), why, then)
                self._accused.discard(machine)  # that others begin shows it already
            if machines - heard:
                order.waits += 1
                found.append(number)
        return self._taken_back(found)

    def _taken_back(self, numbers: Iterable[int]) -> list[_Order[T]]:
        """Ends orders that wait; they are to be sent out again."""
        found = [(number, self._running[number]) for number in numbers]
        for number, _ in found:
            del self._running[number]
            self._link.drop(number)
        return [one for _, one in found]

    def _again(self, order: _Order[T], why: str) -> tuple[str, frozenset[str]]:
        """Counts an order that a machine did not give back; which machine, and by which ids Ray knows it. Raises Retry
        where that was too often."""
        machine, ids = order.machine, ids_of(self._link, order.machine, order.node)
        order.left(ids)
        times = self._driven.was_lost(order.name)
        if order.tries > self._limits.tries:
            raise Retry(
                f"the order that begins with {order.name} lost its worker {times} times ({why}); nothing was settled"
            )
        return machine, ids

    def _accuse(self, machine: str, ids: frozenset[str], why: str, then: str) -> None:
        """Has a machine avoided, and says so. It is forgiven where nobody else can do it either."""
        if seconds := FIGURES.avoided.avoid(self._link.address, machine, ids, why):
            self._accused.add(machine)
            _log.warning("the machine %s gets no orders for %.0f s, and %s: %s", machine, seconds, then, why)

    def _avoid(self, order: _Order[T], options: dict[str, Any]) -> tuple[str, ...]:
        """The ids of machines that are not to do an order: those that it did not come back from, and those that are
        avoided, as long as another one is left."""
        alive, there = {str(node["NodeID"]) for node in self._link.nodes}, fitting(self._link, options)
        own = order.ids | self._apart
        avoided = frozenset[str]().union(*(one.ids for one in FIGURES.avoided.now(self._link.address).values()))
        for ids in (own | avoided, own):
            if there - ids:
                return tuple(sorted(ids & alive))
        return ()


def _died(why: str) -> str:
    """What Ray says of a worker that died, and what to do where memory was the reason."""
    advice = "; set ray.memory higher, so that fewer orders run on a machine at a time"
    return why + advice if "OutOfMemory" in why else why
