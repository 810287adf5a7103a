"""The only door to Megatron-Core: everything the package takes from it, imported in the right order.

Without CUDA the import hook has to be there before the first module of Megatron-Core, so nobody else imports it.
"""

import warnings

from megarec.base.errors import UserError
from megarec.parallel.megatron_on_cpu import install

# It warns of every optional package it goes without; what matters to a user is said by our own checks.
warnings.filterwarnings("ignore", module=r"megatron\.")
install()

try:
    from megatron.core import parallel_state
except (RuntimeError, OSError) as error:  # an ImportError of what it can go without is its own business
    raise UserError(
        f"Megatron-Core cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where="installation",
        fix="A broken Transformer Engine does this: install the whole of it, or pip uninstall transformer-engine",
    ) from error
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer_config import ParamPredicate  # noqa: E402
from megatron.core.optimizer_param_scheduler import ParamGroupOverride  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

__all__ = [
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "MegatronOptimizer",
    "ModelType",
    "OptimizerConfig",
    "ParamGroupOverride",
    "ParamKey",
    "ParamPredicate",
    "RowParallelLinear",
    "TransformerConfig",
    "all_to_all",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
]
