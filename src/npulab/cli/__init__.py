"""The command line: one verb a file, each a thin call of the API.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 a bad input
file, 4 device trouble or a defect of npulab. Modules here import what is heavy inside their functions: `npulab --help`
must be instant.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from npulab.cli.atlas import atlas
from npulab.cli.check import check
from npulab.cli.cliffs import cliffs
from npulab.cli.compare import compare
from npulab.cli.compile import compile
from npulab.cli.convert import convert
from npulab.cli.disasm import disasm
from npulab.cli.evaluate import evaluate
from npulab.cli.export import export
from npulab.cli.patch import patch
from npulab.cli.printing import fail
from npulab.cli.probe import probe
from npulab.cli.profile import profile
from npulab.cli.quantize import quantize
from npulab.cli.replay import replay
from npulab.cli.roofline import roofline
from npulab.cli.run import run
from npulab.cli.sweep import sweep
from npulab.cli.targets import targets
from npulab.cli.teardown import teardown
from npulab.cli.zoo import zoo
from npulab.errors import NpulabError

app = typer.Typer(
    name="npulab", add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (run, evaluate, check, patch, quantize, convert, export, compile, profile, compare, cliffs, sweep, teardown,
             roofline, probe, atlas, disasm, replay, targets):
    app.command(no_args_is_help=verb not in (atlas, targets, probe))(verb)
app.add_typer(zoo, name="zoo")


def _print_version(asked: bool) -> None:
    if asked:
        from npulab import __version__

        print(f"npulab {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 bad input file, 4 device trouble.")
def _npulab(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True,
                                                  help="Print the version and stop.")] = False) -> None:
    """Take a neural network to an edge NPU: what runs where and why, compile, run on a virtual NPU."""


def main() -> NoReturn:
    """The command `npulab`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are cleared away
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run_arguments(sys.argv[1:]))


def run_arguments(arguments: Sequence[str]) -> int:
    """Run one command; the exit code. Every failure is said on stderr, none as a traceback."""
    try:
        code = app(args=list(arguments), prog_name="npulab", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except NpulabError as e:
        return fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what the interpreter flushes at exit
        return 141
    except MemoryError:
        return fail("there is not enough memory for this", 4)
    except Exception as e:
        if type(e).__name__ == "Abort":  # how older option parsers tell of an interrupt
            return 130
        if hasattr(e, "format_message"):  # the option parser's own errors
            return _wrong_usage(e, arguments)
        if isinstance(e, OSError) and e.errno is not None:
            return fail(f"{e.strerror}\n  where   {e.filename or 'standard output'}", 4)
        if os.environ.get("NPULAB_TRACEBACK"):
            traceback.print_exc()
        return fail(f"{type(e).__name__}: {e}\n  This is a defect of npulab; please report it.\n"
                     "  try     NPULAB_TRACEBACK=1 shows where it happened", 4)


def _wrong_usage(error: Exception, arguments: Sequence[str]) -> int:
    message = error.format_message()  # type: ignore[attr-defined]
    if message.startswith("Usage:"):  # called without arguments: this is the help
        print(message, file=sys.stderr)
        return 2
    verbs = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    verbs |= {g.name for g in app.registered_groups}
    verb = next((f"{a} " for a in arguments if a in verbs), "")
    return fail(f"{message[:1].lower()}{message[1:].rstrip('.')}\n  try     npulab {verb}--help", 2)
