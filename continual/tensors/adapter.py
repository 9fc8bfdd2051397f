"""An adapter in PEFT's layout as a fine-tune: its configuration, its tensors, and what it makes of each tensor of the
base, one at a time.

What the tensors of a kind of adapter mean is said in `pieces`. Which tensors of the base an adapter meets is decided in
matching.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from continual.errors import Refuse
from continual.outside import shown
from continual.records import FileStat
from continual.tensors.adapter_config import CONFIG, Fields
from continual.tensors.buffers import is_buffer
from continual.tensors.checkpoint import FLOATS, Checkpoint, open_checkpoint
from continual.tensors.compound import WHOLE, Part
from continual.tensors.header import TensorInfo
from continual.tensors.kinds import is_vocabulary
from continual.tensors.pieces import KINDS, Kind, Piece
from continual.tensors.place import Place

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_COMPARED = 1_000_000
"""Names of modules_to_save times weights that lie beside the factors: so many comparisons take a tenth of a second."""
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_FROZEN = re.compile(r"\.original_module(?=\.)")
_TUNERS = re.compile(r"(?:^|\.)(?:lora|hada|lokr|ia3|vera|trainable_tokens)_")


class Adapter:
    """An adapter's files, open for reading; a context manager. `pieces`: weight name (without PEFT's prefix) to what
    is added to it; `saved`: weight name to the tensors that replace it, all of them the same (modules_to_save, biases,
    and the embeddings PEFT stores beside the factors)."""

    def __init__(self, place: Place, parts: Sequence[Part] = (WHOLE,)) -> None:
        """Opens the adapter in `place`. `parts` are the folders of its model: the weights of all but the first replace
        the base's. Raises Refuse for a configuration or tensors that are not understood."""
        self.place = place
        self._config_file = place.open([CONFIG])
        try:
            self.config = Fields(place, self._config_file)
            kind = kind_of(self.config)
            self.transposed = self.config.transposed
            """Whether the configuration says that the base stores these weights as in × out."""
            self.weights: Checkpoint = open_checkpoint(place, WEIGHTS, parts=parts)
        except BaseException:
            self._config_file.close()
            raise
        try:
            self.pieces, self.saved = _sort(self.weights, self.config, kind)
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
    def tying(self) -> bool:
        """Whether what it does to one of two tied tables, it does to both (`ensure_weight_tying`)."""
        return self.config.flag("ensure_weight_tying")

    def is_trained(self, name: str) -> bool:
        """Whether a whole weight was trained by itself, as modules_to_save; else PEFT stored it because the vocabulary
        was resized."""
        return any(f".{module}." in f".{name}" for module in self.config.saved)

    @property
    def files(self) -> tuple[FileStat, ...]:
        """The weights and the configuration: another alpha is another model."""
        return self.weights.files + self._config_file.stats

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return self.weights.nbytes

    def metadata(self) -> tuple[str, Mapping[str, str]]:
        """The weight file, as messages name it, and what its publisher wrote into its header."""
        return self.weights.metadata()

    def check_unchanged(self) -> None:
        """Raises Retry if a file changed since it was opened."""
        self.weights.check_unchanged()
        self._config_file.check_unchanged()

    def infos(self, piece: Piece) -> tuple[TensorInfo, ...]:
        """The tensors that a piece is made from, in its order."""
        return tuple(self.weights.tensors[name] for name in piece.names)

    def read(self, piece: Piece) -> tuple[torch.Tensor, ...]:
        """The same, read. Raises Retry if a file cannot be read."""
        return tuple(self.weights.read(name) for name in piece.names)


def kind_of(config: Fields) -> Kind:
    """The kind that the configuration is of. Raises Refuse (`adapter-kind`) for one, or a key, that is not
    understood."""
    kind = KINDS.get(config.kind) if isinstance(config.kind, str) else None
    if kind is None:
        raise Refuse(
            "adapter-kind",
            f"{config.place}: adapter of kind {shown(config.kind)}: only {', '.join(KINDS)} are understood; "
            "merge the adapter into its base and publish that",
        )
    config.only(kind.keys)
    return kind


def _sort(weights: Checkpoint, config: Fields, kind: Kind) -> tuple[dict[str, Piece], dict[str, tuple[str, ...]]]:
    """What each tensor of the file is for: a piece, or a whole weight. Raises Refuse."""
    names = "|".join(re.escape(role) for role in sorted(kind.roles, key=len, reverse=True))
    role_of = re.compile(rf"(?P<module>.+?)\.(?P<role>{names})")  # a role may have a dot in it: the longest counts
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    beside: dict[str, tuple[str, ...]] = {}
    for name, info in weights.tensors.items():
        if info.dtype not in FLOATS and not is_buffer(name, info.shape):
            raise Refuse("dtype", f"{config.place}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16")
        if weights.part_of(info).prefix:
            beside[name] = (name,)  # a module after the transformer
            continue
        bare = name.removeprefix(_ROOT)
        if match := role_of.fullmatch(_plain(bare)):
            found = modules.setdefault(match["module"], {})
            if match["role"] in found:
                raise Refuse(
                    "adapter-kind", f"{config.place}: {name} and {found[match['role']].name} are the same factor"
                )
            found[match["role"]] = info
        else:
            whole[bare] = info
    pieces = kind.pieces(config, modules)
    return pieces, _saved(config, whole, pieces) | beside


def _plain(name: str) -> str:
    """A factor's name without the adapter's own name, and with the end that all versions of PEFT have agreed on."""
    for end in ("", ".weight", ".bias"):
        if name.endswith(f".default{end}"):
            name = name.removesuffix(f".default{end}") + end
            break
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _saved(config: Fields, whole: Mapping[str, TensorInfo], pieces: Mapping[str, Piece]) -> dict[str, tuple[str, ...]]:
    """The tensors that replace whole weights, by the names of these. Raises Refuse (`adapter-kind`) for a tensor that
    belongs nowhere, (`config`) where there are too many to be compared.

    With `bias = all` PEFT saves every name that ends in `.bias`: the trained bias of a module to save twice, and the
    base's own under it, which nothing uses.
    """
    saved: dict[str, tuple[str, ...]] = {}
    bias = config.bias
    names = {_WRAPPER.sub("", bare, count=1) for bare in whole} if bias == "all" else set()
    for bare, info in whole.items():
        if len(config.saved) * (len(saved) + 1) > _COMPARED:
            raise Refuse("config", f"{config.place}: modules_to_save has too many names for so many whole weights")
        weight = _WRAPPER.sub("", bare, count=1)
        trained = _FROZEN.sub("", bare, count=1)
        if trained != bare and trained in names:
            continue
        belongs = (
            is_vocabulary(weight)
            or any(f".{name}." in f".{weight}" for name in config.saved)
            or (weight.endswith(".bias") and (bias == "all" or (bias == "only" and _sibling(weight) in pieces)))
        )
        if _TUNERS.search(bare) or not belongs or (weight in saved and bias != "all"):
            raise Refuse(
                "adapter-kind",
                f"{config.place}: tensor {info.name} is no part of a {config.kind} adapter with this configuration; "
                "merge it into its base and publish that",
            )
        saved[weight] = (*saved.get(weight, ()), info.name)
    return saved


def _sibling(bias: str) -> str:
    """The weight of the module whose bias it is."""
    return f"{bias.removesuffix('.bias')}.weight"
