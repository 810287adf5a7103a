"""A small log with every kind of field, and its events laid out for a model by the plainest code."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megarec.data.dataset import FieldInfo
from megarec.layers.dropout import Randomness
from megarec.models.config import SequenceConfig
from megarec.models.inputs import Events, Lookup
from megarec.models.shape import TIME_GAP, FieldSlots, InputShape, bucket_time_gap, input_shape

FIELDS = {
    info.name: info
    for info in (
        FieldInfo(name="item", role="item", kind="id", num_ids=12),
        FieldInfo(name="like", role="feedback", kind="flag", num_ids=3),
        FieldInfo(name="organic", role="context", kind="flag", num_ids=3),
        FieldInfo(name="artist", role="item_side", kind="id", num_ids=5, slots=2),
        FieldInfo(name="ratio", role="feedback", kind="numeric", num_ids=6),
        FieldInfo(name="device", role="context", kind="categorical", num_ids=4),
    )
}


@dataclass
class SmallLog:
    """Raw events by user: `columns[name][user]` is `[n]` or `[n, slots]`; item-side values stand in every event."""

    lengths: tuple[int, ...] = (4, 1, 9, 2)
    seed: int = 0
    columns: dict[str, list[np.ndarray]] = field(init=False)
    time: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.columns = {name: [self._draw(rng, info, n) for n in self.lengths] for name, info in FIELDS.items()}
        self.time = [1_000_000 + np.cumsum(rng.integers(1, 5000, size=n)) for n in self.lengths]

    def _draw(self, rng: np.random.Generator, info: FieldInfo, n: int) -> np.ndarray:
        if info.slots == 1:
            return rng.integers(0, info.num_ids, size=n)
        ids = rng.integers(0, info.num_ids, size=(n, info.slots))
        ids[:, 1:][rng.random((n, info.slots - 1)) < 0.5] = -1
        return ids

    def rows(self, name: str, user: int, event: int, shape: InputShape) -> list[int]:
        """The table rows of one field of one event."""
        first = first_rows(shape)[name]
        if name == TIME_GAP:
            if event == 0:
                return [first]
            gap = self.time[user][event] - self.time[user][event - 1]
            return [first + int(bucket_time_gap(np.array([gap]), shape.tables[TIME_GAP] - 1)[0])]
        return [first + int(i) if i >= 0 else -1 for i in np.atleast_1d(self.columns[name][user][event])]


def first_rows(shape: InputShape) -> dict[str, int]:
    """Where each field's rows begin in the one matrix."""
    starts, total = {}, 0
    for name, rows in shape.tables.items():
        starts[name], total = total, total + rows
    return starts


def shape_for(config: SequenceConfig, *without: str) -> InputShape:
    """The input shape on the small log; fields in `without` are not in the dataset."""
    return input_shape({name: info for name, info in FIELDS.items() if name not in without}, config)


def make_table(shape: InputShape, config: SequenceConfig, seed: int = 0) -> Tensor:
    """All tables as one fp64 leaf."""
    generator = torch.Generator().manual_seed(seed)
    size = (sum(shape.tables.values()), config.table_width)
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def make_lookup(table: Tensor) -> Lookup:
    """Sums rows of `table`; -1 gives nothing."""
    return lambda rows: (table[rows.clamp(min=0)] * (rows >= 0).unsqueeze(-1)).sum(-2)


@dataclass
class Laid:
    """Events of a log and, for each row with a next event, who asks: (row, user, event)."""

    events: Events
    asked: list[tuple[int, int, int]]


def lay_out(log: SmallLog, shape: InputShape, config: SequenceConfig, *, dead: int = 3, garbage: int = -1) -> Laid:
    """Packs all users; `dead` rows at the end hold row number `garbage` everywhere."""
    roles = {"prefix": shape.prefix, "context": shape.context, "item": shape.item, "feedback": shape.feedback}
    parts: dict[str, list[list[int]]] = {part: [] for part in (*roles, "next_context", "next_item")}
    cu_seqlens, position, time, next_time = [0], [], [], []
    asked = []
    for user, length in enumerate(log.lengths):
        for event in range(length if config.keep_last_event else length - 1):
            has_next = event + 1 < length
            if has_next:
                asked.append((len(position), user, event))
            for part, slots in roles.items():
                parts[part].append(_all_rows(log, slots, user, event, shape))
                if part not in ("feedback", "prefix"):
                    empty = [-1] * sum(f.slots for f in slots)
                    parts[f"next_{part}"].append(_all_rows(log, slots, user, event + 1, shape) if has_next else empty)
            position.append(event)
            time.append(int(log.time[user][event]))
            next_time.append(int(log.time[user][event + 1 if has_next else event]))
        cu_seqlens.append(len(position))
    for part, values in parts.items():
        values += [[garbage] * sum(f.slots for f in roles[part.removeprefix("next_")])] * dead
    num = len(position) + dead
    rows = {f"{part}_rows": torch.tensor(values, dtype=torch.int64).view(num, -1) for part, values in parts.items()}
    events = Events(
        cu_seqlens=torch.tensor(cu_seqlens),
        position=torch.tensor(position + [0] * dead),
        timestamp=torch.tensor(time + [0] * dead),
        next_timestamp=torch.tensor(next_time + [0] * dead),
        **rows,
    )
    return Laid(events, asked)


def _all_rows(log: SmallLog, slots: tuple[FieldSlots, ...], user: int, event: int, shape: InputShape) -> list[int]:
    return [row for f in slots for row in log.rows(f.name, user, event, shape)]


def randomness(num_tokens: int, key: int = 7) -> Randomness:
    return Randomness(key=key, token=torch.arange(num_tokens))
