"""Attention in parts, each between some queries and some keys, against the whole."""

from collections.abc import Sequence

import pytest
import torch
from megarec_kernels.hstu_attention import rectangle as hstu
from megarec_kernels.hstu_attention.rectangle import Biases, bucket_rectangles
from megarec_kernels.hstu_attention.reference import hstu_attention_reference
from megarec_kernels.rectangles import plan_rectangles
from megarec_kernels.softmax_attention import rectangle as softmax
from megarec_kernels.softmax_attention.reference import softmax_attention_reference
from megarec_kernels.tiles import heads_first
from megarec_kernels.visibility import Visibility, candidate_suffix
from torch import Tensor

LENGTHS: dict[str, list[int]] = {
    "mixed": [0, 1, 63, 100, 7, 0, 300],
    "one user": [150],
    "short ones": [1] * 20 + [2] * 30,
    "nobody": [0, 0],
}
HEADS, WIDTH, DEAD, BUCKETS = 2, 4, 5, 6


class Pack:
    """A pack with random q, k, v and biases, its tokens dealt out at random to three ranks, and one gradient."""

    def __init__(self, lengths: Sequence[int], *, candidates: bool) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        self.num_tokens = int(self.cu_seqlens[-1]) + DEAD
        count = torch.tensor([min(3, length) for length in lengths])
        self.visibility: Visibility | None = None
        if candidates:
            self.visibility = candidate_suffix(self.cu_seqlens, count, group=1, num_tokens=self.num_tokens)
        shape = (self.num_tokens, HEADS, WIDTH)
        self.q, self.k, self.v, self.outer = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
        )
        self.position = torch.randn(max([1, *lengths]), generator=generator, dtype=torch.float64)
        self.time = torch.randn(BUCKETS + 1, generator=generator, dtype=torch.float64)
        self.timestamp = torch.randint(0, 500, (self.num_tokens,), generator=generator)
        self.asked = self.timestamp + torch.randint(0, 50, (self.num_tokens,), generator=generator)
        owner = torch.randint(0, 3, (self.num_tokens,), generator=generator)
        self.shares = [(owner == rank).nonzero().squeeze(1) for rank in range(3)]

    def want(self, kind: str) -> list[Tensor]:
        """Output and gradients of the slow reference."""
        inputs = [x.clone().requires_grad_() for x in (self.q, self.k, self.v, self.position, self.time)]
        q, k, v, position, time = inputs
        if kind == "hstu":
            out = hstu_attention_reference(
                q,
                k,
                v,
                self.cu_seqlens,
                scale=0.5,
                divisor=1.0,
                position_bias=position,
                time_bias=time,
                timestamp=self.timestamp,
                query_timestamp=self.asked,
                visibility=self.visibility,
            )
        else:
            out = softmax_attention_reference(q, k, v, self.cu_seqlens, scale=0.5, visibility=self.visibility)
            inputs = inputs[:3]
        return [out, *torch.autograd.grad(out, inputs, self.outer)]

    def got(self, kind: str) -> list[Tensor]:
        """The same from all pairs of shares, put together."""
        whole = [torch.zeros_like(self.q) for _ in range(4)]
        biases = Biases(
            position=self.position,
            time=self.time,
            grad_position=torch.zeros_like(self.position),
            grad_time=torch.zeros_like(self.time),
        )
        for queries in self.shares:
            parts = [plan_rectangles(self.cu_seqlens, queries, keys) for keys in self.shares]
            if kind == "hstu":
                out, grads = self._hstu(queries, parts, biases)
            else:
                out, grads = self._softmax(queries, parts)
            whole[0][queries] = out.transpose(0, 1)
            whole[1][queries] = grads[0][0].transpose(0, 1) * 0.5
            for keys, (_, grad_k, grad_v) in zip(self.shares, grads, strict=True):
                whole[2][keys] += grad_k.transpose(0, 1)
                whole[3][keys] += grad_v.transpose(0, 1)
        sums = [x for x in (biases.grad_position, biases.grad_time) if x is not None]
        return [*whole, *sums] if kind == "hstu" else whole

    def _inputs(self, queries: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        q = heads_first(self.q[queries]) * 0.5
        return [(q, heads_first(self.k[keys]), heads_first(self.v[keys])) for keys in self.shares]

    def _hstu(self, queries: Tensor, parts, biases: Biases):
        inputs = self._inputs(queries)
        out, grad_q = torch.zeros_like(inputs[0][0]), torch.zeros_like(inputs[0][0])
        outer, grads = heads_first(self.outer[queries]), []
        for rectangles, (q, k, v) in zip(parts, inputs, strict=True):
            buckets = bucket_rectangles(rectangles, self.timestamp, self.asked, num_buckets=BUCKETS)
            settings = {"biases": biases, "buckets": buckets, "visibility": self.visibility}
            hstu.add_outputs(out, (q, k, v), rectangles, **settings)
            grads.append((grad_q, torch.zeros_like(k), torch.zeros_like(v)))
            hstu.add_gradients(grads[-1], outer, (q, k, v), rectangles, **settings)
        return out, grads

    def _softmax(self, queries: Tensor, parts):
        inputs = self._inputs(queries)
        out, grad_q = torch.zeros_like(inputs[0][0]), torch.zeros_like(inputs[0][0])
        log_sum = torch.full((*out.shape[:2], 1), float("-inf"), dtype=out.dtype)
        for rectangles, given in zip(parts, inputs, strict=True):
            softmax.merge_outputs((out, log_sum), given, rectangles, self.visibility)
        outer, grads = heads_first(self.outer[queries]), []
        delta = (outer * out).sum(2, keepdim=True)
        for rectangles, (q, k, v) in zip(parts, inputs, strict=True):
            grads.append((grad_q, torch.zeros_like(k), torch.zeros_like(v)))
            softmax.add_gradients(
                grads[-1], (outer, delta), (q, k, v), rectangles, log_sum=log_sum, visibility=self.visibility
            )
        return out, grads


@pytest.mark.parametrize("candidates", [False, True], ids=["histories", "candidates"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("kind", ["hstu", "softmax"])
def test_the_parts_are_the_whole(kind: str, name: str, candidates: bool) -> None:
    pack = Pack(LENGTHS[name], candidates=candidates)
    for number, (mine, truth) in enumerate(zip(pack.got(kind), pack.want(kind), strict=True)):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-11, msg=lambda m, n=number: f"{n}: {m}")


def test_a_query_sees_no_key_of_another_history_or_of_later() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    rectangles = plan_rectangles(cu_seqlens, torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5, 7, 9]))
    pairs = {
        (int(query), int(key))
        for rectangle in rectangles
        for block in rectangle.row_blocks()
        for user, row, column in rectangle.seen(block, None).nonzero().tolist()
        for query, key in [(rectangle.query_token[user, row], rectangle.key_token[user, column])]
    }
    assert pairs == {(1, 0), (4, 3), (6, 3), (6, 5)}
