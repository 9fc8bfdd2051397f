"""An adapter in PEFT's layout as a fine-tune: its configuration, its tensors, and what it makes of each tensor of the
base, one at a time.

What the tensors of a kind of adapter mean is said in `pieces`. Which tensors of the base an adapter meets is decided in
matching.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.records import FileStat
from continual.tensors.adapters.adapter_config import CONFIG, MERGE, Fields
from continual.tensors.adapters.pieces import KINDS, Kind, Piece
from continual.tensors.checkpoints.buffers import is_buffer
from continual.tensors.checkpoints.checkpoint import FLOATS, Checkpoint, open_checkpoint
from continual.tensors.checkpoints.compound import WHOLE, Part
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.checkpoints.place import Place
from continual.tensors.names.kinds import BaseModel, is_vocabulary

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_TRAINERS = {
    "fine_tune_type": "mlx-lm",
    "lora_parameters": "mlx-lm",
    "lora_layers": "mlx-lm",
    "architecture": "AdapterHub",
}
"""Keys in the configuration of an adapter that PEFT did not write, and who did."""
_INPUTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
    "CARTRIDGE",
)
_MIXTURES = ("XLORA", "POLY")
_COMPARED = 1_000_000
"""Names of modules_to_save times weights that lie beside the factors: so many comparisons take a tenth of a second."""
_WRAPPER = re.compile(
    r"\.(?:modules_to_save(?:\.default)?|ln_tuning_layers(?:\.default)?|(?:token_adapter\.)?base_layer)(?=\.)"
)
_VALUE_HEAD = "v_head"
"""The head that TRL puts beside a language model: no base has it, and it stays out."""
_INDICES = (".shira_indices", ".shira_indices.default")
"""Ends of names of tensors that are no floats, and say where others are."""
_END = re.compile(r"\.(?:weight|bias)$")
_FROZEN = re.compile(r"\.original_module(?=\.)")
_TUNERS = re.compile(r"(?:^|\.)(?:lora|hada|lokr|ia3|vera|trainable_tokens|oft|boft|hra|shira|miss|bone|fourierft)_")


class Adapter:
    """An adapter's files, open for reading; a context manager. `pieces`: weight name (without PEFT's prefix) to what
    is added to it; `saved`: weight name to the tensors that replace it, all of them the same (modules_to_save, biases,
    and the embeddings PEFT stores beside the factors). `outside`: what it changes of components that the base is
    without."""

    outside: tuple[str, ...] = ()

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
            self.weights: Checkpoint = open_checkpoint(place, place.only or weights_in(place.names()), parts=parts)
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

    def of(self, base: BaseModel) -> Adapter:  # noqa: ARG002
        """The same adapter, with its pieces for this base. Raises Refuse where that cannot be."""
        return self

    def with_pieces(self, pieces: Mapping[str, Piece], weights: Checkpoint) -> Adapter:
        """The same open files with other pieces, made from tensors of `weights`. One of the two is closed."""
        other = copy.copy(self)
        other.pieces, other.weights = dict(pieces), weights
        return other

    @property
    def tying(self) -> bool:
        """Whether what it does to one of two tied tables, it does to both (`ensure_weight_tying`)."""
        return self.config.flag("ensure_weight_tying")

    def is_trained(self, name: str) -> bool:
        """Whether a whole weight was trained by itself, as modules_to_save; else PEFT stored it because the vocabulary
        was resized."""
        return _is_in_any(name, self.config.saved)

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


def weights_in(names: Collection[str]) -> str:
    """The weight file of an adapter in a directory with these names: as PEFT calls it, or the only safetensors file."""
    found = [name for name in names if name.endswith(".safetensors")]
    return found[0] if len(found) == 1 else WEIGHTS


def kind_of(config: Fields) -> Kind:
    """The kind that the configuration is of. Raises Refuse (`adapter-kind`) for one, or a key, that is not
    understood."""
    kind = KINDS.get(config.kind) if isinstance(config.kind, str) else None
    if kind is None:
        raise Refuse("adapter-kind", f"{config.place}: {_why_not(config)}")
    config.only(kind.keys)
    return kind


def _why_not(config: Fields) -> str:
    """Why an adapter of a kind that is not understood is refused, and what to do."""
    if config.kind is None:
        trainer = next((name for key, name in _TRAINERS.items() if key in config.body), "")
        made = f"that of {trainer}" if trainer else "no adapter of PEFT"
        return f"{CONFIG} names no peft_type: it is {made}; fuse it into its base there and publish the whole model"
    if config.kind in _INPUTS:
        return (
            f"adapter of kind {config.kind}: it adds to the inputs of layers and changes no weight of the base, "
            "so there is nothing to fold; train a LoRA instead"
        )
    if config.kind in _MIXTURES:
        return (
            f"adapter of kind {config.kind}: it mixes adapters anew for each input, which no merged weight can do; "
            "publish each of them"
        )
    return f"adapter of kind {shown(config.kind)}: only {', '.join(KINDS)} are understood; {MERGE}"


def _sort(weights: Checkpoint, config: Fields, kind: Kind) -> tuple[dict[str, Piece], dict[str, tuple[str, ...]]]:
    """What each tensor of the file is for: a piece, or a whole weight. Raises Refuse."""
    names = "|".join(re.escape(role) for role in sorted(kind.roles, key=len, reverse=True))
    stems = {_END.sub("", role).rpartition(".")[2] for role in kind.roles}
    called: dict[str, str] = {}
    role_of = re.compile(rf"(?P<module>.+?)\.(?P<role>{names})")  # a role may have a dot in it: the longest counts
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    beside: dict[str, tuple[str, ...]] = {}
    for name, info in weights.tensors.items():
        if info.dtype not in FLOATS and not (is_buffer(name, info.shape) or name.endswith(_INDICES)):
            raise Refuse("dtype", f"{config.place}: tensor {name} is {info.dtype}: convert it to F32, F16 or BF16")
        if weights.part_of(info).prefix:
            beside[name] = (name,)  # a module after the transformer
            continue
        bare = name.removeprefix(_ROOT)
        plain, adapter = _plain(bare, stems)
        if adapter:
            called.setdefault(adapter, name)
        if match := role_of.fullmatch(plain):
            found = modules.setdefault(match["module"], {})
            if match["role"] in found:
                raise Refuse(
                    "adapter-kind",
                    f"{config.place}: {name} and {found[match['role']].name} are the same factor of one module: keep "
                    "one of the two",
                )
            found[match["role"]] = info
        else:
            whole[bare] = info
    if len(called) > 1:
        raise Refuse(
            "adapter-kind",
            f"{config.place}: holds several adapters ({' and '.join(sorted(called.values())[:2])}): "
            "publish each of them in a directory of its own",
        )
    pieces = kind.pieces(config, modules)
    return pieces, _saved(config, whole, pieces) | beside


def _plain(name: str, stems: Collection[str]) -> tuple[str, str]:
    """A factor's name without the adapter's own name, and with the end that all versions of PEFT have agreed on; and
    the adapter's name, empty where it is not there. `stems`: what factors of this kind are called."""
    adapter = ""
    end = match[0] if (match := _END.search(name)) else ""
    head, _, last = name.removesuffix(end).rpartition(".")
    if last not in stems and head.rpartition(".")[2] in stems:
        name, adapter = head + end, last
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name, adapter


