import torch

from megarec.layers.dropout import Randomness
from megarec.layers.tokens import interleave, next_event, split_events, token_of_event
from megarec.parallel.slices import Slices


def test_events_split_into_tokens() -> None:
    tokens = split_events(
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([10, 20, 5, 0]),
        torch.tensor([20, 20, 9, 0]),
        randomness=Randomness(key=1, token=torch.tensor([4, 5, 6, 7])),
        per_event=2,
    )
    assert tokens.cu_seqlens.tolist() == [0, 4, 4, 6]
    assert tokens.timestamp.tolist() == [10, 10, 20, 20, 5, 5, 0, 0]
    assert tokens.query_timestamp.tolist() == [10, 20, 20, 20, 5, 9, 0, 0]
    assert tokens.randomness is not None
    assert tokens.randomness.token.tolist() == [8, 9, 10, 11, 12, 13, 14, 15]


def test_interleave_and_back() -> None:
    kinds = [torch.randn(5, 3) for _ in range(3)]
    tokens = interleave(kinds)
    assert torch.equal(tokens[3 * 2 + 1], kinds[1][2])
    for number, kind in enumerate(kinds):
        assert torch.equal(token_of_event(tokens, 3, number), kind)


def test_next_event_stays_in_its_history() -> None:
    x = torch.arange(1.0, 9.0).unsqueeze(1).requires_grad_()
    following = next_event(x, torch.tensor([0, 0, 3, 4, 4, 6]), Slices())  # two dead rows
    assert following.squeeze(1).tolist() == [2, 3, 0, 0, 6, 0, 0, 0]
    following.sum().backward()
    assert x.grad is not None
    assert x.grad.squeeze(1).tolist() == [0, 1, 1, 0, 0, 1, 0, 0]


def test_next_event_of_nothing() -> None:
    assert next_event(torch.zeros(0, 4), torch.tensor([0]), Slices()).shape == (0, 4)
    assert next_event(torch.ones(2, 4), torch.tensor([0]), Slices()).abs().sum() == 0
