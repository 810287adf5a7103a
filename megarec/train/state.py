"""What of a run goes into a checkpoint, and back: dense weights, their optimizer, tables, lane positions."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.base.config import plain
from megarec.checkpoint.load import Checkpoint
from megarec.checkpoint.pieces import Piece, PieceIndex
from megarec.checkpoint.save import CheckpointWriter
from megarec.embedding.tables import TableGroup
from megarec.parallel.broadcast import gather_objects
from megarec.parallel.placement import Placement, placements
from megarec.train.trainer import Trainer

DENSE, TABLES = "dense", "tables"


def save(writer: CheckpointWriter, trainer: Trainer) -> None:
    """Begins to write a checkpoint of `trainer` as it stands. Collective."""
    positions = gather_objects(trainer.position, trainer.groups.world)
    lanes = {lane: place for position in positions for lane, place in position.items()}
    state = {
        "lanes": dict(sorted(lanes.items(), key=lambda entry: int(entry[0]))),
        "dense_updates": trainer.machinery.optimizer.num_updates,
        "table_updates": trainer.machinery.tables.step,
        "first_row": trainer.machinery.tables.first_row,
    }
    optimizer_state = trainer.machinery.optimizer.state_pieces()
    dense = _dense_pieces(trainer, optimizer_state) if trainer.groups.copies.rank == 0 else []
    pieces = [*dense, *_table_pieces(trainer.machinery.tables, trainer)]
    writer.start(trainer.step, pieces, state=state, config=plain(trainer.config))


def restore(checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Makes `trainer` what was saved; any number of ranks may have saved it.

    Raises:
        UserError: the checkpoint is of another model, other tables or another dataset.
    """
    state = checkpoint.manifest.state
    optimizer, tables = trainer.machinery.optimizer, trainer.machinery.tables
    empty = {
        f"{placement.global_name}/{kind}": torch.empty(parameter.shape)
        for parameter, placement in placements(trainer.model)
        for kind in optimizer.kinds
    }
    dense = _dense_pieces(trainer, empty)
    loaded = [Piece(index=piece.index, values=torch.empty_like(piece.values)) for piece in dense]
    checkpoint.load([*loaded, *_table_pieces(tables, trainer)])
    values = {piece.index.name.removeprefix(f"{DENSE}/"): piece.values for piece in loaded}
    with torch.no_grad():
        for parameter, placement in placements(trainer.model):
            parameter.copy_(values[placement.global_name])
    optimizer.load_state_pieces(values, state["dense_updates"])
    tables.step = int(state["table_updates"])
    trainer.restore_position(checkpoint.step, state["lanes"])


def whole_weights(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense weights by global name and tables by name, whole and on the CPU. Collective."""
    own = {place.global_name: _whole(parameter, place, trainer) for parameter, place in placements(trainer.model)}
    dense = {name: weight for stage in gather_objects(own, trainer.groups.pipeline) for name, weight in stage.items()}
    tables = {name: trainer.machinery.tables.whole(name).cpu() for name in trainer.machinery.tables.specs}
    return dense, tables


def _whole(parameter: Tensor, placement: Placement, trainer: Trainer) -> Tensor:
    own, group = parameter.detach().contiguous(), trainer.groups.tensor
    if placement.split_dim is None or group.size == 1:
        return own.cpu()
    pieces = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(pieces, own, group=group.process_group)
    return torch.cat(pieces, dim=placement.split_dim).cpu()


def read_weights(path: Path) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint with its dense weights by global name and its tables by name, whole."""
    checkpoint = Checkpoint(path)
    names = [n for n in checkpoint.names() if n.startswith(f"{DENSE}/")]
    moments = ("/exp_avg", "/exp_avg_sq", "/main")
    dense = {n.removeprefix(f"{DENSE}/"): checkpoint.read_whole(n) for n in names if not n.endswith(moments)}
    matrix = checkpoint.read_whole(f"{TABLES}/values")
    first_row: dict[str, int] = checkpoint.manifest.state["first_row"]
    bounds = [*sorted(first_row.values()), matrix.shape[0]]
    ends = dict(pairwise(bounds))
    tables = {name: matrix[start : ends[start]] for name, start in first_row.items()}
    return checkpoint, dense, tables


def _dense_pieces(trainer: Trainer, optimizer_state: dict[str, Tensor]) -> list[Piece]:
    """This rank's pieces of the dense weights and of what AdamW keeps about them."""
    pieces = []
    places = {}
    for parameter, placement in placements(trainer.model):
        places[placement.global_name] = placement
        pieces.append(_piece(placement.global_name, parameter.detach(), placement))
    for name, values in optimizer_state.items():
        pieces.append(_piece(name, values, places[name.rpartition("/")[0]]))
    return pieces


def _piece(name: str, values: Tensor, placement: Placement) -> Piece:
    dim = placement.split_dim or 0
    index = PieceIndex(
        name=f"{DENSE}/{name}",
        global_shape=placement.global_shape,
        dim=dim,
        start=placement.offset,
        count=values.shape[dim] if values.dim() else 1,
    )
    return Piece(index=index, values=values)


def _table_pieces(tables: TableGroup, trainer: Trainer) -> list[Piece]:
    """This rank's rows and their optimizer state: every `world`-th row of the one matrix, from its rank on."""
    world = trainer.groups.world
    pieces = []
    for name, values in tables.state_pieces().items():
        index = PieceIndex(
            name=f"{TABLES}/{name}",
            global_shape=(tables.num_rows, *values.shape[1:]),
            start=world.rank,
            stride=world.size,
            count=values.shape[0],
        )
        pieces.append(Piece(index=index, values=values))
    return pieces
