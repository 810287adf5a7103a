"""Stochastic length: most epochs read a long history as a short random part of it."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets, segment_positions
from megarec.base.random import derive_key, hash_numpy, uniform_numpy
from megarec.data.block import Block

Sampler = Literal["recency", "uniform"]


@dataclass(frozen=True, kw_only=True)
class StochasticLength:
    """Which histories are shortened in an epoch, and to which events.

    With N = `max_history_events`, a history of n events stays whole where `n <= N^(alpha / 2)`. A longer one stays
    whole with probability `min(1, N^alpha / n^2)`; otherwise `floor(N^(alpha / 2))` of its events stay, in their order.
    Attention over it then costs about N^alpha instead of n^2.

    The events that stay are drawn without replacement, one after the other in proportion to their weights among those
    that are left. `uniform` weighs all alike; `recency` by `1 - f_i / sum_j f_j` with `f_i = t_n - t_i`, the time from
    event i to the last one. Where all times of a history are equal, as in data without timestamps, f_i counts events.
    With many events every share of the sum is small: `recency` then is close to `uniform`, as published.

    What is drawn is a function of (seed, epoch, user) alone.

    Source: HSTU (arXiv 2402.17152), section "Stochastic Length" and the feature-weighted sampler beside it. The public
    code has only the rule of the lengths, in the benchmark of its kernel, with the same floor.

    Attributes:
        max_history_events: N.
        alpha: above 1, at most 2.
        sampler: how events are weighed.
        seed: of the draws.
    """

    max_history_events: int
    alpha: float
    sampler: Sampler
    seed: int

    @property
    def short_length(self) -> int:
        """Events that stay of a shortened history."""
        # The nearest float of a whole power may lie below it.
        return int(self.max_history_events ** (self.alpha / 2) + 1e-9)

    def shorten(self, block: Block, *, epoch: int) -> Block:
        """`block` as `epoch` reads it: the same users, with fewer events."""
        lengths = np.diff(block.offsets)
        key = derive_key(self.seed, "stochastic length", epoch)
        long = np.flatnonzero(lengths > self.short_length)
        whole = self.max_history_events**self.alpha / lengths[long].astype(np.float64) ** 2
        users = long[uniform_numpy(derive_key(key, "whole"), block.user[long]) >= whole]
        if not len(users):
            return block
        rows = gather_indices(block.offsets[users], lengths[users])
        keep = np.ones(block.offsets[-1], dtype=np.bool_)
        keep[rows] = self._draw(block.columns["timestamp"][rows], lengths[users], block.user[users], key=key)
        lengths[users] = self.short_length
        columns = {name: column[keep] for name, column in block.columns.items()}
        return replace(block, offsets=lengths_to_offsets(lengths), columns=columns)

    def _draw(self, timestamp: Int64, lengths: Int64, user: Int64, *, key: int) -> npt.NDArray[np.bool_]:
        """Which of the events of some histories, end to end, stay.

        Event i waits for an exponential time of rate w_i; the first come, which is drawing in proportion to weights
        without replacement (Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006).
        """
        history = np.repeat(np.arange(len(lengths)), lengths)
        place = segment_positions(lengths)
        counters = hash_numpy(derive_key(key, "user"), user)[history] + place.astype(np.uint64)
        waiting = -np.log1p(-uniform_numpy(derive_key(key, "event"), counters))
        if self.sampler == "recency":
            with np.errstate(divide="ignore", invalid="ignore"):  # of weight 0: it never comes
                waiting /= _recency_weights(timestamp, lengths)
        first_come = np.lexsort((waiting, history))
        stays = np.zeros(len(waiting), dtype=np.bool_)
        stays[first_come[place < self.short_length]] = True
        return stays


def _recency_weights(timestamp: Int64, lengths: Int64) -> npt.NDArray[np.float64]:
    """`1 - f_i / sum_j f_j` of every event of some histories of two events or more."""
    ends = np.cumsum(lengths)
    elapsed = np.repeat(timestamp[ends - 1], lengths) - timestamp
    same_time = np.repeat(timestamp[ends - 1] == timestamp[ends - lengths], lengths)
    behind = np.repeat(lengths - 1, lengths) - segment_positions(lengths)
    elapsed = np.where(same_time, behind, elapsed).astype(np.float64)
    weights: npt.NDArray[np.float64] = 1.0 - elapsed / np.repeat(np.add.reduceat(elapsed, ends - lengths), lengths)
    return weights
