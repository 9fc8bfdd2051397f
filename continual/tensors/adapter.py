"""A LoRA adapter in PEFT layout as a fine-tune: its task vector is scale·B·A, one tensor at a time.

Hu et al. 2022, "LoRA", section 4.1; rsLoRA scaling by Kalajdzievski 2023. What its configuration may say is in
adapter_config.py. Which tensors of the base an adapter meets is decided in matching.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from continual.errors import Refuse
from continual.records import FileStat
from continual.tensors.adapter_config import CONFIG, AdapterConfig, parse
from continual.tensors.checkpoint import FLOATS, Checkpoint, open_checkpoint
from continual.tensors.kinds import is_vocabulary
from continual.tensors.place import Place

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_ROOT = "base_model.model."
_COMPARED = 1_000_000
"""Names of modules_to_save times weights that lie beside the factors: so many comparisons take a tenth of a second."""
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")


class Factors(NamedTuple):
    """The factors of one module's task vector: tensor names in the adapter's file, rank and scale."""

    a: str
    b: str
    rank: int
    scale: float
    embedding: bool


class Adapter:
    """An adapter's files, open for reading; a context manager. `factors`: weight name (without PEFT's prefix) to its
    factors; `saved`: weight name to the tensor that replaces it (modules_to_save, and the embeddings PEFT stores beside
    the factors)."""

    def __init__(self, place: Place) -> None:
        """Opens the adapter in `place`. Raises Refuse for a configuration or tensors that are not understood."""
        self.place = place
        self._config_file = place.open([CONFIG])
        try:
            self.config = parse(place, self._config_file)
            self.weights: Checkpoint = open_checkpoint(place, WEIGHTS)
        except BaseException:
            self._config_file.close()
            raise
        try:
            self.factors, self.saved = _sort(place, self.weights, self.config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self.weights.close()
        self._config_file.close()

    @property
    def files(self) -> tuple[FileStat, ...]:
        """The weights and the configuration: another alpha is another model."""
        return self.weights.files + self._config_file.stats

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return self.weights.nbytes

    @property
    def transposed(self) -> bool:
        """Whether the configuration says that the base stores these weights as in × out."""
        return self.config.transposed

    def metadata(self) -> tuple[str, Mapping[str, str]]:
        """The weight file, as messages name it, and what its publisher wrote into its header."""
        return self.weights.metadata()

    def check_unchanged(self) -> None:
        """Raises Retry if a file changed since it was opened."""
        self.weights.check_unchanged()
        self._config_file.check_unchanged()

    def shape(self, factors: Factors, *, transposed: bool) -> tuple[int, int]:
        """Rows and columns of the task vector, a convolution flattened to 2-D. `transposed`: the base stores the weight
        as in × out."""
        a, b = self.weights.tensors[factors.a].shape, self.weights.tensors[factors.b].shape
        rows, columns = b[0], math.prod(a[1:])
        return (columns, rows) if factors.embedding or transposed else (rows, columns)

    def product(self, factors: Factors, out: torch.Tensor, *, transposed: bool) -> tuple[tuple[str, torch.Tensor], ...]:
        """scale·B·A into `out`, a float32 tensor on the CPU of the shape that `shape` says. Returns the two factors as
        they were read, by name. Raises Retry if a file cannot be read."""
        read = tuple((name, self.weights.read(name)) for name in (factors.a, factors.b))
        a = read[0][1].float().reshape(factors.rank, -1)
        b = read[1][1].float().reshape(-1, factors.rank)
        if factors.embedding or transposed:
            torch.mm(a.T, b.T, out=out)
        else:
            torch.mm(b, a, out=out)
        out.mul_(factors.scale)
        return read


def _sort(place: Place, weights: Checkpoint, config: AdapterConfig) -> tuple[dict[str, Factors], dict[str, str]]:
    """What each tensor of the file is for."""
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name, info in weights.tensors.items():
        if info.dtype not in FLOATS:
            raise Refuse("dtype", f"{place}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16")
        bare = name.removeprefix(_ROOT)
        if match := _KEY.fullmatch(bare):
            pair = halves.setdefault(f"{match['module']}.weight", {})
            half = match["factor"] or match["embedding"].lower()
            if half in pair:
                raise Refuse("adapter-kind", f"{place}: {name} and {pair[half]} are the same factor")
            pair[half] = name
        else:
            if len(config.saved) * (len(saved) + 1) > _COMPARED:
                raise Refuse("config", f"{place}: modules_to_save has too many names for so many whole weights")
            weight = _WRAPPER.sub("", bare, count=1)
            if "lora_" in bare or not _is_saved(weight, config) or weight in saved:
                raise Refuse(
                    "adapter-kind",
                    f"{place}: tensor {name} is no part of a plain LoRA adapter; "
                    "merge it into its base and publish that",
                )
            saved[weight] = name
    factors = {}
    settings = config.of(weight.removesuffix(".weight") for weight in halves)
    for weight, pair in sorted(halves.items()):
        if set(pair) not in ({"A", "B"}, {"a", "b"}):
            raise Refuse(
                "adapter-kind", f"{place}: {weight} has no pair of factors, only {', '.join(sorted(pair.values()))}"
            )
        rank, alpha = settings[weight.removesuffix(".weight")]
        scale = alpha / (math.sqrt(rank) if config.by_root else rank)
        factors[weight] = _factors(place, weights, weight, pair, (rank, scale))
    return factors, saved


def _is_saved(weight: str, config: AdapterConfig) -> bool:
    """Whether a full weight belongs here: its module is one of modules_to_save, or it is an embedding or head, which
    PEFT stores when it was resized."""
    return is_vocabulary(weight) or any(f".{name}." in f".{weight}" for name in config.saved)


def _factors(
    place: Place, weights: Checkpoint, weight: str, pair: Mapping[str, str], setting: tuple[int, float]
) -> Factors:
    """The factors of one weight; `setting` is its rank and scale."""
    embedding, (rank, scale) = "a" in pair, setting
    a, b = (weights.tensors[pair[half]] for half in ("ab" if embedding else "AB"))
    if len(a.shape) < 2 or len(b.shape) < 2 or math.prod(b.shape[2:]) != 1 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise Refuse(
            "shape",
            f"{place}: factors of {weight} are {list(a.shape)} and {list(b.shape)}, which do not fit its rank {rank}",
        )
    return Factors(a.name, b.name, rank, scale, embedding)
