"""Adapters whose task vector is a product of two thin matrices: LoRA, AdaLoRA, and what LoRA can have besides its
factors: DoRA's magnitudes and a bias of its own.

Hu et al. 2022, "LoRA", section 4.1; rsLoRA's scale by Kalajdzievski 2023; Liu et al. 2024, "DoRA", equation 5; Zhang et
al. 2023, "AdaLoRA", equation 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from continual.errors import Refuse
from continual.lazily import torch
from continual.outside import shown
from continual.tensors.adapters.adapter_config import Fields
from continual.tensors.adapters.pieces.contract import Module, Piece, possible, roles_of, unfit
from continual.tensors.adapters.pieces.stacks import TARGETS, FactorPair, Wrapped, bare, levels, targeted
from continual.tensors.adapters.pieces.tokens import TOKENS, Tokens, indices_of
from continual.tensors.checkpoints.header import TensorInfo

A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_ROWS, _COLUMNS = "lora_embedding_A", "lora_embedding_B"
_PROJECTED = ".base_layer.out_proj"
_HARMLESS_INIT: tuple[object, ...] = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are and start from B·A = 0 (or are trained away from it)."""
_ADAPTED = frozenset(
    [
        "r",
        "lora_alpha",
        "fan_in_fan_out",
        "bias",
        "lora_dropout",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "init_lora_weights",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "merge_weights",
    ]
)


@dataclass(frozen=True, slots=True)
class Factors:
    """scale·B·A: the tensors `a` and `b`, their rank and scale. `embedding`: A and B are those of a table of rows.
    `magnitude`: the lengths to which DoRA brings the rows of what comes of it (of a table: the columns)."""

    where: str
    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    embedding: bool = False
    magnitude: TensorInfo | None = None
    optional = False

    @property
    def names(self) -> tuple[str, ...]:
        """A, B, and the magnitudes."""
        return (self.a.name, self.b.name, *((self.magnitude.name,) if self.magnitude else ()))

    @property
    def needs_base(self) -> bool:
        """DoRA does."""
        return self.magnitude is not None

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        rows, columns = self.b.shape[0], math.prod(self.a.shape[1:])
        rows, columns = (columns, rows) if self.embedding or transposed else (rows, columns)
        if len(shape) < 2 or columns != math.prod(shape[1:]):
            raise unfit(self.where, name, shape, f"the product of {self.b.name} and {self.a.name} is {[rows, columns]}")
        possible(self.where, name, self.rank, (rows, columns))
        found = (rows, *shape[1:])
        if self.magnitude is not None:
            lengths = shape[1] if self.embedding or transposed else rows
            if math.prod(self.magnitude.shape) != lengths or lengths not in self.magnitude.shape:
                raise unfit(self.where, name, shape, f"{self.magnitude.name} is {list(self.magnitude.shape)}")
            if found != shape:
                raise unfit(
                    self.where,
                    name,
                    shape,
                    f"the product of {self.b.name} and {self.a.name} is {[rows, columns]}, "
                    "and DoRA needs the table of that size that it was trained on",
                )
        return found

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        kind = "dora" if self.magnitude else "lora"
        return f"{kind} {self.scale!r} {self.embedding} {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 8 * math.prod(shape) if self.magnitude else 0

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        a = read[0].float().reshape(self.rank, -1)
        b = read[1].float().reshape(-1, self.rank)
        product = out.view(out.shape[0], -1)
        if self.embedding or transposed:
            torch.mm(a.T, b.T, out=product)
        else:
            torch.mm(b, a, out=product)
        out.mul_(self.scale)
        if self.magnitude is not None:
            assert base is not None
            along = 0 if self.embedding or transposed else 1
            flat = base.view(product.shape)
            whole = flat + product
            lengths = torch.linalg.vector_norm(whole, dim=along, keepdim=True)
            factor = read[2].float().reshape(lengths.shape) / lengths
            torch.mul(whole, factor, out=product)
            product.sub_(flat)


@dataclass(frozen=True, slots=True)
class Bias:
    """The bias of lora_B (`lora_bias` of PEFT), scaled as the factors are."""

    where: str
    info: TensorInfo
    scale: float
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """The one tensor."""
        return (self.info.name,)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        if self.info.shape != shape:
            raise unfit(self.where, name, shape, f"{self.info.name} is {list(self.info.shape)}")
        return shape

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"bias {self.scale!r}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 0

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        torch.mul(read[0].float(), self.scale, out=out)


