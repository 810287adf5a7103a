"""The pre-norm transformer block of ARGUS."""

import torch.nn.functional as F
from torch import Tensor, nn

from megarec.layers.config import TransformerBlockConfig
from megarec.layers.dropout import Dropout
from megarec.layers.norm import ResidualNorm
from megarec.layers.tokens import Tokens
from megarec.parallel.parts import Parts


class TransformerBlock(nn.Module):
    """Causal softmax attention and a GELU feed-forward, each behind a norm and added to its input.

    ```
    y = x + dropout(W_o Attention(LN(x)))          scale 1 / sqrt(head width)
    z = y + dropout(W_2 GELU(W_1 LN(y)))
    ```
    Weights start as normal(0, 0.02); those of `W_o` and `W_2` divided by sqrt(2 * num_layers), as in GPT-2. The
    rows of the first map are laid out [head, (Q, K, V), channel], so that a tensor-parallel shard is a slice.
    """

    def __init__(
        self,
        config: TransformerBlockConfig,
        *,
        width: int,
        layer: int,
        num_layers: int,
        dropout: float,
        parts: Parts,
    ) -> None:
        super().__init__()
        self.attention, self.run_attention = parts.attention.softmax, parts.run_attention
        self.local_heads = config.num_heads // parts.tp_size
        self.head_width = width // config.num_heads
        hidden, std, out_std = config.feed_forward_multiple * width, 0.02, 0.02 / (2 * num_layers) ** 0.5
        self.attention_norm = ResidualNorm(width, sum_over=parts.between_maps)
        self.qkv = parts.column_linear(width, 3 * width, bias=config.bias, std=std)
        self.attention_out = parts.row_linear(width, width, bias=config.bias, std=out_std)
        self.attention_dropout = Dropout(dropout, layer=layer, site="attention")
        self.feed_forward_norm = ResidualNorm(width, sum_over=parts.between_maps)
        self.up = parts.column_linear(width, hidden, bias=config.bias, std=std)
        self.down = parts.row_linear(hidden, width, bias=config.bias, std=out_std)
        self.feed_forward_dropout = Dropout(dropout, layer=layer, site="feed_forward")

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        x, attention = self.run_attention(self._attend, x, tokens)
        out = self.attention_out(attention.flatten(1))
        mask = self.attention_dropout.mask(tokens.outer_randomness, out.shape[1])
        x, normed = self.feed_forward_norm(x, out, mask)
        hidden = F.gelu(self.up(normed))
        return self.feed_forward_dropout(self.down(hidden), tokens.outer_randomness, add_to=x)

    def _attend(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x)
        qkv = self.qkv(normed).view(-1, self.local_heads, 3 * self.head_width)
        q, k, v = qkv.split(self.head_width, dim=2)
        scale = self.head_width**-0.5
        out = self.attention(q, k, v, tokens.cu_seqlens, scale=scale, plan=tokens.plan, visibility=tokens.visibility)
        return x, out
