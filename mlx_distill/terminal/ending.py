"""How a command ends: with an exit code, and a line on stderr where something went wrong.

In: a command to call. Out: the end of the process. Decided here: a `DistillError`, a wrong option,
a refusal of the operating system and Ctrl-C are one line and an exit code (2, 2, 2, 130); a bug
keeps its traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import typer

from mlx_distill.errors import DistillError
from mlx_distill.view import one_line, show_what_can_be_shown

LONGEST_LINE = 2000  # characters of an error
# typer brings click under two names
UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)
# what the operating system refuses whatever a program does; a file that is missing is not among
# them
REFUSALS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ESTALE,
}  # fmt: skip

GOES_ON = "runs continue by themselves, with the same command (--fresh starts over)"
NOT_NEEDED = {"--resume": GOES_ON, "--continue": GOES_ON}


def run_to_its_end(command: Callable[[], int | None]) -> NoReturn:
    """Call a command that returns its exit code (None for 0), and end the process with it."""
    show_what_can_be_shown()
    code: int | str | None
    try:
        _refuse_deleted_folder()
        code = command() or 0
        if sys.stdout:  # which a shell can close
            sys.stdout.flush()
    except DistillError as error:
        code = _say_error(str(error))
    except UsageError as error:
        code = _say_usage(error)
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        code = 1
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        code = _say_refusal(error)
    except SystemExit as ending:
        code = ending.code
    _end(code)


def _refuse_deleted_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        what = f"the working folder cannot be used ({error.strerror})"
        raise DistillError(f"{what}: it was deleted or moved; change to another one") from None


def _say_error(text: str) -> int:
    rank = os.environ.get("RANK") or os.environ.get("MLX_RANK") or "0"
    line = one_line(text)
    say_last(
        f"error{f' (rank {rank})' if rank != '0' else ''}: "
        f"{line if len(line) <= LONGEST_LINE else f'{line[:LONGEST_LINE]}…'}"
    )
    return 2


def _say_usage(error: Any) -> int:
    """A wrong option or argument; without any, the help is what was asked for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    text = error.format_message().rstrip(".")
    command = error.ctx.command_path if error.ctx else "mlx-distill"
    asked = getattr(error, "option_name", "")
    if asked in NOT_NEEDED:
        return _say_error(f"{asked} is not needed: {NOT_NEEDED[asked]}")
    return _say_error(f"{text}; `{command} --help` says what there is")


def _say_refusal(error: OSError) -> int:
    """What the operating system said, and of what: of a file, or of the place to which we print."""
    if error.filename is not None:
        return _say_error(f"{os.fsdecode(error.filename)}: {error.strerror}")
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except (OSError, ValueError):
        _drop_output()
        return _say_error(f"the output cannot be written: {error.strerror}")
    return _say_error(error.strerror or str(error))


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, so that the interpreter does not fail on it at
    its end.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_last(line: str) -> None:
    """The line that a command ends with; where even stderr takes nothing, the exit code has to do."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _end(code: int | str | None) -> NoReturn:
    """End the process; one of several ranks at once, without taking the interpreter down.

    A thread of torch's group that lets go of a tensor meanwhile would abort it (pytorch issue
    190489).
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):  # told already, or nowhere to tell it
            _drop_output()
            code = code or 2
    number = code if isinstance(code, int) else int(code is not None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(number)
    # all is done: a Ctrl-C while the interpreter is taken down would only leave a traceback
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, lambda *_: os._exit(number))
    sys.exit(code)
