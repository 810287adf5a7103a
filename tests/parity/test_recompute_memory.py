"""What the forward pass leaves in memory for the backward pass, counted storage by storage."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarec.layers.config import HstuBlockConfig, TransformerBlockConfig
from megarec.layers.hstu_block import HstuBlock
from megarec.layers.tokens import split_events
from megarec.layers.transformer_block import TransformerBlock
from megarec.parallel.parts import Parts, local_parts, run_again, run_once
from megarec.parallel.placement import initialize, name_parameters

T, D = 512, 32


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made under it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before:
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key, None)
        return out

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def make_blocks(kind: str, parts: Parts, count: int) -> nn.ModuleList:
    blocks: list[nn.Module] = []
    for layer in range(count):
        if kind == "hstu":
            config = HstuBlockConfig(num_heads=2, qk_head_width=16, v_head_width=16)
            blocks.append(HstuBlock(config, width=D, layer=layer, max_tokens=64, dropout=0.0, parts=parts))
        else:
            settings = TransformerBlockConfig(num_heads=2)
            blocks.append(TransformerBlock(settings, width=D, layer=layer, num_layers=count, dropout=0.0, parts=parts))
    model = nn.ModuleList(blocks)
    name_parameters(model)
    initialize(model, 0)
    return model


def kept_per_block(kind: str, recompute: str) -> float:
    """Vectors `[T, D]` in fp32 that one more block leaves behind its forward pass."""
    parts = Parts(
        **{
            **vars(local_parts()),
            "run_attention": run_again if recompute == "attention" else run_once,
            "run_block": run_again if recompute == "block" else run_once,
        }
    )
    kept = []
    for count in (2, 6):
        blocks = make_blocks(kind, parts, count)
        seqlens, times = torch.arange(0, T + 1, 64), torch.arange(T)
        tokens = split_events(seqlens, times, times, randomness=None, per_event=1)
        x = torch.randn(T, D, requires_grad=True)
        with LiveBytes() as live:
            y = x
            for block in blocks:
                y = parts.run_block(block, y, tokens)
            kept.append(live.total)
        y.sum().backward()
        assert all(p.grad is not None for p in blocks.parameters())
    return (kept[1] - kept[0]) / 4 / (4 * T * D)


def test_whole_blocks_keep_their_input_alone() -> None:
    for kind in ("hstu", "transformer"):
        assert kept_per_block(kind, "block") == pytest.approx(1.0, abs=0.02)


def test_recomputed_attention_is_not_kept() -> None:
    """HSTU drops U, V, Q, K before SiLU, V, Q, K behind it and the normed input; the transformer Q, K, V and that."""
    for kind, dropped in (("hstu", 8.0), ("transformer", 4.0)):
        none, attention = kept_per_block(kind, "none"), kept_per_block(kind, "attention")
        assert none - attention >= dropped
        print(f"{kind}: kept per block {none:.2f}, with recomputed attention {attention:.2f} vectors a token")
