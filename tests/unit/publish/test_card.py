"""The model card: its metadata read back by huggingface_hub, what strangers write in names, licences that differ, and
commands that can be run."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import pytest
from huggingface_hub import ModelCard

from continual.cli.typed import parse_options
from continual.publish import card
from continual.publish.card import Base, Facts, Model
from continual.publish.share_columns import ShareFigures
from continual.rules import rule

SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = Base("org/base", "org/base", SHA, "apache-2.0")


def model(seq: int, name: str = "", **more: Any) -> Model:
    given = {
        "origin": f"hf://org/ft-{seq}",
        "form": "full",
        "digest": f"blake3:{seq:064x}",
        "revision": SHA,
        "licence": "apache-2.0",
    }
    return Model(seq, name or f"org/ft-{seq}", **{**given, **more})


FACTS = Facts(
    base=BASE,
    folded=(model(1), model(2), model(5)),
    state="c0ffee",
    seq=7,
    rule="opcm",
    scale="spread:0.5",
    generated="2026-01-02T03:04:05Z",
    software={"continual": "0.1.0", "torch": "2.13.0"},
    repo="org/merged",
)


def made(**more: Any) -> tuple[str, ModelCard, dict[str, Any]]:
    """The text, the card as huggingface_hub reads it, and its metadata."""
    text = card.card(dataclasses.replace(FACTS, **more))
    read = ModelCard(text)
    return text, read, read.data.to_dict()


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows, split as GitHub's Markdown does."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines][2:]


def words(facts: Facts) -> list[list[str]]:
    """The commands of the card's block, in order, as a shell would split them."""
    block = re.search(r"^(`{3,})sh\n(.*?)\n\1$", card.card(facts), re.MULTILINE | re.DOTALL)
    assert block is not None
    assert block[2].splitlines() == card.commands(facts)
    return [split for line in block[2].splitlines() if (split := shlex.split(line, comments=True))]


def test_metadata_as_the_hub_reads_them() -> None:
    text, read, data = made(
        folded=(model(1), model(2), model(3, origin="hf://org/ft-1"), model(4, name="local", origin="/home/me/local"))
    )
    assert data == {
        "base_model": ["org/base", "org/ft-1", "org/ft-2"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "continual", "task-vectors", "opcm"],
    }
    assert str(read) == text, "a round trip changes nothing"
    assert "/home/me" not in text, "where a model lay is nobody's business"
    assert rows(text)[0] == [
        "1",
        f"[org/ft-1](https://huggingface.co/org/ft-1/tree/{SHA})",
        f"[0123456789ab](https://huggingface.co/org/ft-1/tree/{SHA})",
        "full",
        "",
        "apache-2.0",
        "000000000000",
    ]
    assert "The merge of 4 fine-tunes" in text
    assert "may be replaced by the next release" in text


def test_what_each_model_has_is_listed_where_it_is_known() -> None:
    first = dataclasses.replace(model(1), has=ShareFigures(0.75, -0.5, None))
    text = made(folded=(first, model(2)))[0]
    assert "| weight | share | cosine | licence |" in text
    assert [row[5:7] for row in rows(text)] == [["75.0%", "-0.500"], ["", ""]]
    assert "*share*: of the lengths of all task vectors; *cosine*: between" in text
    assert "share" not in made()[0]


def test_a_local_base_is_no_repo() -> None:
    text, _, data = made(
        base=Base("/srv/models/base"), folded=(model(1, name="ft", origin="/srv/ft", licence=None),), repo=None
    )
    assert "base_model" not in data
    assert "license" not in data
    assert "/srv" not in text
    assert words(dataclasses.replace(FACTS, base=Base("/srv/models/base")))[1][:3] == ["continual", "init", "./base"]


def test_a_view_that_goes_out_as_an_adapter_says_so() -> None:
    text, _, data = made(view="sa*les", of=9, lora=(16, "peft"), architecture="LlamaForCausalLM")
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (["org/base"], "adapter", "peft")
    assert data["tags"][-1] == "lora"
    assert "The view sa&#42;les: the merge of 3 of 9 fine-tunes" in text
    assert "a LoRA adapter of rank 16" in text
    assert f'base = LlamaForCausalLM.from_pretrained("org/base", revision="{SHA}")' in text
    assert 'PeftModel.from_pretrained(base, "org/merged")' in text
    assert "continual export merged --as-lora 16\n" in text
    text, _, data = made(lora=("own", "kohya"), base=Base("/srv/sd"))
    assert data["library_name"] == "diffusers"
    assert 'from_pretrained("sd")' in text
    assert 'load_lora_weights("org/merged")' in text
    assert "continual export merged --as-lora own --format kohya" in text


