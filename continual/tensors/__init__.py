"""Models on disk: strict safetensors headers, reads by pread, and task vectors one tensor at a time, of a full checkpoint or an adapter."""

from continual.tensors.adapter import Adapter
from continual.tensors.checkpoint import Checkpoint
from continual.tensors.header import TensorInfo
from continual.tensors.kinds import BaseModel, describe
from continual.tensors.model import Model, candidate_of, model_files, open_model, open_shipped
from continual.tensors.vectors import Piece, TaskVectors

__all__ = [
    "Adapter",
    "BaseModel",
    "Checkpoint",
    "Model",
    "Piece",
    "TaskVectors",
    "TensorInfo",
    "candidate_of",
    "describe",
    "model_files",
    "open_model",
    "open_shipped",
]
