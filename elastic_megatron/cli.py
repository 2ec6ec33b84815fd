"""The console script ``elastic-megatron``: parsing, exit codes and JSON output; each command has its own module."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from . import __version__
from .commands import (
    convert,
    evaluate,
    generate,
    init,
    jobs,
    plan,
    quantize,
    quickstart,
    rank,
    recipe,
    submit,
    train,
)
from .commands.examples import EXAMPLES
from .data import cli as prepare_data
from .errors import BAD_INPUT, UserError, of_os_error
from .files.json_files import finite, strict
from .report import cli as report

COMMANDS = (
    quickstart,
    init,
    plan,
    recipe,
    prepare_data,
    rank,
    train,
    quantize,
    convert,
    evaluate,
    generate,
    submit,
    jobs,
    report,
)


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line and exit 2, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        _tell(f"{message}; see {self.prog} --help")
        raise SystemExit(BAD_INPUT)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an option that nobody knows ends here, where those that are known are at hand."""
        found, rest = super().parse_known_args(args, namespace)
        if unknown := [text for text in rest if text.startswith("-") and text != "-"]:
            hint = _did_you_mean(unknown[0].split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _did_you_mean(str(value), map(str, action.choices or ()))
            raise


class _Check(argparse.Action):
    """Like ``--version``: prints what ``runtime.kernels`` finds, and exits."""

    def __call__(self, *_: object) -> NoReturn:
        _quiet()
        with _stdout_to_stderr():
            try:
                from .runtime import kernels
            except (ImportError, OSError) as e:
                raise SystemExit(f"error: torch does not import: {e}") from None
            text = kernels.report()
        print(text)
        raise SystemExit(0)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Imports nothing heavy: ``--help`` and ``recipe`` work on a login node."""
    parser = _Parser(
        prog="elastic-megatron", description="Many nested model sizes from one Megatron checkpoint."
    )
    parser.add_argument("--version", action="version", version=f"elastic-megatron {__version__}")
    parser.add_argument(
        "--check",
        action=_Check,
        nargs=0,
        help="print versions, GPUs and which optional kernels import, and exit",
    )
    # who types only the name wants to know what there is
    parser.set_defaults(handler=lambda _: parser.print_help())
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    words = {action.dest: action.help or "" for action in subparsers._choices_actions}
    for name, command in subparsers.choices.items():
        command.description = command.description or f"{words[name][:1].upper()}{words[name][1:]}."
        command.epilog = f"example: {EXAMPLES[name]}"
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 on success, else one ``error:`` line and the status of the ``UserError`` (2 on bad input), 1 on
    an internal failure.

    With ``--json`` stdout carries the command's one JSON object and everything else goes to stderr.
    """
    _prepare_streams()
    args = _parse(argv)
    _quiet()
    machine_readable = getattr(args, "json", False)
    struck: list[int] = []
    try:
        quiet = _stdout_to_stderr() if machine_readable else contextlib.nullcontext()
        with _ended_by_signals(struck), quiet:
            result = args.handler(args)
        if machine_readable and result is not None:
            print(strict(finite(result)))
        sys.stdout.flush()  # here, where a full disk can still be told
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as e:
        if struck:
            print("interrupted", file=sys.stderr)
            return 128 + struck[-1]
        return _failed(e)
    return 0


def _failed(error: Exception) -> int:
    """Say why a command failed; its exit status."""
    if isinstance(error, UserError):
        _tell(str(error))
        return error.status
    if isinstance(error, MemoryError):
        _tell("memory ran out; run it where there is more of it, or on less at a time")
        return 1
    if isinstance(error, BrokenPipeError) and error.errno == errno.EPIPE:
        # the reader has seen enough; keep the interpreter from flushing into the pipe
        _discard_stdout()
        return 0
    told = of_os_error(error) if isinstance(error, OSError) else None
    if told is not None and not os.environ.get("ELASTIC_MEGATRON_DEBUG"):
        _tell(str(told))
        _discard_stdout()
        return told.status
    # an internal failure: the traceback is for a bug report
    traceback.print_exception(error)
    print("this is a defect of elastic-megatron; please report it with the traceback", file=sys.stderr)
    return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with ``key=value`` overrides also behind options, where argparse no longer expects them."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow; see docs/commands.md
        import argcomplete

        argcomplete.autocomplete(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if hasattr(args, "overrides") and "=" in text and text[0] != "-"]
    if unknown := [text for text in rest if text not in overrides]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def _tell(message: str) -> None:
    """Print an error, a line for each line of it. What file names hide in it is shown, not sent to the terminal."""
    for line in message.split("\n"):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        print(f"error: {shown}", file=sys.stderr)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    from .recipe.types import did_you_mean

    return did_you_mean(word, known)


def _prepare_streams() -> None:
    """A closed standard stream is as good as /dev/null, and a character that a terminal lacks is written by its number.

    Otherwise the first file that is opened gets the number of the closed stream, and what is printed with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """Keep the interpreter from writing the rest of stdout when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _ended_by_signals(struck: list[int]) -> Iterator[None]:
    """SIGTERM ends a command as an interruption does: it cleans up. Signals are noted in ``struck`` as they come.

    What a handler raises may not arrive: a destructor prints it and goes on, and C++ turns it into errors of its own.
    So a signal is sent again where it was lost, and whatever ends a command after one is its doing.

    SIGTERM is left to one rank of several: while it waits for the others inside a collective, no handler runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> NoReturn:
        struck.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def again(lost: sys.UnraisableHookArgs) -> None:
        if struck and lost.exc_type in (KeyboardInterrupt, SystemExit):
            # in a while: a handler that runs at once would raise in this hook
            threading.Timer(0.05, os.kill, (os.getpid(), struck[-1])).start()
        else:
            hook(lost)

    taken = {signal.SIGINT: signal.default_int_handler}
    if os.environ.get("WORLD_SIZE", "1") == "1":
        taken[signal.SIGTERM] = signal.SIG_DFL
    taken = {number: usual for number, usual in taken.items() if signal.getsignal(number) is usual}
    hook, sys.unraisablehook = sys.unraisablehook, again
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, usual in taken.items():
            signal.signal(number, usual)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Down to the file descriptor, so that child processes and libraries cannot mix into the JSON either."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _quiet() -> None:
    """Silence third-party chatter that a user cannot act on; ELASTIC_MEGATRON_DEBUG=1 shows it."""
    if os.environ.get("ELASTIC_MEGATRON_DEBUG"):
        return
    import logging

    os.environ.setdefault("TORCH_LOGS", "-torch")  # its import resets the level that is set below
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
