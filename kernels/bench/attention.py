"""What the attention ops share: lengths of histories, work by one convention, methods by history or padded."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.bench.cases import Inputs, Method, Work


def zipf_lengths(num_users: int, longest: int, *, exponent: float = 1.2) -> list[int]:
    """Lengths with `P(n) ~ n^-exponent`, cut at `longest`, one user at the longest; the same for equal arguments."""
    lengths = np.minimum(np.random.default_rng(0).zipf(exponent, num_users), longest)
    lengths[0] = longest
    return lengths.tolist()


def eighth_lengths(num_users: int, longest: int) -> list[int]:
    """`longest / rank^s`, with s such that the mean is an eighth of the longest; in a random order."""
    rank = np.arange(1, num_users + 1)
    exponents = np.linspace(0.0, 3.0, 3001)
    means = np.array([np.maximum(longest / rank**s, 1).mean() for s in exponents])
    s = exponents[int(np.argmin(np.abs(means - longest / 8)))]
    lengths = np.maximum(longest / rank**s, 1).astype(np.int64)
    return np.random.default_rng(0).permutation(lengths).tolist()


def cu_seqlens_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[B + 1]` int64, where each history begins."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)


def attention_work(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Work, Work]:
    """Work of causal attention: both products of the forward over half of all pairs, 2.5 times that backward.

    `flops = sum_n n^2 N (Hqk + Hv)`, that is `2 sum n^2 N H` where both widths are H; the backward has five products.
    The forward reads q, k, v and writes the output; the backward reads these and the gradient, and writes three.

    Source: the benchmarks of the public HSTU kernels count so, and of FlashAttention.
    """
    heads, width, value_width = q.shape[1], q.shape[2], v.shape[2]
    pairs = float(cu_seqlens.diff().double().square().sum())
    flops = pairs * heads * (width + value_width)
    query_bytes, value_bytes = q.nbytes, v.nbytes
    return (
        Work(flops=flops, bytes=2 * query_bytes + 2 * value_bytes),
        Work(flops=2.5 * flops, bytes=4 * query_bytes + 3 * value_bytes),
    )


def by_history(reference: Callable[..., Tensor], tokenwise: Sequence[str]) -> Method:
    """A reference over whole packs, run one history at a time and again in the backward: memory of one history.

    Args:
        reference: `reference(inputs) -> [T, ...]` for inputs that hold one history.
        tokenwise: the inputs that have one row per token, or are None.
    """

    def method(inputs: Inputs) -> Tensor:
        lengths = inputs["cu_seqlens"].diff().tolist()
        pieces = {name: inputs[name].split(lengths) for name in tokenwise if inputs[name] is not None}
        outputs = []
        for user, length in enumerate(lengths):
            own = inputs | {name: histories[user] for name, histories in pieces.items()}
            own["cu_seqlens"] = torch.tensor([0, length], device=inputs["cu_seqlens"].device)
            outputs.append(checkpoint(reference, own, use_reentrant=False))
        return torch.cat(outputs)

    return method


def prepare_padding(inputs: Inputs) -> Inputs:
    """The inputs with the rows `[T]` of the tokens among `B * max_length` padded ones; made once and kept."""
    if "padded_rows" not in inputs:
        lengths, first = inputs["cu_seqlens"].diff(), inputs["cu_seqlens"][:-1]
        user = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        place = torch.arange(len(user), device=lengths.device) - first[user]
        inputs["padded_rows"] = user * inputs["max_length"] + place
    return inputs


def pad_histories(values: Tensor, inputs: Inputs) -> Tensor:
    """`[T, ...]` to `[B, max_length, ...]` with zeros."""
    num_users, longest = len(inputs["cu_seqlens"]) - 1, inputs["max_length"]
    padded = values.new_zeros(num_users * longest, *values.shape[1:])
    return padded.index_copy(0, inputs["padded_rows"], values).view(num_users, longest, *values.shape[1:])


def unpad_histories(padded: Tensor, inputs: Inputs) -> Tensor:
    """The way back of `pad_histories`."""
    return padded.flatten(0, 1).index_select(0, inputs["padded_rows"])
