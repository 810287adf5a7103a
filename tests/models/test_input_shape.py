import numpy as np
import pytest

from megarec.base.errors import UserError
from megarec.data.dataset import FieldInfo
from megarec.layers.config import HeadsConfig
from megarec.models.argus.config import ArgusConfig
from megarec.models.rows import RowMap
from megarec.models.shape import FieldSlots, bucket_time_gap, input_shape
from tests.models.small_log import FIELDS, shape_for


def names(slots: tuple[FieldSlots, ...]) -> list[str]:
    return [f.name for f in slots]


def test_slots_follow_the_dataset_within_a_role() -> None:
    shape = input_shape(FIELDS, ArgusConfig(time_gap_buckets=8))
    assert names(shape.context) == ["organic", "device", "time_gap"]
    assert shape.item == shape.item_tower
    assert shape.item[1] == FieldSlots(name="artist", num_ids=5, slots=2)
    assert names(shape.feedback) == ["like", "ratio"]
    assert shape.feedback_heads == {"like": 2, "ratio": 5}
    assert shape.tables == {"organic": 3, "device": 4, "time_gap": 9, "item": 12, "artist": 5, "like": 3, "ratio": 6}


def test_item_vectors_may_have_tables_of_their_own() -> None:
    tied = shape_for(ArgusConfig())
    own = shape_for(ArgusConfig(tie_item_tables=False))
    assert own.tables == {**tied.tables, "item.target": 12, "artist.target": 5}
    side = {"artist": np.array([[0, -1], [3, 4]])}
    first_row = {name: 100 * number for number, name in enumerate(own.tables)}
    rows = RowMap(own, first_row, side)
    read = rows.item(np.array([1]))[0].tolist()
    made = rows.item_tower(np.array([1]))[0].tolist()
    assert read == [first_row["item"] + 1, first_row["artist"] + 3, first_row["artist"] + 4]
    assert made == [first_row["item.target"] + 1, first_row["artist.target"] + 3, first_row["artist.target"] + 4]


def test_names_choose_and_their_order_does_not_matter() -> None:
    config = ArgusConfig(input_fields=("ratio", "item", "like"), item_fields=("artist",), feedback_heads=("ratio",))
    shape = input_shape(FIELDS, config)
    assert (names(shape.context), names(shape.item)) == ([], ["item"])
    assert (names(shape.item_tower), names(shape.feedback)) == (["artist"], ["like", "ratio"])
    assert shape.feedback_heads == {"ratio": 5}
    assert list(shape.tables) == ["item", "artist", "like", "ratio"]


def test_fields_that_cannot_be_predicted_get_no_head() -> None:
    fields = {
        **FIELDS,
        "tags": FieldInfo(name="tags", role="feedback", kind="id", num_ids=9, slots=3),
        "always": FieldInfo(name="always", role="feedback", kind="categorical", num_ids=2),
    }
    assert set(input_shape(fields, ArgusConfig()).feedback_heads) == {"like", "ratio"}
    for name in ("tags", "always"):
        with pytest.raises(UserError, match=name):
            input_shape(fields, ArgusConfig(feedback_heads=(name,)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ArgusConfig(input_fields=("item", "likes")), "likes.*Did you mean 'like'"),
        (ArgusConfig(item_fields=("organic",)), "model.item_fields.*organic"),
        (ArgusConfig(item_fields=()), "model.item_fields"),
        (ArgusConfig(input_fields=()), "reads nothing"),
        (ArgusConfig(feedback_heads=("device",)), "model.feedback_heads.*device"),
        (ArgusConfig(input_fields=("item",), token_layout="item_action"), "feedback fields.*fused"),
        (ArgusConfig(input_fields=("item", "like"), token_layout="context_item_feedback"), "context fields"),
        (
            ArgusConfig(input_fields=("like", "organic"), heads=HeadsConfig(feedback_head="product_swish")),
            "model.heads.feedback_head.*item",
        ),
    ],
)
def test_settings_the_dataset_cannot_serve_are_refused(config: ArgusConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        input_shape(FIELDS, config)


def test_a_field_called_time_gap_collides() -> None:
    fields = {**FIELDS, "time_gap": FieldInfo(name="time_gap", role="context", kind="numeric", num_ids=4)}
    assert names(input_shape(fields, ArgusConfig()).context)[-1] == "time_gap"
    with pytest.raises(UserError, match="time_gap"):
        input_shape(fields, ArgusConfig(time_gap_buckets=4))


def test_time_gap_buckets_double() -> None:
    seconds = np.array([-5, 0, 1, 2, 3, 4, 7, 8, 2**40 - 1, 2**40, 2**62])
    assert bucket_time_gap(seconds, 41).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 40, 41, 41]
    assert bucket_time_gap(seconds, 3).max() == 3
    assert bucket_time_gap(seconds, 3).dtype == np.int32


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 0},
        {"dropout": 1.0},
        {"time_gap_buckets": -1},
        {"width": 30},
        {"heads": HeadsConfig(query_context=False, query_width=32)},
        {"heads": HeadsConfig(item_tower="none", query_width=32)},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UserError):
        ArgusConfig(**settings)  # type: ignore[arg-type]


def test_temperature_stays_in_its_range() -> None:
    for temperature in (0.0, 0.001, 1000.0):
        with pytest.raises(UserError):
            HeadsConfig(temperature=temperature)
