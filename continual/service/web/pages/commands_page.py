"""The page of commands: signing in, what was asked for here, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from continual.outside import counted
from continual.service.web.errands import Errand
from continual.service.web.pages import controls
from continual.service.web.pages.markup import Html, escape, paragraph, section
from continual.service.web.pages.shell import Around, Frame, document
from continual.texts import when

_LONG = 3000
"""Characters of an answer that are shown."""


def sign_in(around: Around, problem: str = "") -> str:
    """The form for the token."""
    wrong = f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else ""
    return document(
        Frame("/commands", "Sign in, continual", around, live=False),
        "<h1>Commands</h1>",
        wrong,
        "<p>Who has the <code>admin_token</code> of the settings can give commands here.</p>"
        '<form method="post" action="/sign-in"><label for="token">admin_token</label> '
        '<input id="token" name="token" type="password" autocomplete="current-password" required> '
        '<button type="submit">Sign in</button></form>',
    )


def render(found: Sequence[Errand], form: str, around: Around, problem: str = "") -> str:
    """What was asked for, the newest first, and what can be."""
    wrong = f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else ""
    told = [_errand(errand, form) for errand in found] or [paragraph("Nothing was asked for here yet.", "none")]
    leave = (
        f'<form method="post" action="/sign-out"><input type="hidden" name="form" value="{escape(form)}">'
        '<button type="submit">Sign out</button></form>'
    )
    return document(
        Frame("/commands", "Commands, continual", around),
        "<h1>Commands</h1>",
        wrong,
        section("asked", "Asked for here", *told),
        section("more", "What can be asked for", _more(form), leave),
    )


def _more(form: str) -> Html:
    """What has no button on another page. What is about a fold or a model is on its page."""
    told = paragraph(
        "What is about a fold or a model is on the page of that fold or model; pausing is on the first page."
    )
    return Html(
        told
        + controls.row(
            controls.button(form, "Release the merge …", {"command": "release", "dry_run": "yes"}),
            controls.button(form, "Set the scale", {"command": "scale"}, ask={"value": "Scale"}),
        )
    )


def _errand(errand: Errand, form: str) -> Html:
    kind = {"done": "good", "failed": "bad"}.get(errand.state, "")
    asked = ", ".join(f"{key} {value}" for key, value in errand.asked.items() if key not in ("command", "dry_run"))
    asked += " (only looked at)" if errand.asked.get("dry_run") else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in errand.notes)
    came = _came_of(errand)
    return Html(
        f'<article id="command-{errand.number}"><h3>{escape(errand.title)} <span class="tag {kind}">'
        f"{escape(errand.state)}</span></h3><p>{when(errand.time)}, by {escape(errand.by)}"
        f'{": " if asked else ""}{escape(asked)} {escape(errand.doing)}</p>{notes}<div class="asked">'
        f"{escape(came, _LONG)}</div>{_next(errand, form)}</article>"
    )


def _came_of(errand: Errand) -> str:
    """What came of it, for people."""
    if errand.state == "failed":
        return errand.message
    answer = errand.answer
    if not answer:
        return "under way" if errand.state == "waits" else "done"
    if isinstance(answer.get("line"), str):
        return str(answer["line"])
    if "undone" in answer:
        undone, lost = _rows(answer["undone"]), _rows(answer.get("expires"))
        does = "Would go" if answer.get("record") is None else "Went"
        told = f"{does} back to record {answer['to']}: {counted(len(undone), 'fold')} undone"
        return told + (f", {counted(len(lost), 'generation')} expire" if lost else "")
    if isinstance(answer.get("records"), list):
        return f"{counted(len(_rows(answer['records'])), 'record')} made: done when the model is seen next"
    return json.dumps(answer, indent=1)


def _next(errand: Errand, form: str) -> Html:
    """The button that does what was only looked at: it brings how much a person has agreed to."""
    if errand.state != "done" or not errand.asked.get("dry_run"):
        return Html()
    fields = {key: value for key, value in errand.asked.items() if key != "dry_run"}
    expected = _expected(str(errand.asked["command"]), errand.answer)
    if expected is not None:
        fields["expected"] = expected
    return controls.row(controls.button(form, "Do it", fields))


def _expected(command: str, answer: Mapping[str, object]) -> int | None:
    if command == "rollback":
        return len(_rows(answer.get("undone")))
    plan = answer.get("plan")
    if command == "unfold" and isinstance(plan, dict):
        return 0 if plan.get("exact") else len(_rows(plan.get("again")))
    return None


def _rows(value: object) -> list[object]:
    return value if isinstance(value, list) else []
