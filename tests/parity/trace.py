"""What one training step does on every rank: pieces of weights, shapes inside a block, collectives, order of packs.

Nothing here knows how a layout works. Pieces are read from the `Placement` of every parameter, shapes from hooks on
every module, and collectives from torch's dispatcher, which every call of Megatron-Core and of megarec passes with the
process group that it was called with. A collective of the backward pass belongs to the module that made its autograd
node: autograd numbers the nodes in the order in which the forward pass makes them.

The second step is traced: in the first one Megatron-Core's DDP learns which gradients come when.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.data.dataset import open_dataset
from megarec.embedding.tables import OwnedGradients, TableGroup
from megarec.models.model import RecModel
from megarec.optim.dense import DenseOptimizer
from megarec.parallel import engine, megatron_parts
from megarec.parallel.context import fill
from megarec.parallel.groups import Group, ParallelGroups, ProcessInfo, start, stop
from megarec.parallel.placement import placements
from megarec.train import step as step_module
from megarec.train import trainer as trainer_module
from megarec.train.batches import PackWork, StepBatch
from megarec.train.config import TrainConfig
from megarec.train.objective import Objective
from megarec.train.trainer import Trainer
from tests.parity.layout_runs import STREAM, make_run
from tests.parity.table import LAYOUTS
from tests.parity.traffic import CHUNK_BEFORE, GRADIENTS_COME, NEXT_CHUNK, Collective, Trace, Weight, Work
from tests.ranks import run_ranks

OPERATIONS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
WIDTHS = {"width": 32, "table_width": 28, "heads": {"query_width": 20, "hidden_width": 40}}
MODELS: dict[str, dict[str, Any]] = {  # every width another number, so that a shape can be read
    "hstu": {"name": "hstu", "block": {"num_heads": 4, "qk_head_width": 8, "v_head_width": 8, "num_time_buckets": 16}},
    "argus": {"name": "argus", "block": {"num_heads": 4}},
}
TOKENS = 160
BUCKET_NUMBERS = 16_000  # Megatron-Core's 40 million would put all of a small model into one bucket


def trace_run(
    data: Path, layout: str, model: str, *, plant: Callable[[], None] | None = None, **settings: Any
) -> list[Trace]:
    """The traces of all ranks of a small run; `model` of `MODELS`, `layout` of `tests.parity.table.LAYOUTS`.

    `plant` changes the code before anything is built.
    """
    for module in ("megatron.core.transformer.multi_token_prediction", "pyarrow.dataset"):
        import_module(module)  # once, before the fork
    sizes = LAYOUTS[layout].sizes
    chunks = sizes.get("pipeline", 1) * sizes.get("virtual", 1)
    shared = sizes.get("tensor", 1) * sizes.get("context", 1) > 1  # then two packs, else four
    others = {"num_layers": 4 if chunks > 1 else 2, "max_positions": 32, "dropout": 0.1, "time_gap_buckets": 6}
    values = {
        "model": {**WIDTHS, **others, **MODELS[model]},
        "stream": {**STREAM, "tokens_per_pack": TOKENS, "packs_per_lane": 1 if shared else 2},
        "num_steps": 2,
        "optimizer": {},
        "tables": {},
        **settings,
    }
    return run_ranks(trace_second_step, LAYOUTS[layout].world, make_run(data, layout, model, **values), plant)


def trace_second_step(process: ProcessInfo, config: TrainConfig, plant: Callable[[], None] | None) -> Trace:
    """The job of one rank."""
    if plant is not None:
        plant()
    engine.DistributedDataParallelConfig = partial(  # type: ignore[misc,assignment]
        engine.DistributedDataParallelConfig, bucket_size=BUCKET_NUMBERS
    )
    groups = start(config.layout, process)
    recorder = Recorder(groups)
    recorder.watch_attention()
    trainer = Trainer(config, groups, open_dataset(config.data), hooks=[])
    recorder.watch(trainer)
    with recorder:
        trainer.fit()
    stop()
    recorder.trace.facts["tokens"] = config.stream.tokens_per_pack
    return recorder.trace


class Recorder(TorchDispatchMode):
    """Fills a `Trace` while a trainer runs under it. Changes classes, so it belongs into a process of its own."""

    def __init__(self, groups: ParallelGroups) -> None:
        super().__init__()
        self.trace = Trace()
        self._groups = {group.process_group.group_name: n for n, group in vars(groups).items() if type(group) is Group}
        self._phase, self._recording, self._step = "", False, 0
        self._scopes: list[str] = []
        self._nodes: list[tuple[str, int, int]] = []  # scopes that have ended, inner ones first
        self._passes: list[tuple[int, int, int, int]] = []  # pack, chunk, first node, behind the last node
        self._pack: int | None = None
        self._packs: list[PackWork] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and self._recording:
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Sequence[Any]) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        operation = OPERATIONS.get(name, name)
        if group.size() == 1 or operation == "receive":  # what is received was sent
            return
        tensor: Tensor = max((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), key=Tensor.numel)
        others = (group.size() - 1) / group.size()
        phase, place = self._phase, self._scopes[-1] if self._scopes else ""
        if operation == "all-to-all":
            tensor, splits = args[1], [arg for arg in args if isinstance(arg, list)]
            if splits and splits[1]:
                others = 1.0 - splits[1][group.rank()] / max(1, len(tensor))
        elif operation in ("send", "broadcast"):
            others = 1.0
        elif operation == "all-reduce":
            others *= 2
        node = torch._C._current_autograd_node()
        if phase == "schedule":
            phase = "forward" if node is None else "backward"
            if node is not None and not place:
                place = self._place_of(node)
            elif not place:  # between passes: what a chunk made has a graph, what it gives back has none
                phase, place = ("forward", NEXT_CHUNK) if tensor.requires_grad else ("backward", CHUNK_BEFORE)
        self.trace.collectives.append(
            Collective(
                operation=operation,
                group=self._groups.get(group.group_name, "?"),
                size=group.size(),
                shape=tuple(tensor.shape),
                item_bytes=tensor.element_size(),
                to_others=others,
                phase=phase,
                place=place,
                pack=self._pack if phase in ("forward", "backward") else None,
                passes=len(self.trace.order),
            )
        )

    def _place_of(self, node: Any) -> str:
        number = node._sequence_nr()
        return next((name for name, first, end in self._nodes if first <= number < end), GRADIENTS_COME)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """What is called inside, and whose autograd nodes are made inside, belongs to `name`."""
        first = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()
            self._nodes.append((name, first, torch.autograd._get_sequence_nr()))  # type: ignore[attr-defined]

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replaces `owner.name` by `around(original, *args, **settings)`."""
        original = getattr(owner, name)

        @wraps(original)
        def call(*args: Any, **settings: Any) -> Any:
            return around(original, *args, **settings)

        setattr(owner, name, call)

    def _name_calls(self, owner: Any, name: str, place: str) -> None:
        def around(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            with self.scope(place):
                return original(*args, **settings)

        self._wrap(owner, name, around)

    def watch_attention(self) -> None:
        """Attention is no module: it is named after the block that calls it. To be called before a model is built."""

        def kernel(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            out = original(*args, **settings)
            self._keep_shapes(f"{self._scopes[-1]}.kernel", args[0], out)
            return out

        def attention(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            # What is computed again in the backward pass runs outside of its block.
            inside = self._scopes[-1] if self._scopes else self._place_of(torch._C._current_autograd_node())
            block = ".".join(inside.split(".")[:2])
            with self.scope(f"{block}.attention"):
                out = original(*args, **settings)
            self._keep_shapes(f"{block}.attention", args[0], out)
            return out

        def keep_shares(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            plan = original(*args, **settings)
            if self._recording and hasattr(plan, "shares"):
                self.trace.facts["shares"] = plan.shares.tolist()  # of the last pack
            return plan

        def token_parts(original: Callable[..., Any], *args: Any) -> Any:
            parts = original(*args)
            kinds = {kind: partial(attention, getattr(parts["attention"], kind)) for kind in ("hstu", "softmax")}
            plan = partial(keep_shares, parts["attention"].plan)
            return {**parts, "attention": replace(parts["attention"], plan=plan, **kinds)}

        self._wrap(fill, "hstu_attention", kernel)
        self._wrap(fill, "softmax_attention", kernel)
        self._wrap(megatron_parts, "token_parts", token_parts)

    def _keep_shapes(self, place: str, before: Tensor, after: Tensor) -> None:
        if self._recording:
            self.trace.shapes.setdefault(place, (tuple(before.shape), tuple(after.shape)))

    def _begin_phases(self, owner: Any, name: str, phase: str, then: str = "") -> None:
        """From a call of `owner.name` on it is `phase`, and when it has returned, `then`."""

        def around(original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
            self._phase = phase
            try:
                return original(*args, **settings)
            finally:
                self._phase = then

        self._wrap(owner, name, around)

    def watch(self, trainer: Trainer) -> None:
        """Sees every call of the second step of `trainer`."""
        self._wrap(Trainer, "_take_step", self._take_step)
        for owner, name, *phases in (
            (trainer_module, "share_step", "packs"),
            (TableGroup, "fetch", "rows"),
            (Objective, "count_targets", "counts", "counts"),
            (step_module, "run_schedule", "schedule"),
            (step_module, "finalize", "gradients"),
            (TableGroup, "collect_gradients", "row gradients"),
            (DenseOptimizer, "square_norm", "norm"),
            (TableGroup, "square_norm", "norm"),
            (DenseOptimizer, "step", "update"),
            (DenseOptimizer, "zero", "", "losses"),
            (Trainer, "_measure", "log line"),
        ):
            self._begin_phases(owner, name, *phases)
        self._name_calls(RecModel, "_begin", "before the blocks")
        self._name_calls(RecModel, "_end", "behind the blocks")
        self._name_calls(Objective, "_next_item", "next item")
        self._name_calls(Objective, "_feedback", "feedback")
        self._wrap(Objective, "forward", self._forward)
        self._wrap(StepBatch, "work", self._work)
        self._wrap(import_module("megatron.core.pipeline_parallel.schedules"), "backward_step", self._backward)
        self._wrap(TableGroup, "fetch", self._fetch)
        self._wrap(TableGroup, "collect_gradients", self._collect)
        for chunk in trainer.model:
            for name, module in chunk.named_modules():
                self._hook(name, module)
        self._weights(trainer)

    def _hook(self, name: str, module: nn.Module) -> None:
        open_scopes: list[Any] = []

        def enter(_: Any, __: Any) -> None:
            open_scopes.append(self.scope(name))
            open_scopes[-1].__enter__()

        def leave(_: Any, inputs: Any, output: Any) -> None:
            open_scopes.pop().__exit__(None, None, None)
            tensors = [leaf for leaf in tree_leaves((inputs, output)) if isinstance(leaf, Tensor)]
            if tensors:
                self._keep_shapes(name, tensors[0], tensors[-1])

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)  # what is computed again may end early

    def _take_step(self, original: Callable[..., Any], *args: Any) -> Any:
        self._step += 1
        self._recording = self._step == 2
        return original(*args)

    def _work(self, original: Callable[..., Any], batch: StepBatch, index: Tensor) -> Any:
        self._packs = original(batch, index)
        self._nodes.clear()
        columns = [work.pack.columns for work in self._packs]
        counts = [len(pack.get("all_target", pack["target"])) for pack in columns]
        self.trace.facts |= {"candidates": [len(pack["candidate_id"]) for pack in columns], "targets": counts}
        return self._packs

    def _forward(self, original: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        _, work, chunk, _ = args
        self._pack = next(number for number, other in enumerate(self._packs) if other is work)
        self._remember("forward", self._pack, chunk)
        first = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        output = original(*args, **settings)
        self._passes.append((self._pack, chunk, first, torch.autograd._get_sequence_nr()))  # type: ignore[attr-defined]
        return output

    def _backward(self, original: Callable[..., Any], inputs: Any, outputs: Any, *rest: Any) -> Any:
        (output,) = outputs if isinstance(outputs, list) else (outputs,)
        nodes = [output.grad_fn]  # what Megatron-Core made of the chunk's output
        while not (found := [p for p in self._passes if p[2] <= nodes[0]._sequence_nr() < p[3]]):
            nodes = [node for node, _ in nodes.pop(0).next_functions if node is not None] + nodes
        self._pack = found[-1][0]
        self._remember("backward", self._pack, found[-1][1])
        return original(inputs, outputs, *rest)

    def _remember(self, kind: str, pack: int, chunk: int) -> None:
        if self._recording:
            self.trace.order.append(Work(kind=kind, pack=pack, chunk=chunk))

    def _fetch(self, original: Callable[..., Any], tables: TableGroup, rows: Tensor) -> Any:
        fetched = original(tables, rows)
        self.trace.facts |= {
            "rows": tables.num_rows,
            "asked": int((rows >= 0).sum()),
            "distinct": len(fetched.values),
            "asked_of": fetched.route.asked,
            "served_to": fetched.route.served,
            "own_rows": len(tables.state_pieces()["values"]),
        }
        return fetched

    def _collect(self, original: Callable[..., Any], *args: Any) -> OwnedGradients:
        owned: OwnedGradients = original(*args)
        self.trace.facts["updated"] = len(owned.local_rows)
        return owned

    def _weights(self, trainer: Trainer) -> None:
        kept = {
            share.placement.global_name: (share.first or 0, share.weight.numel())
            for share in trainer.machinery.optimizer._shares
        }
        for chunk, ddp in enumerate(trainer.machinery.chunks):
            buckets = [bucket for buffer in ddp.buffers for bucket in buffer.buckets]
            for parameter, placement in placements(ddp):
                number = next(n for n, bucket in enumerate(buckets) if parameter in bucket.params)
                weight = Weight(
                    placement=placement,
                    shape=tuple(parameter.shape),
                    kept=kept.get(placement.global_name, (0, 0)),
                    chunk=chunk,
                    bucket=number,
                    place=buckets[number].offset + buckets[number].param_to_index[parameter][0],
                )
                self.trace.weights.append(weight)
