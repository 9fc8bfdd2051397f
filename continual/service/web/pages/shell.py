"""The frame of every page: head, navigation, footer."""

from __future__ import annotations

from dataclasses import dataclass

from continual.service.web.pages.markup import escape, shown

SECONDS = 15
"""Seconds after which a page reloads itself where no script runs."""
NAVIGATION = (
    ("/", "Now"),
    ("/folds", "Folds"),
    ("/refusals", "Refusals"),
    ("/evaluations", "Evaluations"),
    ("/storage", "Storage"),
    ("/settings", "Settings"),
)


@dataclass(frozen=True, slots=True)
class Around:
    """What all pages are given: the directory of the state, for commands; a word that is another one when there is
    something new to show; further entries of the navigation."""

    state: str
    stamp: str
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a page is in the navigation, its title, and what goes below it. `live`: it is exchanged by itself when
    something changed; without JavaScript it is loaded again now and then, unless somebody may be typing in it."""

    path: str
    title: str
    around: Around
    foot: str = ""
    live: bool = True


def document(frame: Frame, *content: str) -> str:
    """The whole document."""
    links = "".join(_entry(path, text, frame.path) for path, text in (*NAVIGATION, *frame.around.more))
    again = frame.live and not any("<form" in part for part in content)
    reload = f'<noscript><meta http-equiv="refresh" content="{SECONDS}"></noscript>' if again else ""
    live = f' data-stamp="{escape(frame.around.stamp)}"' if frame.live else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(frame.title)}</title>{reload}"
        '<link rel="icon" href="/icon.svg" type="image/svg+xml"><link rel="stylesheet" href="/page.css">'
        '<script src="/page.js" defer></script></head>'
        '<body><a class="skip" href="#main">Skip to the content</a>'
        f'<nav class="site" aria-label="Pages"><b>continual</b><ul>{links}</ul></nav>'
        f'<main id="main" tabindex="-1"{live}>{"".join(content)}</main>'
        f"<footer>{shown(frame.foot)} All times are UTC.</footer></body></html>"
    )


def _entry(path: str, text: str, here: str) -> str:
    current = ' aria-current="page"' if path == here else ""
    return f'<li><a href="{path}"{current}>{escape(text)}</a></li>'


def trouble(status: int, told: str, around: Around) -> str:
    """The page that says that there is no such page, or that something was asked wrongly."""
    return document(Frame("", f"{status}, continual", around, live=False), f"<h1>{status}</h1><p>{escape(told)}</p>")
