"""The model card of a release, and what the licences of its parts say together. Pure: facts in, Markdown out; nothing
is looked up.

Metadata are those of the Hub's model cards (https://huggingface.co/docs/hub/model-cards), written by huggingface_hub's
ModelCardData. Names, licences and settings come from strangers. In text they are escaped, so that they cannot become
Markdown, HTML or a line of their own; in commands they are quoted for a shell; only the id of a repo or a commit is a
link.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from continual.hub.names import is_repo, is_sha
from continual.outside import counted, few
from continual.publish.share_columns import UNKNOWN, ShareColumns, ShareFigures
from continual.records import SCHEME

MOST = 1000
"""Folded models that a card lists, the newest; the Hub and its readers have to get through it."""
_LONGEST = 200
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_SPECIAL = re.compile(r"(?!:[ \d])[^\w /,.;()+-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Base:
    """The base: `name` for people (a path is shown by its last part), `repo` its id on the Hub, None where it came from
    a folder."""

    name: str
    repo: str | None = None
    revision: str | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A folded model, as its record has it. `origin` is `hf://ORG/NAME` or a path, `revision` a commit, `weight` None
    where the rule has none; `has`: what it has in the merge."""

    seq: int
    name: str
    origin: str
    form: str
    digest: str
    revision: str | None = None
    licence: str | None = None
    weight: float | None = None
    has: ShareFigures = UNKNOWN


@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says. `folded` are in the order in which they were folded.

    `options` are the rule's fold-time options, `before` among them; `reading` the rule that reads it, where that is
    another; `scale` and `lines` what `continual scale` takes; `layers` how many have a coefficient besides, `terms`
    how many models have some in how many layers, in words; `plain` and `exclude` the globs of `continual init`, `width`
    that of a state of adapters; `settings` those of folding that are not the defaults, by the names of the flags of
    `continual fold` (`missing`, `vocab`); `export` further words of `continual export`. `generated` is the time of the
    record; `software` has at least continual's version; `architecture` is the first of the base's config.json;
    `previous` the commit of the release before. Of a `view`, `folded` are those that it reads, of so many (`of`) in the
    merge. `lora`: the rank and the layout of the adapter that is released, None for a whole model.
    """

    base: Base
    folded: Sequence[Model]
    state: str
    seq: int
    rule: str
    scale: str
    generated: str
    software: Mapping[str, str]
    options: Mapping[str, object] = field(default_factory=dict)
    lines: str | None = None
    layers: int = 0
    terms: str = ""
    reading: str | None = None
    plain: Sequence[str] = ()
    exclude: Sequence[str] = ()
    width: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    export: Sequence[str] = ()
    repo: str | None = None
    architecture: str | None = None
    previous: str | None = None
    view: str = ""
    of: int = 0
    lora: tuple[int | Literal["own"], str] | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the licences of a base and its folded models say together.

    `known`: lower-case licence to the names of the models under it, in order, the base's first; `conflict`: there are
    two or more; `unknown`: models that name none. `message` says all of it in a line of plain text.
    """

    known: Mapping[str, tuple[str, ...]]
    conflict: bool
    unknown: int
    message: str


def licences(base: Base, folded: Sequence[Model]) -> Agreement:
    """Whether the licences agree, compared in lower case. `unknown` and an empty text name no licence; `other` is one
    that differs from every word."""
    known: dict[str, list[str]] = {}
    unknown = 0
    for name, licence in [(base.repo or _last(base.name), base.licence), *((_called(m), m.licence) for m in folded)]:
        word = _cut(licence or "").strip().lower()
        if word in ("", "unknown"):
            unknown += 1
        else:
            known.setdefault(word, []).append(_cut(name))
    parts = [f"{word}: {few(names)}" for word, names in known.items()]
    if unknown:
        parts.append(f"no licence named: {unknown} {'model' if unknown == 1 else 'models'}")
    found = {word: tuple(names) for word, names in known.items()}
    said = "not every licence is known"
    if len(known) > 1:
        said = "the licences differ"
    elif known and not unknown:
        said = "the licences agree"
    return Agreement(found, len(known) > 1, unknown, f"{said} ({'; '.join(parts)})")


def card(facts: Facts) -> str:
    """README.md of the release: YAML metadata and a body in Markdown. Needs huggingface_hub."""
    agreement = licences(facts.base, facts.folded)
    listed = facts.folded[-MOST:]
    body = [
        f"# {_text(facts.repo or 'Merged model')}",
        _about(facts),
        "## Use",
        _use(facts),
        f"## Folded models: {len(facts.folded)}",
        *(
            [f"The newest {MOST} of {len(facts.folded)}; `continual.json` has them all."]
            if len(listed) < len(facts.folded)
            else []
        ),
        _table(listed),
        "## Licences",
        _text(agreement.message[0].upper() + agreement.message[1:]) + ".",
        "Whoever uses this model has to keep to the terms of the base and of every folded model.",
        "## Reproduce",
        _how(facts),
        _fenced("\n".join(commands(facts)), "sh"),
    ]
    return f"---\n{_metadata(facts, agreement, listed)}\n---\n\n" + "\n\n".join(body) + "\n"


