"""Tables whose rows are read and updated by kernels train as those in plain torch do."""

import os

import pytest
import torch
from megarec_kernels import table_rows
from megarec_kernels.hashing import signed
from megarec_kernels.unique_ids import find_unique
from torch import Tensor

from megarec.base.random import hash_numpy
from megarec.base.random_torch import hash_torch
from megarec.embedding.config import TableConfig, TableSpec
from megarec.embedding.lookup import lookup
from megarec.embedding.tables import TableGroup

pytest.importorskip("triton")

import triton
import triton.language as tl
from megarec_kernels.programs import hash_bits

KINDS = ["sgd", "rowwise_adagrad", "adam", "rowwise_adam"]
WIDTH = 20
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@triton.jit(do_not_specialize=["key"])
def write_bits(key, counters, bits, num, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    counter = tl.load(counters + place, mask=place < num, other=0)
    tl.store(bits + place, hash_bits(key, counter).to(tl.int64), mask=place < num)


def train(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Three steps of two packs each, one with bags of three and one long segment."""
    specs = [TableSpec(name="item", num_rows=50, init_std=1.0), TableSpec(name="hour", num_rows=3)]
    settings = TableConfig(kind=kind, weight_decay=0.1)
    tables = TableGroup(specs, width=WIDTH, group=None, seed=4, device=device, dtype=dtype, optimizer=settings)
    draws = torch.Generator().manual_seed(1)
    tables.state_pieces()["values"].copy_(torch.randn(tables.num_rows, WIDTH, generator=draws))
    for _ in range(3):
        rows = torch.randint(-1, tables.num_rows, (100, 3), generator=draws)
        rows[:, 2] = 51
        fetched = tables.fetch(rows.to(device))
        for slots in (fetched.index, fetched.index[:50, :1]):
            output = lookup(fetched, slots)
            output.backward(torch.randn(output.shape, generator=draws).to(output))
        tables.update(tables.collect_gradients(fetched), lr=0.05, scale=0.7)
    return {name: tensor.cpu().double() for name, tensor in tables.state_pieces().items()}


def assert_alike(found: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Sums of up to 100 gradients in fp32 in another order, in three steps: 300 roundings of the largest number."""
    for name, tensor in plain.items():
        allowed = 300 * torch.finfo(torch.float32).eps * tensor.abs().max()
        assert (found[name] - tensor).abs().max() <= allowed, name


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(kind, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(table_rows, "has_kernel", lambda values: values.dtype == torch.float32)
    assert_alike(train(kind, DEVICE, torch.float32), plain)


def test_an_update_without_decay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train("sgd", torch.device("cpu"), torch.float32)
    monkeypatch.setattr("megarec.embedding.tables.update_rows", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        assert_alike(train("sgd", torch.device("cpu"), torch.float32), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trains_as_the_cpu_does(kind: str, dtype: torch.dtype) -> None:
    """A bf16 row whose fp32 number differs in its last bits may be rounded the other way, one time in thousands."""
    found, plain = train(kind, torch.device("cuda"), dtype), train(kind, torch.device("cpu"), dtype)
    if dtype == torch.bfloat16:
        far = (found["values"] - plain["values"]).abs() > 2.0**-20
        assert far.double().mean() < 0.01
        torch.testing.assert_close(found["values"], plain["values"], rtol=2.0**-6, atol=2.0**-6)
    else:
        assert_alike(found, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1000, 10**7])
def test_a_gpu_finds_the_rows_of_the_cpu(num_rows: int) -> None:
    rows = torch.randint(-1, num_rows, (3000,), generator=torch.Generator().manual_seed(0))
    for found, want in zip(
        *(find_unique(rows.to(device), num_ids=num_rows) for device in ("cuda", "cpu")), strict=True
    ):
        assert torch.equal(found.cpu(), want)


def test_the_hash_of_the_kernels_is_that_of_the_tables() -> None:
    counters = torch.cat([torch.arange(50), torch.tensor([2**63 - 1, -(2**63), -1])])
    for key in (0, 12345, 2**63 + 7, 2**64 - 1):
        want = torch.from_numpy(hash_numpy(key, counters.numpy()).view("int64"))
        assert torch.equal(hash_torch(key, counters), want)
        bits = torch.empty_like(counters, device=DEVICE)
        write_bits[(1,)](signed(key), counters.to(DEVICE), bits, len(counters), BLOCK=64)
        assert torch.equal(bits.cpu(), want)
