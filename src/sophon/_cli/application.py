"""The application: its name, shared options, and errors as exit codes."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
import typer.core

from sophon._base.counting import watching
from sophon._base.errors import SophonError, SpecError
from sophon._base.remarks import LOG

if TYPE_CHECKING:
    from types import FrameType

    from sophon._training.ranks import Ranks

# torchrun gives it to the processes it starts.
_ELASTIC = "TORCHELASTIC_RUN_ID"
_SAME_S = 2.0

EXIT_CODES = """\
\b
Exit codes:
  0    done
  1    a fault in sophon itself; please report it
  2    the command, run file, data, model or folder cannot be used; the message says what to change
  3    no weights met the tolerance on the original task; all files are kept
  4    a loss became infinite or not a number; what was written is kept
  5    audit --controls: a model whose answer is known was not found out
  130  interrupted; repeat the command to resume

\b
Examples:
  sophon demo
  sophon try --model timm:resnet18 --weights w.safetensors --keep photos --refuse faces
  sophon protect run.toml --out runs/p1
  sophon audit run.toml --model runs/p1/model.safetensors --out runs/a1
  sophon report runs/a1 --html report.html
"""

# As a user meets them.
_ORDER = (
    *("demo", "try", "init", "pretrain", "protect", "audit", "report"),
    *("compare", "evaluate", "inspect", "export"),
)


class _Commands(typer.core.TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    name="sophon",
    cls=_Commands,
    help="Protect a pre-trained model against fine-tuning, attack it, report the result.",
    epilog=EXIT_CODES,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def option(flag: str, metavar: str, text: str, **more: Any) -> Any:
    """Return an option that takes a value: its flag, what stands for the value, its help."""
    return typer.Option(flag, metavar=metavar, help=text, **more)


RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.TOML", help="The run: model, domains and what to do.")
]
Settings = Annotated[
    list[str] | None,
    option(
        "--set",
        "KEY=VALUE",
        "Change one value of the run file, such as protect.rounds=50. May be repeated.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the last line, the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line and no bars.")]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved run and a forecast; write nothing.")
]


def required_out(out: Path | None, example: str) -> Path:
    """Return the folder to write to. Raises SpecError where a run that writes has none."""
    if out is None:
        raise SpecError(f"--out is missing: name a folder to write to, such as --out {example}")
    return out


def counted(text: str | int) -> int:
    """Return a whole number from 1 on. Raises typer.BadParameter, naming what was given."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise typer.BadParameter(f"{text} is not a whole number from 1 on")
    return count


Threads = Annotated[
    int | None, option("--threads", "N", "Processor threads to use.", parser=counted)
]
Arguments = ParamSpec("Arguments")


def say_json(event: str, **values: Any) -> None:
    """Print one JSON object in a line."""
    typer.echo(json.dumps({"event": event, **values}))


def _fail(message: str, code: int) -> NoReturn:
    for line in textwrap.wrap(message, 300, break_on_hyphens=False):
        typer.echo(line, err=True)
    raise typer.Exit(code)


