"""Which filling a run's models get."""

import torch

from megarec.parallel.fp8.precision import Precision
from megarec.parallel.fp8.reference_parts import reference_parts
from megarec.parallel.fp8.te_parts import te_parts
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.mcore import TransformerConfig
from megarec.parallel.megatron_parts import megatron_parts
from megarec.parallel.parts import Parts


def dense_dtype(precision: Precision) -> torch.dtype:
    """Of the dense weights and of everything that is not in FP8; bf16 ones are updated through an fp32 copy."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def make_parts(groups: ParallelGroups, config: TransformerConfig, precision: Precision) -> Parts:
    """The parts that `layout.linears` names, in `precision`; `checks` has seen that the two go together."""
    if groups.layout.linears == "te":
        return te_parts(groups, config, precision)
    if groups.layout.linears == "fp8_reference":
        return reference_parts(groups, config)
    return megatron_parts(groups, config)
