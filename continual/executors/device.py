"""On which device tensors are computed. Nothing here moves a tensor."""

from __future__ import annotations

from continual.errors import ContinualError
from continual.lazily import torch


def pick_device(word: str) -> torch.device:
    """The device that the setting `device` names: `auto` is the first CUDA device if there is one, else the CPU.

    On CUDA it turns TF32 off for the process, because TF32 would round to 10 bits. Raises ContinualError if CUDA is
    named and this torch sees none.
    """
    if word != "cpu":
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            return torch.device("cuda" if word == "auto" else word)
        if word != "auto":
            raise ContinualError(f"device = {word}: this torch sees no CUDA device; use auto or cpu")
    return torch.device("cpu")
