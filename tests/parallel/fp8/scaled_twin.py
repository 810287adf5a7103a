"""The slow twin of the FP8 product: operands rounded, brought back, multiplied in fp64."""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
U32, UNIT = 2.0**-24, {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half the gap to the next number, relative
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `x` is after FP8, in fp64, without `quantize`."""
    amax = float(x.abs().max())
    scale = torch.tensor(LARGEST[dtype] / amax if amax else 1.0, dtype=torch.float32)
    return (x.float() * scale).to(dtype).double() / scale.double()


def assert_product(found: Tensor, one: Tensor, other: Tensor, *, dtype: torch.dtype, unit: float = U32) -> None:
    """`found` is `one @ other` summed in fp32 in any order, times two scales, rounded to `dtype` once.

    A sum of K terms in fp32 errs by at most K u times the sum of magnitudes (u = 2^-24; the products of FP8 numbers are
    exact in fp32). The inverses of two scales and two products with them err by u each, the result by u of `dtype`;
    one u more for what is of second order. `unit` is another u, where the sum is not in fp32.
    """
    exact, magnitude = one @ other, one.abs() @ other.abs()
    bound = (one.shape[1] + 5) * unit * magnitude + UNIT[dtype] * (exact.abs() + (one.shape[1] + 5) * unit * magnitude)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound).all()
