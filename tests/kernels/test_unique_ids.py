"""Distinct ids by bitmap and by sort, in Triton: on a GPU, or by its interpreter."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.unique_ids.gpu import BITS_PER_ID, run_bitmap, run_find_unique

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def assert_unique(ids: Tensor, found: tuple[Tensor, Tensor]) -> None:
    unique, index = found
    assert unique.dtype == index.dtype == torch.int64
    assert unique.tolist() == sorted(set(ids.flatten().tolist()) - {-1})
    assert index.shape == ids.shape
    assert torch.equal(torch.where(index < 0, -1, unique[index]) if len(unique) else index, ids)


@pytest.mark.parametrize("num_ids", [1, 31, 32, 33, 1000, 70_000])
@pytest.mark.parametrize("shape", [(1,), (63, 2), (1500,)])
def test_bitmap(shape: tuple[int, ...], num_ids: int) -> None:
    ids = torch.randint(-1, num_ids, shape, generator=torch.Generator().manual_seed(num_ids)).to(DEVICE)
    ids.view(-1)[0] = num_ids - 1
    ids.view(-1)[1:2] = -1
    assert_unique(ids, run_bitmap(ids, num_ids))


def test_only_empty_slots() -> None:
    ids = torch.full((40,), -1, device=DEVICE)
    assert_unique(ids, run_bitmap(ids, 7))
    assert_unique(ids, run_find_unique(ids, 2**50))


@pytest.mark.parametrize("num_ids", [30 * BITS_PER_ID, 30 * BITS_PER_ID + 1, 2**31, 2**31 + 1, 2**62])
def test_any_number_of_ids(num_ids: int) -> None:
    ids = torch.randint(-1, num_ids, (30,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids[:5] = num_ids - 1
    ids[5:8] = -1
    assert_unique(ids, run_find_unique(ids, num_ids))
