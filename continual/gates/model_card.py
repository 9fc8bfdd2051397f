"""What a model's card (README.md) says of where it comes from: the YAML between two lines of dashes at its top, as the
Hub reads it. It is what the publisher says, and nothing is proved by it."""

from __future__ import annotations

import re
from typing import NamedTuple

from continual.config import plain_yaml
from continual.config.globs import SEVERAL
from continual.errors import Refuse
from continual.outside import shown
from continual.tensors import Place

CARD = "README.md"
LARGEST = 1 << 18
"""Bytes of a card in which its metadata has to end."""
_FRONT = re.compile(r"\A\ufeff?[ \t\r\n]*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)

_BEGIN = re.compile(r"\A\ufeff?[ \t\r\n]*---[ \t]*\r?\n")


class ModelCard(NamedTuple):
    """`bases`: the models that it names as its base, repos or paths; `relation`: what it is of them (`finetune`,
    `adapter`, `merge`, `quantized`), as it says, or `merge` where it names several. `licence`: in small letters,
    several with `SEVERAL` between them."""

    bases: tuple[str, ...] = ()
    relation: str | None = None
    licence: str | None = None


def card_of(place: Place) -> ModelCard:
    """The card of a model; one that says nothing where there is none, or no metadata in it. Raises Refuse (`card`) for
    metadata that cannot be read, Retry."""
    if not place.present(CARD):
        return ModelCard()
    try:
        whole = place.small(CARD)
        text = whole[:LARGEST].decode("utf-8", "replace")
        front = _FRONT.match(text)
        if front is None and len(whole) > LARGEST and _BEGIN.match(text):
            raise ValueError(f"they do not end within {LARGEST} bytes")
        body = plain_yaml.parse(front[1]) if front is not None and front[1].strip() else {}
    except ValueError as error:
        raise Refuse(
            "card", f"{place.file(CARD)}: its metadata cannot be read ({shown(str(error))}): correct it, or take it out"
        ) from None
    named = body.get("base_model")
    bases = tuple(one for one in _listed(named) if one.strip())
    relation, licence = body.get("base_model_relation"), body.get("license")
    licences = [one.strip().lower() for one in _listed(licence) if one.strip()]
    said = relation.strip().lower() if isinstance(relation, str) else "merge" if len(bases) > 1 else None
    return ModelCard(bases, said, SEVERAL.join(licences) or None)


def _listed(value: object) -> list[str]:
    """The texts of a value that is one, or a list with some."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
