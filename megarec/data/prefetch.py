"""Makes the next values in a thread while the last one is used."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `source` again and again in a thread, at most `depth` values ahead of `take`.

    The state of a source that runs ahead is ahead too: let it return its state with each value,
    `Prefetcher(lambda: (stream.next_step(), stream.state()), depth)`.

    Args:
        source: makes the next value; from now on it is called in the thread alone.
        depth: values made ahead; 0 calls `source` in `take`, without a thread.
    """

    def __init__(self, source: Callable[[], T], depth: int) -> None:
        self._source = source
        self._values: SimpleQueue[T | _Failure] = SimpleQueue()
        self._free = threading.Semaphore(depth)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True) if depth else None
        if self._thread:
            self._thread.start()

    def take(self) -> T:
        """The next value, in the order made; waits for it.

        Raises:
            BaseException: what `source` raised in its place, and again at every later call.
        """
        if self._closed.is_set():
            raise RuntimeError("the prefetcher is closed")
        if self._thread is None:
            return self._source()
        if self._failure is None:
            value = self._values.get()
            if not isinstance(value, _Failure):
                self._free.release()
                return value
            self._failure = value.error
        raise self._failure

    def close(self) -> None:
        """Ends the thread, after the value it is making; values made ahead are lost."""
        self._closed.set()
        self._free.release()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._free.acquire()
            if self._closed.is_set():
                return
            try:
                self._values.put(self._source())
            except BaseException as error:  # whatever it is belongs to whoever takes
                self._values.put(_Failure(error))
                return


class _Failure:
    """An exception on its way to `take`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