@dataclass(frozen=True, slots=True)
class Triple:
    """scale·B·(E∘A): AdaLoRA's singular value decomposition in parts."""

    where: str
    a: TensorInfo
    b: TensorInfo
    e: TensorInfo
    scale: float
    optional = False
    needs_base = False

    @property
    def names(self) -> tuple[str, ...]:
        """A, B and E."""
        return (self.a.name, self.b.name, self.e.name)

    def fit(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> tuple[int, ...]:
        """As the protocol says."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        rows, columns = (columns, rows) if transposed else (rows, columns)
        if len(shape) < 2 or columns != math.prod(shape[1:]):
            raise unfit(self.where, name, shape, f"the product of {self.b.name} and {self.a.name} is {[rows, columns]}")
        possible(self.where, name, self.a.shape[0], (rows, columns))
        return rows, *shape[1:]

    def settings(self, *, transposed: bool) -> str:
        """As the protocol says."""
        return f"adalora {self.scale!r} {transposed}"

    def workspace(self, shape: tuple[int, ...]) -> int:
        """As the protocol says."""
        return 0

    def add(
        self, read: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor, *, transposed: bool
    ) -> None:
        """As the protocol says."""
        a, b, e = (tensor.float() for tensor in read)
        a *= e
        product = out.view(out.shape[0], -1)
        if transposed:
            torch.mm(a.T, b.T, out=product)
        else:
            torch.mm(b, a, out=product)
        out.mul_(self.scale)


class Lora:
    """LoRA as PEFT has it, with `use_dora`, `lora_bias`, `bias`, `trainable_token_indices` and `target_parameters`."""

    keys = _ADAPTED | {"use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"} | {TOKENS, TARGETS}
    roles = (A, B, BIAS, MAGNITUDE, _ROWS, _COLUMNS, "token_adapter.trainable_tokens_delta")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        _harmless(fields)
        rank, alpha = fields.rank("r", 8), fields.number("lora_alpha", 8)
        by_root = fields.flag("use_rslora")
        rows = self.roles[-1]
        adapted = [_outer(name) for name, found in modules.items() if rows not in found]
        ranks, alphas = fields.ranks("rank_pattern").of(adapted), fields.numbers("alpha_pattern").of(adapted)
        tokens = indices_of(fields, TOKENS, [name for name in modules if rows in modules[name]])
        wrapped = targeted(fields, {name: found for name, found in modules.items() if found.keys() == {A, B}})
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            if rows in found:
                weight = f"{name}.weight"
                (info,) = roles_of(fields, weight, found, (rows,))
                pieces[weight] = Tokens.of(fields, weight, info, tokens[name])
            elif bare(name) not in wrapped:
                r = ranks.get(_outer(name), rank)
                scale = alphas.get(_outer(name), alpha) / (math.sqrt(r) if by_root else r)
                if name.endswith(_PROJECTED):
                    scale *= 2  # PEFT adds it twice, in training and in use as well as on merging
                pieces.update(_linear(fields, _weight_of(name, modules), found, (r, scale)))
        for module, params in wrapped.items():
            within = levels(module, modules)
            r = ranks.get(module, rank)
            plain: Mapping[str, Piece] | Refuse
            try:
                setting = (r, alphas.get(module, alpha) / (math.sqrt(r) if by_root else r))
                weight = f"{module}.weight"
                plain = _linear(fields, weight, modules[module], setting) if within == (module,) else {}
            except Refuse as refusal:
                plain = refusal
            pairs = tuple(FactorPair(modules[level][A], modules[level][B]) for level in within)
            pieces[f"{module}.weight"] = Wrapped(str(fields.place), module, pairs, params, plain)
        return pieces


def _outer(module: str) -> str:
    """The module that PEFT adapted: the attention of torch, for the projection of its outputs."""
    return module.removesuffix(_PROJECTED)


def _weight_of(module: str, modules: Mapping[str, Module]) -> str:
    """The weight that a module's factors are about. Of torch's MultiheadAttention PEFT adapts two at once: that of the
    inputs under the module's name, and that of the outputs."""
    if module + _PROJECTED in modules:
        return f"{module}.in_proj_weight"
    return f"{module.removesuffix(_PROJECTED)}.out_proj.weight" if module.endswith(_PROJECTED) else f"{module}.weight"


def _linear(fields: Fields, weight: str, found: Module, setting: tuple[int, float]) -> dict[str, Piece]:
    """What the factors of a linear layer are added to; `setting` is their rank and scale."""
    factors = _factors(fields, weight, found, setting)
    if BIAS not in found:
        return {weight: factors}
    if factors.embedding:
        raise Refuse("adapter-kind", f"{fields.place}: {found[BIAS].name}: an embedding has no bias")
    bias = Bias(str(fields.place), found[BIAS], setting[1])
    return {weight: factors, f"{weight.removesuffix('weight')}bias": bias}


class AdaLora:
    """AdaLoRA as PEFT saves it. PEFT divides by the rank that training began with, whatever rank is left."""

    keys = _ADAPTED | frozenset(
        [
            "target_r",
            "init_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "rank_pattern",
            "use_rslora",
        ]
    )
    roles = ("lora_A", "lora_B", "lora_E")

    def pieces(self, fields: Fields, modules: Mapping[str, Module]) -> dict[str, Piece]:
        """As the protocol says."""
        _harmless(fields)
        begun, alpha = fields.rank("init_r", 12), fields.number("lora_alpha", 8)
        pieces: dict[str, Piece] = {}
        for name, found in sorted(modules.items()):
            weight = f"{name}.weight"
            a, b, e = roles_of(fields, weight, found, self.roles)
            rank = a.shape[0] if a.shape else 0
            if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != rank or e.shape != (rank, 1):
                raise Refuse(
                    "shape",
                    f"{fields.place}: factors of {weight} are {list(a.shape)}, {list(b.shape)} and {list(e.shape)}, "
                    "which do not fit each other",
                )
            pieces[weight] = Triple(str(fields.place), a, b, e, (alpha or float(rank)) / (begun + 1e-5))
        return pieces


def _harmless(fields: Fields) -> None:
    """Raises Refuse (`adapter-kind`) where the initialisation changed the base."""
    begun = fields.body.get("init_lora_weights", True)
    if (begun.lower() if isinstance(begun, str) else begun) not in _HARMLESS_INIT:
        raise Refuse(
            "adapter-kind",
            f"{fields.place}: init_lora_weights = {shown(begun)} may have changed the base, "
            "and then B·A alone is not the task vector; "
            "merge the adapter into its base and publish that, or convert it to plain LoRA",
        )


def _factors(fields: Fields, weight: str, found: Module, setting: tuple[int, float]) -> Factors:
    """The factors of one weight; `setting` is its rank and scale."""
    besides = ({BIAS} if fields.flag("lora_bias") else set()) | ({MAGNITUDE} if fields.flag("use_dora") else set())
    embedding = _ROWS in found
    pair = (_ROWS, _COLUMNS) if embedding else (A, B)
    expected = {*pair, *(besides - {BIAS} if embedding else besides)}
    if found.keys() != expected:
        raise Refuse(
            "adapter-kind",
            f"{fields.place}: {weight} has no pair of factors: by use_dora and lora_bias it takes "
            f"{' and '.join(sorted(expected))}, and it has {', '.join(sorted(info.name for info in found.values()))}",
        )
    (rank, scale), a, b = setting, found[pair[0]], found[pair[1]]
    if len(a.shape) < 2 or len(b.shape) < 2 or math.prod(b.shape[2:]) != 1 or (a.shape[0], b.shape[1]) != (rank, rank):
        grouped = len(b.shape) > 2 and a.shape[0] == rank and 0 < b.shape[1] < rank and rank % b.shape[1] == 0
        raise Refuse(
            "shape",
            f"{fields.place}: factors of {weight} are {list(a.shape)} and {list(b.shape)}, "
            f"which do not fit its rank {rank}"
            + (": PEFT cannot merge LoRA into a convolution with groups either" if grouped else ""),
        )
    return Factors(str(fields.place), a, b, rank, scale, embedding, found.get(MAGNITUDE))
