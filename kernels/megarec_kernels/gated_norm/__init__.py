"""What stands between the attention of an HSTU block and its output map: norm, gate, dropout."""

from typing import Literal

from torch import Tensor

from megarec_kernels.devices import has_kernel
from megarec_kernels.dropout import WORD, DropoutMask, check_mask
from megarec_kernels.gated_norm.reference import gated_norm_reference

Concat = Literal["none", "u_and_norm", "u_and_attention"]
Over = Literal["all_heads", "per_head"]
MAX_WIDTH = 4096  # what is normed together stays in the registers of one program


def gated_norm(
    u: Tensor,
    attention: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    over: Over,
    eps: float,
    concat: Concat,
    mask: DropoutMask | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`dropout([U ; norm(A) or A ;] U norm(A))`, head by head, with `norm(A) = (A - mean) / sqrt(variance + eps)`.

    On CUDA one pass forward and one backward: u and attention are read, the result is written; dropout masks are made
    again, not kept. Sums in fp32 and in a fixed order.

    Args:
        u: `[T, N, Hv]`, a view of packed rows perhaps.
        attention: `[T, N, Hv]`.
        scale: of the normed channels: `[N * Hv]` over all heads, `[N]` per head; None together with `shift`.
        shift: as `scale`.
        over: whether the channels of all heads are normed together or those of each head.
        eps: added to the variance.
        concat: what stands before the gated norm.
        mask: what is dropped; of all channels of the result.
        statistics: mean and 1 / sqrt(variance + eps) of each token, `[T]` in fp32, both with gradients: those of the
            heads of all ranks, with `all_heads`; None: of the heads at hand, taken here.

    Returns:
        `[T, N * Hv]`, or `[T, N * 3 Hv]` laid out [head, (U, norm or A, gated), channel].

    Raises:
        ValueError: a shape is wrong; names the argument.
    """
    _check(u, attention, scale, shift, over=over)
    if statistics is not None and over != "all_heads":
        raise ValueError("statistics are of all heads together; over is 'per_head'")
    num_heads, head_width = u.shape[1:]
    if mask is not None:
        check_mask(mask, len(u), num_heads * head_width * (1 if concat == "none" else 3))
    width = head_width * (num_heads if over == "all_heads" else 1)
    words = mask is None or (mask.starts_a_word and head_width % WORD == 0)
    if has_kernel(u, attention, scale, shift) and width <= MAX_WIDTH and words:
        from megarec_kernels.gated_norm.gpu import run_gated_norm

        weights = scale, shift, *(statistics or (None, None))
        return run_gated_norm(u, attention, weights, over=over, eps=eps, concat=concat, mask=mask)
    return gated_norm_reference(
        u, attention, scale, shift, over=over, eps=eps, concat=concat, mask=mask, statistics=statistics
    )


def _check(u: Tensor, attention: Tensor, scale: Tensor | None, shift: Tensor | None, *, over: Over) -> None:
    if u.dim() != 3:
        raise ValueError(f"u must be [T, N, Hv], got {list(u.shape)}")
    if attention.shape != u.shape:
        raise ValueError(f"attention must have the shape of u, {list(u.shape)}, got {list(attention.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, or neither")
    size = u.shape[1] * u.shape[2] if over == "all_heads" else u.shape[1]
    for name, weight in (("scale", scale), ("shift", shift)):
        if weight is not None and list(weight.shape) != [size]:
            raise ValueError(f"{name} must be [{size}] over {over}, got {list(weight.shape)}")
