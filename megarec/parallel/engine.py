"""The few calls of Megatron-Core that training is made of: its config, its DDP, its schedule, its gradient sums.

One process and many run the same calls. A loss is a sum divided by a *global* count before it enters the schedule
(`calculate_per_token_loss`), so every gradient sum over ranks is a plain sum and nothing is averaged anywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarec.parallel.groups import ParallelGroups
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    ModelType,
    TransformerConfig,
    finalize_model_grads,
    get_forward_backward_func,
)
from megarec.parallel.placement import placements

Pack = TypeVar("Pack")
Report = Mapping[str, Any]
ForwardStep = Callable[[Pack], tuple[Tensor, Report]]


class Replica(nn.Module):
    """A model as Megatron-Core's schedule wants to see it; `module` is the model itself.

    Attributes:
        module: the model; its own methods may be called directly, gradients are found through its parameters.
    """

    def __init__(self, module: nn.Module, config: TransformerConfig) -> None:
        super().__init__()
        self.module = module
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, tensor: Any) -> None:
        """Takes what the stage before sends: nothing, for a model that is one stage."""
        if tensor != [None] and tensor is not None:
            raise AssertionError("a model of one stage was sent activations")


def transformer_config(
    layout: LayoutConfig, *, num_layers: int, width: int, num_heads: int, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron-Core's config for a model of this shape, with the settings that would train wrong numbers fixed.

    Interleaved stages need `overlap_p2p_comm` and never `batch_p2p_comm`: with two stages, batched sends to the
    same peer get crossed without an error.
    """
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=width,
        num_attention_heads=num_heads,
        kv_channels=max(1, width // num_heads),
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=torch.float32,  # every filling starts in fp32; wrap_ddp casts once
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=False,
        overlap_p2p_comm=layout.virtual is not None,
        fp8=None,
    )


def wrap_ddp(groups: ParallelGroups, model: nn.Module, config: TransformerConfig) -> DistributedDataParallel:
    """Puts `model` on its device in `config.pipeline_dtype` and inside Megatron-Core's DDP.

    Gradients live in contiguous buffers, summed over data-parallel ranks; those of bf16 weights in fp32.

    Args:
        groups: who takes part.
        model: filled with its initial weights, every parameter with a Placement.
        config: from `transformer_config`.
    """
    model.to(device=groups.device, dtype=config.pipeline_dtype)
    for parameter, _ in placements(model):
        setattr(parameter, "sequence_parallel", False)  # noqa: B010  (`finalize` sums by Placement, with and without)
    in_fp32 = config.pipeline_dtype == torch.bfloat16
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32)
    return DistributedDataParallel(config=config, ddp_config=settings, module=Replica(model, config))


def run_schedule(
    model: DistributedDataParallel,
    forward_step: ForwardStep[Pack],
    packs: Iterator[Pack],
    *,
    num_packs: int,
    tokens_per_pack: int,
) -> list[Report]:
    """Runs forward and backward of `num_packs` packs through Megatron-Core's schedule.

    Gradients are added up in the buffers of `model`; `finalize` then sums them over ranks.

    Args:
        model: from `wrap_ddp`.
        forward_step: from a pack to its share of the loss (a scalar, already divided by the global count) and
            whatever should come back. A pack with no target returns a loss that is zero but has a graph.
        packs: yields at least `num_packs` packs.
        num_packs: packs of this rank in the step, the same on every data-parallel rank.
        tokens_per_pack: the fixed size of a pack.

    Returns:
        what `forward_step` reported, in the order of the packs.
    """

    def step(
        iterator: Iterator[Pack], _: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Report]]]:
        loss, report = forward_step(next(iterator))
        no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)  # counts are ours: see the module docstring
        return loss, lambda output: (output, no_tokens, report)

    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=packs,
        model=model,
        num_microbatches=num_packs,
        seq_length=tokens_per_pack,
        micro_batch_size=1,
    )
    return reports


@torch.no_grad()
def finalize(model: DistributedDataParallel, groups: ParallelGroups) -> None:
    """Sums the gradients in the buffers over every rank that shares a parameter. Collective."""
    if groups.tensor.size > 1:
        partial = [p.main_grad for p, placement in placements(model) if "tp" in placement.grad_sum_over]  # type: ignore[attr-defined]
        flat = torch._utils._flatten_dense_tensors(partial)
        dist.all_reduce(flat, group=groups.tensor.process_group)
        torch._foreach_copy_(partial, list(torch._utils._unflatten_dense_tensors(flat, partial)))
    finalize_model_grads([model], num_tokens=None)
