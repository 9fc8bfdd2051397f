"""A watched folder with all that was seen in it: what is looked at again and when, what is given, and what is noted.

Three things make it look. Notices of the kernel name the directories that changed. A model that was seen is looked at
when its settle time is over. And every `rescan` seconds there is a rescan: of directories without a model by their
time, of which the kernel may have told nothing, and of some of the models that were given, in turn. It spends at most
one part in 2,000 of a processor where it finds nothing new: where there is more to look at, rescans take turns or come
more rarely.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from continual.sources import directories
from continual.sources.directories import FolderSighting, Listing, shown
from continual.sources.noted import Noted
from continual.sources.notices import Notices
from continual.sources.settling import PATIENCE, Settling

SHARE = 0.0005
"""Of a processor that rescans may take."""
FRESH = 2.0
"""Seconds within which a directory may change again and keep its time: file systems count in ticks, some in seconds."""
SOME = 3
"""Things that are named of those that lie loose in one directory."""


@dataclass(slots=True)
class Node:
    """A directory as it was when it was last looked at.

    `depth`: levels below the watched folder; `stamp`: time of change and inode, and `since` when it was that;
    `fresh`: it had changed just before, and may have changed again within the same tick of the file system's clock;
    `below`: the names of the directories in it in which models are looked for. `model`: the names of the files that
    make the model in it, if there is one, and `parts` the folders in it that belong to that; `given`: their signature,
    once it was given or is known as settled under `key`.
    """

    depth: int
    link: bool = False
    stamp: tuple[int, int, int] = (0, 0, 0)
    fresh: bool = False
    below: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    given: int | None = None
    key: str | None = None
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Looking:
    """How a folder is looked through: seconds between two rescans, whether models in models count, whether a key is
    settled; and the clocks: of the processor, and of the world."""

    rescan: float = 30.0
    nested: bool = False
    known: Callable[[str], bool] = lambda _key: False
    spent: Callable[[], float] = time.thread_time
    clock: Callable[[], float] = time.time


@dataclass(slots=True)
class Tree:
    """Everything seen in the folder `root`. One thread at a time; times are those of one clock that the caller has.

    `noted` has what a person should know; `problem` is why the folder itself cannot be looked at.
    """

    root: str
    settling: Settling
    looking: Looking = field(default_factory=Looking)
    notices: Notices | None = None
    noted: Noted = field(init=False)
    problem: str | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    _turn: deque[str] = field(default_factory=deque)
    _next_rescan: float | None = None
    _begun: float = 0.0

    def __post_init__(self) -> None:
        self.noted = Noted(self.settling.settle * PATIENCE)

    def look(self, now: float, changed: Iterable[str] = (), *, everything: bool = False) -> list[FolderSighting]:
        """Looks at what `changed` (or at everything), at what is due, and once in a while at the rest. Returns the
        models that have been still long enough, in their order."""
        first = self._next_rescan is None
        if first or everything:
            for path in (self.root, *self.nodes):
                if path in self.nodes or path == self.root:
                    self.visit(path, now)
        for path in sorted(changed):
            self._changed(path, now)
        for due in self.settling.due(now):
            self.visit(due, now)
        for path in self.noted.due(now):
            self.visit(path, now)
        self.noted.ripen(now)
        if first:
            self.settling.were_still(now, self.looking.clock())
            self._next(now, 0.0)
        elif now >= (self._next_rescan or 0.0):
            self._rescan(now)
        found = self.settling.take(now)
        for model in found:
            self.nodes[model.path].given = hash(model.files)
        return found

    def next_look(self, now: float) -> float:
        """Seconds until it is to look again if nothing is told."""
        waits = [0.0 if self._next_rescan is None else self._next_rescan - now]
        for due in (self.settling.next_look(now), self.noted.next_due(now)):
            if due is not None:
                waits.append(due + 0.01)
        return max(0.0, min(waits))

    def settled(self, path: str, key: str) -> None:
        """Hears under which key a model that was given is settled."""
        if (node := self.nodes.get(path)) is not None:
            node.key = key

    def visit(self, path: str, now: float) -> None:
        """Looks at one directory, and at those in it that were not seen before. Trouble with it is noted and ends
        nothing."""
        try:
            new, links = self._list(path, self.nodes.get(path) or Node(0), now)
        except (FileNotFoundError, NotADirectoryError):
            self.forget(path)
            if path == self.root:
                self.problem = f"{shown(path)}: the folder cannot be reached"
            return
        except OSError as error:
            self._unreadable(path, error.strerror or str(error))
            return
        except Exception as error:  # of ours: the directories beside it are looked at all the same
            if self._unreadable(path, f"an error of continual itself: {error!r}"):
                structlog.get_logger("continual").exception("look failed", path=shown(path))
            return
        if path == self.root:
            self.problem = None
        for name in new:
            self._enter(os.path.join(path, name), name in links, now)

    def forget(self, path: str) -> None:
        """Forgets a directory and all below: it is not there any more, or is not looked at."""
        node = self.nodes.pop(path, None)
        if node is None:
            return
        if self.notices is not None:
            self.notices.remove(path)
            self.notices.change(path, node.parts, ())
        self.settling.gone(path)
        self.noted.say(path, "")
        for name in node.below:
            self.forget(os.path.join(path, name))

    def _enter(self, path: str, link: bool, now: float) -> None:
        """Looks at a directory that was not seen before."""
        if len(self.nodes) >= directories.MOST:
            self.noted.say(f"{self.root}/", f"holds more than {directories.MOST} folders: the others are left out")
            return
        self.nodes[path] = Node(self.nodes[os.path.dirname(path)].depth + 1, link, since=now)
        self.visit(path, now)

    def _list(self, path: str, node: Node, now: float) -> tuple[list[str], frozenset[str]]:
        """Looks at a directory itself. Returns the names of those in it that were not seen before, and which names are
        links. Raises OSError."""
        self.nodes[path] = node
        stat = os.stat(path)
        stamp = (stat.st_ctime_ns, stat.st_ino, stat.st_dev)
        if self.notices is not None and not node.link:
            if stamp[1:] != node.stamp[1:]:
                self.notices.remove(path)  # another directory has this name now
            self.notices.add(path, follow=node.depth == 0)  # before it is listed: nothing is missed in between
        if stamp != node.stamp:
            node.stamp, node.since = stamp, now
        node.fresh = self.looking.clock() - stat.st_ctime < FRESH
        found = directories.listed(path)
        before = set(node.below)
        parts = directories.folders_of(path, found) if node.depth > 0 else ()
        below = directories.searched(found, depth=node.depth, link=node.link, nested=self.looking.nested)
        node.below = tuple(name for name in below if name not in {part.partition("/")[0] for part in parts})
        for name in before.difference(node.below):
            self.forget(os.path.join(path, name))
        if self.notices is not None and not node.link:
            self.notices.change(path, node.parts, parts)
        node.parts = parts
        model = directories.model_in(path, found) if node.depth > 0 else None
        if model is None:
            node.model, node.given, node.key = (), None, None
            self.settling.gone(path)
        else:
            node.model = tuple(sys.intern(file.name) for file in model.files)
            self._saw(node, model, found, now)
        self._note(path, node, found)
        return [name for name in node.below if name not in before], found.links

    def _saw(self, node: Node, model: FolderSighting, found: Listing, now: float) -> None:
        """Has a model wait until it is still, unless it was given as it is or is known as settled."""
        files = hash(model.files)
        if node.given == files and not self._asked_again(node):
            return
        before = self.settling.seen(model.path)
        same = before is not None and before.files == model.files
        if not same:
            key = next((key for key in directories.keys(model, found) if self.looking.known(key)), None)
            if key is not None:
                node.given, node.key = files, key
                self.settling.gone(model.path)
                return
        node.given = node.key = None
        whole = same and before is not None and before.whole and not directories.unfinished(found)
        self.settling.saw(model._replace(whole=whole or directories.is_whole(model.path, found)), now)

    def _asked_again(self, node: Node) -> bool:
        """Whether somebody wants a settled model looked at again."""
        return node.key is not None and not self.looking.known(node.key)

    def _changed(self, path: str, now: float) -> None:
        """Looks at a directory of which the kernel told something; one that is new is entered, if it counts."""
        above, name = os.path.split(path)
        node = self.nodes.get(above)
        if path in self.nodes:
            self.visit(path, now)
        elif (whole := _model_of(path, self.nodes, self.root)) is not None:
            self.visit(whole, now)
        elif node is not None and not directories.ignored(name) and os.path.isdir(path):
            counts = directories.searched(
                Listing(folders=(name,)), depth=node.depth, link=node.link, nested=self.looking.nested
            )
            if counts and not node.model and not self.noted.concerns(above):
                node.below = (*node.below, name)  # without listing all that lies beside it
                self._enter(path, False, now)
            else:
                self.visit(above, now)

    def _rescan(self, now: float) -> None:
        """Looks at what nobody told of: the directories without a model that changed, models that are waited for, and
        some of the others in turn."""
        begun, news = self.looking.spent(), 0.0
        for path in [path for path, node in self.nodes.items() if not node.model] or [self.root]:
            if self._moved(path):
                news += self._revisit(path, now)
        for path in [path for path, node in self.nodes.items() if self._asked_again(node)]:
            news += self._revisit(path, now)
        for model in list(self.settling.waiting):
            news += self._revisit(model, now)
        budget = SHARE * (now - self._begun)
        if not self._turn:
            self._turn.extend(path for path, node in self.nodes.items() if node.model)
        for _ in range(len(self._turn)):
            path = self._turn.popleft()
            if path in self.nodes and self._moved(path):
                news += self._revisit(path, now)
            if self.looking.spent() - begun - news > budget:
                break
        self._next(now, self.looking.spent() - begun - news)

    def _revisit(self, path: str, now: float) -> float:
        """Looks at a directory in a rescan. Returns what that took of a processor where it found something new: to
        read the header of a large model is no reason to rescan more rarely."""
        begun, folders, before = self.looking.spent(), len(self.nodes), self.settling.seen(path)
        self.visit(path, now)
        found = self.settling.seen(path)
        changed = found is not None and (before is None or before.files != found.files)
        return self.looking.spent() - begun if changed or len(self.nodes) > folders else 0.0

    def _next(self, now: float, spent: float) -> None:
        self._begun = now
        self._next_rescan = now + max(self.looking.rescan, spent / SHARE)

    def _moved(self, path: str) -> bool:
        """Whether a directory, or the model in it, is another than it was when it was last looked at."""
        node = self.nodes.get(path)
        try:
            stat = os.stat(path)
            same = node is not None and (stat.st_ctime_ns, stat.st_ino, stat.st_dev) == node.stamp and not node.fresh
            if node is None or not same or not node.model:
                return not same
            return directories.signature(path, node.model) != node.given
        except OSError:
            return True

    def _unreadable(self, path: str, why: str) -> bool:
        """Notes that a directory cannot be looked at; it is tried again in every rescan. Returns whether that is
        news."""
        node = self.nodes.setdefault(path, Node(0))
        node.stamp, node.model = (0, 0, 0), ()
        self.settling.gone(path)
        if path == self.root:
            before, self.problem = self.problem, f"{shown(path)}: the folder cannot be looked at: {why}"
            return before != self.problem
        for name in node.below:
            self.forget(os.path.join(path, name))
        node.below = ()
        return self.noted.say(path, f"cannot be looked at: {why}")

    def _note(self, path: str, node: Node, found: Listing) -> None:
        """Notes at once what lies loose, and later that there is no model, if that stays so."""
        runs = [] if self.looking.nested else [name for name in found.folders if directories.is_checkpoint(name)]
        if node.model:
            self.noted.say(path, "")
        elif node.depth == 0 or node.below or (runs and not directories.claimed(found)):
            lies = [*directories.loose(found)]
            lies += [f"{shown(name)} is a checkpoint of a run: rename it, or set nested = true" for name in runs]
            more = f"; and {len(lies) - SOME} more" if len(lies) > SOME else ""
            self.noted.say(path, "; ".join(lies[:SOME]) + more)
        else:
            self.noted.wait(path, f"is no model: it {directories.why_none(found)}", node.since)


def _model_of(path: str, nodes: Mapping[str, Node], root: str) -> str | None:
    """The directory of the model in `root` that a folder belongs to, if it does."""
    above = os.path.dirname(path)
    while len(above) > len(root):
        if (node := nodes.get(above)) is not None:
            return above if any(f"{above}/{part}/".startswith(f"{path}/") for part in node.parts) else None
        above = os.path.dirname(above)
    return None
