"""What Transformer Engine asks of a machine."""

from importlib import import_module

import torch

from megarec.parallel.fp8.precision import Precision, is_fp8

ENGINE_VERSIONS = (2, 9), (2, 12)
"""From the first up to, not including, the second: what Megatron-Core 0.16.1 declares."""


def why_no_engine(precision: Precision) -> str:
    """What keeps this machine from `precision` with Transformer Engine, in a few words; empty: nothing.

    FP8 products need a GPU of compute capability 8.9, those scaled block by block 9.0 and CUDA 12.9.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        engine = import_module("transformer_engine")
        import_module("transformer_engine.pytorch")
    except Exception as error:  # a package without its compiled part raises RuntimeError or OSError
        return f"it cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    lowest, limit = ENGINE_VERSIONS
    if not lowest <= _numbers(engine.__version__) < limit:
        return f"{engine.__version__} is installed, and Megatron-Core takes {_words(lowest)} up to {_words(limit)}"
    needed = (9, 0) if precision == "fp8_blockwise" else (8, 9)
    capability = torch.cuda.get_device_capability()
    if is_fp8(precision) and capability < needed:
        return f"the GPU has compute capability {_words(capability)}, and {precision} needs {_words(needed)}"
    if precision == "fp8_blockwise" and _numbers(torch.version.cuda or "0.0") < (12, 9):
        return f"torch is built for CUDA {torch.version.cuda}, and {precision} needs 12.9"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def _words(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
