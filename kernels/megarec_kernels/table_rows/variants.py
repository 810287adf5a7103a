"""What the kernels on rows are compiled ahead of time for: every way to finish a row, and the classes of widths."""

from collections.abc import Iterator
from typing import Any

from megarec_kernels.table_rows import gpu, programs
from megarec_kernels.variants import Variant

FLOATS = ("lr", "keep", "weight1", "weight2", "correction1", "root_correction2", "eps")
STATE = {"sgd": (), "rowwise_adagrad": ("square",), "adam": ("mean", "square"), "rowwise_adam": ("mean", "square")}
PLACES = {"order": "*i64", "number": "*i32", "starts": "*i32"}


def variants() -> Iterator[Variant]:
    """By width and dtype of the rows; one slot, as of tables without bags, but for one of bags."""
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"table": f"*{dtype}", "index": "*i64", "out": f"*{dtype}", "num": "i32", "width": "i32"}
        yield _variant(f"sum_slots 128 {dtype}", programs.sum_slots, types, {"num_slots": 1} | gpu.tile_of(128))
    bags = {"table": "*fp32", "index": "*i64", "out": "*fp32", "num": "i32", "width": "i32", "num_slots": "i32"}
    yield _variant("sum_slots 1024 fp32 bags", programs.sum_slots, bags, gpu.tile_of(1024))
    starts = {"number": "*i32", "starts": "*i32", "num": "i32"}
    yield _variant("find_starts", programs.find_starts, starts, {"BLOCK": gpu.PLACES_AT_ONCE})
    for width in (128, 1024):
        yield from _sums("add", "fp32", width)
    for kind in STATE:
        for dtype in ("fp32", "bf16"):
            types = {"rows": "*i64", "grad": "*fp32", "num": "i32"}
            yield _update("update_given", programs.update_given, types, {}, finish=(kind, dtype, 128))
    yield from _sums("rowwise_adagrad", "fp32", 128)
    yield from _sums("adam", "bf16", 1024)


def _sums(kind: str, dtype: str, width: int) -> Iterator[Variant]:
    sorted_rows = {"rows": "*i32", "num": "i32"}
    slots = {"grad": "*fp32"}
    known = {"SPAN": gpu.SPAN}
    finish = (kind, dtype, width)
    yield _update(
        "sum_short", programs.sum_short, sorted_rows | PLACES | slots, known | {"num_slots": 1}, finish=finish
    )
    own = {name: kind for name, kind in PLACES.items() if name != "order"} | {"partial": "*fp32"}
    yield _update("sum_long", programs.sum_long, sorted_rows | own, known, finish=finish)
    if kind == "add":
        types = PLACES | slots | {"partial": "*fp32", "num": "i32", "width": "i32"}
        constants = known | {"num_slots": 1} | gpu.reducing_tile_of(width)
        yield _variant(f"sum_pieces {width}", programs.sum_pieces, types, constants)


def _update(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], *, finish: tuple[str, str, int]
) -> Variant:
    kind, dtype, width = finish
    types = types | {"values": f"*{dtype}", "width": "i32"}
    if kind != "add":
        types |= dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(STATE[kind], "*fp32")
        types |= {"scale": "*fp32", "key": "i64", "row_stride": "i32", "row_offset": "i32"}
    unused = dict.fromkeys(argument for argument in programs.UPDATE_ARGUMENTS if argument not in types)
    tile = gpu.reducing_tile_of(width) if name == "sum_long" else gpu.tile_of(width)
    return _variant(f"{name} {kind} {width} {dtype}", kernel, types, constants | unused | {"KIND": kind} | tile)


def _variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Variant:
    num_warps = constants.pop("num_warps", 4)
    return Variant(
        name=f"table_rows.{name}",
        kernel=kernel,
        types=types,
        constants=constants,
        aligned=frozenset(name for name, kind in types.items() if kind.startswith("*")) | ({"width"} & types.keys()),
        num_warps=num_warps,
    )
