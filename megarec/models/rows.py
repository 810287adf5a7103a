"""From field ids, as data holds them, to table rows, as a model looks them up: the same for training and serving.

All tables of a model are one matrix; the row of id `i` of a field is `first_row[table] + i`, and -1 stays -1.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from megarec.models.shape import TIME_GAP, FieldSlots, InputShape, bucket_time_gap

Ids = npt.NDArray[np.integer]
Rows = npt.NDArray[np.int64]


class RowMap:
    """Lays field ids out in the slots of an `InputShape`.

    Args:
        shape: what the model reads.
        first_row: where each table begins in the one matrix.
        item_side: for each item-side field its ids by item id, `[num_items + 1]` or `[num_items + 1, slots]`.
    """

    def __init__(self, shape: InputShape, first_row: Mapping[str, int], item_side: Mapping[str, Ids]) -> None:
        self.shape = shape
        self._first_row = dict(first_row)
        self._item_side = dict(item_side)

    def events(
        self,
        fields: Mapping[str, Ids],
        *,
        next_fields: Mapping[str, Ids],
        next_item: Ids,
        gap_seconds: Ids,
        next_gap_seconds: Ids,
    ) -> dict[str, Rows]:
        """The rows of T events and of what is asked after each, by `EVENT_PARTS`.

        Args:
            fields: ids of the item and of each context and feedback field, `[T]` or `[T, slots]`.
            next_fields: ids of each context field of the next event.
            next_item: item ids of the next event, `[T]`; -1 where it is not told.
            gap_seconds: since the event before, `[T]`; negative for none.
            next_gap_seconds: until the next event, `[T]`; negative for none.
        """
        prefix = self._lay_out(self.shape.prefix, fields, len(gap_seconds))
        prefix[gap_seconds >= 0] = -1
        return {
            "prefix": prefix,
            "context": self.context(fields, gap_seconds=gap_seconds),
            "item": self.item(fields["item"].astype(np.int64)),
            "feedback": self.feedback(fields, len(gap_seconds)),
            "next_context": self.context(next_fields, gap_seconds=next_gap_seconds),
            "next_item": self.item(next_item),
        }

    def context(self, fields: Mapping[str, Ids], *, gap_seconds: Ids) -> Rows:
        """Rows `[T, Sc]` of context `fields`; `gap_seconds` `[T]` since the event before, negative for none."""
        columns = dict(fields)
        gaps = [f for f in self.shape.context if f.name == TIME_GAP]
        if gaps:
            columns[TIME_GAP] = np.where(gap_seconds < 0, 0, bucket_time_gap(gap_seconds, gaps[0].num_ids - 1))
        return self._lay_out(self.shape.context, columns, len(gap_seconds))

    def feedback(self, fields: Mapping[str, Ids], num_events: int) -> Rows:
        """Rows `[T, Sf]` of feedback `fields`."""
        return self._lay_out(self.shape.feedback, fields, num_events)

    def item(self, items: Ids) -> Rows:
        """Rows `[T, Si]` of item ids `[T]` as the history is read."""
        return self._lay_out(self.shape.item, self._item_columns(self.shape.item, items), len(items))

    def item_tower(self, items: Ids) -> Rows:
        """Rows `[C, Si]` of item ids `[C]` as item vectors are made."""
        return self._lay_out(self.shape.item_tower, self._item_columns(self.shape.item_tower, items), len(items))

    def _item_columns(self, slots: tuple[FieldSlots, ...], items: Ids) -> dict[str, Ids]:
        columns: dict[str, Ids] = {"item": items}
        for field in slots:
            if field.name != "item":
                side = self._item_side[field.name]
                empty = items < 0 if side.ndim == 1 else (items < 0)[:, None]
                columns[field.name] = np.where(empty, -1, side[np.maximum(items, 0)])
        return columns

    def _lay_out(self, slots: tuple[FieldSlots, ...], columns: Mapping[str, Ids], num_rows: int) -> Rows:
        rows = np.empty((num_rows, sum(field.slots for field in slots)), dtype=np.int64)
        start = 0
        for field in slots:
            ids = columns[field.name].reshape(num_rows, field.slots)
            rows[:, start : start + field.slots] = np.where(
                ids < 0, -1, ids.astype(np.int64) + self._first_row[field.table]
            )
            start += field.slots
        return rows
