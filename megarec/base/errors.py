"""The one error that is the user's to mend, and the exit codes every command keeps."""

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn, Protocol

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2

# The system says no to a path as it was given: not a folder, a file in its place, not ours, read-only, too long.
_REFUSED_PATHS = frozenset(
    {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
)


class UserError(Exception):
    """Input or configuration is wrong: one line that says what, where and what to do.

    Args:
        what: what is wrong.
        where: the file, row, key or value it is wrong at.
        fix: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = what if not where else f"{where}: {what}"
        super().__init__(line if not fix else f"{line}. {fix}")

    def within(self, path: str) -> "UserError":
        """The same error seen from outside: a group of settings knows its keys, not the `path` it hangs under."""
        where = f"{path}.{self.where}" if path and self.where else path or self.where
        return UserError(self.what, where=where, fix=self.fix)


def nearest(word: str, words: list[str]) -> str:
    """A "did you mean" clause for `word`, or the list of what is allowed."""
    close = get_close_matches(word, words, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Allowed: {', '.join(sorted(words))}"


class Peers(Protocol):
    """The other processes of a job: what ends all of them is said once, and all end with the same exit code."""

    def refuse(self, line: str, code: int) -> None:
        """Says `line` on standard error unless another process has said it; they all will end with `code`."""
        ...

    def refused(self) -> int | None:
        """The exit code of the process whose end is the reason of this one's error, if one has refused."""
        ...


class NoPeers:
    """A job of one process."""

    def refuse(self, line: str, code: int) -> None:
        """Says `line` on standard error."""
        print(line, file=sys.stderr)  # noqa: T201

    def refused(self) -> int | None:
        """Nobody else can have."""
        return None


def run_command(body: Callable[[], None], *, peers: Callable[[], Peers] = NoPeers) -> NoReturn:
    """Runs a command and ends the process: 0 done, 2 the user's mistake, 1 anything else.

    A user's mistake, a path that the system refuses, a full disk, too little memory and an interrupt are one line on
    standard error, never a traceback.

    Args:
        body: the command.
        peers: how to reach the other processes of the job, asked for after an error.
    """
    code = EXIT_DONE
    try:
        body()
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:
        line, code = explain(error)
        if line:
            peers().refuse(line, code)
        elif (others := peers().refused()) is None:
            raise
        else:
            code = others
    sys.stdout.flush()
    sys.exit(code)


def explain(error: BaseException) -> tuple[str, int]:
    """The line that tells the user of an error, empty for one that wants a traceback, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: only what was complete is left", EXIT_FAILED
    if isinstance(error, MemoryError):
        return f"error: out of memory ({str(error)[:200]}). Lower the sizes", EXIT_FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"error: no space left on the disk{where}. Free some and run again", EXIT_FAILED
    if isinstance(error, OSError) and error.errno in _REFUSED_PATHS and error.filename:
        return f"error: {error.filename}: {error.strerror}. Check the path", EXIT_USER_ERROR
    return "", EXIT_FAILED
