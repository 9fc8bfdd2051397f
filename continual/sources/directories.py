"""One directory as it is now: whether a model is in it, whether all of it is there, and what a person should know if
there is none.

It goes by names, sizes and times. Only regular files are opened, and only weights and an index, to see how long they
say they are; whether a model is any good is for the gates. Nothing here waits for a file: what lies in a watched folder
was put there by others.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from continual.errors import Refuse, Retry
from continual.records import FileStat
from continual.tensors import Folder
from continual.tensors.adapters.adapter import weights_in
from continual.tensors.adapters.adapter_config import CONFIG as ADAPTER
from continual.tensors.checkpoints import header
from continual.tensors.checkpoints.checkpoint import CONFIG, INDEX, SINGLE, opened_files, weight_files
from continual.tensors.checkpoints.compound import COPIED, Part, parts_of
from continual.tensors.checkpoints.files import Files
from continual.tensors.checkpoints.place import MANIFESTS, key_of

MARKS = (INDEX, SINGLE, ADAPTER)
_BESIDE = (*MARKS, CONFIG, *MANIFESTS)
DEEPEST = 3
"""Levels below the watched folder at which a model may lie."""
MOST = 200_000
"""Names in one directory that are looked at."""
_TENSORS = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (_TENSORS, *_PICKLED)
_UNREAD = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz", ".tflite")
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".bz2", ".7z", ".rar")
_CLAIMS = (CONFIG, ADAPTER, *MANIFESTS, "trainer_state.json", "training_args.bin")
"""Files by which a folder says that it is a model, or will be one: what lies below belongs to it."""
_UNFINISHED = (".tmp", ".part", ".incomplete")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


class FolderSighting(NamedTuple):
    """A model directory as it is now. `whole`: every file the index names is there, as long as its header says.
    `changed`: when the file system last changed one of its files, in seconds since 1970."""

    path: str
    files: tuple[FileStat, ...]
    whole: bool
    order: tuple[int, str]
    changed: float = 0.0


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in a directory. `files`: what is no directory, in order; `hidden`: such files under names that do not
    count; `folders`: the directories in which something can be published, in order; `links`: those of them that are
    links; `broken`: links that lead nowhere."""

    files: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    links: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()


def ignored(name: str) -> bool:
    """Names under which nothing is published yet: hidden ones and those of unfinished downloads."""
    return name.startswith(".") or name.endswith(_UNFINISHED)


def is_checkpoint(name: str) -> bool:
    """Whether a folder is called as a Trainer calls the checkpoints of a run."""
    return _CHECKPOINT.fullmatch(name) is not None


def listed(path: str) -> Listing:
    """The names in the directory `path`. One entry that cannot be looked at counts as a file, and hides no other.

    Raises OSError if the directory cannot be listed, or holds more than 200,000 names.
    """
    files, hidden, folders, links, broken = list[str](), list[str](), list[str](), set[str](), set[str]()
    with os.scandir(path) as entries:
        for number, entry in enumerate(entries):
            if number == MOST:
                raise OSError(errno.E2BIG, f"it holds more than {MOST} names", path)
            name = entry.name
            if not _is_folder(entry):
                (hidden if ignored(name) else files).append(name)
                if entry.is_symlink() and not os.path.exists(entry.path):
                    broken.add(name)
            elif not ignored(name):
                folders.append(name)
                if entry.is_symlink():
                    links.add(name)
    files.sort()
    hidden.sort()
    folders.sort()
    return Listing(tuple(files), tuple(hidden), tuple(folders), frozenset(links), frozenset(broken))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links, a target that may not be looked at
        return False


def searched(found: Listing, *, depth: int, link: bool, nested: bool) -> tuple[str, ...]:
    """The folders of a directory in which models are looked for.

    A link is not followed further: it may lead back up. What lies in a model belongs to it, and a checkpoint to a run
    that may become a model yet, unless `nested`. The watched folder itself (`depth` 0) is never a model.
    """
    if depth >= DEEPEST or link:
        return ()
    if nested:
        return found.folders
    if depth > 0 and claimed(found):
        return ()
    return tuple(name for name in found.folders if not is_checkpoint(name))


def claimed(found: Listing) -> bool:
    """Whether a directory is a model or is about to become one, by the names of its files."""
    return unfinished(found) is not None or any(name in _CLAIMS or name.endswith(_WEIGHTS) for name in found.files)


