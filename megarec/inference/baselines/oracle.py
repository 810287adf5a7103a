"""The truth of a synthetic log as a predictor: the most that any model can earn on it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megarec.base.errors import UserError
from megarec.base.jagged import Int64
from megarec.data.dataset import Dataset
from megarec.inference.baselines.feedback import to_logits
from megarec.inference.histories import Histories, Prediction, Targets

COLUMNS = ["uid", "timestamp", "item_ids", "probabilities", "p_listened"]


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The true probabilities behind each user's last event, from the `oracle.parquet` of `megarec-make-log`.

    The file lists each user's likeliest items only; all others count as impossible.

    Attributes:
        row: where each user index stands in the file, `[users]`; -1 for users it does not know.
        timestamp: the time of the event each row is about, in seconds.
        item: item ids of each row, `[rows, n]`; 0 for items the dataset lacks.
        probability: of these items, `[rows, n]`.
        p_listened: the probability that the listener stays, given the item that was played.
        feedback: the feedback field that says whether the listener stayed, or None when the dataset has none.
        num_ids: item ids are smaller than this.
        name: the row's name.
    """

    row: Int64
    timestamp: Int64
    item: Int64
    probability: npt.NDArray[np.float64]
    p_listened: npt.NDArray[np.float64]
    feedback: str | None
    num_ids: int
    name: str = "oracle"

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        """The truth about each user's only target.

        Raises:
            UserError: the file is of another log, or the targets are not the last events.
        """
        row = self.row[histories.user]
        if (row < 0).any() or not np.array_equal(np.diff(targets.offsets), np.ones(len(row), np.int64)):
            raise UserError("the oracle knows each user's last event only", fix="Use split=leave_last_out")
        if not np.array_equal(self.timestamp[row], targets.timestamp):
            raise UserError("the oracle tells of other times than the targets'", fix="Give this log's oracle.parquet")
        scores = torch.zeros(len(row), self.num_ids, dtype=torch.float64)
        scores.scatter_(1, torch.from_numpy(self.item[row]), torch.from_numpy(self.probability[row]))
        p = self.p_listened[row]
        feedback = {self.feedback: to_logits(np.stack([1 - p, p], axis=1))} if self.feedback else {}
        return Prediction(scores=scores, feedback=feedback)


def read_oracle(path: Path, dataset: Dataset, *, feedback: str = "listened") -> Oracle:
    """Reads the oracle's file and translates its raw ids into those of `dataset`.

    Args:
        path: `oracle.parquet`.
        dataset: made from the same log.
        feedback: the field whose truth is `p_listened`, if the dataset has it.

    Raises:
        UserError: the file cannot be read or is no oracle's.
    """
    import polars as pl

    try:
        frame = pl.read_parquet(path, columns=COLUMNS)
        users = pl.read_parquet(dataset.path / "vocab" / "user.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"not an oracle's file ({error})", where=str(path)) from None
    item_of = {raw: number for number, raw in enumerate(dataset.item_raw()) if number}
    row_of = {raw: row for row, raw in enumerate(frame["uid"].to_list())}
    width = int(frame["item_ids"].list.len().max() or 0)  # type: ignore[arg-type]
    if width == 0 or not frame["item_ids"].list.len().eq(width).all():
        raise UserError("its lists of items are not of one length", where=str(path))
    raw_items = frame["item_ids"].explode().to_numpy()
    distinct, place = np.unique(raw_items, return_inverse=True)
    known = np.array([item_of.get(raw, 0) for raw in distinct.tolist()], dtype=np.int64)
    row = np.full(int(users["user"].max() or 0) + 1, -1)  # type: ignore[arg-type]
    row[users["user"].to_numpy()] = [row_of.get(raw, -1) for raw in users["raw"].to_list()]
    return Oracle(
        row=row,
        timestamp=frame["timestamp"].cast(pl.Int64).to_numpy(),
        item=known[place].reshape(-1, width),
        probability=frame["probabilities"].explode().to_numpy().astype(np.float64).reshape(-1, width),
        p_listened=frame["p_listened"].to_numpy().astype(np.float64),
        feedback=feedback if feedback in dataset.fields else None,
        num_ids=dataset.fields["item"].num_ids,
    )