def _is_in_any(weight: str, modules: Collection[str]) -> bool:
    """Whether a weight lies in one of the modules to save: as PEFT has it, in one whose name ends so."""
    return any(f"{name}." in weight for name in modules)


def _saved(config: Fields, whole: Mapping[str, TensorInfo], pieces: Mapping[str, Piece]) -> dict[str, tuple[str, ...]]:
    """The tensors that replace whole weights, by the names of these. Raises Refuse (`adapter-kind`) for a tensor that
    belongs nowhere, (`config`) where there are too many to be compared.

    PEFT saves some trained weights of modules to save twice, and the base's own under them, which nothing uses: with
    `bias = all` every bias, and embedding and head where the vocabulary was resized.
    """
    saved: dict[str, tuple[str, ...]] = {}
    bias = config.bias
    names = {_WRAPPER.sub("", bare, count=1) for bare in whole}
    for bare, info in whole.items():
        if len(config.saved) * (len(saved) + 1) > _COMPARED:
            raise Refuse("config", f"{config.place}: modules_to_save has too many names for so many whole weights")
        weight = _WRAPPER.sub("", bare, count=1)
        trained = _FROZEN.sub("", bare, count=1)
        twice = bias == "all" or is_vocabulary(trained) or _is_in_any(trained, config.saved)
        if trained != bare and trained in names and twice:
            continue
        belongs = (
            is_vocabulary(weight)
            or _is_in_any(weight, config.saved)
            or (".base_layer." in bare and (weight in pieces or _sibling(weight) in pieces))
            or bare.partition(".")[0] == _VALUE_HEAD
            or (".ln_tuning_layers." in bare and config.kind == "LN_TUNING")
            or (weight.endswith(".bias") and (bias == "all" or (bias == "only" and _sibling(weight) in pieces)))
        )
        if _TUNERS.search(bare) or not belongs or (weight in saved and not twice):
            raise Refuse(
                "adapter-kind",
                f"{config.place}: tensor {info.name} is no part of a {config.kind} adapter with this configuration; "
                f"{MERGE}",
            )
        saved[weight] = (*saved.get(weight, ()), info.name)
    return saved


def _sibling(bias: str) -> str:
    """The weight of the module whose bias it is."""
    return f"{bias.removesuffix('.bias')}.weight"
