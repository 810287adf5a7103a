"""The two programs of the index."""

from collections.abc import Iterator

from megarec_kernels.hash_index import EMPTY, gpu, programs
from megarec_kernels.variants import Variant


def variants() -> Iterator[Variant]:
    """One of each."""
    types = {"slots": "*i32", "key_of_row": "*i64", "num": "i32", "last_slot": "i32"}
    for name, kernel, own in (
        ("probe", programs.probe_slots, {"keys": "*i64", "found": "*i64"}),
        ("place", programs.place_rows, {"first": "i32"}),
    ):
        known = types | own
        yield Variant(
            name=f"hash_index.{name}",
            kernel=kernel,
            types=known,
            constants={"EMPTY": EMPTY, "BLOCK": gpu.BLOCK},
            aligned=frozenset(name for name, kind in known.items() if kind.startswith("*")),
        )
