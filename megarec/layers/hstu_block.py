"""The HSTU block in its published variants."""

from megarec_kernels.silu import UvqkLayout, split_silu
from torch import Tensor, nn

from megarec.layers.config import HstuBlockConfig
from megarec.layers.dropout import Dropout
from megarec.layers.norm import GatedAllHeadsNorm, GatedHeadNorm, ResidualNorm
from megarec.layers.tokens import Tokens
from megarec.parallel.parts import Parts, whole_parameter
from megarec.parallel.placement import Init


class HstuBlock(nn.Module):
    """Gated pointwise attention (Zhai et al., "Actions Speak Louder than Words", arXiv 2402.17152, section 3).

    ```
    U, V, Q, K = split(SiLU(W_1 norm(x)))
    A_i        = sum over j <= i of SiLU(scale Q_i·K_j + p[i - j] + t[bucket(query time_i - time_j)]) V_j / divisor
    y          = x + W_2 dropout([U ; norm(A) or A ;] U * norm(A))
    ```
    The divisor is a fixed number, where the published code takes a padded length: results then do not depend on
    who shares a batch. Rows of `W_1` are laid out [head, (U, V, Q, K), channel] and columns of `W_2` [head, (gates),
    channel], so that a tensor-parallel shard is a slice; the published layout has all heads of U first
    (`megarec.models.hstu.convert`). With `weighting=softmax` the weights are the softmax over j <= i of the scaled
    scores: the public code takes it over all columns, the future and the padding too, and masks afterwards. `W_1` and
    the biases p, t start as normal(0, 0.02), `W_2` with the variance of Xavier and its bias uniform within
    ±1 / sqrt(inputs), as the public research code does.
    """

    def __init__(
        self, config: HstuBlockConfig, *, width: int, layer: int, max_tokens: int, dropout: float, parts: Parts
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = parts.attention
        self.run_attention = parts.run_attention
        self.layout = UvqkLayout(
            num_heads=config.num_heads // parts.tp_size,
            v_head_width=config.v_head_width,
            qk_head_width=config.qk_head_width,
        )
        self.scale = 1.0 if config.scale == "one" else config.qk_head_width**-0.5
        uvqk_width = 2 * config.num_heads * (config.v_head_width + config.qk_head_width)
        value_width = config.num_heads * config.v_head_width
        out_width = value_width * (1 if config.concat == "none" else 3)
        bias_init, eps = Init(kind="normal", std=0.02), config.norm_eps
        self.norm = ResidualNorm(width, affine=config.input_norm_affine, eps=eps, sum_over=parts.between_maps)
        self.uvqk = parts.column_linear(width, uvqk_width, bias=config.uvqk_bias, std=0.02)
        self.position_bias = (
            whole_parameter((max_tokens,), bias_init, sum_over=("tp",)) if config.position_bias else None
        )
        num_buckets = config.num_time_buckets
        self.time_bias = whole_parameter((num_buckets + 1,), bias_init, sum_over=("tp",)) if num_buckets else None
        self.output_norm: nn.Module
        if config.output_norm == "all_heads":
            self.output_norm = GatedAllHeadsNorm(value_width, affine=config.output_norm_affine, eps=eps, parts=parts)
        else:
            self.output_norm = GatedHeadNorm(config.num_heads, affine=config.output_norm_affine, eps=eps, parts=parts)
        self.dropout = Dropout(dropout, layer=layer, site="output", part=parts.tp_rank, num_parts=parts.tp_size)
        self.local_out_width = out_width // parts.tp_size
        out_std = (2.0 / (out_width + width)) ** 0.5
        bound = out_width**-0.5
        self.out = parts.row_linear(out_width, width, bias=config.output_bias, std=out_std, bias_bound=bound)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        x, u, attention = self.run_attention(self._gates_and_attention, x, tokens)
        mask = self.dropout.mask(tokens.inner_randomness, self.local_out_width)
        out = self.out(self.output_norm(u, attention, concat=self.config.concat, mask=mask))
        return x + out if self.config.residual else out

    def _gates_and_attention(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        x, normed = self.norm(x)
        u, v, q, k = split_silu(self.uvqk(normed), self.layout, silu_on=self.config.silu_on)
        return x, u, self._attend(q, k, v, tokens)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        if self.config.weighting == "softmax":
            return self.attention.softmax(
                q, k, v, tokens.cu_seqlens, scale=self.scale, plan=tokens.plan, visibility=tokens.visibility
            )
        return self.attention.hstu(
            q,
            k,
            v,
            tokens.cu_seqlens,
            scale=self.scale,
            divisor=self.config.scaling_events,
            position_bias=self.position_bias,
            time_bias=self.time_bias,
            plan=tokens.plan,
            time_buckets=tokens.time_buckets,
            visibility=tokens.visibility,
        )
