"""Every parser of bytes that others wrote, on wrong inputs: a result or an error of ours, and nothing else. A slice of
tests/campaigns/fuzz.py."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.helpers.parsers import OWN, Parser, table

PARSERS = table()
each = pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)


@each
def test_what_is_valid_is_read(parser: Parser) -> None:
    for data in parser.valid:
        parser.call(data)


@pytest.mark.slow
@each
def test_wrong_inputs_give_a_result_or_an_error_of_ours(parser: Parser) -> None:
    @given(parser.inputs.strategy)
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    def holds(data: bytes) -> None:
        said = ""
        try:
            parser.call(data)
        except parser.raises as error:
            said = str(error) if isinstance(error, OWN) else ""
        assert said.isprintable()  # a message goes to logs and terminals

    holds()