def model_in(path: str, found: Listing) -> FolderSighting | None:
    """The model in a directory, without looking whether it is `whole`; None if there is none.

    Raises OSError if it vanished meanwhile.
    """
    kept = [name for name in found.files if name.endswith(_WEIGHTS) or name in _BESIDE]
    kept += _files_in_parts(path, found)
    mark = next((mark for mark in MARKS if mark in kept), None) or next((n for n in kept if n.endswith(_WEIGHTS)), None)
    if mark is None:
        return None
    stats = {name: _stat(f"{path}/{name}") for name in kept}
    files = tuple(_file_stat(name, found) for name, found in stats.items())
    changed = max(os.stat(path).st_ctime, *(found.st_ctime for found in stats.values()))
    return FolderSighting(path, files, False, (stats[mark].st_mtime_ns, os.path.basename(path)), changed)


def is_in_parts(found: Listing) -> bool:
    """Whether a directory says that its folders make one model."""
    return any(name in MANIFESTS for name in found.files)


def folders_of(path: str, found: Listing) -> tuple[str, ...]:
    """The folders that belong to the model in a directory, those of them that are there."""
    parts = {part.folder for part in _parts(path, found)} - {""}
    return tuple(folder for folder in sorted(parts) if os.path.isdir(f"{path}/{folder}"))


def _parts(path: str, found: Listing) -> tuple[Part, ...]:
    """The parts of the model in a directory; none where its files lie together, or what it says is malformed: then it
    is refused, not waited for."""
    if not is_in_parts(found):
        return ()
    try:
        return parts_of(Folder(Path(path)))
    except (Refuse, Retry):
        return ()


def _files_in_parts(path: str, found: Listing) -> list[str]:
    """What counts of the folders of a model, with the folders themselves: they change when a file is added."""
    names: list[str] = []
    for folder in folders_of(path, found):
        inside = listed(f"{path}/{folder}").files
        counts = [name for name in inside if name.endswith((*_WEIGHTS, ".index.json")) or name == CONFIG]
        names += [folder, *(f"{folder}/{name}" for name in counts)]
    return names


def signature(path: str, names: Sequence[str]) -> int:
    """A number that changes when one of these files does. Raises OSError if one is gone."""
    return hash(tuple(_file_stat(name, _stat(f"{path}/{name}")) for name in names))


def look(path: str) -> FolderSighting | None:
    """The model in directory `path`, None if there is none or it vanished while it was looked at."""
    try:
        names = listed(path)
        found = model_in(path, names)
    except OSError:
        return None
    return found and found._replace(whole=is_whole(path, names))


def keys(model: FolderSighting, found: Listing) -> Iterator[str]:
    """The keys under which this model can be settled, the likelier first: that of its weights as they are opened, and
    that of all its files, which a model has whose headers could not be read."""
    stats = {file.name: file for file in model.files}
    for names in _opened(model.path, found):
        if all(name in stats for name in names):
            yield key_of(model.path, [stats[name] for name in names])
    folder = Folder(Path(model.path))
    try:
        yield folder.key(folder.look())
    except OSError:
        return


def _opened(path: str, found: Listing) -> Iterator[tuple[str, ...]]:
    """The files that are opened of a model, as far as can be told; an index is read only at last."""
    if is_in_parts(found):
        yield from _opened_parts(path, found)
    elif ADAPTER in found.files:
        yield (weights_in(found.files), ADAPTER)
    elif SINGLE in found.files:
        yield (SINGLE,)
    elif INDEX not in found.files:
        yield tuple(name for name in found.files if name.endswith(_TENSORS))
        yield from _as_opened(path)
    else:
        yield tuple(name for name in found.files if _SHARD.fullmatch(name))
        yield from _as_opened(path)


def _as_opened(path: str) -> Iterator[tuple[str, ...]]:
    """The weight files that are opened of a model whose files lie together."""
    try:
        yield weight_files(Folder(Path(path)))
    except (Refuse, Retry):
        return


def _opened_parts(path: str, found: Listing) -> Iterator[tuple[str, ...]]:
    """The files that are opened of a model in parts."""
    parts, adapter = _parts(path, found), ADAPTER in found.files
    try:
        if parts:
            names = opened_files(Folder(Path(path)), parts, weights_in(found.files) if adapter else None)
            yield (*names, ADAPTER) if adapter else names
    except (Refuse, Retry):
        return


def is_whole(path: str, found: Listing) -> bool:
    """Whether everything that belongs to the model is there and as long as it says. What is malformed, or no regular
    file, counts as whole: it is refused, not waited for."""
    if unfinished(found):
        return False
    names = set(found.files)
    if ADAPTER in names:
        weights = weights_in(names)
        present = {weights, "adapter_model.bin"} & names
        whole = bool(present) and (weights not in present or _complete(f"{path}/{weights}"))
        return whole and all(_is_part_whole(path, part) for part in _parts(path, found)[1:])
    if parts := _parts(path, found):
        return all(_is_part_whole(path, part) for part in parts)
    wanted = {name for name in names if name.endswith(_TENSORS)}
    if SINGLE not in names:
        try:
            wanted = set(weight_files(Folder(Path(path)))) if INDEX in names else wanted | _rest(wanted)
        except (Refuse, Retry):
            return True
    return wanted <= names and all(_complete(f"{path}/{name}") for name in wanted)


