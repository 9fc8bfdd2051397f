"""Models as blocks of singular triplets, a few columns a layer: what is kept of an adapter, and how any rule is read
from it. Pure: tensors and small arrays in, the same out; no file, no clock, no state."""

from continual.blocks.columns import CHUNK, MOST, Arrangement, Columns, plan, slots, width, without
from continual.blocks.factoring import ThinProduct
from continual.blocks.layer import Layer
from continual.blocks.merged import Merged
from continual.blocks.shares import Explaining, ModelShare, Products, Shares
from continual.blocks.shelf import Shelf
from continual.blocks.triplets import Block, decomposed, decomposing, triplets

__all__ = [
    "CHUNK",
    "MOST",
    "Arrangement",
    "Block",
    "Columns",
    "Explaining",
    "Layer",
    "Merged",
    "ModelShare",
    "Products",
    "Shares",
    "Shelf",
    "ThinProduct",
    "decomposed",
    "decomposing",
    "plan",
    "slots",
    "triplets",
    "width",
    "without",
]
