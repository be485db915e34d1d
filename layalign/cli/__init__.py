"""The `layalign` command. Importing this package is cheap: torch and transformers load inside the commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

__all__ = ["main"]

INTERRUPTED = 130
STOPPED = 143  # what a shell reports after SIGTERM


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0; 1 after an unexpected error; 2 after an error that the user can fix; 130 after Ctrl-C; 143 after
    SIGTERM in training. Errors are one line on stderr; `--debug`, anywhere on the line, adds the traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = _run(arguments, debug)
    except KeyboardInterrupt:  # also while typer is imported or an error is printed
        code = INTERRUPTED
    # Some releases of typer return this code on Ctrl-C.
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> int:
    import typer

    from layalign.cli.app import app

    try:
        code = typer.main.get_command(app).main(arguments, prog_name="layalign", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the pipe is gone. Python would print a second error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = describe(error)
        hint = "" if debug or code == 2 else "  (--debug shows where)"
        print(f"error: {line}{hint}", file=sys.stderr)
        return code


def describe(error: Exception) -> tuple[str, int]:
    """One line for an exception, and the exit code that goes with it."""
    from layalign.utils.errors import LayAlignError, StoppedError
    from layalign.utils.versions import note_if_untested

    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        # A usage error of click; typer may bundle its own copy, so the class cannot be compared.
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return _one_line(error.format_message()).rstrip(".") + where, 2
    if isinstance(error, StoppedError):
        return _one_line(str(error)), STOPPED
    if isinstance(error, LayAlignError):  # may list many differences
        return _one_line(str(error), 750), 2
    if isinstance(error, OSError | ImportError) or type(error).__module__.startswith("yaml"):
        return _one_line(str(error)) or type(error).__name__, 2
    return f"{type(error).__name__}: {_one_line(str(error))}{note_if_untested()}", 1


def _one_line(text: str, longest: int = 600) -> str:
    # Not every terminal can print a lone surrogate, as in a file name that is not UTF-8.
    line = " ".join(text.encode("utf-8", errors="backslashreplace").decode().split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
