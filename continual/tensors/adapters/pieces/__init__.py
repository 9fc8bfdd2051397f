"""What an adapter of any kind makes of one tensor of the base: a protocol in `contract`, a module for each family of
kinds, and the kinds by PEFT's names for them."""

from __future__ import annotations

from collections.abc import Mapping

from continual.tensors.adapters.pieces.contract import Kind, Piece
from continual.tensors.adapters.pieces.low_rank import AdaLora, Lora
from continual.tensors.adapters.pieces.lycoris import LoHa, LoKr
from continual.tensors.adapters.pieces.rotation import Boft, Hra, Oft
from continual.tensors.adapters.pieces.scaling import IA3, LNTuning, VeRA
from continual.tensors.adapters.pieces.sparse import FourierFT, Miss, Shira
from continual.tensors.adapters.pieces.tokens import TrainableTokens

KINDS: Mapping[str, Kind] = {
    "LORA": Lora(),
    "ADALORA": AdaLora(),
    "LOHA": LoHa(),
    "LOKR": LoKr(),
    "IA3": IA3(),
    "VERA": VeRA(),
    "TRAINABLE_TOKENS": TrainableTokens(),
    "LN_TUNING": LNTuning(),
    "OFT": Oft(),
    "BOFT": Boft(),
    "HRA": Hra(),
    "SHIRA": Shira(),
    "MISS": Miss("miss_block"),
    "BONE": Miss("bone_block"),
    "FOURIERFT": FourierFT(),
}
"""The kinds that are understood, by `peft_type`."""

__all__ = ["KINDS", "Kind", "Piece"]
