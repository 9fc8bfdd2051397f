"""The language suite on a tiny model: what is asked, that answers are what generation and likelihoods say, and what is
trained. The real model is never here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from continual.engine.views import ReadView
from tests.campaigns.bench.quality import asked, language
from tests.campaigns.bench.quality.campaign import Adapters, Campaign, Plan, order_of
from tests.campaigns.bench.quality.language import Language
from tests.campaigns.bench.quality.suite import Watching, fine_tune

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TEXTS = ("red apples are sweet", "the train is late", "green pears are sour", "a bus left the town")


def rows(count: int) -> list[list[object]]:
    return [[f"{TEXTS[i % 4]} {i}", i % 2] for i in range(count)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Language:
    """Two layers of width 32 with grouped queries and a tied table, tokens of one byte or a few, and one labelled
    set."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    (folder / "text").mkdir()
    labelled = {
        "classes": ["ham", "spam"],
        "prompts": [["a"], ["b"]],
        "train": rows(asked.HELD + 40),
        "test": rows(30),
    }
    (folder / "text" / "sms_spam.json").write_text(json.dumps(labelled))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "given")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "given")
    return Language(folder / "suite", (folder,), folder / "given")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training of three steps, and few answers to write."""
    monkeypatch.setattr(language, "STEPS", dict.fromkeys(language.STEPS, 3))
    monkeypatch.setattr(asked, "WRITTEN_TEST", 20)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (90, "ninety"),
        (305, "three hundred and five"),
        (4000, "four thousand"),
        (2891, "two thousand eight hundred and ninety-one"),
        (7012, "seven thousand and twelve"),
    ],
)
def test_numbers_are_spelled(number: int, words: str) -> None:
    assert asked.spelled(number) == words


def test_writing_tasks_are_the_same_in_every_run_and_held_out_rows_are_not_learned() -> None:
    for name in asked.WRITERS:
        task = asked.task(name, ())
        assert task == asked.task(name, ())
        parts = [{row.text for row in part} for part in (task.train, task.validation, task.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
    with pytest.raises(FileNotFoundError, match=r"text/snips7\.json"):
        asked.task("snips7", ())


def test_label_words(suite: Language) -> None:
    assert asked.LABELLED["hwu64"].word("alarm_set") == " alarm"
    assert asked.LABELLED["hwu64"].word("qa_maths") == " question"
    assert suite.tasks == ("numbers", "dates", "sms_spam"), "labelled sets that no folder has are left out"
    task = asked.task("sms_spam", suite._sources)
    assert task.choices == (" friend", " spam")
    assert (len(task.train), len(task.validation)) == (40, asked.HELD)
    assert all(150 < len(passage) < 300 for passage in asked.passages())


@pytest.mark.slow
def test_written_answers_are_right_where_greedy_decoding_writes_them(suite: Language) -> None:
    model, tokenizer = language.load(suite.prepare())
    task = asked.task("numbers", ())
    language.learn(model, tokenizer, task.test[:4], 30, 1e-2, 0)  # by heart, so that some rows are right
    right, losses = suite.answers(dict(model.state_dict()), "numbers", "test")
    assert right[:4].any()
    assert not right.all()
    for row, found, loss in zip(task.test[:8], right[:8], losses[:8], strict=True):
        prompt = prompt_of(tokenizer, row)
        answer = tokenizer(f"{row.answer}\n")["input_ids"]
        told = model.generate(prompt, max_new_tokens=len(answer), do_sample=False, pad_token_id=0)
        assert bool(found) == (told[0, prompt.shape[1] :].tolist() == answer)
        assert float(loss) == pytest.approx(likelihood(model, prompt, answer), rel=1e-4)


def prompt_of(tokenizer: Any, row: asked.Row) -> torch.Tensor:
    """The tokens before the answer: the text, cut, and the cue."""
    return torch.tensor([tokenizer(row.text)["input_ids"][: language.TOKENS] + tokenizer(f"\n{row.cue}")["input_ids"]])


@torch.no_grad()
def likelihood(model: Any, prompt: torch.Tensor, answer: list[int]) -> float:
    """Nats of an answer, token by token."""
    nats, seen = 0.0, prompt
    for token in answer:
        nats -= float(model(seen).logits[0, -1].log_softmax(0)[token])
        seen = torch.cat([seen, torch.tensor([[token]])], 1)
    return nats


@pytest.mark.slow
def test_the_likeliest_label_word_is_the_answer(suite: Language) -> None:
    model, tokenizer = language.load(suite.prepare())
    task = asked.task("sms_spam", suite._sources)
    right = suite.correct({}, "sms_spam", "test")
    assert len(right) == len(task.test)
    assert 0 < int(right.sum()) < len(right)
    for row, found in zip(task.test, right, strict=True):
        prompt = prompt_of(tokenizer, row)
        nats = {word: likelihood(model, prompt, tokenizer(word)["input_ids"][:1]) for word in task.choices}
        assert bool(found) == (min(nats, key=nats.__getitem__) == row.answer)


@pytest.mark.slow
@torch.no_grad()
def test_what_a_merge_must_not_break(suite: Language) -> None:
    model, tokenizer = language.load(suite.prepare())
    assert isinstance(suite, Watching)
    found = suite.watch({}, ["numbers", "sms_spam"])
    assert set(found) == {"perplexity", "facts", "loss numbers"}
    nats, count = 0.0, 0
    for passage in asked.passages():
        ids = torch.tensor([tokenizer(passage)["input_ids"]])
        nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    broken = suite.watch({name: torch.zeros_like(value) for name, value in model.state_dict().items()}, [])
    assert broken["perplexity"] == pytest.approx(300), "all tokens alike"


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_fine_tunes_are_what_their_form_says(suite: Language) -> None:
    full = load_file(fine_tune(suite, "numbers", "full") / "model.safetensors")
    assert {value.dtype for value in full.values()} == {torch.bfloat16}
    base = load_file(suite.prepare() / "model.safetensors")
    assert full.keys() == base.keys()
    assert not torch.equal(full["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    factors = {
        (form, task): load_file(fine_tune(suite, task, form) / "adapter_model.safetensors")
        for form in ("lora", "shared")
        for task in ("dates", "sms_spam")
    }
    first = next(name for name in factors["lora", "dates"] if "lora_A" in name)
    assert torch.equal(factors["shared", "dates"][first], factors["shared", "sms_spam"][first])
    ranks = [factors["lora", task][first].shape[0] for task in ("dates", "sms_spam")]
    assert ranks == [8, 16], "publishers differ"
    assert not torch.equal(factors["lora", "sms_spam"][first][:8], factors["lora", "dates"][first])


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_state_of_adapters_is_asked_by_every_rule(suite: Language, tmp_path: Path) -> None:
    plan = Plan((1, 2), None)
    with Adapters(suite, "lora", tmp_path, Progress(disable=True), plan) as run:
        run.run(1, ["task-arithmetic", "tsv-even"])
        assert not run.states.exists() or not list(run.states.iterdir()), "nothing is kept"
        with pytest.raises(SystemExit, match="another run writes it"):
            Adapters(suite, "lora", tmp_path, Progress(disable=True), plan)
    asked_of = {(row["rule"], row["count"], row["read"]): row for row in run.results.rows}
    counts = {count for rule, count, read in asked_of if (rule, read) == ("tsv-even", "default")}
    assert counts == {1, 2, 3}, "and all of them"
    reads = [row["read"] for row in run.results.rows if (row["rule"], row["count"]) == ("task-arithmetic", 2)]
    assert reads == ["default", "paper", "sum"], "what says most comes first"
    own, one = asked_of["own", 3, "paper"], asked_of["task-arithmetic", 1, "sum"]
    (task,) = one["test"]
    assert one["test"][task] == own["test"][task], "one model reads as itself by the sum"
    assert one["watched"] == pytest.approx(own["each"][task]["watched"])
    assert asked_of["tsv-even", 3, "alone"]["test"] == own["test"], "and by the default"
    assert asked_of["tsv-even", 3, "alone"]["apart"] < 1e-5
    with Adapters(suite, "lora", tmp_path, Progress(disable=True), plan) as again:
        assert not again.asked(0, "tsv-even")
    with Adapters(suite, "lora", tmp_path, Progress(disable=True), Plan((1, 2), (1,))) as more:
        assert more.asked(0, "tsv-even") == [1, 3], "only where something was not asked"
        assert more.asked(1, "tsv-even") == [1, 2], "no order changes what all of them make"
        assert more.ways("tsv-even", 2) == ["default", "paper"]
    with Adapters(suite, "shared", tmp_path, Progress(disable=True), Plan((1,), None, ("default",))) as other:
        other.origin()
        assert other.results.rows[0]["test"] == asked_of["base", 3, "paper"]["test"], "the base is asked once"
        assert other.ways("task-arithmetic", 1) == ["default"]


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_a_campaign_goes_on_where_it_was_killed(suite: Language, tmp_path: Path) -> None:
    """By the states that are kept: no model is folded twice, and what one rule folded another reads."""
    plan = Plan((2,), None, ("default",), keep=True)
    with Campaign(suite, "lora", tmp_path, Progress(disable=True), plan) as run:
        assert run.homes(["iso-c", "opcm", "mean"]) == {"iso-c": ["iso-c", "mean"], "opcm": ["opcm"]}
        run.trajectory(0, "iso-c", ["iso-c"])
        assert sorted(path.name for path in run.states.iterdir()) == ["iso-c-0", "iso-c-0-at-2", "iso-c-0.json"]
        first = {row["count"]: row for row in run.results.rows}
        assert [len(first[count]["costs"]) for count in (2, 3)] == [2, 3]
    lines = run.results.file.read_text().splitlines()
    run.results.file.write_text(lines[0] + "\n" + lines[1][:40])  # killed while it wrote
    with Campaign(suite, "lora", tmp_path, Progress(disable=True), plan) as again:
        assert [row["count"] for row in again.results.rows] == [2]
        tasks = order_of(suite.tasks, 0)
        again.trajectory(0, "iso-c", ["iso-c"])
        assert again.results.rows[1]["test"] == first[3]["test"], "by the state that stands: nothing is folded"
        assert again.results.rows[1]["costs"] == first[3]["costs"]
        with again.opened("iso-c", "0") as folding:
            assert folding.begin(tasks, 2) == 2, "the copy: the state itself has one too many"
            assert len(folding.costs) == 2
            reading, unit = again.read(folding.merge(), ReadView(rule="mean"))
            assert (reading.rule.name, reading.totals.count) == ("mean", 2)
            again.plan = replace(plan, scales=("0.5",))
            assert again.ways("mean", 2) == ["default", "0.5"], "a scale that is named comes besides"
            again.checkpoint(0, "mean", tasks[:2], [], reading, unit)
            whole, half = again.results.rows[-2:]
            assert (whole["factor"], half["scale"], half["factor"]) == (1.0, "0.5", 0.5)
            assert half["watched"] != whole["watched"]
            before = folding.merge()
            assert folding.merge() is before, "every rule reads what is open already"
            assert folding.begin(tasks[::-1], 3) == 0, "another order is another state"
            assert folding.merge() is not before
        (again.states / "opcm-0").mkdir()  # killed while it was made
        with again.opened("opcm", "0") as folding:
            assert folding.begin(tasks, 3) == 0
            assert folding.merge().state.ledger.folds() == []
