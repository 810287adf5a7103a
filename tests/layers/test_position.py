import pytest
import torch

from megarec.layers.position import PositionEmbedding


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 1000])
def test_forward_and_gradient_are_those_of_indexing(num_tokens: int) -> None:
    layer = PositionEmbedding(40, 7, std=1.0).double()
    torch.nn.init.normal_(layer.weight)
    position = torch.randint(0, 33, (num_tokens,), generator=torch.Generator().manual_seed(0))
    weigh = torch.randn(num_tokens, 7, dtype=torch.float64)
    plain = layer.weight.detach().clone().requires_grad_()
    torch.testing.assert_close(layer(position), plain[position], rtol=0, atol=0)
    (layer(position) * weigh).sum().backward()
    (plain[position] * weigh).sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_gradient_of_bf16_is_summed_in_fp32() -> None:
    layer = PositionEmbedding(2, 1, std=1.0).bfloat16()
    layer(torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 0].tolist() == [1000.0, 0.0]  # a bf16 sum stops at 256


def test_gradient_is_the_same_in_every_run() -> None:
    torch.set_num_threads(2)
    try:
        layer = PositionEmbedding(3, 64, std=1.0)
        position, weigh = torch.randint(0, 3, (5000,)), torch.randn(5000, 64)
        grads = []
        for _ in range(5):
            layer.weight.grad = None
            (layer(position) * weigh).sum().backward()
            grads.append(layer.weight.grad)
        assert all(torch.equal(grad, grads[0]) for grad in grads)
    finally:
        torch.set_num_threads(1)


def test_a_position_beyond_the_last_is_refused() -> None:
    with pytest.raises(IndexError):
        PositionEmbedding(3, 4, std=1.0)(torch.tensor([3]))
