"""Texts and their labels out of packages of Debian (main) and npm: how a package is fetched, and a maker of pairs for
each kind of what lies in it. Packages are fetched with the ordinary clients (apt-get download, apt-cache, npm pack);
nothing is installed and no root is needed.
"""

from __future__ import annotations

import email
import email.policy
import functools
import gzip
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

WIDTH = 160
"""Characters of a text that are kept."""
Pairs = Iterator[tuple[str, str]]


def call(*command: str, cwd: Path | None = None) -> str:
    """Standard output of a program. Raises RuntimeError with its last words, also where it isn't installed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def fetch(package: str, root: Path) -> None:
    """Unpacks a package below `root`: Debian's as it would be installed, npm's into `package/NAME`."""
    kept = root / ".fetched" / re.sub(r"\W", "_", package)
    if kept.exists():
        return
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        folder = Path(scratch)
        if package.startswith("npm:"):
            call("npm", "pack", "--silent", package.removeprefix("npm:"), cwd=folder)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(folder / "out", filter="data")
            name = package.removeprefix("npm:").rpartition("/")[2]
            shutil.move(folder / "out" / "package", root / "package" / name)
        else:
            call("apt-get", "download", package, cwd=folder)
            call("dpkg-deb", "-x", str(next(folder.glob("*.deb"))), str(root))
    kept.mkdir(parents=True)


@functools.cache
def available() -> list[dict[str, str]]:
    """All packages in apt's lists, each with its first line of description, section, and tags."""
    text = call("apt-cache", "dumpavail")
    found = [
        dict(re.findall(r"^(Package|Description|Section|Tag): (.*(?:\n .*)*)", entry, re.M))
        for entry in text.split("\n\n")
    ]
    if not any("Tag" in entry for entry in found):
        raise RuntimeError("apt-cache dumpavail: no tagged packages; is apt's list empty (apt-get update)?")
    return sorted((entry for entry in found if "Description" in entry), key=lambda entry: entry["Package"])


def short(entry: dict[str, str]) -> str:
    """A package's description without what only tells its parts apart, such as (data files) or - documentation."""
    return re.sub(r"\s*\([^)]*\)|\s+-+ .*", "", entry["Description"].splitlines()[0])


def of_section(_: Path) -> Pairs:
    yield from ((short(entry), entry["Section"].rpartition("/")[2]) for entry in available() if "Section" in entry)


def of_tag(facet: str, same: dict[str, str] | None = None) -> Callable[[Path], Pairs]:
    """A maker of the packages that have exactly one tag of this facet; of a tag such as biology:molecular only the
    first part counts unless `same` maps it."""

    def make(_: Path) -> Pairs:
        for entry in available():
            tags = {(same or {}).get(tag, tag) for tag in re.findall(rf"\b{facet}::([\w:+-]+)", entry.get("Tag", ""))}
            tags = {tag.partition(":")[0] for tag in tags}
            if len(tags) == 1:
                yield short(entry), tags.pop()

    return make


def of_wordnet(part: str, first: int, names: str) -> Callable[[Path], Pairs]:
    """A maker of WordNet's glosses without their examples. `names` are the lexicographer files, the first of them being
    number `first`."""

    def make(root: Path) -> Pairs:
        lexical = {f"{number:02}": name for number, name in enumerate(names.split(), first)}
        for line in (root / f"usr/share/wordnet/data.{part}").read_text().splitlines():
            if not line.startswith(" "):
                yield re.split(r'; *"', line.partition(" | ")[2])[0].strip(), lexical[line.split()[1]]

    return make


