"""How the ranks of a job share the model: sizes of the tensor, pipeline, context and data dimension."""

from dataclasses import dataclass
from typing import Literal

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """The sizes of one replica; the data-parallel size is what is left of the world.

    Attributes:
        tensor: ranks that split every layer.
        pipeline: stages that split the stack of layers.
        virtual: chunks of layers per stage (interleaved schedule), or None.
        layers_per_chunk: how many layers each chunk holds, in order; None: such that all cost about the same.
        context: ranks that split the tokens of a pack.
        context_by: how attention sees all of them: `heads`: each rank gets all tokens of some heads; `ring`: keys and
            values of all ranks pass by.
        sequence_parallel: split the tokens between the layers' products over the tensor-parallel ranks too.
        zero1: share the optimizer state of the dense weights out over the ranks that hold equal weights (ZeRO-1).
        recompute: what the backward pass computes again instead of keeping it: `none`; `attention`: of every block the
            norm, the first map and the attention; `block`: whole blocks, of which only the input is kept.
        linears: what makes the split maps of the blocks: `megatron`: Megatron-Core; `te`: Transformer Engine, on a GPU;
            `fp8_reference`: plain torch, with `precision=fp8_current` alone, to hold the others against.
        overlap: sum gradients over those ranks in buckets while the backward pass still runs.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    layers_per_chunk: tuple[int, ...] | None = None
    context: int = 1
    context_by: Literal["heads", "ring"] = "heads"
    sequence_parallel: bool = False
    zero1: bool = False
    recompute: Literal["none", "attention", "block"] = "none"
    linears: Literal["megatron", "te", "fp8_reference"] = "megatron"
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise UserError("a layout size is at least 1", where=name)
        if self.sequence_parallel and self.tensor == 1:
            raise UserError(
                "sequence parallelism splits tokens over tensor-parallel ranks, and there is one",
                where="sequence_parallel",
                fix="Set it to false or layout.tensor above 1",
            )
        if self.virtual is not None and (self.pipeline == 1 or self.virtual < 2):
            raise UserError(
                "virtual stages need at least 2 chunks on each of at least 2 stages",
                where="virtual",
                fix="Set it to null or raise layout.pipeline",
            )

        given = self.layers_per_chunk
        if given is not None and (len(given) != self.num_chunks or min(given) < 1):
            raise UserError(
                f"must be {self.num_chunks} numbers of at least 1 (pipeline x virtual)", where="layers_per_chunk"
            )

    @property
    def num_chunks(self) -> int:
        """Pieces into which the stack of layers is cut."""
        return self.pipeline * (self.virtual or 1)

    @property
    def replica(self) -> int:
        """The number of ranks that hold one copy of the model together."""
        return self.tensor * self.pipeline * self.context

    def data(self, world: int) -> int:
        """The number of data-parallel replicas in a `world` of ranks.

        Raises:
            UserError: a replica does not divide the world.
        """
        if world % self.replica:
            raise UserError(
                f"one replica takes {self.replica} ranks (tensor x pipeline x context), which does not divide {world}",
                where="layout",
            )
        return world // self.replica