def test_learned_coefficients_are_told_of() -> None:
    assert "Coefficients of 30 layers were learned from calibration rows" in made(layers=30)[0]
    assert "Coefficients" not in made()[0]


def test_how_to_load_it() -> None:
    assert 'LlamaForCausalLM.from_pretrained("org/merged")' in made(architecture="LlamaForCausalLM")[0]
    assert 'AutoModel.from_pretrained("merged")' in made(architecture="x; import os", repo=None)[0]
    assert made()[2]["library_name"] == "transformers"
    assert f"[0123456789ab](https://huggingface.co/org/merged/tree/{SHA})" in made(previous=SHA)[0]


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "a\\|b",
        "`code` ```",
        "two\nlines\n| 9 | row |",
        "\r\n---\nlicense: mit\n---",
        "[click](https://evil.example)",
        "<script>alert(1)</script>",
        "https://evil.example www.evil.example",
        "*bold* _it_ ~x~ $x$ @me #1 :smile: &amp; !",
        "back\u202eward\x00\u2028",
        "x" * 5000,
        "'; rm -rf ~; '",
        "-rf",
        "..",
        "",
    ],
)
def test_a_strangers_words_break_nothing(name: str) -> None:
    folded = (model(1), model(2, name=name, origin=f"/in/{name}", licence=name, form=name, digest=name), model(3))
    facts = dataclasses.replace(FACTS, folded=folded, base=dataclasses.replace(BASE, licence=name), repo=None)
    text = card.card(facts)
    assert str(ModelCard(text)) == text
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == ["org/base", "org/ft-1", "org/ft-3"]
    assert data["license"] in ("apache-2.0", "other")
    found = rows(text)
    assert [len(row) for row in found] == [7, 7, 7]
    assert [row[0] for row in found] == ["1", "2", "3"]
    cells = " ".join(found[1])
    assert not re.search(r"[`<>\[\]*$@!~\\]|:(?![ \d])|https?:|www\.|(^| )_", re.sub(r"&#\d+;", "", cells))
    assert len(cells) < 3000
    assert text.replace("\n", "").isprintable()
    commands = words(facts)
    assert [line[:2] for line in commands[2:5]] == [["continual", "fold"]] * 3
    assert commands[3][-1].startswith("./")
    assert len(commands[3]) == 3


def test_what_only_looks_like_a_repo_is_not_linked() -> None:
    for origin in ("org/name", "hf://../x", "hf://a/b/c", "hf://a b", "hf://a/b)](https://evil.example"):
        text, _, data = made(folded=(model(1, name="x", origin=origin),))
        assert data["base_model"] == ["org/base"]
        assert rows(text)[0][1] == "x"
    assert "evil" not in made(folded=(model(1, revision="main](https://evil.example"),))[0].split("## Reproduce")[
        0
    ].replace("&#", "")


@pytest.mark.parametrize(
    ("base", "folded", "conflict", "unknown", "known"),
    [
        ("mit", ["mit", "MIT"], False, 0, {"mit": 3}),
        ("mit", [None, " MIT "], False, 1, {"mit": 2}),
        (None, [None, "unknown", ""], False, 4, {}),
        ("apache-2.0", ["llama3", None, "llama3"], True, 1, {"apache-2.0": 1, "llama3": 2}),
        (None, ["a", "b", "c"], True, 1, {"a": 1, "b": 1, "c": 1}),
        ("other", ["mit"], True, 0, {"other": 1, "mit": 1}),
        ("mit", [], False, 0, {"mit": 1}),
    ],
)
def test_licences(
    base: str | None, folded: list[str | None], conflict: bool, unknown: int, known: dict[str, int]
) -> None:
    models = [model(i, licence=licence) for i, licence in enumerate(folded, 1)]
    found = card.licences(dataclasses.replace(BASE, licence=base), models)
    assert (found.conflict, found.unknown) == (conflict, unknown)
    assert {word: len(names) for word, names in found.known.items()} == known
    assert ("differ" in found.message) == conflict
    data = made(base=dataclasses.replace(BASE, licence=base), folded=tuple(models))[2]
    expected = "other" if conflict else next(iter(known), None)
    assert data.get("license") == expected
    assert data.get("license_name") == ("mixed" if conflict else None)
    assert data.get("license_link") == ("https://huggingface.co/org/merged#licences" if conflict else None)