def dictionary(root: Path, name: str) -> str:
    """The text of a dictionary in dict's format."""
    return gzip.decompress((root / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode("utf-8", "replace")


def of_gcide(root: Path) -> Pairs:
    for mark, text in re.findall(
        r"\(([A-Z][A-Za-z]+\.?)\)\s+([A-Z][^\[\]]+?)(?=\n *\n|\s*\[|\s+--)", dictionary(root, "gcide")
    ):
        yield re.sub(r"\([A-Z][a-z]+\.\)|[{}]|\([a-z]\) ", "", text), mark.rstrip(".")


def of_foldoc(root: Path) -> Pairs:
    for mark, text in re.findall(r"^   <([a-z ]+)> (.+?)\n\n", dictionary(root, "foldoc"), re.M | re.S):
        yield re.sub(r"<[a-z ,]+>|[{}]|^\s*(\d\.|\([^)]*\))\s*", "", text), mark


def of_fortunes(root: Path) -> Pairs:
    for path in sorted((root / "usr/share/games/fortunes").iterdir()):
        if not path.suffix:
            for text in re.split(r"^%\n", path.read_text(errors="replace"), flags=re.M):
                said = " ".join(re.split(r"\n\s*-- ", text)[0].split())
                if len(said) <= WIDTH:
                    yield said, path.name


def of_emoji(root: Path) -> Pairs:
    tree = ElementTree.parse(root / "usr/share/unicode/cldr/common/annotations/en.xml")
    words = {node.get("cp"): node.text or "" for node in tree.iter("annotation") if node.get("type") is None}
    group = ""
    for line in (root / "usr/share/unicode/emoji/emoji-test.txt").read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif found := re.search(r"; fully-qualified +# (\S+) E[\d.]+ (.+)", line):
            known = words.get(found[1].replace("\ufe0f", ""), "").replace(" | ", ", ")
            if "skin tone" not in line:
                yield f"{found[2]}: {known}" if known else found[2], group


def of_bible(root: Path) -> Pairs:
    kinds = {
        "law": "Ge Exo Lev Num Deu",
        "history": "Josh Jdgs Ruth 1Sm 2Sm 1Ki 2Ki 1Chr 2Chr Ezra Neh Est",
        "poetry": "Job Psa Prv Eccl SSol",
        "prophets": "Isa Jer Lam Eze Dan Hos Joel Amos Obad Jonah Mic Nahum Hab Zep Hag Zec Mal",
        "gospels": "Mat Mark Luke John",
        "letters": "Rom 1Cor 2Cor Gal Eph Phi Col 1Th 2Th 1Tim 2Tim Titus Phmn Heb Jas 1Pet 2Pet 1Jn 2Jn 3Jn Jude",
    }
    book = {name: kind for kind, names in kinds.items() for name in names.split()}
    for line in call(str(root / "usr/bin/bible"), "-f", "Gen1:1-Rev22:21", cwd=root / "usr/lib").splitlines():
        if found := re.match(r"(\d?[A-Za-z]+)\d+:\d+ (.+)", line):
            yield found[2], book.get(found[1], "")


def of_ding(root: Path) -> Pairs:
    for line in (root / "usr/share/trans/de-en").read_text().splitlines():
        if (
            not line.startswith("#")
            and len(marks := set(re.findall(r"\[([a-z]+)\.\]", line)) - {"coll", "ugs", "fig", "hist"}) == 1
        ):
            yield re.sub(r"[\[{(][^\])}]*[\])}]", "", line.partition("::")[2]).replace("|", ";"), marks.pop()


def of_mail(root: Path) -> Pairs:
    for path in sorted((root / "package/datasets-spam-assassin/data").glob("*/*.json")):
        message = email.message_from_string(json.loads(path.read_text())["text"])
        part = next((part for part in message.walk() if part.get_content_maintype() == "text"), message)
        body = part.get_payload(decode=True)
        text = re.sub(
            r"<[^>]*>?|&\w+;|[=_*-]{3,}|https?://\S+", " ", body.decode("latin-1") if isinstance(body, bytes) else ""
        )
        yield (
            re.sub(r"\[[^\]]*\]", "", f"{message.get('Subject', '')}: {text[:1000]}"),
            "spam" if "spam" in path.parent.name else "ham",
        )


def of_speeches(root: Path) -> Pairs:
    for path in sorted((root / "package/datasets-sotu/data").glob("*.json")):
        speech = json.loads(path.read_text())
        if isinstance(speech, dict) and "year" in speech:
            begins = max(year for year in (1790, 1840, 1890, 1930, 1980) if year <= int(speech["year"]))
            yield from ((said, str(begins)) for said in re.split(r"(?<=[.!?])\s+", speech["text"]))


def of_places(root: Path) -> Pairs:
    for entry in json.loads((root / "usr/share/iso-codes/json/iso_3166-2.json").read_text())["3166-2"]:
        yield re.sub(r"\s*[\[(].*", "", entry["name"]), entry["code"][:2]
