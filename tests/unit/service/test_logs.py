"""What reaches the log: nothing that steers a terminal or passes for another line, and nothing without end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

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