def _is_part_whole(path: str, part: Part) -> bool:
    """Whether a folder of a model holds what it needs, as far as that is known of its kind."""
    place, directory = Folder(Path(path)), f"{path}/{part.folder}" if part.folder else path
    try:
        found = listed(directory)
    except OSError:
        return not part.weighted and part.kind != "Pooling"  # those without settings are kept as empty folders, or not
    names = set(found.files)
    if unfinished(found) or (part.kind == "Pooling" and CONFIG not in names):
        return False
    tensors = {name for name in names if name.endswith(_TENSORS)}
    if part.folder in COPIED or not tensors:
        return not part.weighted or part.folder in COPIED or any(name.endswith(_PICKLED) for name in names)
    try:
        wanted = weight_files(place, part.folder)
    except (Refuse, Retry):
        return not _rest(tensors)
    return all(place.present(name) and _complete(f"{path}/{name}") for name in wanted)


def unfinished(found: Listing) -> str | None:
    """Weights under a name of what is still being written; what macOS keeps beside a file (`._NAME`) is none."""
    return next((name for name in found.hidden if _TENSORS in name and not name.startswith("._")), None)


def _rest(names: set[str]) -> set[str]:
    """What shards are waited for with, which say by their names that they are some of several: their index."""
    return {INDEX} if any(part and int(part[3][:9]) > 1 for part in map(_SHARD.fullmatch, names)) else set()


def _complete(file: str) -> bool:
    """Whether a safetensors file is as long as its header says; True for what is refused whatever is waited for."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return True  # a pipe, a device: to open one may do something
    except OSError as error:
        return error.errno != errno.ENOENT
    try:
        opened = Files([Path(file)], None)
    except (Refuse, Retry):
        return True
    try:
        header.parse(functools.partial(opened.pread, 0), opened.stats[0].size, file)
    except Refuse as refusal:
        return refusal.reason != "truncated"
    except Retry:
        return False
    finally:
        opened.close()
    return True


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # a link that leads nowhere
        return os.lstat(path)


def _file_stat(name: str, found: os.stat_result) -> FileStat:
    return FileStat(name, found.st_size, found.st_mtime_ns, found.st_ino)


def forbidden(root: Path) -> Path | None:
    """A state of ours that lies in `root` or that `root` lies in; None if there is none. What cannot be looked at is
    passed over."""
    above = [str(path) for path in Path(os.path.realpath(root)).parents]
    for path in (*_directories(str(root), DEEPEST), *above):
        if os.path.isfile(os.path.join(path, "format.json")) and os.path.isdir(os.path.join(path, "commits")):
            return Path(path)
    return None


def _directories(path: str, depth: int) -> Iterator[str]:
    yield path
    try:
        found = listed(path) if depth else Listing()
    except OSError:
        return
    for name in found.folders:
        yield from _directories(os.path.join(path, name), 0 if name in found.links else depth - 1)


def shown(path: str) -> str:
    """A path or name as it can stand in a sentence: bytes that are no UTF-8 become `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def why_none(found: Listing) -> str:
    """What a person should know of a directory in which neither a model is nor one is looked for."""
    names = found.files
    below = "; what lies in its folders is not looked at" if found.folders else ""
    if part := unfinished(found):
        return f"holds {shown(part)}, which is not finished, and no weights{below}"
    if other := next((name for name in names if name.endswith((*_UNREAD, *_PACKED))), None):
        return f"holds no weights that can be read: {_other(other)}{below}"
    if mark := next((name for name in names if name in _CLAIMS), None):
        return f"has {mark} and no weights beside it{below}"
    if found.folders:
        return f"holds folders that are not looked at: {DEEPEST} levels are, and links are not followed further"
    return "holds no weights" if names else "is empty"


def loose(found: Listing) -> Iterator[str]:
    """What lies in a directory that holds folders and is not looked at, though it may have been meant as a model."""
    for name in found.files:
        if name in found.broken:
            yield f"{shown(name)} is a link that leads nowhere"
        elif name.endswith((*_UNREAD, *_PACKED)):
            yield _other(name)
        elif name.endswith(_WEIGHTS) or name in _CLAIMS or name == INDEX:
            yield f"{shown(name)} lies loose: a model is a folder of its own; make one and move the files there"


def _other(name: str) -> str:
    what = "is an archive: unpack it" if name.endswith(_PACKED) else "is of a kind that is not read: only safetensors"
    return f"{shown(name)} {what}"
