"""The one error that is the user's to mend, and the exit codes every command keeps."""

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import NoReturn

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


def run_command(body: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process: 0 done, 2 the user's mistake, 1 anything else.

    A user's mistake, a path that the system refuses, a full disk, too little memory and an interrupt are one line on
    standard error, never a traceback.
    """
    code = EXIT_DONE
    try:
        body()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        code = EXIT_USER_ERROR
    except BrokenPipeError:  # who read the output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            print(f"error: no space left on the disk{where}. Free some and run again", file=sys.stderr)  # noqa: T201
            code = EXIT_FAILED
        elif error.errno in _REFUSED_PATHS and error.filename:
            print(f"error: {error.filename}: {error.strerror}. Check the path", file=sys.stderr)  # noqa: T201
            code = EXIT_USER_ERROR
        else:
            raise
    except KeyboardInterrupt:
        print("interrupted: only what was complete is left", file=sys.stderr)  # noqa: T201
        code = EXIT_FAILED
    except MemoryError as error:
        print(f"error: out of memory ({str(error)[:200]}). Lower the sizes", file=sys.stderr)  # noqa: T201
        code = EXIT_FAILED
    sys.stdout.flush()
    sys.exit(code)
