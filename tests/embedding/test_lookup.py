import pytest
import torch
import torch.nn.functional as F
from megarec_kernels.unique_ids import find_unique
from torch import Tensor

from megarec.embedding.config import TableSpec
from megarec.embedding.lookup import lookup
from megarec.embedding.tables import TableGroup


def make(num_rows: int, dtype: torch.dtype) -> TableGroup:
    specs = [TableSpec(name="item", num_rows=num_rows, init_std=1.0)]
    return TableGroup(specs, width=5, group=None, seed=0, device=torch.device("cpu"), dtype=dtype)


def rows_of(shape: tuple[int, ...], num_rows: int) -> Tensor:
    return torch.randint(-1, num_rows, shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", [(11, 3), (11, 1), (2, 5, 4), (1,), (63, 2), (0, 3), (4, 0)])
@pytest.mark.parametrize("num_rows", [3, 500])
def test_sums_and_gradients_equal_embedding_bag(shape: tuple[int, ...], num_rows: int) -> None:
    tables = make(num_rows, torch.float64)
    rows = rows_of(shape, num_rows)
    fetched = tables.fetch(rows)
    got = lookup(fetched, fetched.index)

    weight = torch.cat([tables.whole("item"), torch.zeros(1, 5, dtype=torch.float64)]).requires_grad_()
    slots = F.embedding(torch.where(rows < 0, num_rows, rows), weight)
    want = slots.sum(dim=-2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    if not rows.numel():
        return
    factor = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    (got.sin() * factor).sum().backward()
    (want.sin() * factor).sum().backward()
    owned = tables.collect_gradients(fetched)
    dense = torch.zeros(num_rows, 5, dtype=torch.float64)
    dense[owned.local_rows] = owned.grad
    torch.testing.assert_close(dense, weight.grad[:-1], rtol=0, atol=1e-13)


def test_gradients_of_several_lookups_add_up() -> None:
    tables = make(9, torch.float32)
    fetched = tables.fetch(torch.tensor([4, 4, -1, 2]))
    for scale in (1.0, 10.0):
        (lookup(fetched, fetched.index.view(2, 2)) * scale).sum().backward()
    assert fetched.values.shape == (2, 5)
    assert fetched.grad[:, 0].tolist() == [11.0, 22.0]  # rows 2 and 4
    assert fetched.leaf.grad is None


def test_bf16_rows_gather_gradients_in_fp32() -> None:
    tables = make(3, torch.bfloat16)
    fetched = tables.fetch(torch.zeros(600, 1, dtype=torch.int64))
    lookup(fetched, fetched.index).sum().backward()
    assert fetched.grad.dtype == torch.float32
    assert fetched.grad[0, 0] == 600  # bf16 would have stopped at 256


def test_the_backward_pass_is_bit_for_bit_repeatable() -> None:
    tables = make(40, torch.float32)
    rows = rows_of((500, 4), 40)
    seen = []
    for _ in range(2):
        fetched = tables.fetch(rows)
        output = lookup(fetched, fetched.index)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        seen.append(fetched.grad)
    assert torch.equal(*seen)


@pytest.mark.parametrize("count", [0, 1, 5, 100, 3000])
def test_bitmap_and_sort_find_the_same_rows(count: int) -> None:
    addresses = rows_of((count,), 400)
    one, one_index = find_unique(addresses, num_ids=400)  # sorts when there are few addresses
    padding = torch.full((4000,), -1)
    other, other_index = find_unique(torch.cat([addresses, padding]), num_ids=400)  # marks
    assert torch.equal(one, other)
    assert torch.equal(one_index, other_index[:count])
    assert torch.equal(torch.where(one_index < 0, -1, one[one_index]) if count else addresses, addresses)
    assert one.tolist() == sorted(set(addresses.tolist()) - {-1})
