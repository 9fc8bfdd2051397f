"""Models near what one box can hold: a whole model of 8 B, and one layer of a model of 70 B.

    python -m tests.campaigns.bench.big model                # 50 GB of disk, 80 with all steps; a quarter of an hour
    python -m tests.campaigns.bench.big model --layers 1     # try it: 4 GB of weights
    python -m tests.campaigns.bench.big block --rules opcm iso-c tsv-m     # 15 GB of disk; hours

`model` writes a base of the shapes of Llama 3 8B in bfloat16, 16 GB in shards of 5 GB, makes a state of it, and folds
fine-tunes by `--rule`. A fine-tune takes no disk: it lies on a Hub on loopback that makes its bytes as they are read,
those of the base with the low two bits of each mantissa changed, and the fold streams it. All of the first differs; of
the second only the last shard, so that the second generation shares the other files with the first. Then the merge is
exported. Before each step that writes, the disk is looked at: what does not leave `--keep-free` GB to others is left
out, and said.

`block` has the seven matrices of one layer, or those of them that `--matrices` names, and two fine-tunes in a folder
each: singular values that fall as 1/k, 256 of them, and what bfloat16 rounds. Two folds and an export of each rule.

Each command is a process of its own with the settings that it has by default; CPU seconds are beyond imports, memory is
VmHWM, which has nothing of the page cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.campaigns.bench import adapters, ran
from tests.helpers.hubs import card
from tests.loopback import Hub, environment, serving
from tests.loopback.repos import Blob

Shapes = Mapping[str, tuple[int, ...]]
EIGHT = adapters.Shape(32, 4096, 1024, 14336, 128256)
SHARD = 5e9
MASK = 1 << 20
RANK = 256
MATRICES = tuple(f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down"))
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}


class Changed:
    """The bytes of a weight file of a fine-tune, made as they are read: those of the base's file, with the two low bits
    of each mantissa changed by a pattern of 2 MiB that `seed` draws; as they are without a seed."""

    def __init__(self, file: Path, seed: int | None) -> None:
        self._file, self._size = file, file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            self.header = json.loads(opened.read(length))
        self._data = 8 + length
        draw = np.random.default_rng(seed)
        self._mask = np.zeros(MASK, np.uint16) if seed is None else draw.integers(0, 4, MASK, np.uint16)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        first, last = start - start % 2, stop + stop % 2  # header and data have even lengths
        found = np.fromfile(self._file, np.uint8, last - first, offset=first)
        values = found[max(0, self._data - first) :].view(np.uint16)
        at = max(0, first - self._data) // 2 % MASK
        for begin in range(-at, len(values), MASK):
            here = values[max(0, begin) : begin + MASK]
            here ^= self._mask[max(0, -begin) : max(0, -begin) + len(here)]
        return found[start - first : stop - first].tobytes()

    def weight(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, flat."""
        first, last = (self._data + place for place in self.header[name]["data_offsets"])
        return (np.frombuffer(self[first:last], np.uint16).astype(np.uint32) << 16).view(np.float32)


