"""Models as blocks of singular triplets, a few columns a layer: what is kept of an adapter, and how any rule is read
from it. Pure: tensors and small arrays in, the same out; no file, no clock, no state."""

from continual.blocks.columns import MOST, Arrangement, Columns, plan, slots, width, without
from continual.blocks.layer import Layer
from continual.blocks.triplets import Block, triplets

__all__ = [
    "MOST",
    "Arrangement",
    "Block",
    "Columns",
    "Layer",
    "plan",
    "slots",
    "triplets",
    "width",
    "without",
]
