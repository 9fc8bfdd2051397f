"""One frozen `Settings`, from a TOML file, `CONTINUAL_*` variables and flags, the later winning. No other module reads the environment.

Validation is pydantic's; what is here is the order of the sources and errors that name the setting and where it was set.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from continual.errors import Misconfigured

PREFIX = "CONTINUAL_"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: object) -> object:
    """`4GB`, `512MiB`, `1000` as a number of bytes; what is no such text is passed on for the validator to refuse."""
    if isinstance(text, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())):
        return int(float(match[1]) * _UNITS[match[2] or ""])
    return text


def _split(text: object) -> object:
    return tuple(part for part in text.split(",") if part) if isinstance(text, str) else text


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split)]
Seconds = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Everything a user can set. Sizes are bytes (`4GB` is understood), times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Path = Field(Path("state"), description="directory of the state")
    watch: Paths = Field((), description="folders in which fine-tunes are published")
    rule: str | None = Field(None, description="fold rule that init takes; a state made under another is refused")
    options: dict[str, Any] = Field(default_factory=dict, description="fold-time options of the rule, likewise")
    before: Texts | None = Field(None, description="transforms of each task vector before its fold, as drop:rate=0.9, likewise")
    weight: Annotated[str, BeforeValidator(str)] = Field("1", description="weight of a model: a number, FILE.json:KEY or metadata:KEY")
    weights: dict[str, float] = Field(default_factory=dict, description="globs over model names and the weight of those they match")
    settle: Seconds = Field(5.0, description="how long a model's files must be still before it is taken")
    rescan: Annotated[float, Field(gt=0)] = Field(30.0, description="how often the folders are scanned whatever the notifications say")
    base: Path | None = Field(None, description="where the base is now, if it was moved since init")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field("auto", description="auto, cpu, cuda or cuda:N")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="tensors folded at a time; 0: one per core")
    memory: Bytes | None = Field(None, description="bytes the tensors in flight may take; default: half of what the machine has free")
    keep: Annotated[int, Field(ge=1)] = Field(3, description="generations kept besides the tagged ones")
    updates: Literal["refuse", "add"] = Field("refuse", description="what to do with new files at a place that was folded before")
    missing: Literal["refuse", "unchanged"] = Field("refuse", description="what a tensor that a fine-tune lacks means")
    vocab: Literal["refuse", "common-rows"] = Field("refuse", description="what to do with vocabularies of another size")
    max_base_ratio: Annotated[float, Field(gt=0)] = Field(0.5, description="largest task-vector norm, as a multiple of the base's norm")
    max_mean_ratio: Annotated[float, Field(gt=1)] = Field(30.0, description="largest task-vector norm, as a multiple of the mean so far")
    host: str = Field("127.0.0.1", description="address the service listens on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8321, description="port of the service; 0 takes a free one")
    allow_remote: bool = Field(False, description="listen on an address that other machines reach")
    current: Path | None = Field(None, description="a link that is kept pointing at an export of the newest merged model")
    drain: Seconds = Field(30.0, description="how long a stop waits for the fold under way before giving it up")
    log_json: bool | None = Field(None, description="JSON log lines; default: when the output is no terminal")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")


def load(flags: Mapping[str, Any], *, file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from `file` (or the file `CONTINUAL_CONFIG` names), the environment and `flags` (None means not given).

    Raises Misconfigured naming the setting, where it was set and what is wrong with it.
    """
    environ = os.environ if environ is None else environ
    file = file or (Path(environ["CONTINUAL_CONFIG"]) if environ.get("CONTINUAL_CONFIG") else None)
    known = Settings.model_fields
    values: dict[str, Any] = {}
    where: dict[str, str] = {}
    for origin, pairs in (
        (f"{file}", _toml(file) if file else {}),
        ("environment", {k[len(PREFIX) :].lower(): v for k, v in environ.items() if k.startswith(PREFIX) and k != "CONTINUAL_CONFIG"}),
        ("flag", {k: v for k, v in flags.items() if v is not None and v != []}),
    ):
        for key, value in pairs.items():
            shown = f"{PREFIX}{key.upper()}" if origin == "environment" else key
            if key not in known:
                raise Misconfigured(f"{origin}: unknown setting {shown!r}; known are {', '.join(sorted(known))}")
            values[key], where[key] = value, f"{origin}: {shown}"
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise Misconfigured(f"{where.get(name, name)} = {first['input']!r}: {first['msg']}") from None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise Misconfigured(f"settings file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"settings file {file}: {error}") from None
