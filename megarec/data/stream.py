"""The endless stream of training packs: the same for every layout, exact after a restart.

A dataset is read by a fixed number of lanes. What a lane serves is a function of the dataset, the configuration and
the lane's number alone, so lanes can be spread over any number of ranks that divides them. The position of a lane is
small: (epoch, pool, pack) and references to the windows its pool took over from the one before.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from megarec.base.errors import UserError
from megarec.base.jagged import Int64
from megarec.base.random import derive_key, permutation
from megarec.data.dataset import Dataset
from megarec.data.packs import Pack, PackRule, Windows, concatenate_windows, cut_windows, make_pack
from megarec.data.pools import Pool, fill_pool
from megarec.data.reader import BlockReader
from megarec.data.stochastic_length import Sampler, StochasticLength

FORMAT = "megarec-stream-2"  # a change of what a lane serves changes it: old positions are then refused
COUNTS = ("histories", "short_histories", "events", "sampled_out_events", "dropped_events", "windows")


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How a dataset becomes packs.

    Attributes:
        tokens_per_pack: tokens of a pack.
        tokens_per_event: tokens the model's layout makes of an event; a pack is
            `tokens_per_pack // tokens_per_event` events.
        prefix_tokens: tokens before the first event of a window.
        keep_last_event: whether the last event of a window, which has no target, takes part: layouts that put an item
            and its feedback into different tokens need it.
        lanes: readers of the dataset; a multiple of every data-parallel size one wants to use.
        packs_per_lane: packs of a lane in a step; a step is `lanes * packs_per_lane` packs.
        pool_blocks: blocks whose users are mixed and packed together.
        max_history_events: the most events of a window.
        window: `newest`: of a longer history the newest events, the others are dropped and counted; `stride:N`: all of
            it, in windows whose ends are N targets apart.
        candidates_per_window: the last events of a window are candidates: they stand at one place behind the events
            before, see these and not each other, and they alone are asked for their feedback. With `window=stride:N` of
            the same N every event with one before it is a candidate once. 0: none.
        stochastic_length_alpha: above 1, at most 2: an epoch reads most histories of more than
            `max_history_events ** (alpha / 2)` events as so many of them, drawn anew (`StochasticLength`); what stays
            is read as if there were no other events, so a target is the next event that stays. 0: off.
        stochastic_length_sampler: how events are drawn: later ones more often, or all alike.
        seed: of the shuffles and draws.
        prefetch_steps: steps made ahead; changes no pack.
    """

    tokens_per_pack: int = 4096
    tokens_per_event: int = 1
    prefix_tokens: int = 0
    keep_last_event: bool = False
    lanes: int = 4
    packs_per_lane: int = 1
    pool_blocks: int = 8
    max_history_events: int = 512
    window: str = "newest"
    candidates_per_window: int = 0
    stochastic_length_alpha: float = 0.0
    stochastic_length_sampler: Sampler = "recency"
    seed: int = 0
    prefetch_steps: int = 2

    def __post_init__(self) -> None:
        names = ("seed", "prefetch_steps", "prefix_tokens", "candidates_per_window", "stochastic_length_alpha")
        may_be_zero = dict.fromkeys(names, 0)
        at_least = {"max_history_events": 1 + self.keep_last_event, **may_be_zero}
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < at_least.get(name, 1) and not isinstance(value, bool):
                raise UserError(f"{name} is {value}", fix=f"Set it to {at_least.get(name, 1)} or more")
        if self.max_history_events + self.prefix_events > self.events_per_pack:
            what = f"max_history_events is {self.max_history_events}, a pack holds {self.events_per_pack} events"
            if self.prefix_events:
                what += f", {self.prefix_events} of them for the prefix"
            raise UserError(what, fix="Lower it or raise tokens_per_pack: no history exceeds a pack")
        max_targets = self.max_history_events - self.keep_last_event
        if self.window != "newest" and not 1 <= self._stride <= max_targets:
            what = f"window is '{self.window}'"
            raise UserError(what, fix=f"Set it to 'newest' or to 'stride:N' with N from 1 to {max_targets}")
        if self.candidates_per_window > max_targets:
            what = f"candidates_per_window is {self.candidates_per_window}, a window has {max_targets} targets"
            raise UserError(what, fix="Lower it, or raise max_history_events")
        self._check_stochastic_length()

    @property
    def events_per_pack(self) -> int:
        """Events of a pack, T."""
        return self.tokens_per_pack // self.tokens_per_event

    @property
    def prefix_events(self) -> int:
        """The room of a window's prefix, in events."""
        return -(-self.prefix_tokens // self.tokens_per_event)

    @property
    def pack_rule(self) -> PackRule:
        """How histories become windows and windows packs."""
        return PackRule(
            num_events=self.events_per_pack,
            max_targets=self.max_history_events - self.keep_last_event,
            stride=self._stride,
            keep_last_event=self.keep_last_event,
            prefix_events=self.prefix_events,
            candidates=self.candidates_per_window,
        )

    @property
    def stochastic_length(self) -> StochasticLength | None:
        """How an epoch shortens histories; None: it does not."""
        if not self.stochastic_length_alpha:
            return None
        return StochasticLength(
            max_history_events=self.max_history_events,
            alpha=self.stochastic_length_alpha,
            sampler=self.stochastic_length_sampler,
            seed=self.seed,
        )

    def _check_stochastic_length(self) -> None:
        rule = self.stochastic_length
        if rule is not None and not 1.0 < rule.alpha <= 2.0:
            what = f"stochastic_length_alpha is {rule.alpha:g}"
            raise UserError(what, fix="Set it above 1 and at most to 2, or to 0 for whole histories")
        if rule is not None and rule.short_length < 2:
            what = f"stochastic length leaves {rule.short_length} of {self.max_history_events} events: no target"
            raise UserError(what, fix="Raise max_history_events")

    @property
    def _stride(self) -> int:
        kind, _, number = self.window.partition(":")
        return int(number) if kind == "stride" and number.isdecimal() and number.isascii() else 0


class TrainStream:
    """The training packs of some lanes of a dataset, without end.

    While a pool is served, a thread reads and packs the next one of the lane.

    Args:
        dataset: what to read.
        config: how.
        lanes: the lanes to serve; rank r of d serves `range(r, config.lanes, d)`.

    Raises:
        UserError: the train split has fewer blocks than `config.lanes`, or shards are missing; from `next_step`: a
            shard is damaged, or a lane holds no history with two events.
    """

    def __init__(self, dataset: Dataset, config: StreamConfig, *, lanes: Sequence[int]) -> None:
        reader = BlockReader(dataset, "train")
        if reader.num_blocks < config.lanes:
            what = f"blocks of users to train on: {reader.num_blocks}, fewer than stream.lanes={config.lanes}"
            fix = f"Set stream.lanes={max(1, reader.num_blocks)}, or make the shards again with fewer users_per_block"
            raise UserError(what, where=str(dataset.path), fix=fix)
        if len(set(lanes)) != len(lanes) or not all(0 <= lane < config.lanes for lane in lanes):
            raise ValueError(f"lanes {list(lanes)} of {config.lanes}")
        self._packs_per_lane = config.packs_per_lane
        self._fingerprint = _fingerprint(dataset, config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pools")
        self._lanes = [_Lane(reader, config, number=lane, thread=self._thread) for lane in lanes]

    def next_step(self) -> list[Pack]:
        """The packs of the next step: `packs_per_lane` of each lane, lane by lane in the order of `lanes`."""
        return [lane.next_pack() for lane in self._lanes for _ in range(self._packs_per_lane)]

    @property
    def counts(self) -> dict[str, int]:
        """What these lanes read since the start of training, up to the end of the pools being served.

        `histories`, `short_histories` (fewer than two events, left out), `events`, `sampled_out_events` (left out by
        stochastic length), `dropped_events` (older than the windows) and `windows`.
        """
        return {name: sum(lane.counts[name] for lane in self._lanes) for name in COUNTS}

    def state(self) -> dict[str, Any]:
        """The position of each lane by its number, as JSON. The states of all ranks together are one dict."""
        return {str(lane.number): {"stream": self._fingerprint, **lane.state()} for lane in self._lanes}

    def epochs(self) -> float:
        """How often the blocks of these lanes were served, summed over the lanes."""
        return sum(lane.epochs() for lane in self._lanes)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues as the streams did whose `state` was taken; `state` may hold other lanes too.

        Raises:
            UserError: `state` lacks a lane, or is of another dataset or configuration.
        """
        for lane in self._lanes:
            saved = state.get(str(lane.number))
            if saved is None:
                raise UserError(f"the saved stream has no lane {lane.number}", fix="Keep the number of lanes")
            if saved["stream"] != self._fingerprint:
                what = "the saved stream is of another dataset or of other stream settings"
                raise UserError(what, fix="Resume with those it was saved with, or start a new run")
        for lane in self._lanes:
            lane.restore(state[str(lane.number)])

    def close(self) -> None:
        """Stops reading ahead."""
        self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A pool of a lane, the windows carried into it, and what was counted before it."""

    epoch: int = 0
    pool: int = 0
    carried: list[list[int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


class _Lane:
    """One lane: a walk through its pools."""

    def __init__(self, reader: BlockReader, config: StreamConfig, *, number: int, thread: ThreadPoolExecutor) -> None:
        self.number = number
        self._reader = reader
        self._config = config
        self._rule = config.pack_rule
        self._stochastic_length = config.stochastic_length
        self._thread = thread
        self._seek(_Place(), pack=0, num_served=0)

    @property
    def counts(self) -> dict[str, int]:
        return self._after.counts

    def state(self) -> dict[str, Any]:
        return {**vars(self._place), "pack": self._pack, "number": self._num_served}

    def restore(self, state: dict[str, Any]) -> None:
        place = _Place(**{name: state[name] for name in ("epoch", "pool", "carried", "counts")})
        self._seek(place, pack=state["pack"], num_served=state["number"])

    def next_pack(self) -> Pack:
        while self._pool is None or self._pack == len(self._pool.packs):
            self._enter_pool()
        members = self._pool.packs[self._pack]
        labels = {"lane": self.number, "number": self._num_served, "epoch": self._place.epoch}
        pack = make_pack(self._pool.windows, members, rule=self._rule, **labels)
        self._pack += 1
        self._num_served += 1
        return pack

    def epochs(self) -> float:
        num_blocks = len(range(self.number, self._reader.num_blocks, self._config.lanes))
        before = self._place.pool * self._config.pool_blocks
        if self._pack == 0:
            return self._place.epoch + before / num_blocks
        here = min(self._config.pool_blocks, num_blocks - before)
        pool = self._pool or self._ahead.result()[0]
        return self._place.epoch + (before + here * self._pack / len(pool.packs)) / num_blocks

    def _seek(self, place: _Place, *, pack: int, num_served: int) -> None:
        self._place = self._after = place
        self._pack = pack
        self._num_served = num_served
        self._pool: Pool | None = None
        self._ahead = self._thread.submit(self._make_pool, place, None)

    def _enter_pool(self) -> None:
        if self._pool is not None:
            self._place, self._pack = self._after, 0
        self._pool, self._after = self._ahead.result()
        self._ahead = self._thread.submit(self._make_pool, self._after, self._pool.carried)

    def _make_pool(self, place: _Place, carried: Windows | None) -> tuple[Pool, _Place]:
        """The pool at `place` and the place after it; without `carried`, its windows are read again."""
        pools = self._pools(place.epoch)
        parts, counts = [], dict(place.counts)
        for number in pools[place.pool].tolist():
            windows, counted = self._cut_block(number, place.epoch)
            parts.append(windows)
            counts = {name: counts[name] + counted[name] for name in COUNTS}
        if carried is None and place.carried:
            carried = self._read_windows(place.carried)
        key = derive_key(self._config.seed, "pool", self.number, place.epoch, place.pool)
        pool = fill_pool(parts, carried=carried, rule=self._rule, key=key)
        ends_epoch = place.pool + 1 == len(pools)
        if ends_epoch and counts["windows"] == 0:
            raise UserError(f"lane {self.number} holds no history with two events", fix="Use fewer lanes")
        after = _Place(
            epoch=place.epoch + ends_epoch,
            pool=0 if ends_epoch else place.pool + 1,
            carried=pool.carried.reference.tolist(),
            counts=counts,
        )
        return pool, after

    def _pools(self, epoch: int) -> list[Int64]:
        """The blocks of each pool of an epoch."""
        config = self._config
        order = permutation(derive_key(config.seed, "blocks", epoch), self._reader.num_blocks)
        mine = order[self.number :: config.lanes]
        return np.split(mine, range(config.pool_blocks, len(mine), config.pool_blocks))

    def _cut_block(self, number: int, epoch: int) -> tuple[Windows, dict[str, int]]:
        """The windows of a block in an epoch, and its `COUNTS`."""
        whole = self._reader.read(number)
        block = whole if self._stochastic_length is None else self._stochastic_length.shorten(whole, epoch=epoch)
        windows, counts = cut_windows(block, epoch=epoch, number=number, rule=self._rule)
        counts["sampled_out_events"] = int(whole.offsets[-1]) - counts["events"]
        counts["events"] = int(whole.offsets[-1])
        return windows, counts

    def _read_windows(self, references: list[list[int]]) -> Windows:
        """The windows referred to, in that order, from the blocks they lie in."""
        blocks = sorted({(epoch, number) for epoch, number, _, _ in references})
        parts = [self._cut_block(number, epoch)[0] for epoch, number in blocks]
        windows = concatenate_windows(parts)
        index = {tuple(reference): at for at, reference in enumerate(windows.reference.tolist())}
        return windows.take(np.array([index[tuple(reference)] for reference in references]))


def _fingerprint(dataset: Dataset, config: StreamConfig) -> str:
    """Equal when the packs are: same shards, settings and way of packing."""
    shards = [shard.sha256 for shard in dataset.shards_of("train")]
    content = [FORMAT, shards, asdict(replace(config, prefetch_steps=0))]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
