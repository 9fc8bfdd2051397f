"""What reaches the log: nothing that steers a terminal or passes for another line, and nothing without end."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from continual.errors import Misconfigured
from continual.service import logs
from continual.service.logs import INTERVAL, Repeats

FOUL = "a\x1b[2J\x9b\u202eb\nforged line\udc80"
SHOWN = r"a\x1b[2J\x9b\u202eb\nforged line\udc80"


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    before = logging.getLogger().handlers[:]
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = before


def raised(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


@pytest.mark.parametrize("as_json", [True, False])
def test_no_value_steers_a_terminal_or_forges_a_line(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.configure(json=as_json)
    log = structlog.get_logger("continual")
    log.warning(
        "retry", model=FOUL, error=FOUL, path=Path(FOUL), many=[FOUL, {FOUL: FOUL}], number=1, what=OSError(FOUL)
    )
    log.error("internal error", exc_info=raised(FOUL), model="x")
    logging.getLogger("somebody").warning("%s is wrong", FOUL)
    logging.getLogger("continual.state").info("adopted %s", FOUL)
    told = capsys.readouterr().err
    assert told.encode()
    assert not any(c in told for c in "\x1b\x9b\u202e\udc80")
    assert not any(line.startswith("forged line") for line in told.splitlines()) or not as_json
    if as_json:
        rows = [json.loads(line) for line in told.splitlines()]
        assert rows[0]["model"] == rows[0]["error"] == rows[0]["path"] == rows[0]["many"][0] == SHOWN
        assert rows[0]["many"][1] == {SHOWN: SHOWN}
        assert rows[0]["number"] == 1
        assert "Traceback" in rows[1]["exception"]
        assert [row["event"] for row in rows] == ["retry", "internal error", "library", f"adopted {SHOWN}"]
    else:
        assert SHOWN in told


def test_the_same_trouble_is_told_once_and_then_counted() -> None:
    now = [0.0]
    repeats = Repeats(lambda: now[0])

    def said(**line: object) -> int | None:
        """How many were left out before the line; None where it is left out itself."""
        try:
            return int(repeats(None, "", dict(line)).get("left_out", 0))  # type: ignore[call-overload,no-any-return]
        except structlog.DropEvent:
            return None

    one = {"level": "warning", "event": "retry", "model": "a", "error": "no"}
    assert said(**one, seconds=5.0) == 0
    assert said(**one, seconds=10.0) is None
    assert said(**one | {"model": "b"}) == 0
    assert said(**one | {"error": "never"}) == 0
    assert said(**one | {"level": "info"}) == 0
    assert said(**one | {"level": "info"}) == 0, "good news is always told"
    assert said(**one) is None
    now[0] = INTERVAL
    assert said(**one) == 2
    assert said(**one) is None
    now[0] = 2 * INTERVAL
    assert said(**one) == 1


def test_what_is_kept_in_mind_is_bounded() -> None:
    repeats = Repeats(lambda: 0.0)
    for number in range(5000):
        repeats(None, "", {"level": "error", "event": "refused", "model": str(number)})
    assert len(repeats._told) == 1000


def test_a_log_file_may_be_moved_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "log"
    logs.configure(file=file)
    log = structlog.get_logger("continual")
    log.info("one", model=FOUL)
    file.rename(tmp_path / "log.1")
    log.info("two")
    shutil.copy(file, tmp_path / "log.2")
    os.truncate(file, 0)
    log.info("three")
    file.unlink()
    log.info("four")
    events = [[json.loads(line)["event"] for line in (tmp_path / name).read_text().splitlines()]
              for name in ("log.1", "log.2", "log")]  # fmt: skip
    assert events == [["one"], ["two"], ["four"]]
    assert stat.S_IMODE(file.stat().st_mode) & 0o007 == 0
    assert capsys.readouterr().err == ""


def test_lines_that_a_log_file_does_not_take_go_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "in" / "log"
    file.parent.mkdir()
    logs.configure(file=file)
    file.rename(file.with_name("log.1"))
    file.mkdir()
    structlog.get_logger("continual").info("one")
    assert json.loads(capsys.readouterr().err)["event"] == "one"
    file.rmdir()
    structlog.get_logger("continual").info("two")
    assert json.loads(file.read_text())["event"] == "two"


@pytest.mark.parametrize("kind", ["directory", "pipe", "missing"])
def test_a_log_file_that_cannot_be_one_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a" / "log" if kind == "missing" else tmp_path / "log"
    if kind == "directory":
        file.mkdir()
    if kind == "pipe":
        os.mkfifo(file)
    with pytest.raises(Misconfigured, match=f"log_file {file}: cannot be written"):
        logs.configure(file=file)
