"""What a pack's forward pass adds to the loss: sums over its targets, divided by the targets of the whole step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megarec.base.errors import UserError
from megarec.base.random import derive_key
from megarec.layers.dropout import Randomness
from megarec.losses.feedback import feedback_loss
from megarec.losses.full_softmax import full_softmax
from megarec.losses.sampled_softmax import sampled_softmax, sampled_softmax_per_position
from megarec.models.inputs import EVENT_PARTS, Events, Lookup
from megarec.models.model import RecModel
from megarec.train.batches import PackBatch, PackWork, StepBatch
from megarec.train.config import ObjectiveConfig

NEXT_ITEM = "next_item"


class Objective:
    """The loss of a model: next item and feedback, each head a sum over its own targets.

    Args:
        chunks: the model, or this rank's pieces of it, in the order in which packs pass them.
        config: which losses, with which weights.
        heads: the feedback fields that are predicted.
        device: where the packs go.

    Attributes:
        names: the heads that have a loss: `next_item`, then the feedback fields.
    """

    def __init__(
        self, chunks: Sequence[RecModel], config: ObjectiveConfig, heads: Mapping[str, int], *, device: torch.device
    ) -> None:
        self._chunks = chunks
        self._model = chunks[-1]
        self._config = config
        self._feedback_heads = tuple(heads) if config.feedback_weight else ()
        self._device = device
        weights = dict.fromkeys(self._feedback_heads, config.feedback_weight)
        if config.next_item != "none":
            weights = {NEXT_ITEM: config.next_item_weight, **weights}
        self.names = tuple(weights)
        if not any(weights.values()):
            fix = "Set objective.next_item=sampled, or objective.feedback_weight and model.feedback_heads"
            raise UserError("nothing is learned: no next item and no feedback", where="objective", fix=fix)
        self._without_loss = _heads_without_loss(self._model, self.names) if self._model.stage.last else []
        self._weights = torch.tensor(list(weights.values()), dtype=torch.float64, device=device)

    def share_of(self, batch: StepBatch) -> StepBatch:
        """What of the packs of its replica this rank works on."""
        return batch.share(self._model.slices, frozenset().union(*(chunk.row_parts for chunk in self._chunks)))

    def count_targets(self, packs: list[PackBatch]) -> Tensor:
        """The targets of each head in `packs` that have a loss on this rank, float64 `[heads]` in the order of `names`.

        Only the last stage has losses.
        """
        if not self._model.stage.last:
            packs = []
        counts = [sum(self._count(pack, name) for pack in packs) for name in self.names]
        return torch.tensor(counts, dtype=torch.float64, device=self._device)

    def forward(
        self, work: PackWork, number: int, received: Tensor | None, *, lookup: Lookup, global_counts: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What one chunk makes of a pack; the last one of the model, the share of the pack in the loss of the step.

        `sum over heads of weight_h * (sum over the pack's targets of loss) / global_counts_h`; a head without any
        target in the step adds zero.

        Args:
            work: the events and targets.
            number: of the chunk.
            received: what the chunk before made of the pack; None for the first.
            lookup: rows to the sum of their vectors.
            global_counts: targets of each head in the step over all ranks, `[heads]`.

        Returns:
            the loss with its graph, and the loss of each head divided by its global count, detached; or what the next
            chunk takes, and nothing.
        """
        model, rows = self._chunks[number], work.rows
        columns = {name: column.to(self._device) for name, column in work.pack.columns.items()}
        events = _events(work.pack, columns, rows)
        states = model.encode(events, lookup, received)
        if not model.stage.last:
            return states, {}
        sums = self._feedback(states, events, columns=columns, lookup=lookup)
        if self._config.next_item != "none":
            query = model.next_item_query(states, events, lookup)
            vectors = model.item_vectors(rows["candidates"], lookup)
            sums[NEXT_ITEM] = self._next_item(query, vectors, columns).double()
        shares = torch.stack([sums[name] for name in self.names]) / global_counts.clamp_min(1.0)
        loss = (shares * self._weights).sum()
        # A pack must reach every parameter, with no target too and in heads that have no loss: the sum of gradients
        # over ranks begins when all of a bucket are there.
        untouched = sum((p.sum() for module in self._without_loss for p in module.parameters()), states.sum())
        return loss + untouched * 0.0, dict(zip(self.names, shares.detach(), strict=True))

    def _next_item(self, query: Tensor, vectors: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Queries of this rank's events and vectors of its slice of the candidates to the sum of its losses."""
        config, slices, scale = self._config, self._model.slices, self._model.inverse_temperature()
        if config.next_item == "full":
            return self._full_softmax(query, vectors, columns)
        query, target = query[columns["target_event"]], columns["target"]
        vectors = slices.gather(vectors)[: len(columns["candidate_id"])]
        log_q = None if config.correction == "none" else columns["log_q"]
        if config.negatives == "per_position":
            return sampled_softmax_per_position(
                query,
                vectors,
                slots=columns["slots"],
                order=columns["order"],
                log_q=log_q,
                correction=config.correction,
                inverse_temperature=scale,
            )
        return sampled_softmax(
            query,
            vectors,
            target=target,
            candidate_id=columns["candidate_id"],
            log_q=log_q,
            correction=config.correction,
            inverse_temperature=scale,
            chunk_rows=config.chunk_rows,
        )

    def _full_softmax(self, query: Tensor, vectors: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Items stay where they are; the queries come to them."""
        slices, own_events = self._model.slices, self._model.slices.rows_of(len(columns["position"]))
        first_item = slices.index * len(vectors)
        event = columns.get("all_target_event", columns["target_event"])
        return full_softmax(
            slices.gather(query)[event],
            vectors[: max(0, len(columns["candidate_id"]) - first_item)],
            target=columns.get("all_target", columns["target"]),
            inverse_temperature=self._model.inverse_temperature(),
            chunk_items=self._config.chunk_items,
            shards=slices,
            first_item=first_item,
            own=(event >= own_events.start) & (event < own_events.stop),
        )

    def _feedback(
        self, states: Tensor, events: Events, *, columns: Mapping[str, Tensor], lookup: Lookup
    ) -> dict[str, Tensor]:
        if not self._feedback_heads:
            return {}
        logits = self._model.feedback_logits(states, events, lookup)
        return {
            head: feedback_loss(logits[head], columns[f"feedback/{head}"]).double() for head in self._feedback_heads
        }

    def _count(self, pack: PackBatch, name: str) -> int:
        if name == NEXT_ITEM:
            return len(pack.columns["target_event"])
        return int((pack.columns[f"feedback/{name}"] > 0).sum())


def _heads_without_loss(model: RecModel, names: Sequence[str]) -> list[nn.Module]:
    unused: list[nn.Module] = []
    if NEXT_ITEM not in names:
        unused += [model.query, model.item_tower, model.temperature]
    if set(names) <= {NEXT_ITEM}:
        unused.append(model.feedback)
    return unused


def _events(pack: PackBatch, columns: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Events:
    token = torch.arange(len(columns["position"]), device=columns["position"].device)
    unread = token.new_empty(0, 0)  # of parts that another stage looks up
    return Events(
        cu_seqlens=columns["cu_seqlens"],
        position=columns["position"],
        timestamp=columns["timestamp"],
        next_timestamp=columns["next_timestamp"],
        **{f"{part}_rows": rows.get(part, unread) for part in EVENT_PARTS},
        randomness=Randomness(key=derive_key(pack.key, "dropout"), token=token),
        num_candidates=columns.get("num_candidates"),
    )
