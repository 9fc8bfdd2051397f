"""A model directory loaded by transformers, which is an optional extra. Nothing is downloaded, and no code of the
model's is run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from continual.errors import Misconfigured
from continual.lazily import torch
from continual.objectives.contract import LoadedModel, Objective


def load_model(kind: type[Objective], directory: Path, device: torch.device, *, still: bool = False) -> LoadedModel:
    """The model in `directory` for objectives of `kind`, whole, in float32 on `device`, in evaluation mode.

    `still`: nothing in it is dropped at random, in training mode either. Raises Misconfigured where transformers is
    missing or cannot load the model, and where the model lacks weights that the objective looks at.
    """
    try:
        import transformers
    except ImportError:
        raise Misconfigured("objectives run the model with transformers: pip install 'continual[evaluate]'") from None
    with _quiet(transformers.utils.logging):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            if still:
                _drop_nothing(config)
            model, told = getattr(transformers, kind.auto).from_pretrained(
                directory,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Misconfigured(
                f"{directory}: transformers cannot load it with {kind.auto} for the objective {kind.name}: {first}"
            ) from None
    drawn = sorted(n for n in told["missing_keys"] if not any(part in n for part in kind.unused))
    if drawn:
        raise Misconfigured(
            f"{directory} has no {drawn[0]}, which {kind.auto} then draws at random: "
            f"it is no model for the objective {kind.name}"
        )
    return LoadedModel(model.float().to(device).eval(), tokenizer, device)


def keep_no_activations(model: Any) -> None:
    """Has a transformers model keep no activations inside its layers. That works in training mode alone, in which the
    model is left. Raises Misconfigured where it cannot."""
    model.config.use_cache = False
    new = hasattr(model, "activation_checkpointing_enable")  # its name from transformers 5 on
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    try:
        enable(**{f"{'activation' if new else 'gradient'}_checkpointing_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise Misconfigured(f"checkpointing: {error}") from error
    model.train()


def _drop_nothing(config: Any) -> None:
    """Sets every rate of dropout to 0, in the configurations within this one too. None may stand for another's rate, so
    it becomes 0 as well."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _drop_nothing(value)
        elif "drop" in key and (value is None or isinstance(value, float)):
            setattr(config, key, 0.0)


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Keeps transformers from printing bars and reports: a user who wants a score did not ask for them."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
