"""AdamW over the dense weights: Megatron-Core's optimizer, taken apart so that the step can order it."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarec.optim.config import OptimizerSettings
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.mcore import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megarec.parallel.placement import placements


class DenseOptimizer:
    """One update is `prepare_grads`, `square_norm`, `scale_grads`, `step`, `zero`, in this order.

    Weights in bf16 are updated through an fp32 copy. Parameters with one dimension are not decayed.

    Args:
        groups: who takes part.
        model: from `wrap_ddp`.
        settings: of AdamW; the schedule and clipping belong to the caller.
    """

    def __init__(
        self, groups: ParallelGroups, model: DistributedDataParallel, settings: OptimizerSettings
    ) -> None:
        self._groups = groups
        self._model = model
        dtype = next(model.parameters()).dtype
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            clip_grad=0.0,
        )
        self._megatron: MegatronOptimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)

    @torch.no_grad()
    def prepare_grads(self) -> None:
        """Hands the summed gradients to the weights that are updated (the fp32 copies of bf16 ones)."""
        self._megatron.prepare_grads()

    @torch.no_grad()
    def square_norm(self) -> Tensor:
        """The square of the norm of the whole dense gradient, a scalar, equal on every rank. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for _, updated, placement in self._parameters():
            if self._groups.tensor.rank == 0 or "tp" not in placement.replicated_over:
                assert updated.grad is not None
                total += torch.linalg.vector_norm(updated.grad).double().square()
        dist.all_reduce(total, group=self._groups.model.process_group)
        return total

    @torch.no_grad()
    def scale_grads(self, coefficient: float | Tensor) -> None:
        """Multiplies every gradient by `coefficient`."""
        for _, updated, _ in self._parameters():
            assert updated.grad is not None
            updated.grad.mul_(coefficient)

    def step(self, learning_rate: float) -> None:
        """Updates the weights."""
        for group in self._megatron.param_groups:
            group["lr"] = learning_rate
        self._megatron.step_with_ready_grads()

    def zero(self) -> None:
        """Empties the gradient buffers for the next step."""
        self._model.zero_grad_buffer()
        self._megatron.zero_grad()
