"""The three programs of the bitmap."""

from collections.abc import Iterator

from megarec_kernels.unique_ids import gpu, programs
from megarec_kernels.variants import Variant


def variants() -> Iterator[Variant]:
    """One of each."""
    types = {"ids": "*i64", "bitmap": "*i32", "num": "i32"}
    counted = {"bitmap": "*i32", "counts": "*i32", "num_words": "i32"}
    ranked = {"ends": "*i32", "unique": "*i64", "index": "*i64"}
    for name, kernel, known in (
        ("mark", programs.mark_ids, types),
        ("count", programs.count_words, counted),
        ("rank", programs.rank_ids, types | ranked),
    ):
        yield Variant(
            name=f"unique_ids.{name}",
            kernel=kernel,
            types=known,
            constants={"BLOCK": gpu.BLOCK},
            aligned=frozenset(name for name, kind in known.items() if kind.startswith("*")),
        )
