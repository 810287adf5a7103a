"""A method under torch.compile, or words for why it cannot be."""

import os
from collections.abc import Callable
from functools import cache

import torch

from kernels.bench.cases import Inputs, Method, Outputs


def compiled(method: Method, prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs) -> Method:
    """The method under `torch.compile`, compiled for its shapes at its first call.

    Args:
        method: what is compiled.
        prepare: fills `inputs` before each call, outside of the compiled program.

    Raises:
        NotImplementedError: at a call, where the compiler is switched off or fails; says which.
    """

    @cache
    def compile_once() -> Method:
        torch.compiler.reset()  # programs of other shapes count towards a limit, beyond which it would run eagerly
        return torch.compile(method, dynamic=False)

    def call(inputs: Inputs) -> Outputs:
        prepare(inputs)
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise NotImplementedError("TORCHDYNAMO_DISABLE=1 turns torch.compile off")
        try:
            return compile_once()(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise NotImplementedError(f"torch.compile: {str(error).strip().splitlines()[0]}") from error

    return call