def tensors(shape: adapters.Shape) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama of this shape, the head apart from the embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.words, shape.width)}
    linear = shape.linear()
    for layer in range(shape.layers):
        head = f"model.layers.{layer}."
        found |= {name: sizes for name, sizes in linear.items() if name.startswith(head)}
        found |= {f"{head}{norm}.weight": (shape.width,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (shape.width,), "lm_head.weight": (shape.words, shape.width)}


def bytes_of(found: Shapes, width: int = 2) -> int:
    """What these tensors take, at so many bytes a value."""
    return width * sum(int(np.prod(sizes)) for sizes in found.values())


def sharded(directory: Path, found: Shapes) -> list[Path]:
    """A model of random values in shards of at most 5 GB, with an index; its weight files."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, sizes in found.items():
        if bytes_of(parts[-1] | {name: sizes}) > SHARD and parts[-1]:
            parts.append({})
        parts[-1][name] = sizes
    directory.mkdir()
    files: list[Path] = []
    index: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        files.append(directory / f"model-{number:05d}-of-{len(parts):05d}.safetensors")
        adapters.write(files[-1], part, number)
        index |= dict.fromkeys(part, files[-1].name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return files


def publish(hub: Hub, repo: str, files: list[Path], changed: list[Path], seed: int) -> None:
    """A fine-tune on the Hub: of the base's weight files those in `changed` are changed, the others as they are."""
    folder = files[0].parent
    blobs = {file.name: Blob(Changed(file, seed if file in changed else None), lfs=True) for file in files}
    small = {file.name: file.read_bytes() for file in folder.iterdir() if file not in files}
    hub.commit(repo, {**small, **blobs, "README.md": card(None)})


class Room:
    """What may be taken of the disk of `work`."""

    def __init__(self, work: Path, keep_free: float) -> None:
        self._work, self._free = work, keep_free * 1e9

    def has(self, step: str, nbytes: float) -> bool:
        """Whether `nbytes` more can be written; says so where they cannot."""
        left = shutil.disk_usage(self._work).free - nbytes - self._free
        if left < 0:
            print(
                f"  {step}: left out; {nbytes / 1e9:.1f} GB and {self._free / 1e9:.0f} GB for others, "
                f"{-left / 1e9:.1f} GB too much for this disk",
                flush=True,
            )
        return left >= 0


@contextmanager
def progress(work: Path, step: str, every: float = 10.0) -> Iterator[None]:
    """Keeps a line on standard error: how long the step has taken, and what lies in `work`."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(every):
            taken = sum(512 * file.lstat().st_blocks for file in _files(work))
            sys.stderr.write(f"\r{step}: {time.monotonic() - began:.0f} s, {taken / 1e9:.1f} GB on the disk ")
            sys.stderr.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        sys.stderr.write("\r" + 80 * " " + "\r")


def _files(work: Path) -> Iterator[Path]:
    """The files below, each once though several names may lead to it; what goes meanwhile is left out."""
    seen = set()
    for path in work.rglob("*"):
        try:
            told = path.lstat()
        except FileNotFoundError:
            continue
        if told.st_ino not in seen and path.is_file():
            seen.add(told.st_ino)
            yield path


def step(work: Path, name: str, *words: str, env: Mapping[str, str] | None = None) -> None:
    """Runs `continual` with these words and prints its line."""
    with progress(work, name):
        cost = ran.continual(*words, env=env)
    print(
        f"  {name}: {cost.cpu:.1f} CPU s beyond imports, {cost.wall:.1f} s, {cost.memory / 1e9:.2f} GB of memory",
        flush=True,
    )


def model(work: Path, shape: adapters.Shape, rule: str, keep_free: float) -> None:
    """Folds and exports a whole model; prints what each step took."""
    found, room, state = tensors(shape), Room(work, keep_free), str(work / "state")
    size = bytes_of(found)
    print(f"{size / 1e9:.1f} GB in bfloat16, {len(found)} tensors, the largest {_largest(found) / 1e9:.2f} GB; {rule}")
    if not room.has("base and first fold", 3.05 * size):
        return
    with progress(work, "base"):
        files = sharded(work / "base", found)
    print(f"  base: {len(files)} shards of {', '.join(f'{f.stat().st_size / 1e9:.1f}' for f in files)} GB")
    step(work, "init", "init", str(work / "base"), "--rule", rule, "--state", state)
    with serving(Hub()) as hub:
        (work / "client").mkdir()
        fold = functools.partial(step, work, env=environment(hub, work / "client"))
        publish(hub, "org/first", files, files, 1)
        fold("first fold, all of it new", "fold", "hf://org/first", "--state", state, "--keep", "1")
        if room.has("second fold", 2.05 * size):  # what a fold asks for, who cannot know what will be as it was
            publish(hub, "org/second", files, files[-1:], 2)
            name = f"second fold, {files[-1].stat().st_size / size:.0%} of it changed"
            fold(name, "fold", "hf://org/second", "--state", state, "--keep", "1")
    check(Path(state), files)
    if room.has("export", 1.05 * size):
        step(work, "export", "export", str(work / "export"), "--state", state)


def check(path: Path, files: list[Path]) -> None:
    """Compares the sums of a matrix of the first and of the last shard with those of the task vectors, bit for bit;
    only of a rule that has sums."""
    import continual

    with continual.open(path) as merge:
        folds = sum(record.kind == "fold" for record in merge.state.ledger.log)
        for file in (files[0], files[-1]):
            base = Changed(file, None)
            name = next(n for n in base.header if n.endswith("k_proj.weight"))
            expected = np.zeros_like(base.weight(name))
            for seed in range(1, folds + 1 if file == files[-1] else 2):
                expected += Changed(file, seed).weight(name) - base.weight(name)
            assert merge.state.read(name, "sum").tobytes() == expected.tobytes(), name
            print(f"  {name}: bit for bit the sum of its task vectors", flush=True)


def _largest(found: Shapes) -> int:
    return max(2 * int(np.prod(sizes)) for sizes in found.values())


def drawn(base: npt.NDArray[np.uint16], rows: int, seed: int) -> npt.NDArray[np.uint16]:
    """A fine-tuned matrix, as bfloat16 in rows: the base plus RANK directions, the k-th 1/k as long as the first; the
    change has a hundredth of the base's length."""
    draw = np.random.default_rng(seed)
    weight = (base.astype(np.uint32) << 16).view(np.float32).reshape(rows, -1)
    rank = min(RANK, *weight.shape)
    left = draw.standard_normal((rows, rank), np.float32) / np.arange(1, rank + 1, dtype=np.float32)
    right = draw.standard_normal((rank, weight.shape[1]), np.float32)
    step_ = max(1, (1 << 24) // weight.shape[1])
    length = float(np.linalg.norm(left)) * weight.shape[1] ** 0.5
    factor = np.float32(0.01 * float(np.linalg.norm(weight)) / length)
    for first in range(0, rows, step_):
        weight[first : first + step_] += factor * (left[first : first + step_] @ right)
    bits = weight.view(np.uint32)
    bits += np.uint32(0x8000)
    return (bits >> 16).astype(np.uint16)


def tuned(base: Path, directory: Path, found: Shapes, seed: int) -> Path:
    """A fine-tune of a base in one file, matrix by matrix; vectors stay as they are."""
    directory.mkdir()
    shutil.copy(base / "config.json", directory)
    file = directory / "model.safetensors"
    shutil.copy(base / "model.safetensors", file)
    with open(file, "r+b") as out:
        at = 8 + int.from_bytes(out.read(8), "little")
        for number, sizes in enumerate(found.values()):
            count = int(np.prod(sizes))
            if len(sizes) == 2:
                out.seek(at)
                values = np.frombuffer(out.read(2 * count), np.uint16)
                out.seek(at)
                out.write(drawn(values, sizes[0], 1000 * seed + number).tobytes())
            at += 2 * count
    return directory


def block(work: Path, found: Shapes, rules: list[str], keep_free: float) -> None:
    """Folds two fine-tunes of these matrices of one layer, and exports them, by each rule."""
    room = Room(work, keep_free)
    size = bytes_of(found)
    print(
        f"{len(found)} matrices of a layer, {size / 1e9:.2f} GB in bfloat16, the largest {_largest(found) / 1e9:.2f}",
        flush=True,
    )
    if not room.has("two fine-tunes", 3 * size):
        return
    (work / "base").mkdir()
    adapters.write(work / "base/model.safetensors", found, 0)
    (work / "base/config.json").write_text(json.dumps(CONFIG))
    models = [tuned(work / "base", work / f"tuned-{seed}", found, seed) for seed in (1, 2)]
    for rule in rules:
        if not room.has(rule, 9 * size):  # two generations, and what an export spools
            continue
        state, target = work / "state", work / "export"
        step(work, f"{rule}, init", "init", str(work / "base"), "--rule", rule, "--state", str(state))
        for number, one in enumerate(models, 1):
            step(work, f"{rule}, fold {number}", "fold", str(one), "--keep", "1", "--state", str(state))
        step(work, f"{rule}, export", "export", str(target), "--state", str(state))
        shutil.rmtree(state)
        shutil.rmtree(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "block"))
    parser.add_argument("--layers", type=int, default=EIGHT.layers, help="of the model")
    parser.add_argument("--rule", default="task-arithmetic", help="by which the model is folded")
    parser.add_argument("--rules", nargs="+", default=["opcm", "iso-c", "tsv-m"], help="by which the block is folded")
    parser.add_argument("--size", choices=tuple(adapters.SHAPES), default="70b", help="whose layer the block is")
    parser.add_argument("--matrices", nargs="+", default=MATRICES, help="of the layer; by default all")
    parser.add_argument("--keep-free", type=float, default=12.0, help="GB of the disk that stay free")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.what == "model":
            model(Path(work), EIGHT._replace(layers=args.layers), args.rule, args.keep_free)
        else:
            layer = adapters.SHAPES[args.size]._replace(layers=1).linear()
            chosen = {name: sizes for name, sizes in layer.items() if name.split(".")[-2] in args.matrices}
            block(Path(work), chosen, args.rules, args.keep_free)


if __name__ == "__main__":
    main()
