"""Keys of `rank_pattern` and `alpha_pattern`: what PEFT makes of them, in time that no stranger can stretch."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from continual.errors import Refuse
from continual.tensors.adapters.patterns import MOST, MOST_EXPRESSIONS, Patterns

MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "encoder.layer.1.attention.self.query",
    "encoder_layer.1.attention.self.query",
    "a",
    "a.b",
    "a_b",
    "x.a_b",
    "x.a.b",
]


def peft(keys: Mapping[str, object], module: str) -> str:
    """`peft.utils.other.get_pattern_key` of PEFT 0.21, to the letter; test_adapter_as_peft.py compares."""
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module


def table(*keys: str) -> Patterns[int]:
    return Patterns({key: number for number, key in enumerate(keys)}, "x/adapter_config.json", "rank_pattern")


def agree(keys: list[str], modules: list[str]) -> None:
    body = {key: number for number, key in enumerate(keys)}
    expected = {m: body[found] for m in modules if (found := peft(body, m)) in body}
    assert Patterns(body, "x", "rank_pattern").of(modules) == expected


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj"],
        ["self_attn.q_proj", "q_proj"],
        ["q_proj", "self_attn.q_proj"],
        ["layer.1.attention.self.query"],
        ["a.b"],
        ["x.a.b", "a.b"],
        ["x.a_b", "a.b", "b"],
        ["model.layers.0.self_attn.q_proj"],
        ["."],
        [".."],
        [""],
        [r"model\.layers\.[01]\..*"],
        [r"layers\.1.*", "q_proj"],
        ["q_proj", r"layers\.1.*"],
        [r"^model\.layers\.0.*"],
        ["^a.b$", "a.b"],
        [r".*\.(q|k)_proj", r"encoder.*"],
        [r"(?i:SELF)\.query", r"\w+_b"],
        [r"layers\.\d{1,1}\..*"],
        [r"(.*)(.*)(.*)x", "a|b"],
        [r"\bb", r"a\Bb"],
        [r"[]a]", r"[^a]*b"],
        [r"(?P<one>a)\.b", r"(?P<one>x).*"],
    ],
)
def test_a_key_means_what_peft_makes_of_it(keys: list[str]) -> None:
    agree(keys, MODULES)


letters = st.sampled_from("ab01_.xX")
words = st.text(letters, max_size=8)
atoms = st.sampled_from(
    ["a", "b", "0", "1", "_", "x", r"\.", ".", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "[0-9]", r"[\d_]", "[]x-]"]
)
expressions = st.recursive(
    atoms | words.map(re.escape),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?", "??"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        )
        | st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | inner.map(lambda part: f"(?i:{part})")
        | inner.map(lambda part: f"^{part}")
        | inner.map(lambda part: f"{part}$")
    ),
    max_leaves=6,
)


@given(st.lists(words | expressions, max_size=6, unique=True), st.lists(words.filter(bool), min_size=1, max_size=6))
@example([r"\d.\d", "1"], ["0.1.1", "0.0.0"])
@settings(max_examples=100)
def test_any_keys_mean_what_peft_makes_of_them(keys: list[str], modules: list[str]) -> None:
    refused = ""
    try:
        agree(keys, modules)
    except Refuse as refusal:
        refused = str(refusal)
    # only a repetition of a place, as in (?:^)*, or beyond a thousand
    assert not refused or ("cannot be used" in refused and re.search(r"[*+?{]", refused))


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("(?i)query", "not understood from"),
        ("(?=a)b", "not understood from"),
        ("(?<!a)b", "not understood from"),
        (r"(a)\1", "not understood from"),
        ("(?P<n>a)(?P=n)", "not understood from"),
        ("a{,3}", "not understood from"),
        ("a*+", "not understood from"),
        ("(?>a)", "not understood from"),
        ("(?#x)a", "not understood from"),
        ("[[:alpha:]]", "not understood from"),
        (r"\Qa.b\E", "not understood from"),
        (r"\pL", "not understood from"),
        (r"a\Z", "not understood from"),
        (r"a\z", "not understood from"),
        ("a)|(b", "not understood from"),
        ("(a", "a bracket is open"),
        ("[a", "not understood from"),
        ("*a", "not understood from"),
        ("a**", "not understood from"),
        ("ü+", "ASCII"),
        ("a\n+", "ASCII"),
        ("a{1001}", "repetition"),
        ("((a{100}){100}){100}", "repetition"),
        ("[b-a]", "range"),
        ("x+" * 501, "1002 characters"),
    ],
)
def test_what_the_engines_do_not_share_is_refused_by_name(key: str, why: str) -> None:
    with pytest.raises(Refuse) as refusal:
        table("query", key)
    assert refusal.value.reason == "config"
    assert why in str(refusal.value)
    assert "x/adapter_config.json: rank_pattern: pattern" in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert str(refusal.value).isprintable()


def cpu(call: object, *arguments: object) -> float:
    begun = time.thread_time()
    call(*arguments)  # type: ignore[operator]
    return time.thread_time() - begun


@pytest.mark.parametrize(
    "key", [".*.*.*x", "(a|aa)+b", "a?" * 40 + "b", "(a|a)" * 30, "(.*a){20}b", "(.*)*b", "(a|b)*a(a|b){300}x"]
)
def test_what_takes_for_ever_elsewhere_takes_no_time(key: str) -> None:
    module = "".join("ab"[i * i % 7 % 2] for i in range(800))
    assert cpu(lambda: table(key).of([module])) < 1


def test_names_are_looked_up_however_many_there_are() -> None:
    modules = [f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj" for i in range(30_000)]
    keys = Patterns({module: i for i, module in enumerate(reversed(modules))}, "x", "rank_pattern")
    found: dict[str, int] = {}
    assert cpu(lambda: found.update(keys.of(modules))) < 10, "a search of each key for each module takes minutes here"
    assert found == {module: i for i, module in enumerate(reversed(modules))}


def test_modules_that_differ_in_numbers_are_matched_once() -> None:
    modules = [f"model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj" for i in range(20_000)]
    keys = [rf".*\.(block{letter}|experts)\.\d+\.(up|down)_proj" for letter in "abcdefgh"]
    found = table(*keys, "down_proj").of(modules)
    assert set(found.values()) == {0}
    assert len(found) == len(modules)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([f"n{i}" for i in range(MOST + 1)], f"{MOST + 1} keys"),
        ([f"n{i}.*" for i in range(MOST_EXPRESSIONS + 1)], "regular expressions"),
        ([f"{letter}{{900}}" for letter in "abcdefgh"], "too involved"),
    ],
)
def test_tables_have_limits(keys: list[str], words: str) -> None:
    with pytest.raises(Refuse, match=words) as refusal:
        table(*keys)
    assert refusal.value.reason == "config"


def test_expressions_times_modules_have_a_limit() -> None:
    modules = ["".join("ab"[(i >> k) & 1] for k in range(17)) * 10 for i in range(2**13)]
    keys = table(*(rf".*{letter}.{{100}}1" for letter in "abcd"))
    with pytest.raises(Refuse, match="too involved for so many modules"):
        keys.of(modules)


def test_dotted_names_times_modules_have_a_limit() -> None:
    def dotted(i: int) -> str:
        return "".join("." if i >> k & 1 else "a" for k in range(14))

    keys = table(*(dotted(i) for i in range(2**13)))
    with pytest.raises(Refuse, match="too involved"):
        keys.of([f"{'a' * 14}.{i}.{'a' * 14}" for i in range(2000)])


def test_expressions_and_a_module_that_is_no_ascii() -> None:
    assert table("naïve.q").of(["a.naïve.q"]) == {"a.naïve.q": 0}
    with pytest.raises(Refuse, match="write names"):
        table(r"\w+").of(["naïve"])
