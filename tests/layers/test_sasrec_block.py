"""The SASRec block against torch's own multi-head attention, one history at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megarec_kernels.softmax_attention import softmax_attention
from torch import Tensor, nn

from megarec.layers.config import SasrecBlockConfig
from megarec.layers.dropout import AttentionDropout, Dropout, Randomness
from megarec.layers.sasrec_block import SasrecBlock
from megarec.layers.tokens import Tokens, split_events
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize, name_parameters

WIDTH, LENGTHS, DEAD = 12, (1, 7, 150, 3), 5
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
NUM_TOKENS = int(BOUNDS[-1]) + DEAD


def make_block(heads: int, dropout: float = 0.0, activation: str = "relu") -> SasrecBlock:
    config = SasrecBlockConfig(num_heads=heads, feed_forward_width=9, activation=activation)  # type: ignore[arg-type]
    block = SasrecBlock(config, width=WIDTH, layer=3, max_tokens=160, dropout=dropout, parts=local_parts()).double()
    name_parameters(block)
    initialize(block, seed=5)
    return block


def make_tokens(key: int | None = None) -> Tokens:
    times = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    randomness = None if key is None else Randomness(key=key, token=torch.arange(NUM_TOKENS))
    return split_events(BOUNDS, times, times, randomness=randomness, per_event=1)


def make_input() -> Tensor:
    return torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def twin(block: SasrecBlock, x: Tensor, heads: int, activation: str) -> Tensor:
    """`nn.MultiheadAttention` with the block's weights in torch's order: all heads of Q, then of K, then of V."""
    head_width = WIDTH // heads
    attention = nn.MultiheadAttention(WIDTH, heads, batch_first=True, dtype=torch.float64)
    key_value = block.key_value.weight.view(heads, 2, head_width, WIDTH)
    key_value_bias = block.key_value.bias.view(heads, 2, head_width)
    del attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
    attention.in_proj_weight = torch.cat(
        [block.query.weight, key_value[:, 0].reshape(WIDTH, WIDTH), key_value[:, 1].reshape(WIDTH, WIDTH)]
    )
    attention.in_proj_bias = torch.cat(
        [block.query.bias, key_value_bias[:, 0].flatten(), key_value_bias[:, 1].flatten()]
    )
    attention.out_proj.weight, attention.out_proj.bias = block.attention_out.weight, block.attention_out.bias
    outputs = []
    for first, last in pairwise(BOUNDS.tolist()):
        one = x[None, first:last]
        normed = F.layer_norm(one, (WIDTH,), eps=1e-8)
        future = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
        attended = attention(normed, one, one, attn_mask=future, need_weights=True)[0]
        y = F.layer_norm(normed + attended, (WIDTH,), eps=1e-8)
        hidden = getattr(F, activation)(F.linear(y, block.up.weight, block.up.bias))
        outputs.append((y + F.linear(hidden, block.down.weight, block.down.bias))[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("heads", [1, 3])
def test_block_equals_torch_forward_and_all_gradients(heads: int, activation: str) -> None:
    block, x = make_block(heads, activation=activation), make_input()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)  # biases too
    results = []
    for forward in (lambda x: block(x, make_tokens())[:-DEAD], lambda x: twin(block, x, heads, activation)):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), [leaf, *block.parameters()])
        results.append((out, *grads))
    for found, truth in zip(*results, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


def test_dropped_probabilities_equal_the_equation() -> None:
    """Every kept probability is divided by what is left; masks are those of the query's number, head by head."""
    heads, width = 2, 3
    q, k, v = (torch.randn(NUM_TOKENS, heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3))
    randomness = Randomness(key=11, token=torch.arange(NUM_TOKENS) + 1000)
    weigh = AttentionDropout(0.25, layer=1, heads=range(heads), max_tokens=160)(randomness)
    assert weigh is not None
    found = softmax_attention(q, k, v, BOUNDS, scale=0.7, weigh=weigh)
    truth = torch.zeros_like(found)
    for first, last in pairwise(BOUNDS.tolist()):
        for i in range(first, last):
            factor = weigh(torch.tensor([i]), last - first)[0]  # one row at a time, so no tile can mix them up
            for head in range(heads):
                p = torch.softmax(0.7 * k[first : i + 1, head] @ q[i, head], dim=0) * factor[head, : i + 1 - first]
                truth[i, head] = p @ v[first : i + 1, head]
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_masks_are_columns_of_one_mask_and_have_the_right_share() -> None:
    dropout = AttentionDropout(0.25, layer=1, heads=range(2), max_tokens=400)
    weigh = dropout(Randomness(key=3, token=torch.arange(500)))
    assert weigh is not None
    whole = weigh(torch.arange(500), 400)
    assert torch.equal(weigh(torch.tensor([7, 3]), 10), whole[[7, 3], :, :10])
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (whole > 0).double().mean().item() == pytest.approx(0.75, abs=4 * (0.1875 / whole.numel()) ** 0.5)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_dropout_falls_on_every_site_and_only_in_training() -> None:
    block, x = make_block(2, dropout=0.3), make_input()
    quiet = block(x, make_tokens())
    assert torch.equal(quiet, make_block(2)(x, make_tokens(7)))
    whole = block(x, make_tokens(7))
    for site in ("attention_dropout", "hidden_dropout", "output_dropout"):
        silenced = make_block(2, dropout=0.3)
        old = getattr(silenced, site)
        off = (
            AttentionDropout(0.0, layer=3, heads=range(2), max_tokens=160)
            if isinstance(old, AttentionDropout)
            else Dropout(0.0, layer=3, site=old.site)
        )
        setattr(silenced, site, off)
        assert not torch.equal(silenced(x, make_tokens(7)), whole), site
    assert torch.equal(block(x, make_tokens(7)), whole)
    assert not torch.equal(block(x, make_tokens(8)), whole)
