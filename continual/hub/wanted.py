"""Decides by the settings which repos of the Hub are candidates at all. Pure functions. A repo that is left out here
gets no record, so that it is looked at again when the settings change."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

from continual.config import HubSettings
from continual.config.globs import is_in, unwanted
from continual.errors import Misconfigured
from continual.hub.answers import Info
from continual.hub.names import is_repo


def left_out(
    info: Info, asked: HubSettings, bases: Collection[str], own: str | None = None, called: str | None = None
) -> str | None:
    """Why a repo is left out, in a few words; None if it is taken.

    `bases`: the repos whose fine-tunes are wanted. `own`: the repo that we publish to. `called`: the name that was
    asked for, which a renamed repo does not have any more. Sizes are judged where the files are known; a row of a
    listing does not have them.
    """
    if info.id in (own, *bases):
        return "our own releases" if info.id == own else "the base itself"
    related = {f"base_model:{relation}:{base}" for relation in asked.relations for base in bases}
    owner = info.id.partition("/")[0]
    if not related & set(info.tags) and not {info.id, called} & set(asked.repos) and owner not in asked.authors:
        return "no fine-tune of the base by its tags, and not named in repos or authors"
    if asked.allow and not is_in(info.id, asked.allow):
        return "not in allow"
    if is_in(info.id, asked.deny):
        return "in deny"
    if (other := unwanted(info.licence, asked.licences, asked.deny_licences)) is not None:
        licence, setting = other
        return f"licence {licence} is {'not ' if setting == 'licences' else ''}in {setting}"
    if lacking := sorted(set(asked.tags) - set(info.tags)):
        return f"lacks the tag {lacking[0]}"
    if denied := next((tag for tag in info.tags if is_in(tag, asked.deny_tags)), None):
        return f"has the tag {denied}"
    if info.gated and asked.gated == "refuse":
        return "gated"
    if info.private and asked.private == "refuse":
        return "private"
    if (since := since_of(asked)) is not None and info.modified < since:
        return f"last commit before {since:%Y-%m-%d}"
    if asked.max_bytes is not None and info.weight_bytes > asked.max_bytes:
        return f"{info.weight_bytes} bytes of weights are more than max_bytes"
    return None


def check(asked: HubSettings) -> None:
    """Raises Misconfigured for settings that cannot be used."""
    for name, words in (("bases", asked.bases), ("repos", asked.repos), ("authors", asked.authors)):
        for word in words:
            if not is_repo(word) or (name == "authors" and "/" in word):
                kind = "user or organisation" if name == "authors" else "repo: write ORG/NAME"
                raise Misconfigured(f"hub.{name}: {word!r} is no {kind}")
    since_of(asked)


def since_of(asked: HubSettings) -> datetime | None:
    """The time of `hub.since`: repos whose last commit is older are left out. Raises Misconfigured for a text that is
    no date or time."""
    if asked.since is None:
        return None
    try:
        found = datetime.fromisoformat(asked.since)
    except ValueError:
        raise Misconfigured(
            f"hub.since = {asked.since}: write a date or a time, as 2026-01-31 or 2026-01-31T12:00Z"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
