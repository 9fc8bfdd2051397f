"""A head that is kept apart, on the real classes: an adapter of one of two tied tables answers from the export as it
does in use, and nothing of the export is made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import continual
from continual.errors import Misconfigured

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT warns of tied tables
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
HALVES = {f"{half}_{what}": size for half in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 32))}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
IDS = torch.tensor([[3, 5, 7, 9, 11]])


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def roberta() -> Any:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL))


def bart() -> Any:
    config = transformers.BartConfig(vocab_size=40, d_model=16, **HALVES, **HEADS, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def saved(model: Any, directory: Path) -> Path:
    """Saved with biases that matter: a new model has zeros there."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.2
    model.save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if "Bart" in type(model).__name__ else {}
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, **more).logits
    return found


@pytest.mark.parametrize(
    ("make", "head", "table"),
    [
        (llama, "lm_head", "embed_tokens"),
        (gpt2, "lm_head", "wte"),
        (bert, "cls.predictions.decoder", "word_embeddings"),
        (roberta, "lm_head.decoder", "word_embeddings"),
        (bart, "lm_head", None),  # in PEFT an adapter of `shared` does nothing
    ],
)
def test_what_answers_in_use_answers_from_the_export(tmp_path: Path, make: Any, head: str, table: str | None) -> None:
    torch.manual_seed(0)
    cls = type(make())
    base = saved(make(), tmp_path / "base")
    plain = logits(cls.from_pretrained(base))
    for word in filter(None, (head, table)):
        model = peft.get_peft_model(cls.from_pretrained(base), peft.LoraConfig(r=2, target_modules=[word]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / word)
        used = logits(model.base_model.model)
        assert (used - plain).abs().max() > 0.01
        continual.init(base, tmp_path / f"state-{word}", continual.Recipe(rule="mean", scale="1", untie=True))
        with continual.open(tmp_path / f"state-{word}", write=True, max_base_ratio=1e9) as merge:
            outcome = merge.fold(tmp_path / word)
            assert outcome.fate == "folded", outcome.message
            merge.export(tmp_path / f"out-{word}")
        loaded, told = cls.from_pretrained(tmp_path / f"out-{word}", output_loading_info=True)
        assert not any(told.values()), told
        torch.testing.assert_close(logits(loaded), used, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [llama, bert, bart])
def test_a_fine_tune_with_one_table_is_the_export(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    base = saved(make(), tmp_path / "base")
    tuned = make()
    tuned.load_state_dict(type(tuned).from_pretrained(base).state_dict())
    for parameter in tuned.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "tuned")
    continual.init(base, tmp_path / "state", continual.Recipe(rule="mean", scale="1", untie=True))
    with continual.open(tmp_path / "state", write=True) as merge:
        assert merge.fold(tmp_path / "tuned").fate == "folded"
        merge.export(tmp_path / "out")
    loaded, told = type(tuned).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=0, atol=1e-5)


def test_a_class_whose_answers_hang_on_the_tie_is_not_untied(tmp_path: Path) -> None:
    base = saved(t5(), tmp_path / "base")
    with pytest.raises(Misconfigured, match="a t5 divides what its head is given"):
        continual.init(base, tmp_path / "state", continual.Recipe(rule="mean", untie=True))
    continual.init(base, tmp_path / "state", continual.Recipe(rule="mean", scale="1"))
    model = peft.get_peft_model(t5(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "head")
    with continual.open(tmp_path / "state", write=True) as merge:
        told = merge.fold(tmp_path / "head")
    assert (told.reason, "untie" in told.message, "tied = both" in told.message) == ("tied", False, True)
