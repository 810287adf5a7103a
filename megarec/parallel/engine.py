"""The few calls of Megatron-Core that training is made of: its config, its DDP, its schedule, its gradient sums.

One process and many run the same calls. A loss is a sum divided by a *global* count before it enters the schedule
(`calculate_per_token_loss`), so every gradient sum over ranks is a plain sum and nothing is averaged anywhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    get_forward_backward_func,
)
from megarec.parallel.placement import placements

Pack = TypeVar("Pack")
Report = Mapping[str, Any]
ForwardStep = Callable[[Pack, int, Tensor | None], tuple[Tensor, Report]]


class Replica(nn.Module):
    """A chunk of a model as Megatron-Core's schedule wants to see it.

    Attributes:
        module: the chunk; its own methods may be called directly, gradients are found through its parameters.
        number: which of this rank's chunks it is.
        received: what the chunk before sent for the pack at hand, `[T, D]`; None: this one is the first.
    """

    def __init__(self, module: nn.Module, config: TransformerConfig, *, number: int) -> None:
        super().__init__()
        self.module = module
        self.number = number
        self.received: Tensor | None = None
        self.config = config
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Takes what the chunk before sends, `[T, 1, D]`."""
        (sent,) = tensors
        self.received = None if sent is None else sent.squeeze(1)


def transformer_config(layout: LayoutConfig, *, width: int, num_heads: int, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's config for a model of this shape, with the settings that would train wrong numbers fixed.

    Interleaved stages need `overlap_p2p_comm` and never `batch_p2p_comm`: with two stages, batched sends to the
    same peer get crossed without an error.
    """
    return TransformerConfig(
        num_layers=layout.num_chunks,  # stages are cut by `stages`; every one that Megatron-Core knows of has a layer
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


def wrap_ddp(
    groups: ParallelGroups, chunks: Sequence[nn.Module], config: TransformerConfig
) -> list[DistributedDataParallel]:
    """Puts this rank's chunks of a model on its device in `config.pipeline_dtype` and inside Megatron-Core's DDP.

    Gradients live in contiguous buffers, summed over the ranks that hold equal weights (bucket by bucket, during the
    last backward pass of a step, with `layout.overlap`); those of bf16 weights in fp32.

    Args:
        groups: who takes part.
        chunks: filled with their initial weights, every parameter with a Placement.
        config: from `transformer_config`.
    """
    wrapped = []
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.pipeline_dtype == torch.bfloat16,
        overlap_grad_reduce=groups.layout.overlap and groups.copies.size > 1,
        use_distributed_optimizer=groups.layout.zero1,
    )
    for number, chunk in enumerate(chunks):
        chunk.to(device=groups.device, dtype=config.pipeline_dtype)
        replica = Replica(chunk, config, number=number)
        ddp = DistributedDataParallel(config, settings, replica, disable_bucketing=number > 0)
        wrapped.append(ddp)
    if settings.overlap_grad_reduce:
        hold_back = [ddp.no_sync for ddp in wrapped]
        config.no_sync_func = hold_back if len(wrapped) > 1 else hold_back[0]
    return wrapped


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    forward_step: ForwardStep[Pack],
    packs: Sequence[Pack],
    *,
    tokens_per_pack: int,
) -> list[Report]:
    """Runs forward and backward of the packs through Megatron-Core's schedule.

    Gradients are added up in the buffers of the chunks; `finalize` then sums them over ranks.

    Args:
        chunks: from `wrap_ddp`.
        forward_step: from a pack, the number of one of the chunks and what the chunk before it made (None: nothing
            comes before) to what the chunk makes of them, `[T, D]`, and whatever should come back. The last chunk
            makes the pack's share of the loss (a scalar, already divided by the global count); for a pack with no
            target one that is zero but has a graph.
        packs: of this rank in the step, as many on every data-parallel rank.
        tokens_per_pack: the fixed size of a pack.

    Returns:
        what `forward_step` reported for the last chunk, in the order of the packs; nothing on other stages.
    """

    def step(
        iterator: Iterator[Pack], chunk: DistributedDataParallel
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Report]]]:
        replica = chunk.module
        output, report = forward_step(next(iterator), replica.number, replica.received)
        no_tokens = torch.zeros((), dtype=torch.int, device=output.device)  # counts are ours: see the module docstring
        return output if output.dim() == 0 else output.unsqueeze(1), lambda loss: (loss, no_tokens, report)

    several = len(chunks) > 1
    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(packs) for _ in chunks] if several else iter(packs),
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(packs),
        seq_length=tokens_per_pack,
        micro_batch_size=1,
    )
    return reports


@torch.no_grad()
def finalize(chunks: Sequence[DistributedDataParallel], groups: ParallelGroups) -> None:
    """Sums the gradients in the buffers over every rank that shares a parameter. Collective."""
    for chunk in chunks:
        chunk.finish_grad_sync()
    if groups.tensor.size > 1:
        partial = [
            parameter.main_grad  # type: ignore[attr-defined]
            for chunk in chunks
            for parameter, placement in placements(chunk)
            if "tp" in placement.grad_sum_over
        ]
        if not partial:  # a stage between the first and the last may have none, on all its tensor-parallel ranks alike
            return
        flat = torch._utils._flatten_dense_tensors(partial)
        dist.all_reduce(flat, group=groups.tensor.process_group)
        torch._foreach_copy_(partial, list(torch._utils._unflatten_dense_tensors(flat, partial)))
