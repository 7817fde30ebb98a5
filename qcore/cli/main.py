"""``qcore``: the commands, their exit codes, and how errors are shown.

Exit codes: 0 done; 1 failed, with one message on the standard error; 2 wrong usage; 130 interrupted (Ctrl-C, SIGINT);
143 terminated (SIGTERM).

A command's module is imported when the command runs, so that ``qcore --help`` does not wait for torch.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

# Command -> module with a click command of the same name, and the line that ``qcore --help`` shows.
_COMMANDS = {
    "quantize": ("qcore.cli.quantize", "Quantize a checkpoint to NF4, FP4 or int8."),
    "generate": ("qcore.cli.generate", "Generate text from a checkpoint, quantized or not."),
    "eval": ("qcore.cli.evaluate", "Measure perplexity on a text."),
    "info": ("qcore.cli.info", "Show backends, versions and devices."),
    "bench": ("qcore.cli.bench", "Measure speed beside torch, bitsandbytes and the machine's limits."),
    "shim": ("qcore.cli.shim", "Say what `import bitsandbytes` means here."),
}

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: what cleans up after Ctrl-C cleans up after it too."""


class LazyGroup(click.Group):
    """A group that imports a command's module when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and name not in _COMMANDS:
            near = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(_COMMANDS)}."
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="qcore-quant", prog_name="qcore")
def cli() -> None:
    """Quantize language models and run them on any device.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line; ends the process with one of the exit codes."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return report_errors(lambda: cli.main(args=args, prog_name="qcore", standalone_mode=False))


def report_errors(call: Callable[[], Any]) -> int:
    """Make ``call``, show the errors that are ours or the user's as one message, and return the exit code."""
    try:
        with _terminable():
            result = call()
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        return _interrupted(error)
    except click.ClickException as error:
        error.show()
        return USAGE if isinstance(error, click.UsageError) else FAILED
    except BrokenPipeError:
        # The reader of a pipe has gone; Python would complain once more when it flushes at exit.
        sys.stdout = None
        return FAILED
    except Exception as error:
        return _failed(error)
    return result if isinstance(result, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which a time limit or a scheduler sends, raises :class:`Terminated`; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # signals are somebody else's concern
        return

    def terminate(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted(error: BaseException) -> int:
    terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)  # click's Abort has a cause
    click.echo(f"qcore: {'terminated' if terminated else 'interrupted'}", err=True)
    return TERMINATED if terminated else INTERRUPTED


def _failed(error: Exception) -> int:
    from qcore.errors import InvalidArgument, QcoreError

    if not isinstance(error, QcoreError):
        raise error  # a defect: its traceback is wanted
    click.echo(f"qcore: {error}", err=True)
    return USAGE if isinstance(error, InvalidArgument) else FAILED
