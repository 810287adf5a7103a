"""AdamW over the dense weights: Megatron-Core's optimizer, taken apart so that the step can order it."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarec.optim.config import OptimizerSettings
from megarec.parallel.groups import ParallelGroups
from megarec.parallel.mcore import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megarec.parallel.placement import Placement, placements


class DenseOptimizer:
    """One update is `prepare_grads`, `square_norm`, `scale_grads`, `step`, `zero`, in this order.

    Weights in bf16 are updated through an fp32 copy. Parameters with one dimension are not decayed.

    Args:
        groups: who takes part.
        chunks: from `wrap_ddp`.
        settings: of AdamW; the schedule and clipping belong to the caller.
    """

    def __init__(
        self, groups: ParallelGroups, chunks: Sequence[DistributedDataParallel], settings: OptimizerSettings
    ) -> None:
        self._groups = groups
        self._chunks = list(chunks)
        dtype = next(chunks[0].parameters()).dtype
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
        few_dimensions = ParamKey(predicate=ParamPredicate(name="few_dimensions", fn=lambda p: p.dim() < 2))
        self._megatron: MegatronOptimizer = get_megatron_optimizer(
            config,
            self._chunks,
            config_overrides={few_dimensions: ParamGroupOverride(wd_mult=0.0)},
            use_gloo_process_groups=False,
        )
        for group in self._megatron.param_groups:  # Megatron-Core leaves this to its own scheduler
            group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        self._adam: torch.optim.Optimizer = self._megatron.optimizer
        if not isinstance(self._adam, torch.optim.AdamW):  # Apex and Transformer Engine count steps elsewhere
            raise AssertionError(f"Megatron-Core chose {type(self._adam)}; only torch's AdamW is known here")
        for weight, _ in self._weights():
            self._adam.state[weight] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    @torch.no_grad()
    def prepare_grads(self) -> None:
        """Hands the summed gradients to the weights that are updated (the fp32 copies of bf16 ones)."""
        self._megatron.prepare_grads()

    @torch.no_grad()
    def square_norm(self) -> Tensor:
        """The square of the norm of the whole dense gradient, a float64 scalar, equal on every rank. Collective."""
        first_tensor_rank = self._groups.tensor.rank == 0
        counted = [
            _gradient(weight)
            for weight, placement in self._weights()
            if first_tensor_rank or "tp" not in placement.replicated_over
        ]
        total = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        if counted:
            total += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        dist.all_reduce(total, group=self._groups.model.process_group)
        return total

    @torch.no_grad()
    def scale_grads(self, coefficient: float | Tensor) -> None:
        """Multiplies every gradient by `coefficient`."""
        torch._foreach_mul_([_gradient(weight) for weight, _ in self._weights()], coefficient)

    def step(self, learning_rate: float) -> None:
        """Updates the weights."""
        for group in self._megatron.param_groups:
            group["lr"] = learning_rate
        self._megatron.step_with_ready_grads()

    def zero(self) -> None:
        """Empties the gradient buffers for the next step."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._megatron.zero_grad()

    def reload_weights(self) -> None:
        """Takes over weights of the model that were changed from outside (into the fp32 copies of bf16 ones)."""
        self._megatron.reload_model_params()

    def state_pieces(self) -> dict[str, Tensor]:
        """What a checkpoint needs: this rank's piece of each moment, shaped and split as its weight.

        Names are `<global_name>/exp_avg`, `/exp_avg_sq` and, of bf16 weights, `/main` (the fp32 copy); `step` is
        the number of updates, the same for all. The tensors are the optimizer's own, not copies.
        """
        pieces: dict[str, Tensor] = {}
        for parameter, placement in self._parameters():
            weight = _updated(parameter)
            state = self._adam.state[weight]
            pieces[f"{placement.global_name}/exp_avg"] = state["exp_avg"]
            pieces[f"{placement.global_name}/exp_avg_sq"] = state["exp_avg_sq"]
            if weight is not parameter:
                pieces[f"{placement.global_name}/main"] = weight.detach()
            pieces["step"] = state["step"]
        return pieces

    @torch.no_grad()
    def load_state_pieces(self, pieces: Mapping[str, Tensor]) -> None:
        """Takes over what `state_pieces` gave, under the same names; call it after the weights are loaded.

        Raises:
            KeyError: a piece is missing.
        """
        self.reload_weights()
        for name, own in self.state_pieces().items():
            own.copy_(pieces[name])
        for parameter, _ in self._parameters():
            weight = _updated(parameter)
            self._adam.state[weight]["step"].copy_(pieces["step"])
            if weight is not parameter:
                parameter.copy_(weight)

    def _weights(self) -> Iterator[tuple[Tensor, Placement]]:
        """The tensors that AdamW updates, with the placements of the parameters they stand for."""
        for parameter, placement in self._parameters():
            yield _updated(parameter), placement

    def _parameters(self) -> Iterator[tuple[nn.Parameter, Placement]]:
        for chunk in self._chunks:
            yield from placements(chunk)


def _updated(parameter: nn.Parameter) -> Tensor:
    """The tensor that AdamW updates: the fp32 copy that Megatron-Core made of a bf16 parameter, or itself."""
    return getattr(parameter, "main_param", parameter)


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise AssertionError("a weight has no gradient: call prepare_grads first")
    return weight.grad
