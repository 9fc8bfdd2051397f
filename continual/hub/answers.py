"""What the Hub says of its repos, from the bytes of its answers: every answer passes one strict record for its kind.

Pure functions of bytes. What is no answer of its kind at all is Trouble: it says nothing about any repo. A repo that
does not fit its record is a Misfit, or refused as `malformed`; the others of the same answer are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError

from continual.config.globs import SEVERAL
from continual.errors import Refuse
from continual.hub.names import is_repo, is_sha
from continual.hub.trouble import Trouble
from continual.retrying import Fault

S = TypeVar("S", bound="_Said")
LARGEST_ANSWER = 16 << 20
"""Bytes of an answer that is read, unpacked: a page of a thousand models takes 1 MB, a repo of 50,000 files 12 MB."""
MOST_FILES = 50_000
"""Files of a repo that is read; no model that can be folded has so many."""
MOST_VALUES = 1_000_000
"""Values in an answer. One takes up to 100 bytes while it is parsed, during which no other thread of Python runs."""
LARGEST_FILE = 1 << 50
_SHOWN = 80


class RemoteFile(NamedTuple):
    """A file of a repo: its size in bytes, git's blob id (empty where a mirror does not say it), and the SHA-256 of its
    contents if it is stored in LFS."""

    name: str
    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Info:
    """A model repo at one commit. `files` by path; empty in a listing, which does not have them."""

    id: str
    sha: str
    modified: datetime
    tags: tuple[str, ...] = ()
    gated: bool = False
    private: bool = False
    files: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def licence(self) -> str | None:
        """The licence that the card of the repo names, or several with `SEVERAL` between them."""
        return SEVERAL.join(tag.removeprefix("license:") for tag in self.tags if tag.startswith("license:")) or None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum(file.size for file in self.files.values() if file.name.endswith(".safetensors"))


class Misfit(NamedTuple):
    """A row of a listing that does not fit: the repo and its commit, each None where it cannot be used, and why."""

    repo: str | None
    sha: str | None
    why: str


class DoesNotFit(Refuse):
    """What the Hub says of a repo does not fit: `repo` and `sha`, each None where that itself cannot be used."""

    def __init__(self, message: str, repo: str | None = None, sha: str | None = None) -> None:
        super().__init__("malformed", message)
        self.repo = repo
        self.sha = sha


def _must(holds: Callable[[str], bool], what: str) -> AfterValidator:
    """A check of a text, that says what it should have been."""

    def check(text: str) -> str:
        if not holds(text):
            raise ValueError(f"is no {what}")
        return text

    return AfterValidator(check)


def _is_hash(text: str) -> bool:
    return len(text) in (40, 64) and all(c in "0123456789abcdef" for c in text)


def _is_file(text: str) -> bool:
    """Whether a text is the path of a file within a repo, which cannot lead out of it."""
    parts = text.split("/")
    plain = all(c >= " " and c != "\x7f" for c in text)
    return plain and len(text.encode()) <= 1024 and not any(part in ("", ".", "..") for part in parts)


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("has no time zone")
    try:
        found = found.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time") from None
    if not 1970 <= found.year < 9999:
        raise ValueError("is no time of a commit")
    return found


_Repo = Annotated[str, Field(max_length=200), _must(is_repo, "id of a repo")]
_Sha = Annotated[str, Field(max_length=40), _must(is_sha, "hash of a commit")]
_Hash = Annotated[str, Field(max_length=64), _must(_is_hash, "hash")]
_Name = Annotated[str, Field(max_length=1024), _must(_is_file, "path of a file")]
_Size = Annotated[int, Field(ge=0, le=LARGEST_FILE)]
_Time = Annotated[str, Field(max_length=40), AfterValidator(_time)]
_Text = Annotated[str, Field(max_length=1000)]


class _Said(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Row(_Said):
    """A repo as a listing has it."""

    id: _Repo
    sha: _Sha
    modified: _Time | None = Field(None, alias="lastModified")
    tags: Annotated[list[_Text], FailFast()] = Field(default=[], max_length=10_000)
    gated: bool | _Text | None = None
    private: bool | None = None

    def info(self, files: Mapping[str, RemoteFile] | None = None) -> Info:
        modified = self.modified or datetime.fromtimestamp(0, UTC)
        assert isinstance(modified, datetime)
        return Info(self.id, self.sha, modified, tuple(self.tags), bool(self.gated), bool(self.private), files or {})


class _Large(_Said):
    """What is said of a file in LFS; a repo and a tree call its hash differently."""

    sha256: _Hash | None = None
    oid: _Hash | None = None
    size: _Size | None = None


class _Sibling(_Said):
    name: _Name = Field(alias="rfilename")
    size: _Size | None = None
    oid: _Hash | None = Field(None, alias="blobId")
    lfs: _Large | None = None


class _Whole(_Row):
    """A repo with its files."""

    siblings: Annotated[list[_Sibling], FailFast()] = Field(default=[], max_length=MOST_FILES)


class _TreeEntry(_Said):
    type: Literal["file", "directory"]
    name: _Name = Field(alias="path")
    size: _Size = 0
    oid: _Hash | None = None
    lfs: _Large | None = None


class _HistoryRow(_Said):
    id: _Sha


class _TagRef(_Said):
    name: _Text
    commit: _Sha = Field(alias="targetCommit")


class _Refs(_Said):
    tags: Annotated[list[_TagRef], FailFast()] = Field(default=[], max_length=MOST_FILES)


def models_of(body: bytes, what: str) -> list[Info | Misfit]:
    """The models of a page of a listing. A repo without a commit is empty, and left out. Raises Trouble if this is no
    list of models."""
    rows = _json(body, what)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _no(what, "a list of models")
    return [_row(row) for row in rows if row.get("sha") is not None or not is_repo(row.get("id"))]


def _row(row: Mapping[str, object]) -> Info | Misfit:
    try:
        return _Row.model_validate(row).info()
    except ValidationError as error:
        return Misfit(*_known(row), _why(error))


def model_of(body: bytes, what: str) -> Info:
    """A repo with its files; a size of -1 is one that a mirror does not tell. Raises Trouble if this is no model, and
    Refuse: `gone` for an empty repo, `malformed` for one of which something does not fit."""
    said = _json(body, what)
    if not isinstance(said, dict) or "id" not in said:
        raise _no(what, "a model")
    repo, sha = _known(said)
    if repo is not None and said.get("sha") is None:
        raise Refuse("gone", f"{what}: the Hub names no commit of it: it is empty")
    try:
        found = _Whole.model_validate(said)
        files = _files(_file(f.name, f.size, f.oid, f.lfs) for f in found.siblings)
    except ValidationError as error:
        raise DoesNotFit(f"{what}: what the Hub says of it does not fit: {_why(error)}", repo, sha) from None
    except ValueError as error:
        raise DoesNotFit(f"{what}: what the Hub says of it does not fit: {error}", repo, sha) from None
    return found.info(files)


def tree_of(body: bytes, what: str) -> dict[str, RemoteFile]:
    """The files of a page of a tree. Raises Trouble if this is no tree, Refuse (`malformed`)."""
    entries = _rows(_TreeEntry, body, what, "a list of files")
    try:
        return _files(_file(e.name, e.size, e.oid, e.lfs) for e in entries if e.type == "file")
    except ValueError as error:
        raise DoesNotFit(f"{what}: what the Hub says of it does not fit: {error}") from None


def commits_of(body: bytes, what: str) -> list[str]:
    """The commits of a page of a history. Raises Trouble."""
    try:
        return [row.id for row in _rows(_HistoryRow, body, what, "a list of commits")]
    except DoesNotFit:
        raise _no(what, "a list of commits") from None


def tags_of(body: bytes, what: str) -> dict[str, str]:
    """The commits of the tags of a repo, by name. Raises Trouble."""
    try:
        return {ref.name: ref.commit for ref in _Refs.model_validate(_json(body, what)).tags}
    except ValidationError:
        raise _no(what, "a list of references") from None


def _rows(record: type[S], body: bytes, what: str, kind: str) -> list[S]:
    rows = _json(body, what)
    if not isinstance(rows, list):
        raise _no(what, kind)
    try:
        return [record.model_validate(row) for row in rows]
    except ValidationError as error:
        raise DoesNotFit(f"{what}: what the Hub says of it does not fit: {_why(error)}") from None


def _file(name: str, size: int | None, oid: str | None, lfs: _Large | None) -> RemoteFile:
    """A file. Raises ValueError where its two sizes differ."""
    if lfs is not None and None not in (size, lfs.size) and size != lfs.size:
        raise ValueError(f"the file {name!r} is of {size} bytes, and of {lfs.size}")
    sha256 = None if lfs is None else next((h for h in (lfs.sha256, lfs.oid) if h and len(h) == 64), None)
    whole = size if lfs is None or lfs.size is None else lfs.size
    return RemoteFile(name, -1 if whole is None else whole, oid or "", sha256)


def _files(found: Iterator[RemoteFile]) -> dict[str, RemoteFile]:
    """Files by name. Raises ValueError for a name that is there twice."""
    files: dict[str, RemoteFile] = {}
    for file in found:
        if file.name in files:
            raise ValueError(f"the file {file.name!r} is listed twice")
        files[file.name] = file
    return files


def _known(row: Mapping[str, object]) -> tuple[str | None, str | None]:
    """The repo and the commit of a row that does not fit, as far as each can be used."""
    repo, sha = row.get("id"), row.get("sha")
    return (
        repo if isinstance(repo, str) and is_repo(repo) else None,
        sha if isinstance(sha, str) and is_sha(sha) else None,
    )


def _json(body: bytes, what: str) -> object:
    """What a text says, or Trouble. Unlike in the files of a model, half a surrogate or a key that is there twice does
    not spoil all of it: the row that has it is left out."""
    if len(body) > LARGEST_ANSWER or body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_VALUES:
        raise _no(what, "text of a size that can be meant")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _no(what, "JSON") from None


def _no(what: str, kind: str) -> Trouble:
    return Trouble(f"{what}: the Hub's answer is no {kind.removeprefix('a ')}; nothing was settled", Fault.SERVER)


def _why(error: ValidationError) -> str:
    """The first thing that does not fit, in words."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    given = first["input"]
    if isinstance(given, str):
        given = ascii(given[:_SHOWN])
    elif not isinstance(given, float | None) and not (isinstance(given, int) and abs(given) < 1 << 64):
        given = f"a {type(given).__name__}"
    return f"{where} = {given}: {first['msg'].removeprefix('Value error, ')}"
