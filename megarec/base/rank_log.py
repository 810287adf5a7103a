"""What every rank of a job leaves in files: a log of its own, and of rank 0 the lines that it said."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from megarec.base.errors import UserError
from megarec.base.progress import SAID

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankLog:
    """The log of this process while the `with` block lasts.

    Everything that goes through `logging` and `warnings` is in it; so is the error that ends the block, with its
    traceback. Lines wait in a temporary file until `open` gives them a folder: a run that is refused leaves none.
    Rank 0 shows warnings on the terminal as well. On the other ranks standard output and standard error lead into the
    log, whoever writes to them, libraries in C included; the end of the block gives them back: an error is shown.

    Args:
        rank: the number of this process in the job.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._terminal: dict[int, int] = {}  # file descriptors that lead into the log, and copies of what they were
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile("w", encoding="utf-8", buffering=1)
        self._add(logging.getLogger(), logging.StreamHandler(self._file), _FORMAT)
        if self._rank == 0:
            self._shown = logging.StreamHandler()
            self._shown.setLevel(logging.WARNING)
            self._add(logging.getLogger(), self._shown, "%(levelname)s %(name)s: %(message)s")
        else:
            _flush()
            self._terminal = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
            self._lead_to(self._file.fileno())
        self._log = logging.getLogger("megarec")
        self._level = self._log.level
        self._log.setLevel(logging.INFO)
        logging.captureWarnings(True)
        self._shows_faults = not faulthandler.is_enabled()
        if self._shows_faults:  # where a process died that left no traceback
            faulthandler.enable(self._file)
        return self

    def open(self, folder: Path, *, about: str) -> None:
        """Moves the log to `rank-<number>.log` in `folder`, behind what an earlier start of the run wrote there.

        Rank 0 opens `main.log` too, which holds what `say` shows and nothing else.

        Args:
            folder: made if it is not there.
            about: what this rank is, for the first line.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self._rank:05d}.log").open("ab") as file:
            waiting = os.fstat(self._file.fileno()).st_size
            file.write(os.pread(self._file.fileno(), waiting, 0))
            file.flush()
            os.dup2(file.fileno(), self._file.fileno())
            self._lead_to(file.fileno())
        if self._rank == 0:
            said = logging.FileHandler(folder / "main.log", encoding="utf-8")
            self._add(logging.getLogger(SAID), said, "%(message)s")
        self._log.info("started: rank %d, host %s, pid %d, %s", self._rank, socket.gethostname(), os.getpid(), about)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rank == 0:
            logging.getLogger().removeHandler(self._shown)  # an error is shown once, by who ends the process
        if error is None:
            self._log.info("finished")
        elif isinstance(error, UserError):
            self._log.error("refused: %s", error)
        else:
            self._log.error("stopped by %s", type(error).__name__, exc_info=error)
        if self._shows_faults:
            faulthandler.disable()
        _flush()
        for descriptor, terminal in self._terminal.items():
            os.dup2(terminal, descriptor)
            os.close(terminal)
        logging.captureWarnings(False)
        self._log.setLevel(self._level)
        for logger, handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._file.close()

    def _add(self, logger: logging.Logger, handler: logging.Handler, form: str) -> None:
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
        self._handlers.append((logger, handler))

    def _lead_to(self, file: int) -> None:
        for descriptor in self._terminal:
            os.dup2(file, descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
