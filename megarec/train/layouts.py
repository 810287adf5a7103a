"""The layouts that fit a run, the nearest first to one that does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log2

from megarec.base.errors import UserError
from megarec.parallel.layout import LayoutConfig

MAX_NAMED = 3


def name_nearest(
    error: UserError, wanted: LayoutConfig, fits: Callable[[LayoutConfig], None], *, world: int, num_layers: int
) -> UserError:
    """`error` with up to three layouts behind it that pass `fits`, see `nearest_layouts`; as it was if none does."""
    layouts = nearest_layouts(wanted, fits, world=world, num_layers=num_layers)
    if not layouts:
        return error
    named = "; ".join(describe(layout, wanted) for layout in layouts)
    works = f"Nearest layouts that work on {world} rank{'' if world == 1 else 's'}: {named}"
    return UserError(error.what, where=error.where, fix=f"{error.fix}. {works}" if error.fix else works)


def nearest_layouts(
    wanted: LayoutConfig, fits: Callable[[LayoutConfig], None], *, world: int, num_layers: int
) -> list[LayoutConfig]:
    """Up to three layouts that `fits` accepts, the nearest to `wanted` first.

    Near is by how many doublings or halvings the sizes are apart, the data-parallel size too; of two equally near ones
    the smaller replica comes first. Sequence parallelism and virtual stages are kept where they can be, and are not
    brought up when nobody asked: both only ever add conditions.

    Args:
        wanted: the layout that does not fit.
        fits: raises `UserError` for a layout that does not fit.
        world: the number of ranks.
        num_layers: of the model, the most chunks of layers that there can be.
    """

    def distance(layout: LayoutConfig) -> tuple[float, int, int, int]:
        pairs = [
            (layout.tensor, wanted.tensor),
            (layout.pipeline, wanted.pipeline),
            (layout.context, wanted.context),
            (layout.virtual or 1, wanted.virtual or 1),
            (wanted.replica, layout.replica),  # the data-parallel sizes, the other way round
        ]
        doublings = sum(abs(log2(size / other)) for size, other in pairs)
        return round(doublings, 6), layout.replica, layout.pipeline, layout.context

    found: list[LayoutConfig] = []
    for layout in sorted(_layouts(wanted, world, num_layers), key=distance):
        try:
            fits(layout)
        except UserError:
            continue
        found.append(layout)
        if len(found) == MAX_NAMED:
            break
    return found


def describe(layout: LayoutConfig, wanted: LayoutConfig) -> str:
    """The sizes that are not 1, as a user types them: `tensor=2 pipeline=2`; `tensor=1` when all are.

    What was `wanted` and has to go is named too: `virtual=null`.
    """
    sizes = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context")}
    parts = [f"{name}={size}" for name, size in sizes.items() if size > 1] or ["tensor=1"]
    if layout.virtual is not None:
        parts.append(f"virtual={layout.virtual}")
    parts += [
        f"{name}=null"
        for name in ("virtual", "layers_per_chunk")
        if getattr(wanted, name) is not None and getattr(layout, name) is None
    ]
    if layout.sequence_parallel:
        parts.append("sequence_parallel=true")
    return " ".join(parts)


def _layouts(wanted: LayoutConfig, world: int, num_layers: int) -> Iterator[LayoutConfig]:
    """Every layout of `world` ranks with whole replicas, as like `wanted` in its other settings as can be."""
    for tensor in _divisors(world):
        for pipeline in _divisors(world // tensor):
            for context in _divisors(world // tensor // pipeline):
                chunks = range(2, num_layers // pipeline + 1) if wanted.virtual and pipeline > 1 else ()
                for virtual in (None, *chunks):
                    kept = pipeline * (virtual or 1) == wanted.num_chunks
                    yield replace(
                        wanted,
                        tensor=tensor,
                        pipeline=pipeline,
                        context=context,
                        virtual=virtual,
                        layers_per_chunk=wanted.layers_per_chunk if kept else None,
                        sequence_parallel=wanted.sequence_parallel and tensor > 1,
                    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
