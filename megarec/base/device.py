"""The device that a command was told to use."""

import torch

from megarec.base.errors import UserError


def require_device(device: str) -> None:
    """Refuses `cuda` on a machine without a GPU that torch can use.

    Raises:
        UserError: there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU on this machine", where="device", fix="Set device=cpu, or install a CUDA build"
        )
