"""Rules that no twin meets by chance: an item that is not told, the ends of the temperature, weights of equal shape."""

import numpy as np
import pytest
import torch
from torch import nn

from megarec.layers.config import HeadsConfig
from megarec.layers.heads import InverseTemperature
from megarec.models.rows import RowMap
from megarec.models.shape import FieldSlots, InputShape
from megarec.parallel.parts import Linear
from megarec.parallel.placement import initialize, name_parameters


def test_an_item_that_is_not_told_has_no_row_at_all() -> None:
    item = tuple(FieldSlots(name=name, num_ids=5, slots=slots) for name, slots in (("item", 1), ("a", 1), ("b", 2)))
    shape = InputShape(prefix=(), context=(), item=item, item_tower=item, feedback=(), feedback_heads={})
    side = {"a": np.array([0, 3, 4]), "b": np.array([[-1, -1], [2, -1], [3, 4]])}
    rows = RowMap(shape, {"item": 0, "a": 100, "b": 200}, side).item(np.array([-1, 0, 2]))
    assert rows.tolist() == [[-1, -1, -1, -1], [0, 100, -1, -1], [2, 104, 203, 204]]


@pytest.mark.parametrize(("learned", "factor"), [(50.0, 100.0), (-50.0, 0.01), (0.0, 1.0)])
def test_the_learned_temperature_keeps_to_its_bounds(learned: float, factor: float) -> None:
    temperature = InverseTemperature(HeadsConfig())
    temperature.log_inverse.data.fill_(learned)
    assert temperature(torch.device("cpu")).item() == pytest.approx(factor)


def test_weights_of_equal_shape_start_unequal() -> None:
    model = nn.ModuleList(Linear(6, 6, bias=False, std=1.0) for _ in range(2))
    name_parameters(model)
    initialize(model, seed=1)
    one, other = (module.weight.clone() for module in model)
    assert not torch.equal(one, other)
    initialize(model, seed=2)
    assert not torch.equal(one, model[0].weight)
