"""Models, fine-tunes and adapters of a family, by the library that its class is from: made, written, loaded, asked.

It knows nothing of continual, so that an interpreter with another transformers can run it:

    PYTHON -m tests.campaigns.families.making DIRECTORY NAME...

writes, for each family named, DIRECTORY/NAME/{base,full,lora,merged}, or DIRECTORY/NAME/error.txt where it cannot.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from tests.campaigns.families.family import IMAGE, VOCABULARY, Family
from tests.campaigns.families.table import TABLE

Tensors = dict[str, torch.Tensor]
_GRAIN = 2.0**-16
"""Every value of a base and of a full fine-tune is a multiple of this, so that their differences and sums are exact in
float32, and exports can be compared bit by bit."""


class Unloadable(Exception):
    """The library itself cannot read what was written."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the libraries print and warn of from the terminal."""
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing), redirect_stdout(nothing):
        logging.disable(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                logging.disable(logging.NOTSET)


def slug(family: Family) -> str:
    """The family's name, as a directory."""
    return "".join(c if c.isalnum() else "-" for c in family.name.lower()).strip("-")


def class_of(family: Family) -> Any:
    """The family's class. Raises ImportError where the library, or this version of it, lacks it."""
    try:
        return getattr(importlib.import_module(family.library), family.model)
    except AttributeError:
        raise ImportError(f"this {family.library} has no {family.model}") from None


def made(family: Family) -> Any:
    """A random model of the family, its values on the grain. Raises ImportError, and what the class raises."""
    cls = class_of(family)
    torch.manual_seed(0)
    if family.config:
        config = getattr(importlib.import_module(family.library), family.config)(**family.options)
        model = cls(config)
    else:
        model = cls(**family.options)
    model = model.float().eval()
    with torch.no_grad():
        for name, tensor in _floats(model):
            # norms begin as ones and zeros, some heads as zeros: nothing is to be 0, or equal to its neighbour
            tensor.add_(torch.randn(tensor.shape, generator=_seeded(name)) * 0.02)
            _on_grain(name, tensor)
    return model


def moved(model: Any, size: float = 0.01) -> Any:
    """A full fine-tune: every float of the model moved a little, by a change that hangs on its name alone."""
    with torch.no_grad():
        for name, tensor in _floats(model):
            tensor.add_(torch.randn(tensor.shape, generator=_seeded(f"moved {name}")) * size)
            _on_grain(name, tensor)
    return model


def _on_grain(name: str, tensor: torch.Tensor) -> None:
    rounded = (tensor / _GRAIN).round() * _GRAIN
    tensor.copy_(rounded.abs().clamp(min=0.125) if name.endswith("running_var") else rounded)


def _floats(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every float that a checkpoint has, tied ones once."""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.is_floating_point() and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))


def loaded(family: Family, directory: Path) -> Any:
    """The model in `directory`. Raises Unloadable where the library reports a tensor missing, unknown or misshapen."""
    cls = class_of(family)
    if family.library == "diffusers":
        model, told = cls.from_pretrained(directory, output_loading_info=True, low_cpu_mem_usage=False)
    else:
        model, told = cls.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    wrong = {key: sorted(map(str, names)) for key, names in told.items() if names and key != "error_msgs"}
    if wrong:
        said = "; ".join(f"{key.replace('_', ' ')}: {', '.join(names[:3])}" for key, names in sorted(wrong.items()))
        raise Unloadable(said)
    return model.eval()


def tensors_of(model: Any) -> Tensors:
    """Every tensor of a model, a copy, by the names that it has in memory."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def asked(family: Family, model: Any) -> torch.Tensor:
    """What the model answers to a fixed question, all floats of the answer in one row."""
    torch.manual_seed(3)
    with torch.no_grad():
        answer = model(**inputs_of(family))
    first = [answer[key] for key in ("logits", "logits_per_image", "sample", "last_hidden_state") if key in answer]
    return first[0].float().reshape(-1)


def inputs_of(family: Family) -> dict[str, Any]:
    """The question."""
    drawn = torch.Generator().manual_seed(7)
    return _INPUTS[family.asks](drawn)


def _ids(drawn: torch.Generator, count: int = 12) -> torch.Tensor:
    return torch.randint(3, IMAGE, (1, count), generator=drawn)


def _text(drawn: torch.Generator) -> dict[str, Any]:
    return {"input_ids": _ids(drawn)}


def _pair(drawn: torch.Generator) -> dict[str, Any]:
    return {"input_ids": _ids(drawn), "decoder_input_ids": _ids(drawn, 5)}


def _mel(drawn: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(1, 8, 32, generator=drawn), "decoder_input_ids": _ids(drawn, 5)}


def _image(drawn: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=drawn)}


def _both(drawn: torch.Generator) -> dict[str, Any]:
    return _image(drawn) | {"input_ids": torch.cat([_ids(drawn), torch.tensor([[2]])], 1)}


def _seen(drawn: torch.Generator) -> dict[str, Any]:
    ids = torch.cat([_ids(drawn, 3), torch.full((1, 4), IMAGE), _ids(drawn, 5)], 1)
    return _image(drawn) | {"input_ids": ids, "token_type_ids": (ids == IMAGE).long()}


def _sighted(drawn: torch.Generator) -> dict[str, Any]:
    return {key: value for key, value in _seen(drawn).items() if key != "token_type_ids"}


def _grid(drawn: torch.Generator) -> dict[str, Any]:
    ids = torch.cat([_ids(drawn, 3), torch.tensor([[92]]), torch.full((1, 4), IMAGE), _ids(drawn, 5)], 1)
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=drawn)
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def _sound(drawn: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(1, 200, generator=drawn)}


def _noise(drawn: torch.Generator) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=drawn),
        "timestep": 3,
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=drawn),
    }


def _classes(drawn: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=drawn),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }


def _joint(drawn: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=drawn),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=drawn),
        "pooled_projections": torch.randn(1, 16, generator=drawn),
    }


_INPUTS: dict[str, Callable[[torch.Generator], dict[str, Any]]] = {
    "text": _text,
    "pair": _pair,
    "mel": _mel,
    "image": _image,
    "both": _both,
    "seen": _sighted,
    "typed": _seen,
    "grid": _grid,
    "sound": _sound,
    "noise": _noise,
    "classes": _classes,
    "joint": _joint,
}


def write_all(family: Family, directory: Path) -> None:
    """Writes a base, a full fine-tune, a LoRA adapter, and what that library merges of it. Raises what it raises."""
    from tests.campaigns.families import adapters

    base = directory / "base"
    made(family).save_pretrained(base)
    moved(loaded(family, base)).save_pretrained(directory / "full")
    adapters.write(family, base, directory / "lora", adapters.KINDS["LoRA"])
    adapters.applied(family, base, directory / "lora").merge_and_unload().save_pretrained(directory / "merged")


def main() -> None:
    """Writes the families that the command line names."""
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    assert VOCABULARY > IMAGE
    for family in TABLE:
        if family.name in names:
            target = directory / slug(family)
            target.mkdir(parents=True)
            try:
                with quiet():
                    write_all(family, target)
            except Exception as error:
                (target / "error.txt").write_text(f"{type(error).__name__}: {error}".splitlines()[0][:300], "utf-8")


if __name__ == "__main__":
    main()
