"""Writing the merged model as an ordinary model directory. It has the base's layout, is streamed tensor by tensor into
a temporary directory beside, and renamed into place when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from continual.config import parse_bytes
from continual.engine.block_reading import CutModel
from continual.engine.explaining import shares_of
from continual.engine.reading import Reading
from continual.errors import Misconfigured
from continual.executors.contract import Executor, Progress
from continual.publish.export_orders import ExportForm, write_weights
from continual.publish.exported_config import WORDS, set_config_dtype, untie_config
from continual.publish.exported_tokenizer import put_tokenizer
from continual.publish.exported_weights import DTYPES
from continual.publish.finishing import finish
from continual.publish.provenance import provenance_of
from continual.signing.signer import Signer
from continual.state.durable import move_away, publish_dir, replace_link, usable
from continual.tensors import BaseModel, Checkpoint
from continual.tensors.checkpoints.compound import parts_of
from continual.tensors.checkpoints.place import RELEASE, Place
from continual.tensors.names.tied import tables_apart

_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".ot")
_SMALL = 64 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """What an export is to be: the `directory` to write, the record to read (`at`; None: the newest), the `dtype` as a
    safetensors word (None: the base's own), the size of a shard in bytes (None: the base's shards), where `tokenizer`
    and chat template come from (None: the base), and the `mark` that `continual.json` is to have, by which others see
    whether it is what they want. `earlier`: an earlier export, of which the bytes of tensors that did not change are
    taken. `explain`: what each model has is found whatever that takes. `signer` signs it, `bom`: it has a bill."""

    directory: str | Path
    at: int | None = None
    dtype: str | None = None
    shard_size: int | None = None
    tokenizer: Place | None = None
    mark: str | None = None
    earlier: Path | None = None
    explain: bool = False
    signer: Signer | None = None
    bom: bool = False

    @property
    def path(self) -> Path:
        """The directory to write."""
        return Path(self.directory)


def parse_dtype(word: str | None) -> str | None:
    """`float32`, `bf16`, `F16`… as a safetensors word. Raises Misconfigured for any other."""
    if word is None:
        return None
    if (found := WORDS.get(word.lower(), word.upper())) not in DTYPES:
        raise Misconfigured(f"dtype {word!r}: use one of float32, float16, bfloat16")
    return found


def parse_size(text: str | None) -> int | None:
    """`5GB`, `500MiB` or a number as bytes. Raises Misconfigured for anything else."""
    if text is None:
        return None
    found = parse_bytes(text)
    if not isinstance(found, int) or found <= 0:
        raise Misconfigured(f"size {text!r}: write it as 5GB or 500MiB")
    return found


def export(base: BaseModel, reading: Reading, target: Target, executor: Executor, progress: Progress) -> Path:
    """Writes the merged model that `reading` reads to the target's directory, which must not exist yet.

    Returns the directory. Raises Misconfigured if the directory is there or cannot be made, Halt if a value overflows
    the dtype asked for; then nothing is left behind.
    """
    free(target.path)
    with written(target.path, reading) as temporary:
        fill(base, reading, target, temporary, executor, progress)
        finish(temporary, target, reading)
    return target.path.absolute()


def free(directory: Path) -> None:
    """Raises Misconfigured where a directory to write is there already, or cannot be made."""
    final = directory.absolute()
    with usable(f"cannot write {directory}"):
        if final.exists() or final.is_symlink():
            raise Misconfigured(f"{directory} exists: export writes a new directory, name one that is not there yet")
        if not final.parent.is_dir():
            raise Misconfigured(f"{final.parent}: no such directory to write {final.name} in")


@contextmanager
def written(directory: Path, reading: Reading) -> Iterator[Path]:
    """Gives a temporary directory to write into. When the block ends well, it becomes `directory`, durably. The
    generation that `reading` reads does not expire meanwhile. What killed exports to `directory` left is removed.

    Raises Misconfigured or Retry where the disk gets in the way; then nothing is left behind.
    """
    final = directory.absolute()
    with usable(f"cannot write {directory}"), reading.state.lease(reading.commit.seq):
        clear_leftovers(final.parent, rf"\.{re.escape(final.name)}\.[0-9a-f]+\.tmp")
        with marked(final.parent, f".{final.name}.", ".tmp") as temporary:
            yield temporary
            publish_dir(temporary, final)


@contextmanager
def marked(parent: Path, before: str, after: str = "", mode: int = 0o777) -> Iterator[Path]:
    """A new directory in `parent`, whose name begins and ends so; gone afterwards, where it has that name still. Its
    flock says that it is being written: `clear_leftovers` leaves it alone. Raises OSError."""
    while True:
        directory = parent / f"{before}{secrets.token_hex(4)}{after}"
        directory.mkdir(mode)
        try:
            with suppress(FileNotFoundError):
                fd = _opened(directory)
                break
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(fd)


def _opened(directory: Path) -> int:
    """A descriptor with the flock of a new directory. Raises FileNotFoundError where another process took it for what a
    killed one left, since it was not locked yet."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        locked = _locked(fd)  # None: a file system without locks, where nobody removes what is left
        if locked is False or not os.path.samestat(os.fstat(fd), os.stat(directory)):
            raise FileNotFoundError
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locked(fd: int) -> bool | None:
    """Takes the flock of an open directory: whether it has it, None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clear_leftovers(parent: Path, names: str) -> None:
    """Removes from `parent` the temporary directories and links that killed processes left, whose whole names match the
    pattern `names`, as far as that can be done. What is being written stays."""
    with suppress(OSError):
        for path in [path for path in parent.iterdir() if re.fullmatch(names, path.name)]:
            with suppress(OSError):
                _clear(path)


def _clear(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _locked(fd):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)


def fill(
    base: BaseModel, reading: Reading, target: Target, directory: Path, executor: Executor, progress: Progress
) -> None:
    """Writes the merged model into the empty `directory`, in the dtype and the shards of `target`; syncs nothing.
    Raises Halt if a value overflows the dtype."""
    copy_small_files(base.checkpoint, directory)
    for folder in sorted({part.folder for part in base.checkpoint.parts} | {""}):
        set_config_dtype(directory / folder / "config.json", target.dtype)
    if target.tokenizer is not None:
        put_tokenizer(target.tokenizer, base, directory)
    if tables_apart(base.checkpoint, base.aliases, base.untied):
        untie_config(directory / "config.json")
    with reading.spooled(directory, base.checkpoint.nbytes, shared=executor.elsewhere is not None):
        shares = shares_of(reading, executor, all_of_it=target.explain)  # first: it finds lengths that settling needs
        factor = reading.settle(executor, progress)
        form = ExportForm(directory, target.dtype, target.shard_size, target.earlier)
        made = write_weights(base, reading, form, executor, progress)
    body = provenance_of(reading, factor, shares) | made
    if target.mark is not None:
        body["mark"] = target.mark
    if target.tokenizer is not None:
        body["tokenizer"] = {"origin": target.tokenizer.origin, "revision": target.tokenizer.revision}
    (directory / RELEASE).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", "utf-8")


def keep_current(
    link: Path,
    seq: int,
    write: Callable[[Path], Path],
    time: str | None = None,
    mark: str | None = None,
    served: Callable[[Path], bool] | None = None,
) -> Path:
    """Has `write` export into `LINK-<seq>` beside `link`, points the link there in one step, then removes the directory
    that it pointed at before, and what a killed process left beside it. Returns the new directory.

    Where servers read what lies there whenever they like (`served`), the directory from before stays until the next
    one, and so does each of which `served` says that a server has it.

    An export that is there already is taken, unless it is of a record of another `time`: one that had this number
    before the state was repaired or restored; or has another `mark`, since the settings said otherwise what goes out.
    Then the new one is `LINK-<seq>-<n>`.

    Raises Misconfigured if `link` is there and no link, Retry where the disk gets in the way, and what `write` raises.
    """
    link = link.absolute()
    with usable(f"current = {link}"):
        if link.exists() and not link.is_symlink():
            raise Misconfigured(f"current = {link}: this is no link; name a place that is free, or remove it")
        link.parent.mkdir(parents=True, exist_ok=True)
        before = link.resolve() if link.is_symlink() else None
        names = (f"{link.name}-{seq:08d}{f'-{n}' if n else ''}" for n in count())
        directory = next(d for name in names if not (d := link.parent / name).exists() or _is_of(d, time, mark))
        clear_leftovers(link.parent, rf"\.{re.escape(link.name)}(-[0-9]{{8}}(-[0-9]+)?)?\.[0-9a-f]+\.tmp")
        if not directory.exists():
            write(directory)
        replace_link(link, directory)
    for old in _old_exports(link, before):
        if old != directory and not (served is not None and (old == before or served(old))):
            _remove(old)
    return directory


def _is_of(directory: Path, time: str | None, mark: str | None) -> bool:
    """Whether an export is of the record that was made at `time`, and has this `mark`; None: any. One that an earlier
    version wrote has no mark."""
    body = provenance_in(directory)
    return (time is None or body.get("time") == time) and (mark is None or body.get("mark", mark) == mark)


def provenance_in(directory: Path) -> dict[str, object]:
    """What the `continual.json` in an export says; nothing where there is none that can be read."""
    try:
        body = json.loads((directory / RELEASE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def cut_in(directory: Path) -> tuple[CutModel, ...]:
    """The models of which a part was cut off before, as the export in `directory` says."""
    found = provenance_in(directory).get("cut", [])
    return tuple(CutModel(**one) for one in found) if isinstance(found, list) else ()


def _old_exports(link: Path, before: Path | None) -> list[Path]:
    """The exports beside `link`, by its name and a record: what it pointed at before, and what processes left whole
    that were killed in between. What somebody else named so, as by a date, is of another record."""
    ours = re.compile(rf"{re.escape(link.name)}-([0-9]{{8}})(-[0-9]+)?")
    with suppress(OSError):
        found = [(path, ours.fullmatch(path.name)) for path in link.parent.iterdir() if not path.is_symlink()]
        return [
            path
            for path, name in found
            if name is not None and (path == before or provenance_in(path).get("seq") == int(name[1]))
        ]
    return []


def _remove(directory: Path) -> None:
    """Removes an export, as far as that can be done. It loses its name first: half of one never stands under it."""
    away = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    with suppress(OSError):
        move_away(directory, away)
        shutil.rmtree(away, ignore_errors=True)


def copy_small_files(base: Checkpoint, target: Path) -> None:
    """Config, tokenizer and whatever else stands beside the weights: regular files under 64 MiB, one level of folders
    deep, no weights. The folders of a model in parts come with their settings, and whole where their weights are no
    part of what is merged."""
    source = base.directory
    parts = {part.folder for part in parts_of(base.place)} - {""}
    above = {folder.partition("/")[0] for folder in parts}
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name in (RELEASE, *above):
            continue
        if file.is_dir():
            inner = [f for f in sorted(file.iterdir()) if _is_small(f)]
            if inner and not any(f.name.endswith(_LEFT_OUT) for f in file.iterdir()):
                (target / file.name).mkdir()
                for f in inner:
                    shutil.copyfile(f, target / file.name / f.name)
        elif _is_small(file):
            shutil.copyfile(file, target / file.name)
    read = {part.folder for part in base.parts}
    for folder in sorted(above | parts):
        (target / folder).mkdir(exist_ok=True)
        for file in sorted((source / folder).iterdir()) if (source / folder).is_dir() else ():
            copied = folder in parts and folder not in read and file.name.endswith((".safetensors", ".index.json"))
            if _is_small(file) or (copied and file.is_file()):
                shutil.copyfile(file, target / folder / file.name)


def _is_small(file: Path) -> bool:
    return (
        file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(_LEFT_OUT)
        and file.stat().st_size <= _SMALL
    )
