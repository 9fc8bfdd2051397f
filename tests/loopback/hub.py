"""The Hub's state and every way to change it, from a test or from a route. No HTTP here."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tests.loopback import webhooks
from tests.loopback.access import EVERYTHING, TOKEN, Account, Refusal
from tests.loopback.journal import Journal, Request
from tests.loopback.repos import ATTRIBUTES, Blob, Bytes, Commit, Gate, PullRequest, Repo, commit_sha
from tests.loopback.webhooks import Change, Moved

if TYPE_CHECKING:
    from tests.loopback.faults import Policy


@dataclass(eq=False, repr=False)
class Hub:
    """A Hugging Face Hub in memory. Give `serving` one; set or change any public field at any time.

    `clock` dates commits (so that tests can make ties), files over `lfs_over` bytes and all safetensors are large
    files, lists come in pages of `page_size`, and a CDN link is good for `link_seconds` of real time. `on_request` is
    called with each request before it is answered, on the server's thread: it may change the Hub.
    """

    tokens: dict[str, Account] = field(default_factory=lambda: {TOKEN: EVERYTHING})
    clock: Callable[[], float] = time.time
    faults: Policy | None = None
    on_request: Callable[[Request], None] | None = None
    lfs_over: int = 10_000
    page_size: int = 1000
    link_seconds: float = 3600.0
    webhooks: list[tuple[str, str]] = field(default_factory=list)

    endpoint: str = field(default="", init=False)
    cdn: str = field(default="", init=False)
    journal: Journal = field(default_factory=Journal, init=False)
    objects: dict[str, Bytes] = field(default_factory=dict, init=False)
    xorbs: dict[str, list[bytes]] = field(default_factory=dict, init=False)
    moved: dict[str, str] = field(default_factory=dict, init=False)
    changes: list[Change] = field(default_factory=list, init=False)
    listeners: list[Callable[[Change], None]] = field(default_factory=list, init=False)
    lock: threading.RLock = field(default_factory=threading.RLock, init=False)
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(16), init=False)
    _states: list[Mapping[str, Repo]] = field(default_factory=lambda: [{}], init=False)
    _counter: int = field(default=0, init=False)

    # Reading

    def state(self, ago: int = 0) -> Mapping[str, Repo]:
        """All repositories as they are, or were that many changes ago."""
        return self._states[max(0, len(self._states) - 1 - ago)]

    def repo(self, repo: str) -> Repo:
        found = self.state().get(repo)
        if found is None:
            raise KeyError(f"the Hub has no repository {repo}")
        return found

    def head(self, repo: str, branch: str = "main") -> str:
        return self.repo(repo).branches[branch]

    def read(self, repo: str, revision: str, path: str) -> bytes:
        commit = self.repo(repo).find(revision)
        if commit is None:
            raise KeyError(f"{repo} has no revision {revision}")
        return commit.files[path].data[:]

    def history(self, repo: str, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        found = self.repo(repo)
        return list(found.history(found.find(branch)))

    # Changing

    def create(
        self, repo: str, *, private: bool = False, gated: Gate = False, author: str = "tester", files: bool = True
    ) -> str:
        """A new repository with its first commit, as the Hub's API makes it; returns that commit's sha, or nothing
        without files."""
        with self.lock:
            if repo in self.state():
                raise Refusal(409, "You already created this model repo")
            self._counter += 1
            now = self.clock()
            key = hashlib.sha1(f"{repo} {self._counter}".encode()).hexdigest()[:24]
            made = Repo(repo, key, now, now, private, gated)
            self.moved.pop(repo, None)
            self._publish(made, Change("create", "repo", made))
            return self.commit(repo, {".gitattributes": ATTRIBUTES}, "initial commit", author=author) if files else ""

    def commit(
        self,
        repo: str,
        files: Mapping[str, bytes | Blob | None],
        message: str = "Upload",
        *,
        branch: str = "main",
        parent: str | None = None,
        author: str = "tester",
    ) -> str:
        """One commit that sets these files and removes those given as None; makes the repository if there is none."""
        with self.lock:
            if repo not in self.state():
                self.create(repo, author=author, files=False)
            old = self.repo(repo)
            before = old.branches.get(branch)
            if before is None and old.branches:
                raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            if parent is not None and parent != before:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            commit = self._built(old, before, files, message, author)
            branches, commits = {**old.branches, branch: commit.sha}, {**old.commits, commit.sha: commit}
            new = replace(old, modified=commit.date, branches=branches, commits=commits)
            self._publish(new, Change("update", "repo.content", new, ((f"refs/heads/{branch}", before, commit.sha),)))
            return commit.sha

    def propose(
        self, repo: str, files: Mapping[str, bytes | Blob | None], title: str, text: str = "", *, author: str = "tester"
    ) -> int:
        """A pull request to `main` that sets these files and removes those given as None; its number."""
        with self.lock:
            old = self.repo(repo)
            parent = old.branches["main"]
            commit = self._built(old, parent, files, title, author)
            number = len(old.requests) + 1
            pull = PullRequest(number, title, text, author, commit.date, commit.sha, parent)
            new = replace(old, commits={**old.commits, commit.sha: commit}, requests={**old.requests, number: pull})
            self._publish(new, Change("update", "repo.content", new, ((f"refs/pr/{number}", None, commit.sha),)))
            return number

    def pull(self, repo: str, number: str | int) -> PullRequest:
        """The pull request of a number."""
        found = self.repo(repo).requests.get(int(number)) if str(number).isdecimal() else None
        if found is None:
            raise Refusal(404, f"There is no discussion {number}")
        return found

    def merge(self, repo: str, number: str | int, *, author: str = "tester") -> str:
        """Merges a pull request as one commit on top of `main`; its sha."""
        with self.lock:
            old = self.repo(repo)
            pull = self.pull(repo, number)
            if pull.status != "open":
                raise Refusal(400, f"This pull request is {pull.status}")
            if pull.parent != old.branches["main"]:
                raise Refusal(409, "Merge conflict")
            files, now = old.commits[pull.sha].files, old.commits[old.branches["main"]].files
            changed: dict[str, Blob | None] = {name: file for name, file in files.items() if now.get(name) != file}
            changed |= {name: None for name in now if name not in files}
            sha = self.commit(repo, changed, f"{pull.title} (#{number})", author=author)
            merged = replace(pull, status="merged", merged=sha)
            self._change(repo, requests={**old.requests, pull.number: merged})
            return sha

    def discuss(
        self,
        repo: str,
        number: str | int,
        *,
        status: str | None = None,
        comment: tuple[str, str] | None = None,
    ) -> None:
        """Closes or opens a pull request, or says something in it."""
        with self.lock:
            old = self.repo(repo)
            pull = self.pull(repo, number)
            said = (*pull.comments, comment) if comment else pull.comments
            new = replace(pull, status=status or pull.status, comments=said)
            self._change(repo, requests={**old.requests, pull.number: new})

    def delete(self, repo: str) -> None:
        with self.lock:
            gone = self.repo(repo)
            rest = {name: kept for name, kept in self.state().items() if name != repo}
            self._states.append(rest)
            self._announce(Change("delete", "repo", gone))

    def move(self, repo: str, to: str) -> None:
        """Renames a repository; the old name redirects to the new one."""
        with self.lock:
            if to in self.state():
                raise Refusal(409, f"{to} exists")
            old = self.repo(repo)
            new = replace(old, id=to)
            self._states.append({name: kept for name, kept in self.state().items() if name != repo} | {to: new})
            self.moved[repo] = to
            self._announce(Change("move", "repo", old, moved=Moved(to)))

    def gate(self, repo: str, gated: Gate = "manual") -> None:
        """Gates a repository, or opens it with False."""
        self._configure(repo, gated=gated)

    def hide(self, repo: str, private: bool = True) -> None:
        """Makes a repository private, or public with False."""
        self._configure(repo, private=private)

    def admit(self, token: str, repo: str) -> None:
        """Lets the account of this token into a gated repository."""
        self.tokens[token] = replace(self.tokens[token], gated=self.tokens[token].gated | {repo})

    def tag(self, repo: str, name: str, revision: str | None = "main") -> None:
        """Tags a revision, or with None removes the tag."""
        self._point("tags", repo, name, revision)

    def branch(self, repo: str, name: str, revision: str | None = "main") -> None:
        """Makes a branch at a revision, or with None removes it."""
        self._point("heads", repo, name, revision)

    def is_large(self, path: str, size: int) -> bool:
        return size > 0 and (size > self.lfs_over or path.endswith(".safetensors"))

    # Webhooks

    def payload(self, change: Change) -> dict[str, Any]:
        return webhooks.payload(self.endpoint, change)

    def deliver(self, change: Change | None = None) -> list[int | None]:
        """Posts a change (the last one if not given) to every webhook now, once; the statuses, None where none
        answered."""
        body = self.payload(self.changes[-1] if change is None else change)
        return [webhooks.post(url, secret, body) for url, secret in self.webhooks]

    # Within

    def _point(self, kind: str, repo: str, name: str, revision: str | None) -> None:
        with self.lock:
            old = self.repo(repo)
            refs = dict(old.tags if kind == "tags" else old.branches)
            before = refs.pop(name, None)
            if revision is None:
                if before is None:
                    raise Refusal(404, f"There is no {name}", "RevisionNotFound")
                after = None
            else:
                if before is not None:
                    raise Refusal(409, f"Reference already exists: {name}")
                commit = old.find(revision)
                if commit is None:
                    raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
                after = refs[name] = commit.sha
            new = replace(old, tags=refs) if kind == "tags" else replace(old, branches=refs)
            self._publish(new, Change("update", "repo.content", new, ((f"refs/{kind}/{name}", before, after),)))

    def _built(
        self, repo: Repo, parent: str | None, files: Mapping[str, bytes | Blob | None], message: str, author: str
    ) -> Commit:
        """A commit on top of `parent` that sets these files and removes those given as None; nothing names it yet."""
        tree = dict(repo.commits[parent].files) if parent else {}
        for path, content in files.items():
            if content is None:
                if tree.pop(path, None) is None:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            else:
                tree[path] = content if isinstance(content, Blob) else Blob(content, self.is_large(path, len(content)))
        self.objects.update({blob.sha256: blob.data for blob in tree.values() if blob.lfs})
        self._counter += 1
        title, _, body = message.partition("\n\n")
        return Commit(commit_sha(tree, parent, self._counter), parent, title, body, author, self.clock(), tree)

    def _change(self, repo: str, **fields: Any) -> None:
        """Changes what no webhook tells of."""
        self._states.append({**self.state(), repo: replace(self.repo(repo), **fields)})

    def _configure(self, repo: str, **settings: Any) -> None:
        with self.lock:
            new = replace(self.repo(repo), **settings)
            self._publish(new, Change("update", "repo.config", new))

    def _publish(self, repo: Repo, change: Change) -> None:
        self._states.append({**self.state(), repo.id: repo})
        self._announce(change)

    def _announce(self, change: Change) -> None:
        self.changes.append(change)
        for listener in list(self.listeners):
            listener(change)
