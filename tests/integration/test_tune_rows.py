"""Tuning on calibration rows with real, tiny transformers models: what is in memory is what an export holds, and the
scores are what a plain loop gives."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from continual import api, making
from continual.errors import Misconfigured
from continual.executors.contract import silent
from continual.objectives import builtin
from continual.objectives.causal_lm import CausalLM
from continual.objectives.parameters import find_parameters
from continual.publish import folder
from continual.publish.folder import Target
from continual.rules import ReadOptions
from continual.tuning import Rows, Tuning, scoring
from tests.helpers import models
from tests.helpers.command import machine
from tests.helpers.tiny import CPU, MODELS, SMALL, embedded, loaded, transformers, write_tokenizer

pytestmark = pytest.mark.slow

TEXTS = [
    "a very good film",
    "the book is bad",
    "good film",
    "not a bad book at all",
    "the film was very very bad",
    "a good good book",
    "bad film",
]


LABELS = ["pos", "neg", "pos", "pos", "neg", "pos", "neg"]


class Place(NamedTuple):
    """A state of two folds of the base beside it, and what to evaluate them by."""

    directory: Path
    ask: Rows

    def open(self, write: bool = False) -> api.Merge:
        return api.open(self.directory / "state", write=write, device="cpu")


def write_rows(file: Path, labels: list[Any]) -> Path:
    file.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(TEXTS, labels, strict=True)))
    return file


@pytest.fixture(params=list(MODELS))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    making.init(tmp_path / "base", tmp_path / "state", making.Recipe(rule="opcm", scale="norm"))
    with api.open(tmp_path / "state", write=True, device="cpu", max_base_ratio=10) as merge:
        for i in range(2):
            ft = models.fine_tune(tmp_path / "base", tmp_path / f"ft-{i}", i, size=2.0)
            assert merge.fold(ft).fate == "folded"
    heads = tmp_path / "heads.json" if request.param == "heads" else None
    if heads:
        heads.write_text(
            json.dumps({"neg": ["bad", "very bad film"], "pos": ["good", "a good book", "the good film is good"]})
        )
    return Place(tmp_path, Rows(request.param, write_rows(tmp_path / "rows.jsonl", LABELS), heads, 3))


def plain_score(name: str, model: Any, base: Any, tokenizer: Any, heads: Path | None) -> float:
    """What the objective says it computes, a row at a time."""
    if name == "heads":
        assert heads is not None
        prompts = json.loads(heads.read_text())
        found = torch.nn.functional.normalize(
            torch.stack([embedded(base, tokenizer, p).mean(0) for p in prompts.values()]), dim=-1
        )
        names = [list(prompts)[i] for i in (embedded(model, tokenizer, TEXTS) @ found.T).argmax(1)]
        return sum(a == b for a, b in zip(names, LABELS, strict=True)) / len(LABELS)
    ids = [torch.tensor([tokenizer(t)["input_ids"]]) for t in TEXTS]
    if name == "classification":
        names = [model.config.id2label[int(model(i).logits.argmax())] for i in ids]
        return sum(a == b for a, b in zip(names, LABELS, strict=True)) / len(LABELS)
    losses = [float(model(i, labels=i).loss) * (i.shape[1] - 1) for i in ids if i.shape[1] > 1]
    return -math.fsum(losses) / sum(i.shape[1] - 1 for i in ids)


@torch.no_grad()
def test_in_memory_is_what_an_export_holds_and_scores_are_those_of_a_plain_loop(place: Place) -> None:
    name, base = place.ask.name, place.directory / "base"
    objective = builtin.load(place.ask, base, CPU)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with place.open() as merge:
        held = find_parameters(objective.model, merge.base.specs, merge.base.aliases)
        for number, value in enumerate((0.3, 1.7)):
            reading = merge.reading(options=ReadOptions("norm", value))
            reading.settle(merge.executor, silent)
            found = scoring.score(objective, held, merge.base, reading, merge.executor)
            out = folder.export(merge.base, reading, Target(place.directory / f"out-{number}"), merge.executor, silent)
            exported = loaded(name, out)
            for (key, ours), (_, theirs) in zip(
                objective.model.named_parameters(), exported.named_parameters(), strict=True
            ):
                assert torch.equal(ours, theirs), key
            assert found == pytest.approx(
                plain_score(name, exported, loaded(name, base), tokenizer, place.ask.heads), rel=1e-4
            )


def test_the_losses_can_be_differentiated_and_belong_to_the_score(place: Place) -> None:
    objective = builtin.load(place.ask, place.directory / "base", CPU)
    losses = torch.cat([objective.losses(range(objective.count)[k : k + 3]) for k in range(0, objective.count, 3)])
    assert losses.shape == (len(TEXTS),)
    losses.sum().backward()
    slopes = [p.grad for p in objective.model.parameters() if p.grad is not None]
    assert sum(float(s.square().sum()) for s in slopes) > 0
    if isinstance(objective, CausalLM):
        tokens = torch.tensor(objective.lengths) - 1
        assert objective.score() == pytest.approx(
            -float(losses.detach() @ tokens.to(losses)) / int(tokens.sum()), rel=1e-5
        )
    assert objective.score() == objective.score()


def test_tuned_and_recorded(place: Place) -> None:
    with place.open(write=True) as merge:
        seq = merge.state.ledger.head.seq
        tuned = merge.tune(place.ask, Tuning(candidates=6, policy="number"))
        again = merge.tune(place.ask, Tuning(candidates=6, policy="number", around=1.0, dry_run=True))
        assert again.commit is None
        assert [c.entry.kind for c in merge.state.ledger.log[seq + 1 :]] == ["tune"]
        assert merge.reading().options == tuned.read
        assert tuned.score == max(t.score for t in tuned.entry.trials)
        told = tuned.entry.evaluation
        assert (told.kind, told.objective, told.batch, told.file.name) == (
            "rows",
            place.ask.name,
            3,
            "rows.jsonl",
        )
        assert told.file.digest.startswith("blake3:")
        assert (told.heads is not None) == (place.ask.name == "heads")


def test_from_the_command_line(place: Place) -> None:
    flags = (
        "--rows",
        place.ask.file,
        "--objective",
        place.ask.name,
        *(("--heads", place.ask.heads) if place.ask.heads else ()),
    )
    told = machine("tune", *flags, "--candidates", 3, "--device", "cpu", "--state", place.directory / "state")
    assert len(told["trials"]) == 3
    assert told["record"] == 3


@pytest.mark.parametrize("place", ["classification"], indirect=True)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "good", "label": 1}\n{"text": 3, "label": 1}\n', "line 2: write an object with a text"),
        ('{"text": "good", "label": "pos"}\n\n{"text": "bad"}', "line 3: no label"),
        ('{"text": "good", "label": "grand"}', "line 1: the model has no class 'grand'; it has neg, pos"),
        ('{"text": "good", "label": 2}', "no class 2"),
        ('{"text": "good", "label": true}', "the label is True"),
        ('{"text": "", "label": 1}', "line 1: the text has fewer than 1 tokens"),
        ("good,pos", "line 1: no JSON"),
        ("\n", "no row in it"),
    ],
)
def test_rows_that_cannot_be_used_are_named(place: Place, text: str, words: str) -> None:
    place.ask.file.write_text(text)
    with place.open(write=True) as merge, pytest.raises(Misconfigured, match=words) as caught:
        merge.tune(place.ask)
    assert str(place.ask.file) in str(caught.value)


@pytest.mark.parametrize("place", ["heads"], indirect=True)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ('{"neg": ["bad"]}', "at least two labels"),
        ('{"neg": ["bad"], "pos": []}', "'pos' needs"),
        ('{"a": ["b"], "b": ["c"]}', "no prompts for the label 'pos'"),
    ],
)
def test_heads_that_cannot_be_used_are_named(place: Place, text: str, words: str) -> None:
    assert place.ask.heads is not None
    place.ask.heads.write_text(text)
    with pytest.raises(Misconfigured, match=words):
        builtin.load(place.ask, place.directory / "base", CPU)


@pytest.mark.parametrize("place", ["causal-lm"], indirect=True)
def test_a_text_with_nothing_to_predict_is_named(place: Place) -> None:
    place.ask.file.write_text('{"text": "good film"}\n{"text": "good"}\n')
    with pytest.raises(Misconfigured, match="line 2: the text has fewer than 2 tokens"):
        builtin.load(place.ask, place.directory / "base", CPU)


@pytest.mark.parametrize("place", ["heads"], indirect=True)
def test_a_model_that_is_none_for_the_objective(place: Place) -> None:
    with pytest.raises(Misconfigured, match="draws at random"):
        builtin.load(Rows("classification", place.ask.file), place.directory / "base", CPU)
    with pytest.raises(Misconfigured, match=r"transformers cannot load it|draws at random"):
        builtin.load(Rows("causal-lm", place.ask.file), place.directory, CPU)


@pytest.mark.parametrize("place", ["classification"], indirect=True)
def test_names_with_and_without_the_prefix_and_one_that_is_nowhere(place: Place) -> None:
    """The body alone holds all but the classification head, under names without the prefix."""
    base = load_file(place.directory / "base/model.safetensors")
    body = transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=32))
    with (
        place.open() as merge,
        pytest.raises(Misconfigured, match=r"tensor classifier\.\w+ of the base is no parameter of BertModel"),
    ):
        find_parameters(body, merge.base.specs, merge.base.aliases)
    making.init(place.directory / "base", place.directory / "other", making.Recipe(exclude=("classifier.*",)))
    with api.open(place.directory / "other") as merge:
        held = find_parameters(body, merge.base.specs, merge.base.aliases)
    assert set(held) == {name for name in base if name.startswith("bert.")}


def test_what_is_missing_is_said() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\nfrom pathlib import Path\nimport torch\nfrom "
        "continual.objectives import builtin as o\n"
    )
    code += "o.load(o.Rows('causal-lm', Path('r')), Path('m'), torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Misconfigured" in done.stderr
    assert "pip install 'continual[evaluate]'" in done.stderr
