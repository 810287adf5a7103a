"""Causal softmax attention of ARGUS: packed histories."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megarec_kernels.softmax_attention import softmax_attention
from megarec_kernels.softmax_attention.reference import softmax_attention_reference
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

ARGUMENTS = ("q", "k", "v", "cu_seqlens")


def cases() -> Iterator[Case]:
    """The shapes of the HSTU cases, so that the two kinds of attention compare."""
    yield _case("b3 n20 d16", {"small"}, [20, 0, 7], heads=2, width=16)
    for width in (128, 256):
        yield _case(f"b32 n4096 d{width}", {"h200"}, [4096] * 32, heads=4, width=width)
    for num_users in (32, 128):
        lengths = zipf_lengths(num_users, 4096)
        yield _case(f"b{num_users} zipf1.2 n4096 d128", {"h200"}, lengths, heads=4, width=128)
    yield _case("b128 mean/max=1/8 n880 d50", {"cpu"}, eighth_lengths(128, 880), heads=1, width=50)


def _case(name: str, sets: set[str], lengths: list[int], *, heads: int, width: int) -> Case:
    def make_inputs(draw: Draw) -> Inputs:
        inputs: Inputs = {key: draw.normal(sum(lengths), heads, width) for key in "qkv"}
        inputs |= {"cu_seqlens": cu_seqlens_of(lengths, draw.device), "max_length": max(lengths), "scale": width**-0.5}
        return inputs

    return Case(
        name=name,
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=attend_by_history,
        ours={"ours": _ours},
        baselines={
            "eager padded": _padded,
            "torch.compile padded": compiled(attend_padded, prepare_padding),
            "SDPA padded": _padded_sdpa,
            "SDPA nested": _nested_sdpa,
            "FlexAttention": compiled(_attend_flex, _prepare_flex),
        },
        gradients=("q", "k", "v"),
        work=lambda x: attention_work(x["q"], x["v"], x["cu_seqlens"]),
    )


def _ours(inputs: Inputs) -> Tensor:
    plan = inputs.get("plan") or inputs.setdefault("plan", plan_tiles(inputs["cu_seqlens"]))
    return softmax_attention(*(inputs[name] for name in ARGUMENTS), scale=inputs["scale"], plan=plan)


def attend_by_history(inputs: Inputs) -> Tensor:
    """The reference, one history after the other."""
    return by_history(_reference, "qkv")(inputs)


def _reference(inputs: Inputs) -> Tensor:
    return softmax_attention_reference(*(inputs[name] for name in ARGUMENTS), scale=inputs["scale"])


def _padded(inputs: Inputs) -> Tensor:
    return attend_padded(prepare_padding(inputs))


def attend_padded(inputs: Inputs) -> Tensor:
    """All histories padded to the longest, all scores at once, autograd."""
    q, k, v = (pad_histories(inputs[name], inputs).transpose(1, 2) for name in "qkv")
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = inputs["scale"] * (q @ k.transpose(2, 3))
    weights = scores.masked_fill(later, -torch.inf).softmax(dim=3)
    return unpad_histories((weights @ v).transpose(1, 2), inputs)


def _padded_sdpa(inputs: Inputs) -> Tensor:
    prepare_padding(inputs)
    q, k, v = (pad_histories(inputs[name], inputs).transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs["scale"])
    return unpad_histories(out.transpose(1, 2), inputs)


def _nested_sdpa(inputs: Inputs) -> Tensor:
    """torch's own kernels for histories of unequal length, without padding."""
    if inputs["q"].device.type != "cuda":
        raise NotImplementedError("torch has kernels for nested tensors on CUDA only")
    bounds = {"offsets": inputs["cu_seqlens"], "max_seqlen": inputs["max_length"], "min_seqlen": 1}
    q, k, v = (torch.nested.nested_tensor_from_jagged(inputs[name], **bounds).transpose(1, 2) for name in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs["scale"])
    return out.transpose(1, 2).values()


def _prepare_flex(inputs: Inputs) -> Inputs:
    """A mask of the blocks in which tokens of one history meet; without backward on a CPU it is of no use here."""
    from torch.nn.attention.flex_attention import create_block_mask

    if inputs["q"].device.type != "cuda":
        raise NotImplementedError("FlexAttention has no backward on a CPU")
    if "block_mask" not in inputs:
        num_tokens, lengths = len(inputs["q"]), inputs["cu_seqlens"].diff()
        user = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (user[query] == user[key]) & (query >= key)

        inputs["block_mask"] = create_block_mask(
            seen, None, None, num_tokens, num_tokens, device=lengths.device, _compile=True
        )
    return inputs


def _attend_flex(inputs: Inputs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (inputs[name].transpose(0, 1).unsqueeze(0) for name in "qkv")
    out = flex_attention(q, k, v, block_mask=inputs["block_mask"], scale=inputs["scale"])
    return out.squeeze(0).transpose(0, 1)
