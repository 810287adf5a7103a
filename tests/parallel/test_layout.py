import pytest
import torch

from megarec.base.errors import UserError
from megarec.parallel.engine import transformer_config
from megarec.parallel.layout import LayoutConfig


def test_the_data_size_is_what_is_left() -> None:
    assert LayoutConfig(tensor=2, pipeline=2).data(12) == 3
    with pytest.raises(UserError, match="does not divide 6"):
        LayoutConfig(tensor=2, pipeline=2).data(6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor": 0},
        {"sequence_parallel": True},
        {"virtual": 2},
        {"virtual": 1, "pipeline": 2},
    ],
)
def test_wrong_layouts_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="layout"):
        LayoutConfig(**wrong)


def test_interleaved_stages_never_batch_their_sends() -> None:
    """With two stages, batched sends to one peer get crossed and training goes on with wrong numbers."""
    for layout in (LayoutConfig(), LayoutConfig(pipeline=2), LayoutConfig(pipeline=2, virtual=2)):
        config = transformer_config(layout, width=8, num_heads=2, dtype=torch.float32)
        assert not config.batch_p2p_comm
        assert config.overlap_p2p_comm == (layout.virtual is not None)
        assert config.calculate_per_token_loss
