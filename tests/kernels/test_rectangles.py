"""Attention between some queries and some keys: each rectangle against its pairs, and all of them against the whole."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from megarec_kernels.hstu_attention import bucket_times, hstu_attention
from megarec_kernels.hstu_attention import cpu as hstu
from megarec_kernels.hstu_attention.cpu import Bias, HSTUSettings
from megarec_kernels.hstu_attention.reference import time_bucket
from megarec_kernels.rectangles import RectanglePlan, plan_rectangles
from megarec_kernels.softmax_attention import rectangle as softmax
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.tiles import heads_first
from megarec_kernels.visibility import Visibility, candidate_suffix
from test_attention import relative_error
from torch import Tensor

LENGTHS: dict[str, list[int]] = {
    "mixed": [0, 1, 63, 100, 7, 0, 300],
    "one user": [150],
    "blocks of rows": [700, 129, 128],
    "short ones": [1] * 20 + [2] * 30 + [9] * 5,  # the softmax of one key is constant: its gradient alone is rounding
    "nobody": [0, 0],
}
HEADS, WIDTH, DEAD, BUCKETS, SCALE = 2, 4, 5, 6, 0.5
ERROR = 1e-12


@dataclass(kw_only=True)
class Pack:
    """Histories with random q, k, v and biases; `queries` and `keys` are some of their tokens."""

    cu_seqlens: Tensor
    visibility: Visibility | None
    q: Tensor
    k: Tensor
    v: Tensor
    outer: Tensor
    position: Tensor
    time: Tensor
    timestamp: Tensor
    asked: Tensor
    shares: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.position, self.time]


def make_pack(name: str, *, candidates: bool) -> Pack:
    """With the tokens dealt out at random to three shares."""
    lengths = LENGTHS[name]
    generator = torch.Generator().manual_seed(len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1]) + DEAD

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    visibility = None
    if candidates:
        count = torch.tensor([min(3, length // 2) for length in lengths])
        visibility = candidate_suffix(cu_seqlens, count, group=2, num_tokens=total)
    timestamp = torch.randint(0, 500, (total,), generator=generator)
    owner = torch.randint(0, 3, (total,), generator=generator)
    q, k, v, outer = (normal(total, HEADS, WIDTH) for _ in range(4))
    return Pack(
        cu_seqlens=cu_seqlens,
        visibility=visibility,
        q=q,
        k=k,
        v=v,
        outer=outer,
        position=normal(max(lengths) + 1),
        time=normal(BUCKETS + 1),
        timestamp=timestamp,
        asked=timestamp + torch.randint(0, 50, (total,), generator=generator),
        shares=[(owner == share).nonzero().squeeze(1) for share in range(3)],
    )


def pairs_seen(pack: Pack) -> tuple[Tensor, Tensor]:
    """Of all tokens `[T, T]`: which keys a query sees, and their distance."""
    total = len(pack.q)
    seen, distance = torch.zeros(total, total, dtype=torch.bool), torch.zeros(total, total, dtype=torch.int64)
    for first, last in pairwise(pack.cu_seqlens.tolist()):
        own, index = slice(first, last), torch.arange(last - first)
        place, allowed = index, index[:, None] >= index
        if pack.visibility is not None:
            before, group, place = (x[own] for x in vars(pack.visibility).values())
            allowed = allowed & ((index < before[:, None]) | (index >= group[:, None]))
        seen[own, own], distance[own, own] = allowed, (place[:, None] - place).clamp(min=0)
    return seen, distance


def of_pairs(kind: str, pack: Pack, queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Output, log-sum-exp of softmax, and gradients of q, k, v and biases, from all pairs at once."""
    q, k, v, position, time = (x.clone().requires_grad_() for x in pack.inputs)
    seen, distance = (x[queries][:, keys] for x in pairs_seen(pack))
    scores = SCALE * torch.einsum("inh,jnh->nij", q[queries], k[keys])
    if kind == "hstu":
        bucket = time_bucket(pack.asked[queries, None] - pack.timestamp[keys], BUCKETS)
        scores = scores + position[distance] + time[bucket]
        weights, extra = torch.where(seen, scores * scores.sigmoid(), 0.0), []
    else:
        largest = (
            torch.where(seen, scores.detach(), -1e9).amax(dim=2, keepdim=True) if len(keys) else scores.sum(2, True)
        )
        weights = torch.where(seen, scores - largest, -torch.inf).exp()
        total = weights.sum(dim=2, keepdim=True)
        weights, extra = weights / total.clamp(min=1e-300), [(total.log() + largest).squeeze(2)]
    out = torch.einsum("nij,jnh->inh", weights, v[keys]) + 0.0 * (q.sum() + k.sum() + position.sum() + time.sum())
    grads = torch.autograd.grad(out, [q, k, v, position, time], pack.outer[queries])
    return [x.detach() for x in (out, *extra, *(grads if kind == "hstu" else grads[:3]))]


