"""Faults of Megatron-Core that the package goes around; each test fails once Megatron-Core mends its fault.

When one fails, the way around can go:

- the schedule scales the loss it was given in place -> `engine.py` reports a value of its own, and a loss of ours is
  never scaled (`calculate_per_token_loss`);
- `wd_mult` of a parameter group is ignored by the optimizer -> `DenseOptimizer` applies it;
- with `perform_initialization=False` split weights are uninitialised memory and carry no mark that a norm could
  count by -> `megatron_parts.py` empties them, norms follow `Placement`;
- the distributed optimizer on torch's AdamW cannot restore its own state, and where it can, all parameters share one
  step counter; saving spawns a process that runs the main script again -> checkpoints are the package's own pieces.
"""

import inspect

import pytest
import torch

from megarec.parallel.engine import Replica, transformer_config
from megarec.parallel.groups import ParallelGroups, ProcessInfo, start
from megarec.parallel.layout import LayoutConfig
from megarec.parallel.mcore import (
    ColumnParallelLinear,
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronOptimizer,
    OptimizerConfig,
    get_forward_backward_func,
    get_megatron_optimizer,
)
from megarec.parallel.megatron_parts import megatron_parts
from tests.parallel.tiny_model import HEADS, WIDTH, TinyModel
from tests.ranks import run_ranks


def make(groups: ParallelGroups, *, zero1: bool) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    config = transformer_config(groups.layout, width=WIDTH, num_heads=HEADS, dtype=torch.float32)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=zero1)
    module = Replica(TinyModel(megatron_parts(groups, config)), config, number=0)
    model = DistributedDataParallel(config=config, ddp_config=settings, module=module)
    optimizer = OptimizerConfig(
        optimizer="adam", lr=0.1, min_lr=0.1, use_distributed_optimizer=zero1, params_dtype=torch.float32
    )
    return model, get_megatron_optimizer(optimizer, [model], use_gloo_process_groups=False)


def step_once(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    model.zero_grad_buffer()
    model.module.module(torch.ones(3, WIDTH)).sum().backward()
    optimizer.step()


def schedule_scales_in_place(process: ProcessInfo) -> None:
    model, _ = make(start(LayoutConfig(), process), zero1=False)
    model.config.calculate_per_token_loss = False
    seen = []

    def forward_step(packs, _):
        loss = model.module.module(next(packs)).sum()
        seen.append((loss, loss.item()))
        return loss, lambda output: (output, {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([torch.ones(3, WIDTH)] * 4),
        model=model,
        num_microbatches=4,
        seq_length=3,
        micro_batch_size=1,
    )
    assert [loss.item() for loss, _ in seen] == pytest.approx([value / 4 for _, value in seen])


def weight_decay_multiplier_is_ignored(process: ProcessInfo) -> None:
    _, optimizer = make(start(LayoutConfig(), process), zero1=False)
    assert {(group["wd_mult"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.0, 0.01), (1.0, 0.01)}


def split_weights_carry_no_mark(process: ProcessInfo) -> None:
    config = transformer_config(
        start(LayoutConfig(), process).layout, width=WIDTH, num_heads=HEADS, dtype=torch.float32
    )
    linear = ColumnParallelLinear(4, 4, config=config, init_method=torch.nn.init.zeros_, bias=True)
    assert linear.bias.tensor_model_parallel
    assert not hasattr(linear.weight, "tensor_model_parallel")


def a_fresh_distributed_optimizer_has_no_state_dict(process: ProcessInfo) -> None:
    _, optimizer = make(start(LayoutConfig(), process), zero1=True)
    with pytest.raises(AssertionError):
        optimizer.chained_optimizers[0].state_dict()


def a_distributed_optimizer_cannot_take_over_its_own_moments(process: ProcessInfo) -> None:
    model, optimizer = make(start(LayoutConfig(), process), zero1=True)
    step_once(model, optimizer)
    inner = optimizer.chained_optimizers[0]
    parameter = next(model.parameters())
    tensors = inner._get_main_param_and_optimizer_states(parameter)
    moments = {name: tensor.detach().clone() for name, tensor in tensors.items() if name != "step"}
    with pytest.raises((KeyError, RuntimeError)):
        inner._set_main_param_and_optimizer_states(parameter, moments)


def loaded_parameters_share_one_step_counter(process: ProcessInfo) -> None:
    model, optimizer = make(start(LayoutConfig(), process), zero1=True)
    step_once(model, optimizer)
    inner = optimizer.chained_optimizers[0]
    inner.load_state_dict(inner.state_dict())
    counters = {state["step"].data_ptr() for state in inner.optimizer.state.values()}
    assert len(counters) == 1 < len(inner.optimizer.state)


@pytest.mark.parametrize(
    "fault",
    [
        schedule_scales_in_place,
        weight_decay_multiplier_is_ignored,
        split_weights_carry_no_mark,
        a_fresh_distributed_optimizer_has_no_state_dict,
        a_distributed_optimizer_cannot_take_over_its_own_moments,
        loaded_parameters_share_one_step_counter,
    ],
)
def test_the_fault_is_still_there(fault) -> None:
    run_ranks(fault, 1)


def test_saving_still_spawns_a_process() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # only behind the door

    assert 'get_context("spawn")' in inspect.getsource(filesystem_async._get_write_results_queue)
