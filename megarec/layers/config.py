"""The settings of the blocks and heads. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from megarec.base.errors import UserError

TokenLayout = Literal["fused", "item_action", "context_item_feedback"]
TOKENS_PER_EVENT: dict[TokenLayout, int] = {"fused": 1, "item_action": 2, "context_item_feedback": 3}


@dataclass(frozen=True, kw_only=True)
class TransformerBlockConfig:
    """A pre-norm transformer block.

    Attributes:
        num_heads: attention heads; each has `width / num_heads` channels.
        feed_forward_multiple: the hidden width of the feed-forward, in widths.
        bias: whether the linear maps have one.
    """

    num_heads: int = 4
    feed_forward_multiple: int = 4
    bias: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "feed_forward_multiple")

    def split_widths(self, width: int) -> dict[str, int]:
        """By setting, the widths of the split maps that tensor-parallel ranks divide; the other side is `width`."""
        return {"model.width": width, "model.block.feed_forward_multiple": self.feed_forward_multiple * width}


@dataclass(frozen=True, kw_only=True)
class SasrecBlockConfig:
    """A SASRec block.

    Attributes:
        num_heads: attention heads; each has `width / num_heads` channels.
        feed_forward_width: the hidden width of the feed-forward.
        activation: of the feed-forward.
    """

    num_heads: int = 1
    feed_forward_width: int = 64
    activation: Literal["relu", "gelu"] = "relu"

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "feed_forward_width")

    def split_widths(self, width: int) -> dict[str, int]:
        """As `TransformerBlockConfig.split_widths`."""
        return {"model.width": width, "model.block.feed_forward_width": self.feed_forward_width}


@dataclass(frozen=True, kw_only=True)
class HstuBlockConfig:
    """An HSTU block; the defaults are the research variant of the public tables.

    Attributes:
        num_heads: attention heads.
        qk_head_width: channels of a query and a key, per head.
        v_head_width: channels of a value and a gate, per head.
        weighting: pairs weigh SiLU of their score over `scaling_events`, or the softmax of it over the past (the
            ablation of the paper; without biases).
        silu_on: SiLU follows the first linear map on all of U, V, Q, K (research), on U only (production) or nowhere.
        scale: factor of q·k: one (research) or 1 / sqrt(qk_head_width) (production).
        scaling_events: the fixed divisor of the attention sum (211 in the public ML-1M configuration).
        position_bias: adds a learned number per distance in tokens to q·k.
        num_time_buckets: adds a learned number per log bucket of elapsed time to q·k; 0: none (published: 128).
        output_norm: normalises the attention output over the channels of all heads together or of each head.
        input_norm_affine: whether the norm of the input has a learned scale and shift (research: no).
        output_norm_affine: whether the norm of the attention output has them, per channel or per head (research: no).
        norm_eps: what both norms add to the variance (Meta: 1e-6; NVIDIA: 1e-5).
        concat: what enters the output map, besides the gated norm `U * norm(A)`: nothing; `U` and `norm(A)`
            (research, `concat_ua`); or `U` and `A` (production).
        uvqk_bias: whether the first linear map has a bias.
        output_bias: whether the output map has one.
        residual: whether the input is added to the output.
    """

    num_heads: int = 2
    qk_head_width: int = 32
    v_head_width: int = 32
    weighting: Literal["silu", "softmax"] = "silu"
    silu_on: Literal["uvqk", "u", "none"] = "uvqk"
    scale: Literal["one", "inverse_sqrt_width"] = "one"
    scaling_events: float = 211.0
    position_bias: bool = True
    num_time_buckets: int = 0
    output_norm: Literal["all_heads", "per_head"] = "all_heads"
    input_norm_affine: bool = False
    output_norm_affine: bool = False
    norm_eps: float = 1e-6
    concat: Literal["none", "u_and_norm", "u_and_attention"] = "none"
    uvqk_bias: bool = False
    output_bias: bool = True
    residual: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "num_heads", "qk_head_width", "v_head_width", "scaling_events", "norm_eps")
        if self.num_time_buckets < 0:
            raise UserError(
                f"{self.num_time_buckets} is negative", where="num_time_buckets", fix="0 means no time bias"
            )
        if self.weighting == "softmax" and (
            self.position_bias or self.num_time_buckets or self.qk_head_width != self.v_head_width
        ):
            raise UserError(
                "softmax weights know no bias and one head width",
                where="weighting",
                fix="Set position_bias=false, num_time_buckets=0 and qk_head_width to v_head_width",
            )

    def split_widths(self, width: int) -> dict[str, int]:
        """As `TransformerBlockConfig.split_widths`."""
        return {
            "model.block.v_head_width": self.num_heads * self.v_head_width * (1 if self.concat == "none" else 3),
            "model.block.qk_head_width": 2 * self.num_heads * (self.v_head_width + self.qk_head_width),
        }


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What is read off the states: the query for the next item, the item vectors, the feedback.

    Attributes:
        query_context: the query is an MLP of the state and the next event's context; off: the state itself.
        query_residual: adds the state to what the query's MLP gives.
        query_width: width of queries and item vectors.
        hidden_width: hidden width of the MLPs.
        feedback_head: feedback is an MLP of the state and, in the fused layout, of the next context and item; or, with
            `product_swish`, of the state times a vector of them (the public rankers of HSTU).
        item_tower: item vectors are the sum of their table rows, a linear map of it, or an MLP of it.
        normalize: queries and item vectors have length 1.
        temperature: scores are divided by it; where it is learned, its first value.
        learn_temperature: learns the inverse, kept between 0.01 and 100.
    """

    query_context: bool = True
    query_residual: bool = False
    query_width: int = 64
    hidden_width: int = 128
    feedback_head: Literal["mlp", "product_swish"] = "mlp"
    item_tower: Literal["none", "linear", "mlp"] = "linear"
    normalize: bool = True
    temperature: float = 0.05
    learn_temperature: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "query_width", "hidden_width")
        if not 0.01 <= self.temperature <= 100.0:
            raise UserError(f"{self.temperature} is not between 0.01 and 100", where="temperature")


def require_positive(config: object, *names: str) -> None:
    """Refuses settings that are not above zero.

    Raises:
        UserError: names the first one.
    """
    for name in names:
        value = getattr(config, name)
        if value <= 0:
            raise UserError(f"{value} is not above 0", where=name)
