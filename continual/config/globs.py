"""What names of strangers are compared with: globs of the settings, whether they are in capital letters or in small
ones. The Hub takes `MIT` for `mit` and `Org` for `org`, so that a list of what is denied has to."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

SEVERAL = ", "
"""Stands between the licences of a model that names several."""


def is_in(text: str, globs: Iterable[str]) -> bool:
    """Whether a name is in a list of globs."""
    return any(fnmatch.fnmatchcase(text.lower(), glob.lower()) for glob in globs)


def unwanted(licence: str | None, licences: Sequence[str], denied: Sequence[str]) -> tuple[str, str] | None:
    """The first licence of a model that may not be, and the setting by which: `licences` (globs; empty for any) or
    `deny_licences`. A model that names none has the licence `none`. None where all may be."""
    for one in (licence or "none").split(SEVERAL):
        if licences and not is_in(one, licences):
            return one, "licences"
        if is_in(one, denied):
            return one, "deny_licences"
    return None
