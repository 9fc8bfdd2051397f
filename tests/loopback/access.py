"""Who asks, and what they may see: accounts, and the refusals of the Hub with their error codes."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from tests.loopback.repos import Repo

TOKEN = "hf_the_daemon_of_the_tests"


class Refusal(Exception):
    """The Hub's refusal: a status, the code by which the client picks its exception, and a message."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(f"{status} {code or ''} {message}")
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class Account:
    """A user, the organisations in whose name they read and write, and the gated repositories they were let into; `*`
    is all."""

    user: str
    orgs: Set[str] = frozenset()
    gated: Set[str] = frozenset()

    def owns(self, owner: str) -> bool:
        return owner == self.user or owner in self.orgs or "*" in self.orgs


EVERYTHING = Account("tester", orgs=frozenset({"*"}), gated=frozenset({"*"}))


def account(tokens: Mapping[str, Account], header: str | None) -> Account | None:
    """The account of an Authorization header; None for an anonymous request."""
    if header is None:
        return None
    found = tokens.get(header.removeprefix("Bearer ").strip())
    if found is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return found


def sees(who: Account | None, repo: Repo) -> bool:
    """Whether the repository exists as far as they can tell."""
    return not repo.private or (who is not None and who.owns(repo.owner))


def missing(who: Account | None) -> Refusal:
    """The refusal for a repository that is not there or is private: the Hub does not say which."""
    return Refusal(404 if who else 401, "Repository not found", "RepoNotFound")


def check_open(who: Account | None, repo: Repo, headers: Mapping[str, str]) -> None:
    """Refuses the files of a gated repository to those who were not let in."""
    if not repo.gated or (who and (who.owns(repo.owner) or repo.id in who.gated or "*" in who.gated)):
        return
    message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated to access it."
    raise Refusal(403 if who else 401, message, "GatedRepo", headers)


def member(who: Account | None) -> Account:
    """Refuses those without a token."""
    if who is None:
        raise Refusal(401, "Invalid username or password.")
    return who


def check_write(who: Account | None, owner: str) -> Account:
    """Refuses to write without a token, or in another's name."""
    who = member(who)
    if not who.owns(owner):
        raise Refusal(403, f'You don\'t have the rights to write under the namespace "{owner}"')
    return who