def commands(facts: Facts) -> list[str]:
    """The lines of a shell that make this model again, one command or comment each. What came from a folder is named as
    if it lay in the current one."""
    places = [(facts.base.repo, facts.base.revision, facts.base.name)]
    places += [(repo_of(model.origin), model.revision, model.name) for model in facts.folded]
    given = {key: value for key, value in facts.options.items() if key != "before"}
    init = ["continual", "init", _reference(*places[0]), "--rule", facts.rule]
    init += ["--adapters", "--width", str(facts.width)] if facts.width else []
    init += [word for key in given for word in ("--option", f"{key}={_value(given[key])}")]
    steps = facts.options.get("before")
    if isinstance(steps, Sequence):
        init += [word for step in steps for word in ("--before", _before(step))]
    init += [word for glob in facts.plain for word in ("--plain", glob)]
    init += [word for glob in facts.exclude for word in ("--exclude", glob)]
    flags = [word for key, value in facts.settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    lines = [_line(["pip", "install", f"continual=={facts.software['continual']}"]), _line(init)]
    earlier = len(facts.folded) - MOST
    if earlier > 0:
        lines.append(f"# fold the first {earlier} models as continual.json lists them, then:")
    for model, place in list(zip(facts.folded, places[1:], strict=True))[-MOST:]:
        weight = [] if model.weight is None or model.weight == 1 else ["--weight", f"{float(model.weight)!r}"]
        lines.append(_line(["continual", "fold", *weight, *flags, _reference(*place)]))
    scale = ["continual", "scale", *(["--rule", facts.reading] if facts.reading else [])]
    scale += ["--lines", facts.lines] if facts.lines else []
    lines.append(_line([*scale, *(["--"] if facts.scale.startswith("-") else []), facts.scale]))
    layout = [] if facts.lora is None or facts.lora[1] == "peft" else ["--format", facts.lora[1]]
    as_lora = [] if facts.lora is None else ["--as-lora", str(facts.lora[0]), *layout]
    return [*lines, _line(["continual", "export", "merged", *as_lora, *facts.export])]


def repo_of(origin: str) -> str | None:
    """The id of the repo that an origin names, None where it is a path."""
    repo = origin.removeprefix(SCHEME)
    return repo if repo != origin and is_repo(repo) else None


def shown(text: str) -> str:
    """A stranger's text on one line: what cannot be printed, line breaks included, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str) -> str:
    """A stranger's text on one line, cut to the length that a name needs."""
    seen = shown(text[: _LONGEST + 1])
    return seen if len(seen) <= _LONGEST else seen[: _LONGEST - 1] + "…"


def _metadata(facts: Facts, agreement: Agreement, listed: Sequence[Model]) -> str:
    from huggingface_hub import ModelCardData

    merged = [] if facts.lora else [repo_of(model.origin) for model in listed]
    repos = [facts.base.repo, *merged]  # an adapter is loaded on its base; the table has the others
    words = list(agreement.known)
    licence = words[0] if words else None
    name = link = None
    if agreement.conflict or (licence is not None and not _LICENCE.fullmatch(licence)):
        licence = "other"
        name = "mixed" if agreement.conflict else "see-card"
        link = f"https://huggingface.co/{facts.repo}#licences" if is_repo(facts.repo) else None
    return ModelCardData(
        base_model=list(dict.fromkeys(repo for repo in repos if is_repo(repo) and repo)) or None,
        base_model_relation="adapter" if facts.lora else "merge",
        library_name=_library(facts),
        tags=["merge", "continual", "task-vectors", facts.rule, *(["lora"] if facts.lora else [])],
        license=licence,
        license_name=name,
        license_link=link,
    ).to_yaml()


def _library(facts: Facts) -> str:
    """What loads it."""
    if facts.lora is None:
        return "transformers"
    return "peft" if facts.lora[1] == "peft" else "diffusers"


def _about(facts: Facts) -> str:
    count = len(facts.folded)
    models = f"{count} {'fine-tune' if count == 1 else 'fine-tunes'}"
    if facts.view:
        models = f"{count} of {facts.of} {'fine-tune' if facts.of == 1 else 'fine-tunes'}"
    layers = f", layers {_text(facts.lines)}" if facts.lines else ""
    by = f"by {_text(facts.reading)} " if facts.reading else ""
    base = _linked(facts.base.repo, facts.base.revision, facts.base.repo or _last(facts.base.name))
    what = f"The view {_text(_cut(facts.view))}: the merge" if facts.view else "The merge"
    as_lora = ""
    if facts.lora is not None:
        rank = "the merge's own rank" if facts.lora[0] == "own" else f"rank {facts.lora[0]}"
        as_lora = (
            f" It is a LoRA adapter of {rank}, to be loaded on the base; `continual.json` says how near it comes to "
            "the merge, and which weights it cannot hold."
        )
    previous = f" The release before it is commit {_commit(facts.repo, facts.previous)}." if facts.previous else ""
    return (
        f"{what} of {models} of {base} by the rule {_text(facts.rule)}, read {by}at the scale "
        f"{_text(facts.scale)}{layers}. It was made by continual, a service that folds each new fine-tune "
        f"into one model, as record {facts.seq} of state {_text(facts.state)} on {_text(facts.generated)}.{as_lora}\n\n"
        f"It may be replaced by the next release at any time: name a commit where you depend on it.{previous}"
    )


def _use(facts: Facts) -> str:
    place = json.dumps(facts.repo or "merged")
    named = facts.architecture or ""
    name = named if named.isascii() and named.isidentifier() else "AutoModel"
    if facts.lora is not None:
        return _fenced("\n".join(_use_adapter(facts, name, place)), "python")
    return _fenced(f"from transformers import {name}\n\nmodel = {name}.from_pretrained({place})", "python")


def _use_adapter(facts: Facts, name: str, place: str) -> list[str]:
    """The lines of Python that load an adapter on its base, whose class is called `name`."""
    base = json.dumps(facts.base.repo or _last(facts.base.name))
    if is_sha(facts.base.revision):
        base += f', revision="{facts.base.revision}"'
    if _library(facts) == "diffusers":
        loaded = f"pipeline = DiffusionPipeline.from_pretrained({base})"
        return ["from diffusers import DiffusionPipeline", "", loaded, f"pipeline.load_lora_weights({place})"]
    loaded = f"base = {name}.from_pretrained({base})"
    imports = ["from peft import PeftModel", f"from transformers import {name}", ""]
    return [*imports, loaded, f"model = PeftModel.from_pretrained(base, {place})"]


def _table(models: Sequence[Model]) -> str:
    shares = ShareColumns.of([model.has for model in models])
    rows = [
        [
            str(model.seq),
            _linked(repo_of(model.origin), model.revision, _called(model)),
            _commit(repo_of(model.origin), model.revision) if model.revision else "",
            _text(_cut(model.form)),
            "" if model.weight is None else f"{model.weight:g}",
            *cells,
            _text(_cut(model.licence or "")),
            _text(model.digest.removeprefix("blake3:")[:12]),
        ]
        for model, cells in zip(models, shares.rows, strict=True)
    ]
    head = ["record", "model", "commit", "form", "weight", *shares.head, "licence", "digest (BLAKE3)"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    return f"{table}\n\n{shares.meaning}" if shares.meaning else table


def _how(facts: Facts) -> str:
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in sorted(facts.software.items()))
    parts = [
        f"State {_text(facts.state)}, record {facts.seq}: "
        "`continual.json` beside this card has every digest and option.",
        f"Software: {versions}.",
        "The same base, order, rule and options give the same bits on the same machine.",
    ]
    if any(repo_of(model.origin) is None for model in facts.folded) or facts.base.repo is None:
        parts.append("What was no repo of the Hub is named by its folder: only who has it can fold it.")
    if facts.rule == "frank-wolfe":
        parts.append("Its weights were found in rounds on calibration rows, which the commands do not have.")
    layers = f"coefficients of {counted(facts.layers, 'layer')}" if facts.layers else ""
    if learned := " and ".join(filter(None, (layers, facts.terms))):
        parts.append(
            f"{learned.capitalize()} were learned from calibration rows: `continual.json` has them, and the commands "
            "do not."
        )
    return " ".join(parts)


def _linked(repo: str | None, revision: str | None, label: str) -> str:
    if not is_repo(repo):
        return _text(_cut(label))
    return f"[{_text(_cut(label))}](https://huggingface.co/{repo}{f'/tree/{revision}' if is_sha(revision) else ''})"


def _commit(repo: str | None, revision: str | None) -> str:
    short = _text((revision or "")[:12])
    return f"[{short}](https://huggingface.co/{repo}/tree/{revision})" if is_repo(repo) and is_sha(revision) else short


def _reference(repo: str | None, revision: str | None, name: str) -> str:
    if repo is None:
        return f"./{shown(_last(name))}"
    return f"{SCHEME}{repo}{f'@{revision}' if revision else ''}"


def _called(model: Model) -> str:
    return repo_of(model.origin) or _last(model.name)


def _last(name: str) -> str:
    """The last part of a path: where somebody keeps it is nobody's business."""
    return PurePath(name).name or name


def _value(value: object) -> str:
    """A rule's option as `--option` reads it: TOML, or plain text where that is no TOML."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    return json.dumps(value, ensure_ascii=False)


def _before(step: object) -> str:
    """A transform as `--before` reads it: `name:key=value`."""
    if not isinstance(step, Mapping):
        return str(step)
    return ":".join([str(step["name"]), *(f"{key}={_plain(value)}" for key, value in step.items() if key != "name")])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(shown(word)) for word in words)


def _text(text: str) -> str:
    """A stranger's text as text of a table or paragraph: everything that Markdown, HTML or a link could be made of is a
    character reference."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", shown(text))


def _fenced(text: str, language: str) -> str:
    """A block of code; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
