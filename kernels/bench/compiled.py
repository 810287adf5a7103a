"""A method under torch.compile, or words for why it cannot be."""

import os

import torch

from kernels.bench.cases import Inputs, Method, Outputs


def compiled(method: Method) -> Method:
    """The method under `torch.compile`, compiled at its first call.

    Raises:
        NotImplementedError: at a call, where the compiler is switched off or fails; says which.
    """

    def call(inputs: Inputs) -> Outputs:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise NotImplementedError("TORCHDYNAMO_DISABLE=1 turns torch.compile off")
        try:
            return torch.compile(method)(inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise NotImplementedError(f"torch.compile: {str(error).strip().splitlines()[0]}") from error

    return call
