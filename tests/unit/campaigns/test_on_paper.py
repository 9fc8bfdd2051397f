"""The table on 405 B parameters, by hand."""

from __future__ import annotations

from tests.campaigns.bench.on_paper import table


def test_the_table_on_405_b_follows_from_what_an_element_took() -> None:
    turns = {"ray, 1": [{"worked": worked} for worked in (9.0, 2.0, 1.0)]}
    found = table(
        {"elements": 100_000_000, "rows": {"fold, mean": turns, "export, mean": turns, "fold, opcm": turns}}
    ).splitlines()
    assert found == [
        "| what it takes | `mean` |",
        "|---|---|",
        "| work, measured | 20.0 s for 10⁹ elements |",
        "| work in all | 8,100 s |",
        "| read and written | 4.9 TB |",
        "| the largest tensor, on one core (a table) | 42 s |",
        "| 8 machines: cores, network, store | 63 s, 202 s, **486 s** |",
        "| 32 machines: cores, network, store | 42 s, 51 s, **486 s** |",
        "| 128 machines: cores, network, store | 42 s, 13 s, **486 s** |",
    ]
