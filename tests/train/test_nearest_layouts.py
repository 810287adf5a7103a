"""Layouts that are named where one is refused: all of them fit, and there is one whenever there can be one."""

from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest

from megarec.base.config import build
from megarec.base.errors import UserError
from megarec.parallel.layout import LayoutConfig
from megarec.train.checks import check_run
from megarec.train.config import TrainConfig
from megarec.train.layouts import MAX_NAMED, describe, nearest_layouts
from tests.train.runs import SMALL_ARGUS

Kind = Literal["heads", "ring"]


def make(layout: LayoutConfig, heads: int, layers: int, lanes: int, tokens: int = 96) -> TrainConfig:
    model = {**SMALL_ARGUS, "width": 8 * heads, "num_layers": layers, "block": {"num_heads": heads}}
    stream = {"tokens_per_pack": tokens, "lanes": lanes, "max_history_events": 12}
    return replace(build(TrainConfig, {"data": "nowhere", "model": model, "stream": stream}), layout=layout)


def fits(layout: LayoutConfig, world: int, *, heads: int, layers: int, lanes: int, tokens: int) -> bool:
    """The rules, written down a second time."""
    ranks, replicas = layout.tensor * layout.context, world / (layout.tensor * layout.context * layout.pipeline)
    splits = layout.tensor if layout.context_by == "ring" else ranks
    return (
        replicas == int(replicas)
        and heads % splits == 0
        and layers >= layout.pipeline * (layout.virtual or 1)
        and lanes % replicas == 0
        and (layout.virtual is None or lanes / replicas % layout.pipeline == 0)
        and tokens % (16 * ranks) == 0
    )


def every_layout(most: int, kind: Kind, *, virtual: tuple[int | None, ...] = (None, 2)) -> list[LayoutConfig]:
    layouts = []
    for tensor, pipeline, context, chunks in product(
        range(1, most + 1), range(1, most + 1), range(1, most + 1), virtual
    ):
        if chunks is None or pipeline > 1:
            sizes = {"tensor": tensor, "pipeline": pipeline, "context": context}
            layouts.append(LayoutConfig(**sizes, virtual=chunks, context_by=kind))
    return layouts


@pytest.mark.parametrize("kind", ["heads", "ring"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_what_is_named_fits_and_what_fits_is_named(world: int, kind: Kind) -> None:
    wanted_ones = every_layout(4, kind)
    num_refused = 0
    for heads, layers, lanes, tokens in product((1, 4, 6), (1, 4), (1, 4, 6), (16, 96)):
        sizes = {"heads": heads, "layers": layers, "lanes": lanes, "tokens": tokens}
        config = make(LayoutConfig(), heads, layers, lanes, 96)
        config = replace(config, stream=replace(config.stream, max_history_events=2, tokens_per_pack=tokens))
        possible = {
            describe(x, x) for x in every_layout(world, kind, virtual=(None, 2, 3, 4)) if fits(x, world, **sizes)
        }
        for wanted in wanted_ones:
            try:
                check_run(replace(config, layout=wanted), world=world)
                assert fits(wanted, world, **sizes)
            except UserError as error:
                assert not fits(wanted, world, **sizes), error
                num_refused += 1
                _, found, names = str(error).partition(f"Nearest layouts that work on {world} rank")
                assert bool(found) == bool(possible)
                named = names.partition(": ")[2].split("; ") if found else []
                if wanted.virtual is not None:  # it has to be taken back where it is not kept
                    assert all("virtual=" in name for name in named)
                named = [name.replace(" virtual=null", "") for name in named]
                assert set(named) <= possible
                assert len(set(named)) == len(named) <= MAX_NAMED
                without_virtual = [name for name in possible if "virtual" not in name]
                assert len(named) >= min(MAX_NAMED, len(without_virtual))
    assert num_refused > 1000


@pytest.mark.parametrize(
    ("layout", "sizes", "line"),
    [
        (
            {"pipeline": 3},
            {"heads": 4, "layers": 4, "lanes": 8},
            "one replica takes 3 ranks (tensor x pipeline x context), which does not divide 8. "
            "Nearest layouts that work on 8 ranks: pipeline=4; pipeline=2; tensor=2 pipeline=2",
        ),
        (
            {"tensor": 3},
            {"heads": 4, "layers": 2, "lanes": 8},
            " can be 1 or 2 or 4. Nearest layouts that work on 8 ranks: tensor=4; tensor=2; tensor=2 context=2",
        ),
        ({"tensor": 8}, {"heads": 4, "layers": 2, "lanes": 8}, "Nearest layouts that work on 8 ranks: tensor=4; "),
        ({"context": 8}, {"heads": 4, "layers": 2, "lanes": 8}, "Nearest layouts that work on 8 ranks: context=4; "),
        ({"pipeline": 4}, {"heads": 4, "layers": 2, "lanes": 8}, "Nearest layouts that work on 8 ranks: pipeline=2; "),
        (
            {"pipeline": 2, "virtual": 4},
            {"heads": 1, "layers": 4, "lanes": 8},
            "Nearest layouts that work on 8 ranks: pipeline=2 virtual=2; ",
        ),
        (
            {"pipeline": 2, "virtual": 2},
            {"heads": 1, "layers": 4, "lanes": 4},
            "1 packs per replica are not a multiple of 2 stages",
        ),
        (
            {},
            {"heads": 4, "layers": 2, "lanes": 4},
            "Nearest layouts that work on 8 ranks: tensor=2; context=2; pipeline=2",
        ),
        (
            {"tensor": 4, "sequence_parallel": True},
            {"heads": 2, "layers": 2, "lanes": 8},
            "Nearest layouts that work on 8 ranks: tensor=2 sequence_parallel=true; ",
        ),
        (
            {"tensor": 4},
            {"heads": 4, "layers": 2, "lanes": 8, "tokens": 96},
            "tokens_per_pack: 96 is not a multiple of 64",
        ),
    ],
    ids=str,
)
def test_the_line_ends_with_the_nearest(layout: dict[str, Any], sizes: dict[str, int], line: str) -> None:
    with pytest.raises(UserError) as refused:
        check_run(make(LayoutConfig(**layout), **{"tokens": 128, **sizes}), world=8)
    assert line in str(refused.value)
    assert "Nearest layouts that work on 8 ranks: " in str(refused.value)


def test_nothing_is_named_where_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"Use a multiple of 7$"):
        check_run(make(LayoutConfig(), heads=2, layers=2, lanes=4), world=7)


def test_layers_stay_where_they_were_put_while_there_are_as_many_chunks() -> None:
    wanted = LayoutConfig(pipeline=2, layers_per_chunk=(3, 1))
    near = nearest_layouts(wanted, lambda layout: None, world=2, num_layers=4)
    assert {layout.pipeline: layout.layers_per_chunk for layout in near} == {1: None, 2: (3, 1)}


def test_thousands_of_ranks_take_no_time() -> None:
    """24 layers in virtual stages on 4096 ranks: tens of thousands of layouts, of which a few are checked."""
    calls = []
    near = nearest_layouts(LayoutConfig(pipeline=3, virtual=2), calls.append, world=4096, num_layers=24)
    assert len(near) == len(calls) == MAX_NAMED
