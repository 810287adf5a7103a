"""Values come in order from one thread, never too many ahead, and errors reach whoever takes."""

import itertools
import threading

import pytest

from megarec.data.prefetch import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_values_come_in_order(depth: int) -> None:
    counter = itertools.count()
    prefetcher = Prefetcher(lambda: next(counter), depth)
    assert [prefetcher.take() for _ in range(50)] == list(range(50))
    prefetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        prefetcher.take()


def test_no_more_than_depth_values_are_made_ahead() -> None:
    made: list[int] = []
    two_made = threading.Event()

    def source() -> int:
        made.append(len(made))
        if len(made) == 2:
            two_made.set()
        return made[-1]

    prefetcher = Prefetcher(source, 2)
    assert two_made.wait(10)
    prefetcher.close()
    assert made == [0, 1]


def test_the_sources_error_comes_in_its_place_and_stays() -> None:
    def source() -> int:
        if next(counter) == 2:
            raise LookupError("the shard is gone")
        return 7

    counter = itertools.count()
    prefetcher = Prefetcher(source, 5)
    assert [prefetcher.take(), prefetcher.take()] == [7, 7]
    for _ in range(2):
        with pytest.raises(LookupError, match="the shard is gone"):
            prefetcher.take()
    prefetcher.close()


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    for depth in (1, 4):
        prefetcher = Prefetcher(lambda: bytes(10), depth)
        prefetcher.take()
        prefetcher.close()
    assert threading.active_count() == before