def test_a_message_names_five_models_of_a_licence() -> None:
    found = card.licences(BASE, [model(i, licence="mit") for i in range(1, 9)] + [model(9, licence=None)])
    assert found.message == (
        "the licences differ (apache-2.0: org/base; mit: org/ft-1, org/ft-2, org/ft-3, org/ft-4, "
        "org/ft-5 and 3 more; no licence named: 1 model)"
    )


def test_a_licence_that_is_no_word_of_the_hub() -> None:
    data = made(base=dataclasses.replace(BASE, licence="My own: licence"), folded=())[2]
    assert (data["license"], data["license_name"]) == ("other", "see-card")


def test_commands_make_the_same_again() -> None:
    options = {
        "alpha": 0.5,
        "variant": "block",
        "include": ["*lm_head*", 'a "b"'],
        "before": [{"name": "drop", "rate": 0.9, "rescale": True}],
    }
    facts = dataclasses.replace(
        FACTS,
        options=options,
        lines="0.5:1.5",
        scale="-0.25",
        plain=("*.norm.*",),
        exclude=("lm head",),
        settings={"max_base_ratio": 2.0, "vocab": "common-rows"},
        export=("--dtype", "bfloat16"),
        folded=(
            model(1),
            model(2, weight=0.5),
            model(3, weight=1.0),
            model(4, name="my local'one", origin="/x/my local'one", revision=None),
        ),
    )
    install, init, *folds, scale, export = words(facts)
    assert install == ["pip", "install", "continual==0.1.0"]
    assert init[:5] == ["continual", "init", f"hf://org/base@{SHA}", "--rule", "opcm"]
    given = parse_options([init[i + 1] for i, word in enumerate(init) if word == "--option"])
    given["before"] = [init[i + 1] for i, word in enumerate(init) if word == "--before"]
    assert rule("opcm", given).options == rule("opcm", options).options
    assert init[-4:] == ["--plain", "*.norm.*", "--exclude", "lm head"]
    flags = ["--max-base-ratio", "2.0", "--vocab", "common-rows"]
    assert folds == [
        ["continual", "fold", *flags, f"hf://org/ft-1@{SHA}"],
        ["continual", "fold", "--weight", "0.5", *flags, f"hf://org/ft-2@{SHA}"],
        ["continual", "fold", *flags, f"hf://org/ft-3@{SHA}"],
        ["continual", "fold", *flags, "./my local'one"],
    ]
    assert scale == ["continual", "scale", "--lines", "0.5:1.5", "--", "-0.25"]
    assert export == ["continual", "export", "merged", "--dtype", "bfloat16"]


@pytest.mark.parametrize("value", ["block", "1.0", "true", "[", 'a "b"', 1e-06, True, 3, ["x", "é\\"]])
def test_options_are_read_back(value: Any) -> None:
    init = words(dataclasses.replace(FACTS, options={"k": value}))[1]
    assert parse_options([init[-1]]) == {"k": value}


def test_without_the_hub_the_package_is_enough() -> None:
    facts = dataclasses.replace(FACTS, base=Base("/b"), folded=(model(1, origin="/x", name="x"),))
    assert words(facts)[0][-1] == "continual==0.1.0"


def test_only_the_newest_thousand_are_listed() -> None:
    text, _, data = made(folded=tuple(model(i) for i in range(1, 1206)))
    assert "The newest 1000 of 1205" in text
    assert "# fold the first 205 models as continual.json lists them, then:" in text.splitlines()
    assert [int(row[0]) for row in rows(text)] == list(range(206, 1206))
    assert len(data["base_model"]) == 1001
    assert len(words(dataclasses.replace(FACTS, folded=tuple(model(i) for i in range(1, 1206))))) == 1004


def test_commands_make_a_state_of_adapters_again() -> None:
    init = words(dataclasses.replace(FACTS, width=64))[1]
    assert init[3:8] == ["--rule", FACTS.rule, "--adapters", "--width", "64"]
    assert "--adapters" not in words(FACTS)[1]
