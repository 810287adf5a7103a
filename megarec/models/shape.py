"""Which dataset fields a model reads, in which slots, and what it predicts. Imports no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarec.base.errors import UserError, nearest
from megarec.data.dataset import FieldInfo
from megarec.models.config import SequenceConfig

TIME_GAP = "time_gap"


@dataclass(frozen=True, kw_only=True)
class FieldSlots:
    """One field of an event as a model reads it: ids in `[0, num_ids)` (0: unknown), -1 in empty slots.

    Attributes:
        name: the field.
        num_ids: rows of its table.
        slots: values per event.
        own_table: in the item tower, whether the field has a table of its own beside the one of the input.
    """

    name: str
    num_ids: int
    slots: int = 1
    own_table: bool = False

    @property
    def table(self) -> str:
        """The name of its table."""
        return f"{self.name}.target" if self.own_table else self.name


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """What a model's input and output look like on one dataset.

    A `*_rows` tensor `[T, S]` holds the slots of its fields side by side, in the order of the tuple here.

    Attributes:
        prefix: fields known before the history, each a token of its own.
        context: fields known before the choice; `time_gap`, if any, is the last.
        item: the item and its side fields, as events of the history are read.
        item_tower: the item and its side fields, as item vectors are made.
        feedback: fields known after the choice, as events of the history are read.
        feedback_heads: for each predicted feedback field, how many values it has: ids 1 to this number.
    """

    prefix: tuple[FieldSlots, ...]
    context: tuple[FieldSlots, ...]
    item: tuple[FieldSlots, ...]
    item_tower: tuple[FieldSlots, ...]
    feedback: tuple[FieldSlots, ...]
    feedback_heads: dict[str, int]

    @property
    def tables(self) -> dict[str, int]:
        """Every table the model looks up, with its number of rows: one per field and use that has its own."""
        inputs = (*self.prefix, *self.context, *self.item, *self.item_tower, *self.feedback)
        return {f.table: f.num_ids for f in inputs}


def input_shape(fields: Mapping[str, FieldInfo], config: SequenceConfig) -> InputShape:
    """The input and output of a model with settings `config` on a dataset with `fields`.

    Within a role the slots follow the order of `fields`; `time_gap` comes after all other context.

    Raises:
        UserError: the settings name a field that the dataset lacks, or that cannot serve.
    """
    inputs = _chosen(fields, config.input_fields, "model.input_fields")
    tower = _chosen(_of_role(fields, "item", "item_side"), config.item_fields, "model.item_fields")
    prefix = _chosen(_of_role(fields, "context"), config.prefix_fields, "model.prefix_fields")
    context = _slots({name: info for name, info in _of_role(inputs, "context").items() if name not in prefix})
    if config.time_gap_buckets:
        if TIME_GAP in fields:
            raise UserError(
                f"the dataset has a field '{TIME_GAP}' of its own", where="model.time_gap_buckets", fix="Set it to 0"
            )
        context = (*context, FieldSlots(name=TIME_GAP, num_ids=config.time_gap_buckets + 1))
    shape = InputShape(
        prefix=_slots(prefix),
        context=context,
        item=_slots(_of_role(inputs, "item", "item_side")),
        item_tower=_slots(tower, own_table=not config.tie_item_tables),
        feedback=_slots(_of_role(inputs, "feedback")),
        feedback_heads=_heads(_of_role(fields, "feedback"), config.feedback_heads),
    )
    _check(shape, config)
    return shape


def known_at_feedback(config: SequenceConfig, shape: InputShape) -> tuple[bool, bool]:
    """Whether the feedback heads read the next event's context and its item beside a state.

    The state of an item token has seen both; a product with the item needs it all the same.
    """
    fused = config.token_layout == "fused"
    reads_item = fused or config.heads.feedback_head == "product_swish"
    return fused and bool(shape.context), reads_item and bool(shape.item)


def bucket_time_gap(seconds: npt.NDArray[np.integer], num_buckets: int) -> npt.NDArray[np.int32]:
    """Ids of the field `time_gap`: 1 for less than 2 seconds, 2 for less than 4, and so on up to `num_buckets`.

    Id 0 is left for an event without one before it.
    """
    doublings = np.frexp(np.maximum(seconds, 1).astype(np.float64))[1]  # floor(log2) + 1, exact
    return np.minimum(doublings, num_buckets).astype(np.int32)


def _chosen(fields: Mapping[str, FieldInfo], names: Iterable[str] | None, where: str) -> dict[str, FieldInfo]:
    """The fields that `names` lists (None: all), in the order of `fields`."""
    if names is None:
        return dict(fields)
    wanted = set(names)
    for name in sorted(wanted):
        if name not in fields:
            raise UserError(
                f"'{name}' is not a field that can stand here", where=where, fix=nearest(name, list(fields))
            )
    return {name: info for name, info in fields.items() if name in wanted}


def _of_role(fields: Mapping[str, FieldInfo], *roles: str) -> dict[str, FieldInfo]:
    return {name: info for name, info in fields.items() if info.role in roles}


def _slots(fields: Mapping[str, FieldInfo], *, own_table: bool = False) -> tuple[FieldSlots, ...]:
    return tuple(
        FieldSlots(name=name, num_ids=info.num_ids, slots=info.slots, own_table=own_table)
        for name, info in fields.items()
    )


def _heads(feedback: Mapping[str, FieldInfo], names: Iterable[str] | None) -> dict[str, int]:
    """Feedback fields with their number of values; a head needs one slot and two values."""
    where = "model.feedback_heads"
    heads = {name: info.num_ids - 1 for name, info in feedback.items() if info.slots == 1 and info.num_ids > 2}
    if names is None:
        return heads
    chosen = _chosen(feedback, names, where)
    for name in chosen:
        if name not in heads:
            raise UserError(f"'{name}' has several values per event, or only one in all", where=where)
    return {name: heads[name] for name in chosen}


def _check(shape: InputShape, config: SequenceConfig) -> None:
    if not (shape.context or shape.item or shape.feedback):
        raise UserError("the model reads nothing", where="model.input_fields")
    if not shape.item_tower:
        raise UserError("an item vector needs a field", where="model.item_fields", fix="Name 'item'")
    if shape.feedback_heads and config.heads.feedback_head == "product_swish" and not shape.item:
        raise UserError(
            "product_swish multiplies the state by the item, but the input has none",
            where="model.heads.feedback_head",
            fix="Set it to mlp, or name 'item' in model.input_fields",
        )
    needed = {
        "fused": (),
        "item_action": ("item", "feedback"),
        "context_item_feedback": ("context", "item", "feedback"),
    }
    for role in needed[config.token_layout]:
        if not getattr(shape, role):
            raise UserError(
                f"{config.token_layout} makes a token of the {role} fields, but the input has none",
                where="model.token_layout",
                fix="Set it to fused",
            )
