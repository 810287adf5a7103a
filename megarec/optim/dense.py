"""AdamW over the dense weights: Megatron-Core's optimizer, taken apart so that the step can order it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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

    Weights in bf16 are updated through an fp32 copy. Parameters with one dimension are not decayed. With
    `layout.zero1` each of the ranks that hold equal weights keeps the moments (and fp32 copies) of a share of them,
    updates it and sends it to the others. Megatron-Core takes the fused AdamW of Transformer Engine or Apex where
    there is one, else torch's.

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
            use_distributed_optimizer=groups.layout.zero1,
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
        self._is_fused = type(self._adam).__name__ == "FusedAdam"
        if not self._is_fused and not isinstance(self._adam, torch.optim.AdamW):
            raise AssertionError(f"Megatron-Core chose {type(self._adam)}, which is not known here")
        self._shares = [share for chunk in chunks for share in self._shares_of(chunk)]
        self.kinds = ("exp_avg", "exp_avg_sq", *(("main",) if dtype == torch.bfloat16 else ()))
        for share in self._shares:
            moments = {kind: torch.zeros_like(share.weight) for kind in ("exp_avg", "exp_avg_sq")}
            self._adam.state[share.weight] = moments if self._is_fused else {"step": torch.zeros(()), **moments}

    @torch.no_grad()
    def prepare_grads(self) -> None:
        """Hands the summed gradients to the weights that are updated (the fp32 copies of bf16 ones)."""
        self._megatron.prepare_grads()

    @torch.no_grad()
    def square_norm(self) -> Tensor:
        """The square of the norm of the whole dense gradient, a float64 scalar, equal on every rank. Collective."""
        first_tensor_rank = self._groups.tensor.rank == 0
        counted = [
            _gradient(share.weight)
            for share in self._shares
            if first_tensor_rank or "tp" not in share.placement.replicated_over
        ]
        total = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        if counted:
            total += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        everything = self._groups.world if self._groups.layout.zero1 else self._groups.model
        dist.all_reduce(total, group=everything.process_group)
        return total

    @torch.no_grad()
    def scale_grads(self, coefficient: float | Tensor) -> None:
        """Multiplies every gradient by `coefficient`."""
        if self._shares:  # with ZeRO-1 a rank may have none
            torch._foreach_mul_([_gradient(share.weight) for share in self._shares], coefficient)

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

    @property
    def num_updates(self) -> float:
        """How often the weights were updated."""
        if self._is_fused:  # counts in its groups, but not in those that are empty on this rank
            return float(max(group.get("step", 0) for group in self._adam.param_groups))
        return float(self._adam.state[self._shares[0].weight]["step"]) if self._shares else 0.0

    @torch.no_grad()
    def state_pieces(self) -> dict[str, Tensor]:
        """What a checkpoint needs: this rank's piece of each moment, shaped and split as its weight. Collective.

        Names are `<global_name>/<kind>` for each of `kinds`: the moments `exp_avg` and `exp_avg_sq` and, of bf16
        weights, `main` (the fp32 copy). With ZeRO-1 the first rank of those that hold equal weights gets the pieces,
        on the CPU, and the others none; without, the tensors are the optimizer's own, not copies.
        """
        own = {share.placement.global_name: share for share in self._shares}
        if not self._groups.layout.zero1:
            return {f"{name}/{kind}": self._state(share, kind) for name, share in own.items() for kind in self.kinds}
        pieces, copies = {}, self._groups.copies
        for parameter, placement in self._parameters():
            for kind in self.kinds:
                piece = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
                share = own.get(placement.global_name)
                if share is not None:
                    share.part_of(piece).copy_(self._state(share, kind))
                dist.reduce(piece, group=copies.process_group, group_dst=0)  # every number from one rank, 0 from others
                if copies.rank == 0:
                    pieces[f"{placement.global_name}/{kind}"] = piece.cpu()
        return pieces

    @torch.no_grad()
    def load_state_pieces(self, pieces: Mapping[str, Tensor], num_updates: float) -> None:
        """Takes over what `state_pieces` gave, under the same names; call it after the weights are loaded.

        Raises:
            KeyError: a piece is missing.
        """
        self.reload_weights()
        for group in self._adam.param_groups if self._is_fused else ():
            group["step"] = int(num_updates)
        for share in self._shares:
            if not self._is_fused:
                self._adam.state[share.weight]["step"].fill_(num_updates)
            for kind in self.kinds:
                piece = pieces[f"{share.placement.global_name}/{kind}"].to(share.weight.device)
                self._state(share, kind).copy_(share.part_of(piece))
        if "main" in self.kinds:
            for parameter, placement in self._parameters():
                parameter.copy_(pieces[f"{placement.global_name}/main"])

    def _state(self, share: "_Share", kind: str) -> Tensor:
        return share.weight.detach() if kind == "main" else self._adam.state[share.weight][kind]

    def _parameters(self) -> Iterator[tuple[nn.Parameter, Placement]]:
        for chunk in self._chunks:
            yield from placements(chunk)

    def _shares_of(self, chunk: DistributedDataParallel) -> Iterator["_Share"]:
        """What this rank updates of each parameter; with ZeRO-1 not every rank has a share of every one."""
        for parameter, placement in placements(chunk):
            if not self._groups.layout.zero1:
                weight = getattr(parameter, "main_param", parameter)  # of bf16 ones Megatron-Core made an fp32 copy
                yield _Share(placement=placement, weight=weight)
                continue
            (sharded,) = self._megatron.chained_optimizers
            place = sharded.model_param_group_index_map.get(parameter)
            if place is not None:
                group, number = place
                weight = self._adam.param_groups[group]["params"][number]
                first = sharded._get_model_param_range_map(parameter)["param"].start
                yield _Share(placement=placement, weight=weight, first=first)


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The tensor that AdamW updates for a parameter: all of it, or the elements from `first` on, flattened."""

    placement: Placement
    weight: Tensor
    first: int | None = None

    def part_of(self, piece: Tensor) -> Tensor:
        """What of a tensor of the parameter's shape belongs to this share."""
        if self.first is None:
            return piece
        return piece.view(-1)[self.first : self.first + self.weight.numel()]


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise AssertionError("a weight has no gradient: call prepare_grads first")
    return weight.grad
