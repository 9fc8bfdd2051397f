"""Whether the settings of a canary fit together, and to what they are for."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from continual.config import CanarySettings, Settings
from continual.errors import Misconfigured
from continual.service.outgoing import OutPlan, outgoing

_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def check(settings: Settings) -> None:
    """Raises Misconfigured for a canary that cannot be watched, or put out."""
    for name in (None, *settings.views):
        out = outgoing(settings, name)
        where = "release.canary" if name is None else f"views.{name}.canary"
        if out.canary is not None and (wrong := _wrong(out.canary, settings) or _misplaced(out.canary, out)):
            raise Misconfigured(f"{where}: {wrong}")


def _misplaced(canary: CanarySettings, out: OutPlan) -> str | None:
    """What is wrong with where its canary would go."""
    if not out.outlets:
        return "nothing goes out: set current, or a repo"
    if out.asked.repo is not None and canary.branch == out.asked.branch:
        return f"branch = {canary.branch}: releases are promoted to that branch; name another for canaries"
    if canary.request and (out.asked.repo is None or out.asked.branch != "main"):
        return "request = true: a pull request is to the branch main of a repo; set the repo, and leave branch out"
    if not _BRANCH.fullmatch(canary.branch):
        return f"branch = {canary.branch}: a branch is letters, digits, '.', '_' and '-'"
    if out.asked.every:
        return "release.every = true: one canary is watched at a time, and later folds wait; leave every out"
    return None


def _wrong(canary: CanarySettings, settings: Settings) -> str | None:
    """What does not fit together."""
    limits = canary.max is not None or canary.min is not None
    if canary.query is not None and not canary.query.strip():
        return "query is empty: name what is asked of Prometheus, or leave it out"
    if canary.query is not None and not limits:
        return "query has no limit: set max, min or both"
    if canary.query is None and limits:
        return "max and min are limits of a query: set query"
    if canary.max is not None and canary.min is not None and canary.min > canary.max:
        return f"min = {canary.min:g} is above max = {canary.max:g}: every value would be an alarm"
    if canary.failure_limit > canary.count:
        return f"failure_limit = {canary.failure_limit} of count = {canary.count} measurements can never be reached"
    if canary.evaluate and not settings.evaluation.wanted:
        return "evaluate = true: set command, objective or lm_eval in evaluation, which say who is asked"
    if canary.query is not None and (wrong := _wrong_url(canary.prometheus)):
        return f"prometheus: {wrong}"
    return None


def _wrong_url(url: str) -> str | None:
    """What is wrong with the address of Prometheus, which is not quoted: a part of it may be a secret."""
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port >= 0
    except ValueError:
        known = False
    if not known or not url.isascii() or not url.isprintable() or " " in url:
        return "the address cannot be read; write http://127.0.0.1:9090"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "the address has to begin with http:// or https:// and a host"
    if "@" in parts.netloc:
        return "the address has credentials in it, which would be logged; leave them out"
    if parts.query or parts.fragment:
        return "it is where Prometheus listens, with nothing after ? or #"
    return None
