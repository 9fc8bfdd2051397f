"""Buttons for who has signed in: one form each, with the word of the session. What cannot be taken back easily is asked
for in two steps: first what it would do, then that."""

from __future__ import annotations

from collections.abc import Mapping

from continual.service.web.pages.markup import Html, escape, join
from continual.service.web.recalled import AboutFold, AboutModel
from continual.service.web.view import Status


def button(form: str, text: str, fields: Mapping[str, object], *, ask: Mapping[str, str] | None = None) -> Html:
    """A button that asks for a command. `ask`: fields that a person fills in, with their labels."""
    hidden = "".join(
        f'<input type="hidden" name="{escape(key)}" value="{escape(str(value), 4096)}">'
        for key, value in {"form": form, **fields}.items()
    )
    inputs = "".join(
        f'<label>{escape(label)} <input name="{escape(key)}" required maxlength="500"></label> '
        for key, label in (ask or {}).items()
    )
    return Html(
        f'<form method="post" action="/commands">{hidden}{inputs}<button type="submit">{escape(text)}</button></form>'
    )


def row(*buttons: Html) -> Html:
    """Buttons beside each other."""
    return Html(f'<div class="controls">{join(buttons)}</div>')


def front(status: Status, form: str) -> Html:
    """What can be asked for on the front page."""
    paused = status.paused is not None
    found = [button(form, "Fold again" if paused else "Pause folding", {"command": "resume" if paused else "pause"})]
    if status.select != "none":
        found.append(button(form, "Run a round", {"command": "round"}))
    for canary in status.canaries:
        if canary.phase == "watched":
            of = {"view": canary.view} if canary.view else {}
            said = f"Promote record {canary.seq}" + (f" of {canary.view}" if canary.view else "")
            found.append(button(form, said, {"command": "promote", "at": canary.seq, **of}))
    for view in status.views:
        if view.repo is not None and not view.problem:
            fields = {"command": "release", "view": view.name, "dry_run": "yes"}
            found.append(button(form, f"Release {view.name} …", fields))
    return row(*found)


def fold(about: AboutFold, form: str) -> Html:
    """What can be asked for about a fold."""
    seq, found = about.fold.shown.seq, []
    if about.fold.in_force:
        word = seq if about.kind == "fold" else _word(about.key, seq)
        found.append(button(form, "Take it out …", {"command": "unfold", "model": word, "dry_run": "yes"}))
    if about.back:
        found.append(button(form, "Go back to here …", {"command": "rollback", "seq": seq, "dry_run": "yes"}))
        found.append(button(form, "Tag", {"command": "tag", "at": seq}, ask={"name": "Name"}))
    return row(*found)


def model(about: AboutModel, form: str) -> Html:
    """What can be asked for about a model."""
    if about.settled is None:
        return Html()
    if about.fate == "folded":
        return row(
            button(
                form, "Take it out …", {"command": "unfold", "model": _word(about.key, about.settled), "dry_run": "yes"}
            )
        )
    word = {"model": _word(about.key, about.settled)}
    found = [button(form, "Look at it again", {"command": "retry", **word})]
    if about.fate in ("refused", "duplicate", "expired"):
        by = {"by": "an operator, on the status page"}
        found.append(button(form, "Accept it", {"command": "retry", **word, **by}, ask={"because": "Because"}))
        found.append(button(form, "Take it off the list", {"command": "drop", **word, **by}))
    return row(*found)


def _word(key: str, seq: int) -> str:
    """The word by which a form names a model: its key, or its record where a form cannot hold the key."""
    return key if key.isprintable() and len(key) < 2000 else str(seq)