@contextmanager
def _remarked_once(quiet: bool) -> Iterator[None]:
    """Let each remark be made once in a command, none where it is `quiet`."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    before, LOG.disabled = LOG.disabled, quiet or LOG.disabled
    LOG.addFilter(new)
    try:
        yield
    finally:
        LOG.removeFilter(new)
        LOG.disabled = before


def _shown(noun: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    from sophon._cli.progress import Display

    return Display.late("bar" if sys.stderr.isatty() else "lines", noun, total)


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn what a user can act on into a line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        quiet = bool(kwargs.get("quiet") or kwargs.get("as_json"))
        try:
            with (
                _ended_like_interrupted(),
                _remarked_once(quiet),
                watching(None if quiet else _shown),
            ):
                command(*args, **kwargs)
        except SophonError as error:
            if error.told:
                raise typer.Exit(error.exit_code) from None
            _fail(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            if not _speaks():
                raise typer.Exit(130) from None
            _fail(f"interrupted: to resume, repeat the command: {command_line()}", 130)
        except (OSError, MemoryError, RuntimeError) as error:
            line = _resources_wanting(error)
            if line is None:
                raise
            _fail(f"error: {line}", 2)

    return guarded


def command(
    *examples: str, name: str | None = None
) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """Make a function a command, `guarded`, whose help ends with the examples."""
    epilog = "\b\nExamples:\n" + "".join(f"  {example}\n" for example in examples)

    def added(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
        return app.command(name, epilog=epilog)(guarded(function))

    return added


def _resources_wanting(error: Exception) -> str | None:
    """Return what to do about a disk, a file or a memory that does not serve; None for a fault."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in said.lower() for words in _NO_MEMORY):
        return (
            f"not enough memory ({said[:200] or type(error).__name__}): end what else holds it, or"
            " take fewer or smaller images, smaller batches (batch_size, query_batch_size,"
            " original_batch_size) or fewer --workers; of networks that offer it,"
            " model.gradient_checkpointing = true. Then repeat the command"
        )
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno or 0, "check the path or choose another place")
    return f"{where}{error.strerror or error}: {remedy}, then repeat the command"


# What torch, CUDA, its libraries and the system say.
_ROOM = "make room or choose another place"
_RIGHTS = "get the permission or choose another place"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "choose a place that can be written to",
    errno.EIO: "the disk or the file is damaged, take another copy",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_NO_MEMORY = ("out of memory", "allocate memory", "enough memory", "alloc_failed")


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """Take a request to end, as of `timeout` or a cluster, for Ctrl-C, but for torchrun's."""
    if _ELASTIC in os.environ:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line() -> str:
    """Return the command as it was typed."""
    script = Path(sys.argv[0])
    own = script.suffix == ".py" and script.name != "__main__.py"
    words = [*(("python", sys.argv[0]) if own else ("sophon",)), *sys.argv[1:]]
    if _ELASTIC in os.environ:
        count = os.environ.get("LOCAL_WORLD_SIZE", "1")
        words = ["torchrun", "--nproc-per-node", count, "-m", *words]
    return shlex.join(words)


def typed(command: str) -> str:
    """Return the command line in one printable line if it is of a `command`, or that alone."""
    line = "".join(letter if letter.isprintable() else " " for letter in command_line())
    return line if line.startswith(f"{command} ") else command


def _speaks() -> bool:
    """Return whether this process is the one of torchrun's that speaks for all."""
    return _ELASTIC not in os.environ or os.environ.get("RANK", "0") == "0"


def require_alone(command: str) -> None:
    """Raise SpecError where torchrun started several processes: each would do all of the work."""
    count = os.environ.get("WORLD_SIZE", "1")
    if _ELASTIC in os.environ and count != "1":
        error = SpecError(
            f"torchrun started {count} processes, and `{command}` is work for one: start it"
            " without torchrun; only `protect` is shared by processes"
        )
        error.told = not _speaks()
        raise error


class Stop:
    """Ctrl-C asks to stop after the current round, a second one stops at once.

    `ranks` are the processes that must stop together: torchrun passes every Ctrl-C on to those who
    had it from the terminal already, so one within `_SAME_S` seconds is the same one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = self.ranks.world > 1 and now - (self.since or now) < _SAME_S
        if self.since is not None and not repeated:
            raise KeyboardInterrupt
        if self.since is None and self.ranks.first:
            typer.echo("\nstopping after this round; Ctrl-C again stops at once", err=True)
        self.since = self.since or now

    @property
    def asked(self) -> bool:
        """Whether any process was asked to stop; all must ask this at the same point."""
        return any(self.ranks.gather(self.since is not None))


@contextmanager
def stopping(ranks: Ranks | None = None) -> Iterator[Stop]:
    """Take Ctrl-C, and a request to end, over for as long as the context lasts."""
    from sophon._training.ranks import Ranks

    stop = Stop(ranks or Ranks())
    taken = (signal.SIGINT,) if _ELASTIC in os.environ else (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(one, stop) for one in taken]
    try:
        yield stop
    finally:
        for one, before in zip(taken, previous, strict=True):
            signal.signal(one, before)
