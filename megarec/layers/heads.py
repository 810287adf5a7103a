"""What is read off the states: the query for the next item, item vectors, the feedback to the next item.

Source: ARGUS (arXiv 2507.15994), figure "pretraining". Widths of the MLPs and their start (normal with std
1 / sqrt(inputs)) are ours; the paper does not give them.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarec.layers.config import HeadsConfig
from megarec.layers.norm import LayerNorm, SwishNorm, unit_vectors
from megarec.parallel.parts import MakeLinear, Parts, whole_parameter
from megarec.parallel.placement import Init


class Mlp(nn.Module):
    """`W2 activation(W1 x + b1) + b2`, held whole by every rank."""

    def __init__(
        self,
        in_width: int,
        hidden_width: int,
        out_width: int,
        *,
        parts: Parts,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.hidden = _linear(parts.linear, in_width, hidden_width)
        self.activation = activation
        self.out = _linear(parts.linear, hidden_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """`[*, in_width]` to `[*, out_width]`."""
        out: Tensor = self.out(self.activation(self.hidden(x)))
        return out


class NextItemQuery(nn.Module):
    """The query `q_t = MLP([h_t ; c_{t+1}])`, of length 1 if configured; with `query_context` off, `h_t` itself.

    With `query_residual` it is `h_t + MLP([h_t ; c_{t+1}])`, ours: what a block wrote into the state reaches the scores
    without a detour.
    """

    def __init__(self, config: HeadsConfig, *, width: int, context_width: int, parts: Parts) -> None:
        super().__init__()
        self.normalize = config.normalize
        in_width = width + context_width
        self.mlp = Mlp(in_width, config.hidden_width, config.query_width, parts=parts) if config.query_context else None
        self.residual = config.query_residual

    def forward(self, state: Tensor, next_context: Tensor | None) -> Tensor:
        """States `[T, D]` and the next events' context `[T, E]` (None: the dataset has none) to `[T, Dq]`."""
        query = state
        if self.mlp is not None:
            query = self.mlp(state if next_context is None else torch.cat([state, next_context], dim=1))
            if self.residual:
                query = state + query
        return unit_vectors(query) if self.normalize else query


class ItemTower(nn.Module):
    """Item vectors of the sum of an item's rows: the sum itself, a linear map or an MLP; of length 1 if configured."""

    def __init__(self, config: HeadsConfig, *, table_width: int, parts: Parts) -> None:
        super().__init__()
        self.normalize = config.normalize
        self.map: nn.Module | None = None
        if config.item_tower == "linear":
            self.map = _linear(parts.linear, table_width, config.query_width)
        elif config.item_tower == "mlp":
            self.map = Mlp(table_width, config.hidden_width, config.query_width, parts=parts)

    def forward(self, row_sum: Tensor) -> Tensor:
        """`[C, E]` to `[C, Dq]`."""
        vectors = row_sum if self.map is None else self.map(row_sum)
        return unit_vectors(vectors) if self.normalize else vectors


class StateTimesItem(nn.Module):
    """`LN(h) * LN(W4 s(W3 e + b3) + b4)` with `s(x) = x sigmoid(LN(x))`: the state by the vector of the next event.

    Source: the public ranker of HSTU (modules/dlrm_hstu.py, `_item_embedding_mlp`; modules/postprocessors.py,
    `LayerNormPostprocessor`). It lays the rows of the candidate side by side, where `e` is the sum of the item's and,
    beside it, of the context's; and its variant that joins the hour and the weekday to the state is not here.
    """

    def __init__(self, width: int, known_width: int, hidden_width: int, *, parts: Parts) -> None:
        super().__init__()
        self.state_norm = LayerNorm(width, eps=1e-5)
        self.item = Mlp(known_width, hidden_width, width, parts=parts, activation=SwishNorm(hidden_width))
        self.item_norm = LayerNorm(width, eps=1e-5)

    def forward(self, state: Tensor, known: Tensor) -> Tensor:
        """States `[T, D]` and what is known of the next events `[T, W]` to `[T, D]`."""
        product: Tensor = self.state_norm(state) * self.item_norm(self.item(known))
        return product


class FeedbackHeads(nn.Module):
    """One MLP with a group of outputs per feedback field: one output for two values, else one per value.

    It reads the state and what is known of the next event side by side; or, with `product_swish`, their
    `StateTimesItem`, and its activation is `SwishNorm`: the ranker of MLPerf ("dlrmv4") and of Meta's public code.
    """

    def __init__(
        self, num_values: Mapping[str, int], config: HeadsConfig, *, width: int, known_width: int, parts: Parts
    ) -> None:
        super().__init__()
        self.num_outputs = {name: 1 if values == 2 else values for name, values in num_values.items()}
        num_outputs, hidden = sum(self.num_outputs.values()), config.hidden_width
        self.product: StateTimesItem | None = None
        self.mlp: Mlp | None = None
        if num_outputs and config.feedback_head == "product_swish":
            self.product = StateTimesItem(width, known_width, hidden, parts=parts)
            self.mlp = Mlp(width, hidden, num_outputs, parts=parts, activation=SwishNorm(hidden))
        elif num_outputs:
            self.mlp = Mlp(width + known_width, hidden, num_outputs, parts=parts)

    def forward(self, state: Tensor, known: Sequence[Tensor]) -> dict[str, Tensor]:
        """States `[T, D]` and what is known of the next events, each `[T, E]`, to the logits `[T, n]` of each field."""
        if self.mlp is None:
            return {}
        if self.product is None:
            x = torch.cat([state, *known], dim=1)
        else:
            x = self.product(state, torch.cat(list(known), dim=1))
        groups = self.mlp(x).split(list(self.num_outputs.values()), dim=1)
        return dict(zip(self.num_outputs, groups, strict=True))


class InverseTemperature(nn.Module):
    """What scores are multiplied by: fixed, or `clip(exp(log_inverse), 0.01, 100)` with `log_inverse` learned.

    The authors' public code starts at 1; ours starts at the configured temperature, because scores of unit
    vectors need a factor near 20 and the optimizer would spend its first thousands of steps on getting there.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.fixed = 1.0 / config.temperature
        self.log_inverse = whole_parameter((1,), Init(value=math.log(self.fixed))) if config.learn_temperature else None

    def forward(self, device: torch.device) -> Tensor:
        """A scalar on `device`, in fp32 or wider."""
        if self.log_inverse is None:
            return torch.full((), self.fixed, dtype=torch.float64, device=device)
        wide = self.log_inverse[0].to(torch.promote_types(self.log_inverse.dtype, torch.float32))
        return wide.exp().clamp(0.01, 100.0)


def _linear(make: MakeLinear, in_width: int, out_width: int) -> nn.Module:
    """A linear map with bias that keeps the size of its input: std 1 / sqrt(in_width)."""
    return make(in_width, out_width, bias=True, std=in_width**-0.5)