def of_rectangles(kind: str, pack: Pack, queries: Tensor, shares: list[Tensor]) -> list[Tensor]:
    """The same by rectangles of the `queries` with each of the shares of keys in turn."""
    parts = [plan_rectangles(pack.cu_seqlens, queries, keys) for keys in shares]
    q, outer = heads_first(pack.q[queries]), heads_first(pack.outer[queries])
    inputs = [(q, heads_first(pack.k[keys]), heads_first(pack.v[keys])) for keys in shares]
    grad_q = torch.zeros_like(q)
    grads = [(grad_q, torch.zeros_like(k), torch.zeros_like(v)) for _, k, v in inputs]
    out, log_sum = torch.zeros_like(q), q.new_full((*q.shape[:2], 1), -torch.inf)
    extra: list[Tensor | None] = []
    if kind == "hstu":
        plan = RectanglePlan(cu_seqlens=pack.cu_seqlens, tiles=sum(parts, start=()))
        buckets = bucket_times(plan, pack.timestamp, pack.asked, num_buckets=BUCKETS)
        settings = HSTUSettings(scale=SCALE, divisor=1.0, plan=plan, time_buckets=buckets, visibility=pack.visibility)
        bias, ends = Bias(pack.position, pack.time, settings, dtype=q.dtype), [0]
        for part, (q, k, v), grad in zip(parts, inputs, grads, strict=True):
            ends.append(ends[-1] + len(part))
            out += hstu.attend((q, k, v), range(*ends[-2:]), bias=bias)
            found = hstu.attend_backward(outer, (q, k, v), range(*ends[-2:]), bias=bias)
            for total, own in zip(grad, found, strict=True):
                total += own
        extra = list(bias.gradients())
    else:
        settings = {"scale": SCALE, "visibility": pack.visibility}
        for part, given in zip(parts, inputs, strict=True):
            softmax.merge_outputs((out, log_sum), given, part, **settings)
        for part, given, grad in zip(parts, inputs, grads, strict=True):
            softmax.add_gradients(grad, outer, given, part, merged=(out, log_sum), **settings)
    whole = [torch.zeros_like(pack.q) for _ in range(3)]
    whole[0][queries] = grad_q.transpose(0, 1)
    for keys, (_, grad_k, grad_v) in zip(shares, grads, strict=True):
        whole[1][keys], whole[2][keys] = grad_k.transpose(0, 1), grad_v.transpose(0, 1)
    middle = [] if kind == "hstu" else [log_sum.squeeze(2)]
    return [out.transpose(0, 1), *middle, *whole, *(x for x in extra if x is not None)]


def finite(values: list[Tensor]) -> list[Tensor]:
    """-inf, the log-sum-exp of nothing, as a number that nothing else comes near."""
    return [x.nan_to_num(nan=torch.nan, neginf=-1e6) for x in values]


@pytest.mark.parametrize("candidates", [False, True], ids=["histories", "candidates"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("kind", ["hstu", "softmax"])
def test_a_rectangle_has_its_pairs_alone(kind: str, name: str, candidates: bool) -> None:
    pack = make_pack(name, candidates=candidates)
    queries, keys, _ = pack.shares
    for columns in (keys, queries):
        found, truth = of_rectangles(kind, pack, queries, [columns]), of_pairs(kind, pack, queries, columns)
        assert relative_error(finite(found), finite(truth)) <= ERROR


@pytest.mark.parametrize("candidates", [False, True], ids=["histories", "candidates"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("kind", ["hstu", "softmax"])
def test_rectangles_of_all_keys_make_the_whole(kind: str, name: str, candidates: bool) -> None:
    """The second way to the same: the kernels of whole packs, for the outputs of every share."""
    pack = make_pack(name, candidates=candidates)
    settings = {"scale": SCALE, "visibility": pack.visibility}
    if kind == "hstu":
        biases = {"position_bias": pack.position, "time_bias": pack.time}
        times = {"timestamp": pack.timestamp, "query_timestamp": pack.asked}
        truth = hstu_attention(pack.q, pack.k, pack.v, pack.cu_seqlens, divisor=1.0, **settings, **biases, **times)
    else:
        truth = softmax_attention(pack.q, pack.k, pack.v, pack.cu_seqlens, **settings)
    found = torch.zeros_like(truth)
    for queries in pack.shares:
        found[queries] = of_rectangles(kind, pack, queries, pack.shares)[0]
    assert relative_error([found], [truth]) <= ERROR


def test_off_the_cpu_softmax_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for other devices, run here: it must equal the flash kernel, on rows that see nothing too."""
    pack = make_pack("mixed", candidates=True)
    queries, keys, _ = pack.shares
    flash = of_rectangles("softmax", pack, queries, [keys])
    monkeypatch.setattr(softmax, "ON_CPU", "nowhere")
    found = of_rectangles("softmax", pack, queries, [keys])
    assert relative_error(finite(found), finite(flash)) <= ERROR
    assert not all(torch.equal(a, b) for a, b in zip(found, flash, strict=True))  # it was the other branch


def test_a_query_sees_no_key_of_another_history_or_of_later() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    rectangles = plan_rectangles(cu_seqlens, torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5, 7, 9]))
    pairs = {
        (int(rectangle.query_token[user, block[0] + row]), int(rectangle.key_token[user, column]))
        for rectangle in rectangles
        for block in rectangle.row_blocks()
        for user, row, column in rectangle.seen(None, block).nonzero().tolist()
    }
    assert pairs == {(1, 0), (4, 3), (6, 3), (6, 5)}


def test_keys_that_come_later_are_not_visited() -> None:
    """Blocks of 128 queries behind 0, 1 and 2 blocks of 128 keys of the same history, which takes turns."""
    token = torch.arange(768).view(6, 128)
    (rectangle,) = plan_rectangles(torch.tensor([0, 768]), token[::2].flatten(), token[1::2].flatten())
    assert list(rectangle.row_blocks()) == [(128, 256, 128), (256, 384, 256)]
    assert plan_rectangles(torch.tensor([0, 768]), token[0], token[1]) == ()
