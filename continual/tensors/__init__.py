"""The files of models: where they are, their strict safetensors headers, and their task vectors, one tensor at a time.
A model is a full checkpoint or an adapter."""

from continual.tensors.adapters.adapter import Adapter
from continual.tensors.checkpoints.checkpoint import Checkpoint
from continual.tensors.checkpoints.header import TensorInfo
from continual.tensors.checkpoints.place import Folder, Place, place_of, read_json, release_of
from continual.tensors.model import Model, candidate_of, open_model, open_shipped, unreadable
from continual.tensors.names.kinds import BaseModel, describe
from continual.tensors.vectors.thin import LayerVectors, ThinVector, WholeVector
from continual.tensors.vectors.vectors import TaskVector, TaskVectors, digest_of

__all__ = [
    "Adapter",
    "BaseModel",
    "Checkpoint",
    "Folder",
    "LayerVectors",
    "Model",
    "Place",
    "TaskVector",
    "TaskVectors",
    "TensorInfo",
    "ThinVector",
    "WholeVector",
    "candidate_of",
    "describe",
    "digest_of",
    "open_model",
    "open_shipped",
    "place_of",
    "read_json",
    "release_of",
    "unreadable",
]
