"""What a command shows: results on standard output, long work as a bar with rate and time left on standard error."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SAID = "megarec.said"  # the logger that gets what `say` shows


def say(text: str) -> None:
    """Prints a part of the result, at once; a run's `main.log` gets it too."""
    print(text, flush=True)  # noqa: T201
    logging.getLogger(SAID).info(text)


def track(items: Iterable[T], *, title: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yields `items` while showing how many of `total` are done, the rate and the time left."""
    yield from tqdm(items, desc=title, total=total, unit=unit, **_style())


@contextmanager
def bar(*, title: str, total: int | None, unit: str) -> "Iterator[tqdm[None]]":
    """A bar to be moved by hand with `update(n)`."""
    with tqdm(desc=title, total=total, unit=unit, **_style()) as moving:
        yield moving


def _style() -> dict[str, Any]:
    # A log file gets one line every ten seconds, a terminal ten a second.
    return {"unit_scale": True, "mininterval": 0.1 if sys.stderr.isatty() else 10.0, "file": sys.stderr}
