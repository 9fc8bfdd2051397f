"""The picture of a comparison: a cell for each layer and kind, whatever the names are."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import pytest

from continual.engine.comparing import Diff, DiffFigures, DiffTensor
from continual.errors import Misconfigured
from continual.publish.heat_map import check_picture, draw, heat_map


def tensor(layer: str, part: str, before: float, change: float) -> DiffTensor:
    figures = DiffFigures(before, before, change, change / before if before else None, 0.5, None)
    return DiffTensor(f"{layer}.{part}".strip("."), layer, part, "matrix", 0.0, figures)


def comparison(*tensors: DiffTensor) -> Diff:
    return Diff("a<b>", "HEAD", 1, 2, DiffFigures(1.0, 1.0, 1.0, 1.0, 0.5, None), (), tensors, (), (), ())


def cells(text: str) -> dict[str, str]:
    """The colour of each cell, by what is said of it."""
    found = xml.dom.minidom.parseString(text)
    return {
        rect.getElementsByTagName("title")[0].firstChild.data: rect.getAttribute("fill")  # type: ignore[union-attr]
        for rect in found.getElementsByTagName("rect")
        if rect.getElementsByTagName("title")
    }


def test_the_longer_the_change_the_darker_and_experts_are_one() -> None:
    found = cells(
        heat_map(
            comparison(
                tensor("l.0", "q", 2.0, 1.0),
                tensor("l.0", "experts.0.w", 3.0, 0.0),
                tensor("l.0", "experts.1.w", 4.0, 0.0),
                tensor("head", "", 0.0, 1.0),
            )
        )
    )
    assert found == {
        "l.0 q: difference 1, before 2": "#08306b",
        "l.0 experts.w: difference 0, before 5; 2 tensors": "#eef3fa",
        "head: difference 1, before 0; nothing was merged here before": "#d94801",
    }


def test_from_nothing_it_is_the_length_of_the_change() -> None:
    found = cells(heat_map(comparison(tensor("l.0", "q", 0.0, 4.0), tensor("l.1", "q", 0.0, 0.0))))
    assert list(found.values()) == ["#08306b", "#eef3fa"]


@pytest.mark.parametrize("name", ["<script>&\"'", "a\x1b[2Jb\x00", "\u202e\ud800", "x" * 5000])
def test_names_are_no_markup(tmp_path: Path, name: str) -> None:
    found = comparison(tensor(name, "q", 1.0, 1.0))
    draw(found, tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert len(cells(text)) == 1
    assert len(text) < 4000


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    for file in (tmp_path / "model.safetensors", tmp_path / "none" / "a.svg"):
        with pytest.raises(Misconfigured, match="picture ="):
            check_picture(file)
    (tmp_path / "d.svg").mkdir()
    with pytest.raises(Misconfigured, match="name a file"):
        check_picture(tmp_path / "d.svg")
