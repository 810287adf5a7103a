"""The block of SASRec as the baseline of the public HSTU tables has it."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megarec.layers.config import SasrecBlockConfig
from megarec.layers.dropout import AttentionDropout, Dropout
from megarec.layers.norm import ResidualNorm
from megarec.layers.tokens import Tokens
from megarec.parallel.parts import Parts

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class SasrecBlock(nn.Module):
    """Softmax attention whose queries alone are normed, and a feed-forward behind a second norm.

    ```
    n = LN(x)
    y = LN(n + W_o Attention(q = W_q n, k = W_k x, v = W_v x))     scale 1 / sqrt(head width)
    z = y + dropout(W_2 dropout(activation(W_1 y)))
    ```
    The norms have no scale and no shift (eps 1e-8); attention probabilities are dropped too. All matrices start as
    Xavier normal, the three of the queries, keys and values as one matrix of 3 widths; attention biases start at 0,
    those of the feed-forward uniform within ±1 / sqrt(inputs). Rows of the key and value map are laid out
    [head, (K, V), channel].

    Source: Kang and McAuley (arXiv 1808.09781) as the public research code of HSTU has it
    (research/modeling/sequential/sasrec.py). It adds the normed input to the attention, and so do we.
    """

    def __init__(
        self, config: SasrecBlockConfig, *, width: int, layer: int, max_tokens: int, dropout: float, parts: Parts
    ) -> None:
        super().__init__()
        self.attention, self.run_attention = parts.attention.softmax, parts.run_attention
        self.local_heads = config.num_heads // parts.tp_size
        self.head_width = width // config.num_heads
        self.activation = ACTIVATIONS[config.activation]
        hidden = config.feed_forward_width
        input_std, hidden_std = (2.0 / (4 * width)) ** 0.5, (2.0 / (width + hidden)) ** 0.5
        self.norm = ResidualNorm(width, affine=False, eps=1e-8)
        self.query = parts.column_linear(width, width, bias=True, std=input_std)
        self.key_value = parts.column_linear(width, 2 * width, bias=True, std=input_std)
        self.attention_out = parts.row_linear(width, width, bias=True, std=width**-0.5)
        self.attention_dropout = AttentionDropout(
            dropout, layer=layer, heads=parts.attention_heads(config.num_heads), max_tokens=max_tokens
        )
        self.up = parts.column_linear(width, hidden, bias=True, std=hidden_std, bias_bound=width**-0.5)
        self.hidden_dropout = Dropout(dropout, layer=layer, site="hidden", part=parts.tp_rank, num_parts=parts.tp_size)
        self.down = parts.row_linear(hidden, width, bias=True, std=hidden_std, bias_bound=hidden**-0.5)
        self.output_dropout = Dropout(dropout, layer=layer, site="output")

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        normed, attention = self.run_attention(self._attend, x, tokens)
        _, y = self.norm(normed, self.attention_out(attention.flatten(1)))
        hidden = self.hidden_dropout(self.activation(self.up(y)), tokens.inner_randomness)
        return self.output_dropout(self.down(hidden), tokens.outer_randomness, add_to=y)

    def _attend(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        _, normed = self.norm(x)
        q = self.query(normed).view(-1, self.local_heads, self.head_width)
        k, v = self.key_value(x).view(-1, self.local_heads, 2 * self.head_width).split(self.head_width, dim=2)
        attention = self.attention(
            q,
            k,
            v,
            tokens.cu_seqlens,
            scale=self.head_width**-0.5,
            plan=tokens.plan,
            visibility=tokens.visibility,
            weigh=self.attention_dropout(tokens.randomness),
        )
        return normed, attention
