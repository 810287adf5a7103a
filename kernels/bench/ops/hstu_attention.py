"""HSTU attention: packed histories, without biases and with both."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megarec_kernels.hstu_attention import TimeBuckets, bucket_times, hstu_attention
from megarec_kernels.hstu_attention.reference import hstu_attention_reference, time_bucket
from megarec_kernels.tiles import plan_tiles
from torch import Tensor

from kernels.bench.attention import (
    attention_work,
    by_history,
    cu_seqlens_of,
    eighth_lengths,
    pad_histories,
    prepare_padding,
    unpad_histories,
    zipf_lengths,
)
from kernels.bench.cases import Case, Draw, Inputs
from kernels.bench.compiled import compiled

NUM_BUCKETS = 128
ARGUMENTS = ("q", "k", "v", "cu_seqlens")
SETTINGS = ("scale", "divisor", "position_bias", "time_bias", "timestamp", "query_timestamp")
TOKENWISE = ("q", "k", "v", "timestamp", "query_timestamp")


def cases() -> Iterator[Case]:
    """The shapes of the public benchmarks, long users, jagged ones, and what two CPU cores can do."""
    for biases in (False, True):
        yield _case("b3 n20 d16", {"small"}, [20, 0, 7], heads=2, width=16, biases=biases)
    for width in (128, 256):
        for biases in (False, True):
            yield _case(f"b32 n4096 d{width}", {"h200"}, [4096] * 32, heads=4, width=width, biases=biases)
    for length in (1024, 2048, 4096):
        yield _case(f"b128 n{length} d128", {"h200"}, [length] * 128, heads=4, width=128)
    for num_users, length in ((8, 8192), (4, 16384)):
        yield _case(f"b{num_users} n{length} d128", {"h200"}, [length] * num_users, heads=4, width=128)
    for num_users in (32, 128):
        lengths = zipf_lengths(num_users, 4096)
        yield _case(f"b{num_users} zipf1.2 n4096 d128", {"h200"}, lengths, heads=4, width=128)
    for biases in (False, True):
        yield _case("b128 mean/max=1/8 n880 d50", {"cpu"}, eighth_lengths(128, 880), heads=1, width=50, biases=biases)


def _case(name: str, sets: set[str], lengths: list[int], *, heads: int, width: int, biases: bool = False) -> Case:
    def make_inputs(draw: Draw) -> Inputs:
        num_tokens = sum(lengths)
        inputs: Inputs = {key: draw.normal(num_tokens, heads, width) for key in "qkv"}
        seconds = draw.integers(num_tokens, high=10**7).sort()[0]
        inputs |= {
            "cu_seqlens": cu_seqlens_of(lengths, draw.device),
            "max_length": max(lengths),
            "scale": width**-0.5,
            "divisor": float(max(lengths)),
            "timestamp": seconds,
            "query_timestamp": seconds + draw.integers(num_tokens, high=1000),
            "position_bias": draw.normal(max(lengths), scale=0.02) if biases else None,
            "time_bias": draw.normal(NUM_BUCKETS + 1, scale=0.02) if biases else None,
        }
        return inputs

    return Case(
        name=f"{name} biases" if biases else name,
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=attend_by_history,
        ours={"ours": _ours, "ours atomic": _ours_atomic},
        baselines={"eager padded": _padded, "torch.compile padded": compiled(attend_padded, prepare_padded)},
        gradients=("q", "k", "v", "position_bias", "time_bias") if biases else ("q", "k", "v"),
        work=lambda x: attention_work(x["q"], x["v"], x["cu_seqlens"]),
    )


def _ours(inputs: Inputs, **switches: bool) -> Tensor:
    if "plan" not in inputs:
        inputs["plan"] = plan_tiles(inputs["cu_seqlens"])
    if "time_buckets" not in inputs:
        inputs["time_buckets"] = None if inputs["time_bias"] is None else _bucket_times(inputs)
    made = {name: inputs[name] for name in ("plan", "time_buckets")}
    return hstu_attention(*(inputs[name] for name in ARGUMENTS), **_settings(inputs), **made, **switches)


def _bucket_times(inputs: Inputs) -> TimeBuckets:
    return bucket_times(inputs["plan"], inputs["timestamp"], inputs["query_timestamp"], num_buckets=NUM_BUCKETS)


def _ours_atomic(inputs: Inputs) -> Tensor:
    if inputs["q"].device.type != "cuda":
        raise NotImplementedError("the atomic backward is of CUDA only")
    return _ours(inputs, deterministic=False)


def attend_by_history(inputs: Inputs) -> Tensor:
    """The reference, one history after the other."""
    return by_history(_reference, TOKENWISE)(inputs)


def _reference(inputs: Inputs) -> Tensor:
    return hstu_attention_reference(*(inputs[name] for name in ARGUMENTS), **_settings(inputs))


def _settings(inputs: Inputs) -> dict[str, Any]:
    return {name: inputs[name] for name in SETTINGS}


def _padded(inputs: Inputs) -> Tensor:
    return attend_padded(prepare_padded(inputs))


def prepare_padded(inputs: Inputs) -> Inputs:
    """Makes once what `attend_padded` needs besides the inputs."""
    prepare_padding(inputs)
    if inputs["time_bias"] is not None and "padded_buckets" not in inputs:
        asked, happened = (pad_histories(inputs[name], inputs) for name in ("query_timestamp", "timestamp"))
        inputs["padded_buckets"] = time_bucket(asked[:, :, None] - happened[:, None, :], NUM_BUCKETS)
    return inputs


def attend_padded(inputs: Inputs) -> Tensor:
    """As the public code without kernels: all histories padded to the longest, all scores at once, autograd."""
    q, k, v = (pad_histories(inputs[name], inputs).transpose(1, 2) for name in "qkv")
    row = torch.arange(inputs["max_length"], device=q.device)
    distance = row[:, None] - row[None, :]
    scores = inputs["scale"] * (q @ k.transpose(2, 3))
    if inputs["position_bias"] is not None:
        scores = scores + inputs["position_bias"][distance.clamp(min=0)]
    if inputs["time_bias"] is not None:
        scores = scores + inputs["time_bias"][inputs["padded_buckets"]][:, None]
    weights = F.silu(scores) * (distance >= 0) / inputs["divisor"]
    return unpad_histories((weights @ v).transpose(1, 2), inputs)
