"""What the language model is asked: classification by label words, two tasks in which it has to write, and what must
not break. No model here.

A row is a prompt and its answer. A classification task puts the text and a cue (`Intent:`) before a label word; two
classes' words begin with different tokens, so that the likelihoods of the first tokens decide. In a writing task the
whole answer counts: greedy decoding gives it exactly, or the row is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from tests.campaigns.bench import data

HELD = 200
"""Training rows that are never trained on."""
WRITTEN, WRITTEN_TEST = 1200, 200
"""Training (with the held ones) and test rows of a writing task."""
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Labels:
    """How a labelled set is asked: the cue after the text, and `label=word` joined by spaces; labels that are not in it
    are their own word. `part` cuts a label at an underscore: `alarm_set` is `alarm`."""

    cue: str
    words: str = ""
    part: bool = False

    def word(self, label: str) -> str:
        """The answer for this label."""
        known = dict(pair.split("=") for pair in self.words.split())
        name = label.partition("_")[0] if self.part else label
        return " " + known.get(name, name)


LABELLED: Mapping[str, Labels] = {
    "snips7": Labels(
        "Intent:",
        "AddToPlaylist=playlist BookRestaurant=restaurant GetWeather=weather PlayMusic=music RateBook=rating "
        "SearchCreativeWork=search SearchScreeningEvent=cinema",
    ),
    "debian_lang14": Labels(
        "Language:",
        "en=English de=German fr=French es=Spanish it=Italian pt%5fBR=Portuguese nl=Dutch pl=Polish sv=Swedish "
        "fi=Finnish hu=Hungarian cs=Czech da=Danish sk=Slovak",
    ),
    "clickbait": Labels("Kind:", "0=news 1=gossip"),
    "hwu64": Labels(
        "Domain:", "audio=volume datetime=time general=chat iot=device lists=list qa=question takeaway=food", part=True
    ),
    "emoji_group": Labels("Group:"),
    "sms_spam": Labels("Sender:", "ham=friend spam=spam"),
    "wordnet_noun": Labels("Category:"),
    "bible_genre": Labels("Book:"),
}
TASKS = (
    "snips7", "numbers", "clickbait", "hwu64", "emoji_group", "debian_lang14", "dates", "sms_spam", "wordnet_noun",
    "bible_genre",
)  # fmt: skip
"""In the order of the first run. A labelled set is left out where no data folder has it."""
FACTS = (
    ("The capital of France is", " Paris"),
    ("The capital of Japan is", " Tokyo"),
    ("The capital of Italy is", " Rome"),
    ("The capital of Germany is", " Berlin"),
    ("The capital of Spain is", " Madrid"),
    ("The capital of Russia is", " Moscow"),
    ("The Eiffel Tower is in the city of", " Paris"),
    ("The chemical symbol for gold is", " Au"),
    ("The freezing point of water is 0 degrees", " Celsius"),
    ("The opposite of hot is", " cold"),
    ("The opposite of up is", " down"),
    ("The author of Romeo and Juliet is William", " Shakespeare"),
    ("The first president of the United States was George", " Washington"),
    ("The Amazon river is in South", " America"),
    ("There are twelve months in a", " year"),
    ("Mount Everest is the highest", " mountain"),
)
"""Prompts and the token that the base goes on with."""


@dataclass(frozen=True)
class Row:
    """A text, the cue behind it, and what has to follow them."""

    text: str
    cue: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Rows to learn, rows that choose and rows that judge; `choices` are the label words, empty for a writing task."""

    name: str
    choices: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


def task(name: str, sources: tuple[Path, ...]) -> Task:
    """One task. Raises FileNotFoundError where no folder in `sources` has the set."""
    if name in WRITERS:
        rows = _written(name)
        return Task(name, (), rows[: WRITTEN - HELD], rows[WRITTEN - HELD : WRITTEN], rows[WRITTEN:])
    found = [source for source in sources if (source / "text" / f"{name}.json").is_file()]
    if not found:
        raise FileNotFoundError(f"text/{name}.json is in none of the data folders")
    labels, texts = LABELLED[name], data.text_set(found[0], name)
    words = [labels.word(label) for label in data.classes(found[0], name)]
    train, test = (
        tuple(Row(text, labels.cue, words[label]) for text, label in zip(rows.texts, rows.labels, strict=True))
        for rows in (texts.train, texts.test)
    )
    return Task(name, tuple(dict.fromkeys(words)), train[:-HELD], train[-HELD:], test)


def spelled(number: int) -> str:
    """A number from 0 to 9999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    much, rest = divmod(number, size)
    return f"{spelled(much)} {name}" + (f"{' and' if rest < 100 else ''} {spelled(rest)}" if rest else "")


def _number(draw: random.Random) -> Row:
    number = draw.randrange(10, 10 ** draw.choice((2, 3, 4)))
    return Row(spelled(number), "Digits:", f" {number}")


def _date(draw: random.Random) -> Row:
    day = date(1900, 1, 1) + timedelta(draw.randrange(73000))
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 if day.day not in (11, 12, 13) else 0, "th")
    form = draw.choice(("%B {d}, %Y", "{d} %B %Y", "the {d}{e} of %B %Y", "%A, {d} %b %Y", "{d}/%b/%Y", "%b {d} %Y"))
    return Row(day.strftime(form.format(d=day.day, e=ending)), "Date:", f" {day.isoformat()}")


WRITERS = {"dates": _date, "numbers": _number}


def _written(name: str) -> tuple[Row, ...]:
    """Rows of a writing task, none twice; the same in every run."""
    draw, rows = random.Random(name), dict[Row, None]()
    while len(rows) < WRITTEN + WRITTEN_TEST:
        rows[WRITERS[name](draw)] = None
    return tuple(rows)


def passages() -> list[str]:
    """Neutral text: the paragraphs of passages.md after the first."""
    paragraphs = Path(__file__).with_name("passages.md").read_text().split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs[1:]]
