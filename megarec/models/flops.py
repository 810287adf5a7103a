"""Floating-point operations of a training step that every model shares.

A multiply-add counts 2. Forward counts once and backward twice, whatever is computed again on the way: recomputed
work is no progress (MLPerf's formula for HSTU counts attention 3.5 times instead of 3 for that reason). Attention
counts the pairs it needs, n(n + 1)/2 of a history of n tokens without candidates. Lookups, norms, activations,
softmaxes and dead padding count nothing.
"""

from dataclasses import dataclass

from megarec.base.jagged import Int64
from megarec.models.config import SequenceConfig
from megarec.models.shape import InputShape, known_at_feedback

FORWARD_AND_BACKWARD = 3


def linear_flops(num_rows: int, in_width: int, out_width: int) -> int:
    """A linear map of `num_rows` vectors, trained: 6 per weight and row."""
    return FORWARD_AND_BACKWARD * 2 * num_rows * in_width * out_width


def attention_flops(num_pairs: int, channels: int) -> int:
    """Attention over pairs of tokens; `channels`: those of keys and of values, over all heads."""
    return FORWARD_AND_BACKWARD * 2 * num_pairs * channels


def count_pairs(lengths: Int64, num_candidates: Int64, *, per_event: int) -> int:
    """Pairs of a token and one that it sees, itself among them, in histories of `lengths` `[B]` tokens.

    The last `num_candidates` `[B]` events see the history and not each other.
    """
    before = lengths - num_candidates * per_event
    candidate = per_event * before + per_event * (per_event + 1) // 2
    return int((before * (before + 1) // 2 + num_candidates * candidate).sum())


@dataclass(frozen=True, kw_only=True)
class PackFlops:
    """What a pack costs in training.

    Attributes:
        begin: what lies before the blocks.
        layer: one block.
        end: what lies behind the blocks.
    """

    begin: int
    layer: int
    end: int

    def total(self, num_layers: int) -> int:
        """The whole model."""
        return self.begin + num_layers * self.layer + self.end


def begin_flops(config: SequenceConfig, *, num_tokens: int) -> int:
    """What lies before the blocks: the input map."""
    return linear_flops(num_tokens, config.table_width, config.width) if config.table_width != config.width else 0


def end_flops(
    config: SequenceConfig, shape: InputShape, *, num_events: int, num_item_vectors: int, num_scores: int
) -> int:
    """What lies behind the blocks: query, item tower, scores, feedback heads.

    Args:
        config: the settings of the model.
        shape: its input and output.
        num_events: events of the pack, each of which asks for its successor.
        num_item_vectors: those that are made.
        num_scores: pairs of query and item vector that are scored.
    """
    width, table_width, heads = config.width, config.table_width, config.heads
    context_width = table_width if shape.context else 0
    flops = FORWARD_AND_BACKWARD * 2 * num_scores * heads.query_width
    if heads.query_context:
        flops += _mlp_flops(num_events, width + context_width, heads.hidden_width, out_width=heads.query_width)
    if heads.item_tower == "linear":
        flops += linear_flops(num_item_vectors, table_width, heads.query_width)
    elif heads.item_tower == "mlp":
        flops += _mlp_flops(num_item_vectors, table_width, heads.hidden_width, out_width=heads.query_width)
    if shape.feedback_heads:
        known_width = known_at_feedback(config, shape).count(True) * table_width
        in_width = width + known_width
        if heads.feedback_head == "product_swish":
            in_width = width
            flops += _mlp_flops(num_events, known_width, heads.hidden_width, out_width=width)
        outputs = sum(1 if values == 2 else values for values in shape.feedback_heads.values())
        flops += _mlp_flops(num_events, in_width, heads.hidden_width, out_width=outputs)
    return flops


def _mlp_flops(num_rows: int, in_width: int, hidden_width: int, *, out_width: int) -> int:
    return linear_flops(num_rows, in_width, hidden_width) + linear_flops(num_rows, hidden_width, out_width)
