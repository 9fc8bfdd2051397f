"""Every family, each kind of fine-tune: folded alone, exported, loaded, compared.

    python -m tests.campaigns.families [--only FAMILY]... [--json FILE] [--write]
        [--transformers4 PYTHON] [--cells "full;LoRA"]

A family takes a few seconds on one core; TMPDIR on a disk in memory (/dev/shm) spares the waits of durable writes.
Families of diffusers need an interpreter that has it. With `--transformers4`, an interpreter whose transformers is of
version 4 writes bases and fine-tunes too, and they are mixed with those written here. `--write` writes
ops/docs/families.md. It ends with 1 where a cell is `wrong` or a `silent loss`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from tests.campaigns.families import page
from tests.campaigns.families.adapters import KINDS
from tests.campaigns.families.family import Family
from tests.campaigns.families.judging import Bench, Cell, again, as_lora, crossed, guarded, judge, of_kind
from tests.campaigns.families.making import quiet, slug
from tests.campaigns.families.table import TABLE

CROSSED = ("base 4, full 5", "base 5, full 4", "base 5, LoRA 4")
COLUMNS = ("full", "again", "as LoRA", *KINDS, *CROSSED)
_ROOT = Path(__file__).parents[3]


def cells_of(family: Family, work: Path, older: Path | None, wanted: tuple[str, ...]) -> Iterator[tuple[str, Cell]]:
    """The verdict of each column of a family."""
    bench = Bench(family, work / slug(family), older)
    bench.directory.mkdir()
    try:
        with quiet():
            bench.prepare()
            truth = bench.truth(bench.directory / "full")
    except Exception as error:  # of a library, which cannot make or read such a model itself
        yield from ((column, Cell("n/a", f"{type(error).__name__}: {error}"[:300])) for column in wanted)
        return
    todo = {
        "full": partial(judge, bench, bench.base, bench.directory / "full", truth),
        "again": partial(again, bench),
        "as LoRA": partial(as_lora, bench),
        **{kind: partial(of_kind, bench, kind) for kind in KINDS},
        **{name: partial(crossed, bench, name) for name in CROSSED if older is not None},
    }
    for column in wanted:
        if column in todo:
            yield column, guarded(todo[column])


def main() -> None:
    """Runs the families that are asked for, prints their verdicts, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="FAMILY", help="a family's name, or a part of it")
    parser.add_argument("--cells", default=";".join(COLUMNS), help="columns, with ; between them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what it has of other families and columns is kept")
    parser.add_argument("--write", action="store_true", help="write ops/docs/families.md, of all that FILE has")
    parser.add_argument("--transformers4", type=Path, metavar="PYTHON", help="or the directory that it wrote before")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [f for f in TABLE if not asked.only or any(word.lower() in f.name.lower() for word in asked.only)]
    found = kept(asked.json) if asked.json else {}
    with tempfile.TemporaryDirectory() as scratch:
        older = write_older(asked.transformers4, Path(scratch), chosen) if asked.transformers4 else None
        for family in chosen:
            began = time.perf_counter()
            cells = dict(cells_of(family, Path(scratch), older, tuple(asked.cells.split(";"))))
            say(family.name, cells, time.perf_counter() - began)
            found[family.name] = {**found.get(family.name, {}), **cells}
            if asked.json:
                keep(found, asked.json)
    if asked.write:
        page.write({f.name: found[f.name] for f in TABLE if f.name in found}, _ROOT / "ops/docs/families.md")
    total = Counter(cell.verdict for cells in found.values() for cell in cells.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in total.most_common()))
    sys.exit(1 if total["wrong"] or total["silent loss"] else 0)


def say(name: str, cells: dict[str, Cell], seconds: float) -> None:
    """Tells on stderr how a family went, and why a cell is not right."""
    counted = Counter(cell.verdict for cell in cells.values())
    told = ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
    print(f"{name}: {told}; {seconds:.1f} s", file=sys.stderr, flush=True)
    for column, cell in cells.items():
        if cell.verdict in ("wrong", "silent loss", "refused", "told"):
            print(f"    {column}: {cell.verdict}: {cell.said}", file=sys.stderr, flush=True)


def kept(file: Path) -> dict[str, dict[str, Cell]]:
    """What an earlier run found; nothing where there is no file."""
    body = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {name: {column: Cell(**cell) for column, cell in cells.items()} for name, cells in body.items()}


def keep(found: dict[str, dict[str, Cell]], file: Path) -> None:
    """Writes what was found."""
    body = {name: {column: cell._asdict() for column, cell in cells.items()} for name, cells in found.items()}
    file.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_older(python: Path, scratch: Path, chosen: list[Family]) -> Path:
    """Has another interpreter write its models of these families; where they are. A directory has them already."""
    if python.is_dir():
        return python
    older = scratch / "older"
    older.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    names = [family.name for family in chosen if family.library == "transformers"]
    command = [str(python), "-m", "tests.campaigns.families.making", str(older), *names]
    subprocess.run(command, check=True, env=environment, cwd=_ROOT)
    return older


if __name__ == "__main__":
    main()
