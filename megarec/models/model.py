"""What every model is made of: events to tokens, blocks, and the heads that read the states."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from megarec.layers.dropout import Dropout
from megarec.layers.heads import FeedbackHeads, InverseTemperature, ItemTower, NextItemQuery
from megarec.layers.position import PositionEmbedding
from megarec.layers.tokens import Tokens, interleave, next_event, split_events, token_of_event
from megarec.models.config import SequenceConfig
from megarec.models.inputs import Events, Lookup
from megarec.models.shape import InputShape, known_at_feedback
from megarec.parallel.parts import Parts
from megarec.parallel.placement import place, placement_of
from megarec.parallel.stages import Stage

INPUT_LAYER = -1  # dropout of the input counts as a layer before the first


class RecModel(nn.Module):
    """A causal model of event histories that predicts the next item and the feedback to it.

    A history is `(c_1, i_1, f_1), (c_2, i_2, f_2), ...`: context, item, feedback. A token is the sum of the rows of
    its fields, times `input_scale`, plus a learned vector of the event's position:

    - `fused`: one token per event, of all its fields;
    - `item_action`: a token of context and item, then one of the feedback;
    - `context_item_feedback`: one token of each.

    Fields of the user may stand before the history as a prefix, one token each (`layers.tokens.PrefixPlaces`).

    Row t of every output speaks of event t + 1. The query for its item reads the state of event t's last token and
    c_{t+1}. The feedback heads read the same state, c_{t+1} and i_{t+1} in the fused layout; otherwise the state of
    event t + 1's item token, which has seen both (and i_{t+1} once more for the product with it), so the next event
    must be in the pack. The sequence of blocks and
    the norm behind them are the subclasses'.

    A pipeline stage holds a piece of it: what lies before the blocks (input map, positions) on the first, what lies
    behind them (norm, heads) on the last, and its own layers.
    """

    def __init__(
        self,
        config: SequenceConfig,
        shape: InputShape,
        parts: Parts,
        stage: Stage,
        *,
        blocks: Mapping[int, nn.Module],
        final_norm: nn.Module | None,
        input_scale: float,
        position_std: float,
    ) -> None:
        super().__init__()
        width, table_width = config.width, config.table_width
        self.config = config
        self.shape = shape
        self.stage = stage
        self.input_scale = input_scale
        self.slices, self.attention = parts.slices, parts.attention
        self.inner_rows, self.outer_rows = parts.inner_rows, parts.outer_rows
        self.enter_blocks, self.leave_blocks = parts.enter_blocks, parts.leave_blocks
        self.run_block, self.around_blocks = parts.run_block, parts.around_blocks
        self.input_map = (
            parts.linear(table_width, width, bias=False, std=table_width**-0.5)
            if stage.first and table_width != width
            else None
        )
        self.position = (
            PositionEmbedding(config.max_positions, width, std=position_std)
            if stage.first and config.position_embedding
            else None
        )
        self.input_dropout = Dropout(config.dropout, layer=INPUT_LAYER, site="input")
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in blocks.items()})
        self.final_norm = final_norm
        if stage.last:
            context_width = table_width if shape.context else 0
            self.query = NextItemQuery(config.heads, width=width, context_width=context_width, parts=parts)
            self.item_tower = ItemTower(config.heads, table_width=table_width, parts=parts)
            known_width = known_at_feedback(config, shape).count(True) * table_width
            self.feedback = FeedbackHeads(
                shape.feedback_heads, config.heads, width=width, known_width=known_width, parts=parts
            )
            self.temperature = InverseTemperature(config.heads)
        # What lies before and behind the blocks meets this rank's slice of the tokens alone.
        for name, parameter in self.named_parameters():
            if not name.startswith("blocks."):
                place(parameter, replace(placement_of(parameter), grad_sum_over=("tp",)))

    @property
    def reads_query_time(self) -> bool:
        """Whether the state of a history depends on the time at which it is asked about what comes next."""
        return False

    @property
    def row_parts(self) -> frozenset[str]:
        """Which rows this piece of the model looks up: names of `inputs.EVENT_PARTS`, and `candidates`."""
        parts = {"prefix", "context", "item", "feedback"} if self.stage.first else set()
        if self.stage.last:
            parts |= {"next_context", "next_item", "candidates"}
            parts |= {"item"} if self.config.tokens_per_event > 1 else set()  # the feedback heads read it once more
        return frozenset(parts)

    def encode(self, events: Events, lookup: Lookup, received: Tensor | None = None) -> Tensor:
        """The states of all events' tokens, `[T * tokens_per_event, D]`: what the other methods take as `states`.

        Where ranks share a pack, of this rank's slice of the events. A stage takes what the stage before `received`
        made of the pack (None: it is the first) and makes what the next one takes; the last makes the states.
        """
        tokens = self._tokens(events)
        x = self._begin(events, tokens, lookup) if received is None else received
        with self.around_blocks():
            for block in self.blocks.values():
                x = self.run_block(block, x, tokens)
        return self._end(x, tokens) if self.stage.last else x

    def next_item_query(self, states: Tensor, events: Events, lookup: Lookup) -> Tensor:
        """Queries `[T, Dq]` for the item of the next event; `inverse_temperature` times query·item is the score."""
        reads_context = self.config.heads.query_context and bool(self.shape.context)
        next_context = self._sum_rows(events.next_context_rows, lookup) if reads_context else None
        query: Tensor = self.query(self._last_tokens(states), next_context)
        return query

    def item_vectors(self, item_rows: Tensor, lookup: Lookup) -> Tensor:
        """Rows `[C, S]`, in the slots of `shape.item_tower`, to item vectors `[C, Dq]`."""
        vectors: Tensor = self.item_tower(self._sum_rows(item_rows, lookup))
        return vectors

    def feedback_logits(self, states: Tensor, events: Events, lookup: Lookup) -> dict[str, Tensor]:
        """Logits `[T, n]` of the next event's feedback for each head; rows without a next event mean nothing.

        `n` is 1 for a field of two values (the logit of id 2), else the number of values (id v at v - 1).
        """
        if not self.shape.feedback_heads:
            return {}
        per_event = self.config.tokens_per_event
        reads_context, reads_item = known_at_feedback(self.config, self.shape)
        known = [self._sum_rows(events.next_context_rows, lookup)] if reads_context else []
        if per_event == 1:
            state = states
            known += [self._sum_rows(events.next_item_rows, lookup)] if reads_item else []
        else:
            state = next_event(token_of_event(states, per_event, per_event - 2), events.cu_seqlens, self.slices)
            if reads_item:
                item = self._sum_rows(events.item_rows, lookup)
                known.append(next_event(item, events.cu_seqlens, self.slices))
        logits: dict[str, Tensor] = self.feedback(state, known)
        return logits

    def inverse_temperature(self) -> Tensor:
        """What query·item is multiplied by: a scalar."""
        scale: Tensor = self.temperature(next(self.parameters()).device)
        return scale

    def _begin(self, events: Events, tokens: Tokens, lookup: Lookup) -> Tensor:
        """From rows to what the blocks take."""
        x = self._embed(events, lookup)
        if tokens.places is not None:  # its tokens move across the slices
            merged = tokens.places.merge(self._embed_prefix(events, lookup), self.slices.gather(x))
            x = self.slices.own(merged)
        x = self.input_dropout(x, None if tokens.randomness is None else tokens.randomness.of(self.slices))
        return self.enter_blocks(x, tokens.plan)

    def _end(self, x: Tensor, tokens: Tokens) -> Tensor:
        """From what the blocks give to states."""
        x = self.leave_blocks(x, tokens.plan)
        if tokens.places is not None:
            x = self.slices.own(tokens.places.events_of(self.slices.gather(x)))
        return x if self.final_norm is None else self.final_norm(x)

    def _tokens(self, events: Events) -> Tokens:
        """What the blocks know about the tokens."""
        tokens = split_events(
            events.cu_seqlens,
            events.timestamp,
            events.next_timestamp,
            randomness=events.randomness,
            per_event=self.config.tokens_per_event,
            num_prefix=self.config.num_prefix_tokens,
            num_candidates=events.num_candidates,
            plan=self.attention.plan,
        )
        if tokens.randomness is None:
            return tokens
        inner, outer = (
            replace(tokens.randomness, token=rows(tokens.randomness.token, tokens.plan))
            for rows in (self.inner_rows, self.outer_rows)
        )
        return replace(tokens, inner_randomness=inner, outer_randomness=outer)

    def _embed(self, events: Events, lookup: Lookup) -> Tensor:
        """The input of the first block, `[T * tokens_per_event, D]`."""
        context, item, feedback = events.context_rows, events.item_rows, events.feedback_rows
        groups = {
            "fused": [[context, item, feedback]],
            "item_action": [[context, item], [feedback]],
            "context_item_feedback": [[context], [item], [feedback]],
        }[self.config.token_layout]
        vectors = [self._embed_rows(torch.cat(group, dim=1), lookup) for group in groups]
        if self.position is not None:
            position = self.position(self.slices.own(events.position))
            vectors = [v + position for v in vectors]
        return vectors[0] if len(vectors) == 1 else interleave(vectors)

    def _embed_prefix(self, events: Events, lookup: Lookup) -> Tensor:
        """The input of the first block at the tokens of the prefixes, `[B * P, D]`; a prefix has no position."""
        rows = events.prefix_rows[events.cu_seqlens[:-1]].split([field.slots for field in self.shape.prefix], dim=1)
        return interleave([self._embed_rows(field_rows, lookup) for field_rows in rows])

    def _embed_rows(self, rows: Tensor, lookup: Lookup) -> Tensor:
        """Rows `[*, S]` to what a token is made of, `[*, D]`."""
        vectors = self._sum_rows(rows, lookup)
        if self.input_map is not None:
            vectors = self.input_map(vectors)
        return vectors * self.input_scale if self.input_scale != 1.0 else vectors

    def _last_tokens(self, states: Tensor) -> Tensor:
        per_event = self.config.tokens_per_event
        return token_of_event(states, per_event, per_event - 1)

    def _sum_rows(self, rows: Tensor, lookup: Lookup) -> Tensor:
        """The sum of rows `[*, S]` in the dtype of the weights, `[*, E]`: tables may be stored in another one."""
        return lookup(rows).to(next(self.parameters()).dtype)
