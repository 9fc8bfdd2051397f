"""What the README and the pages tell a user to type works: its five lines run on a small base, and every command line
of every page is one that the command understands."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import load_file
from typer.core import TyperGroup

from continual.cli.main import app
from tests.helpers import models, services
from tests.helpers.command import parsers, run
from tests.helpers.pages import PAGES, ROOT, blocks, name, prose

README = ROOT / "README.md"


def typed(line: str) -> list[str]:
    """The words of a line of a block, without a prompt and without what follows a #, or sends on what is printed."""
    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
    return list(itertools.takewhile(lambda word: word[0:1] not in ("|", ">"), words))


def lines(block: str) -> list[list[str]]:
    """The `continual …` lines of a block, also at the end of another program's line."""
    found = [
        typed(line) for line in block.splitlines() if re.match(r"\s*(\$ )?(continual|hf jobs .* continual) ", line)
    ]
    return [words[words.index("continual") :] for words in found]


def quoted(page: Path) -> list[list[str]]:
    """The `continual …` commands that the page's sentences quote; those with […], | or … show a form."""
    spans = re.findall(r"`(continual [a-z][^`]*)`", prose(page))
    return [shlex.split(span) for span in spans if not re.search(r"[\[\]|…]", span)]


def complaint(words: list[str], *, whole: bool) -> str | None:
    """What the command says of the arguments, None if it takes them; nothing is executed.

    Where a sentence quotes it (not `whole`), arguments may be left out, and capitals stand for a value.
    """
    command: Any = parsers(app)
    arguments = words[1:]
    context = typer.Context(command, info_name="continual")
    try:
        while isinstance(command, TyperGroup):
            if not arguments:
                return None if not whole or command.invoke_without_command else "a command is missing"
            _, command, arguments = command.resolve_command(context, arguments)
        values = arguments if whole else ["1" if a.isupper() else a for a in arguments]
        command.make_context(command.name, values, parent=context)
    except typer.TyperException as error:
        left_out = type(error).__name__ in ("MissingParameter", "BadOptionUsage")
        return None if left_out and not whole else error.format_message()
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_line_is_understood(page: Path) -> None:
    blocked = [words for block in blocks(page, "") for words in lines(block)]
    said = {" ".join(words): complaint(words, whole=True) for words in blocked}
    said |= {" ".join(words): complaint(words, whole=False) for words in quoted(page)}
    assert {line: error for line, error in said.items() if error is not None} == {}


def test_a_line_that_is_not_understood_is_found() -> None:
    assert complaint(["continual", "fold", "a", "--selekt", "relevance"], whole=True) is not None
    assert complaint(["continual", "foldd"], whole=False) is not None
    assert complaint(["continual", "rollback"], whole=True) is not None
    assert complaint(["continual", "log", "--number", "soon"], whole=False) is not None


@pytest.mark.slow
def test_the_five_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, machines = [found for b in blocks(README, "") if (found := lines(b))]
    assert [words[1] for words in machines] == ["init", "run"]  # they need a store and a cluster
    assert [words[1] for words in block] == ["init", "run", "fold", "unfold", "export"]
    monkeypatch.chdir(tmp_path)
    base = models.base(tmp_path / "base")
    for number, person in enumerate(("alice", "bob")):
        models.fine_tune(base, tmp_path / "fine-tunes" / person, number)
    for words in block:
        if words[1] == "run":
            watch = Path(words[words.index("--watch") + 1])
            with services.daemon(Path("state"), watch) as process:
                address = services.url(process, Path("state"))
                services.until(lambda where=address: services.status(where)["folds"] == 2, "both folds")
                process.send_signal(signal.SIGTERM)
                assert process.wait(services.LIMIT) == 0
        else:
            done = run(*words[1:])
            assert done.returncode == 0, f"{words}: {done.stderr}"
    models.fine_tune(base, tmp_path / "only/bob", 1)
    merged, before = load_file("merged/model.safetensors"), load_file("base/model.safetensors")
    changed = {tensor for tensor, values in merged.items() if not values.equal(before[tensor])}
    assert changed == set(before)
    assert run("init", base, "--state", "alone").returncode == 0
    assert run("fold", "only/bob", "--state", "alone").returncode == 0
    assert run("export", "bobs", "--state", "alone").returncode == 0
    for tensor, values in load_file("bobs/model.safetensors").items():
        assert (merged[tensor] - values).norm() <= 1e-5 * (values - before[tensor]).norm(), tensor


def test_the_two_commands_of_the_readme_are_there() -> None:
    (block,) = [b for b in blocks(README, "") if "ops/" in b]
    programs = [typed(line)[0] for line in block.splitlines()]
    assert programs == ["ops/demo", "ops/check"]
    assert [program for program in programs if shutil.which(str(ROOT / program)) is None] == []


def test_the_readme_fits_on_a_screen() -> None:
    assert len(README.read_text().splitlines()) <= 80
    assert "ops/docs/contributing.md" in README.read_text().splitlines()[-1]
