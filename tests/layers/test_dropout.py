from dataclasses import replace

import torch

from megarec.layers.dropout import Dropout, Randomness

X = torch.ones(500, 70, dtype=torch.float64)


def drop(layer: int = 0, site: str = "a", key: int = 1, rows: slice = slice(None), p: float = 0.3) -> torch.Tensor:
    token = torch.arange(500)[rows]
    return Dropout(p, layer=layer, site=site)(X[rows], Randomness(key=key, token=token))


def test_any_slice_of_tokens_gets_its_part_of_the_same_mask() -> None:
    whole = drop()
    pieces = [drop(rows=slice(0, 123)), drop(rows=slice(123, 124)), drop(rows=slice(124, 500))]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(drop(rows=slice(0, 500, 2)), whole[::2])


def test_drops_the_given_share_and_keeps_the_mean() -> None:
    dropped = drop()
    share = (dropped == 0).double().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / X.numel()) ** 0.5
    kept = dropped[dropped != 0]
    exact = round(0.3 * 65536) / 65536
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - exact)))
    by_channel = (dropped == 0).double().mean(0)
    assert (by_channel - 0.3).abs().max() < 5 * (0.3 * 0.7 / 500) ** 0.5


def test_layers_sites_and_packs_draw_their_own() -> None:
    masks = [drop() == 0, drop(layer=1) == 0, drop(site="b") == 0, drop(key=2) == 0]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            agreement = (one == other).double().mean()
            assert abs(agreement - (0.3**2 + 0.7**2)) < 0.02


def test_gradient_goes_where_the_value_went() -> None:
    x = X.clone().requires_grad_()
    y = Dropout(0.3, layer=0, site="a")(x, Randomness(key=1, token=torch.arange(500)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_off_without_randomness_or_probability() -> None:
    randomness = Randomness(key=1, token=torch.arange(500))
    assert Dropout(0.3, layer=0, site="a")(X, None) is X
    assert Dropout(0.0, layer=0, site="a")(X, randomness) is X
    assert torch.equal(Dropout(0.3, layer=0, site="a")(X, replace(randomness)), drop())
