"""What is seen while a run goes on: a bar on a terminal, now and then a line, JSON, or nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sophon._cli.application import say_json
from sophon._records.metrics import shown
from sophon._records.round import Round

if TYPE_CHECKING:
    from sophon._auditing.budget import AuditForecast
    from sophon._records.audit_record import Trial
    from sophon._records.round import Stage

Mode = Literal["bar", "lines", "json", "quiet"]
SECONDS_BETWEEN_LINES = 10.0
# A narrower terminal has no room for a bar beside what is said.
_WIDE = 120
# Loops that are over sooner are not shown.
LATE_S = 2.0


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `45 s`, `12 min 05 s`, `2 h 03 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def say_forecast(
    expected: AuditForecast,
    mode: Mode,
    todo: int | None = None,
    given_up: Sequence[str] = (),
    *,
    about: bool = True,
) -> None:
    """Print a forecast; `todo` is how many of its trials no store has, where that is known."""
    if mode == "quiet":
        return
    if mode == "json":
        numbers = {"trials": expected.trials, "steps": expected.steps, "total_s": expected.seconds}
        more = {} if todo is None else {"to_run": todo, "given_up": list(given_up)}
        say_json("forecast", **numbers, **more)
        return
    left = "" if todo is None else f"; {todo} trials are still to be run"
    # Of stages the trials that are left are the longer ones.
    if todo and not about and expected.seconds is not None and todo < expected.trials:
        left += f", about {duration(expected.seconds * todo / expected.trials)}"
    typer.echo(f"forecast: {forecast_text(expected, about=about)}{left}", err=True)


def forecast_text(expected: AuditForecast, *, about: bool = True) -> str:
    """Return what a line says of an audit to come; `about` where its trials are not certain."""
    seconds = expected.seconds
    time = "a time that cannot be measured" if seconds is None else f"about {duration(seconds)}"
    several = f"{'about ' if about else ''}{expected.trials} trials"
    return f"{several}, {expected.steps} steps, {time} in all"


class Display(AbstractContextManager["Display"]):
    """Shows the steps of a run of `total`, of which `todo` are still to be done.

    JSON goes to stdout, for programs; bars and lines go to stderr, so that stdout holds the
    result alone.
    """

    displays: ClassVar[int] = 0

    def __init__(self, mode: Mode, *, noun: str, total: int, todo: int) -> None:
        self.mode = mode
        self.noun = noun
        self.total = total
        self.todo = todo
        self.seen = 0
        self.ran = 0
        self.started = time.monotonic()
        self.last_line = self.started
        self.bar: Progress | None = None
        self.shown = False

    def __enter__(self) -> Self:
        self.shown = True
        Display.displays += 1
        if self.mode == "bar":
            console = Console(stderr=True)
            wide = console.width >= _WIDE
            bar = (TextColumn(self.noun + "s"), BarColumn(24)) if wide else ()
            columns = (*bar, MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=console)
            self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        Display.displays -= 1
        if self.bar is not None:
            self.bar.stop()

    @classmethod
    @contextmanager
    def late(cls, mode: Mode, noun: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a loop once it has taken `LATE_S` seconds, unless a display is open already.

        The value is called after each of its steps.
        """
        display = cls(mode, noun=noun, total=total, todo=total)
        with ExitStack() as opened:

            def step() -> None:
                taken = time.monotonic() - display.started
                if not display.shown and taken > LATE_S and not cls.displays:
                    opened.enter_context(display)
                    display.start_at(display.seen)
                if display.shown:
                    display.step({}, "")
                else:
                    display.seen, display.ran = display.seen + 1, display.ran + 1

            yield step

    def start_at(self, done: int) -> None:
        """Count `done` steps as finished by an earlier run."""
        self.seen = done
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)

    def step(self, record: dict[str, Any], text: str, *, fresh: bool = True) -> None:
        """Show one finished step; one that is not `fresh` was only read from a store."""
        self.seen += 1
        self.ran += fresh
        if self.mode == "json":
            say_json(self.noun, **record)
        elif self.bar is not None:
            described = f"{self._pace()}  {text}"
            self.bar.update(self.bar.task_ids[0], completed=self.seen, description=described)
        elif self.mode == "lines":
            self._line(text)

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if self.seen != self.total and now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        more = f" ({self.seen - self.total} more than expected)" if self.seen > self.total else ""
        line = f"{self.noun} {self.seen}/{self.total}{more}  {self._pace()}  {text}"
        typer.echo(line, err=True)

    def _pace(self) -> str:
        if not self.ran:
            return "stored"
        each = max(1e-6, (time.monotonic() - self.started) / self.ran)
        rate = f"{each:.1f} s/{self.noun}" if each >= 1 else f"{1 / each:.1f} {self.noun}s/s"
        # Of later stages it may turn out only then that they are stored.
        left = min(self.todo - self.ran, self.total - self.seen)
        return f"{rate}, {duration(each * left)} left" if left >= 0 else rate


def toml(value: Any) -> str:
    """Return plain JSON data as an inline TOML value; keys without a value are left out."""
    if isinstance(value, dict):
        held = ", ".join(f"{k} = {toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {held} }}" if held else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


def lines(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a specification as TOML, one dotted key a line, as `--set` spells them."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from lines(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key} = {toml(value)}"


def round_text(query: str, guard: str, record: Round) -> str:
    """Return what a line says of a round: the last check of the original task; the price of
    hindrance; the query score, or what readers find early, midway and late beside fresh networks.
    """
    groups = [name.removeprefix("R2 ") for name in record.readings if name.startswith("R2 ")]
    found = f"restricted score {query}"
    if groups:
        # Of several domains the last whose turn it was.
        domain = groups[-1].partition(" ")[2]
        groups = [group for group in groups if group.partition(" ")[2] == domain]
        read, fresh = (
            "/".join(f"{record.readings[f'{kind} {group}']:.2f}" for group in groups)
            for kind in ("R2", "floor")
        )
        depths = "/".join(group.partition(" ")[0] for group in groups)
        found = f"R2 {depths} {read} (fresh {fresh}){domain and ' ' + domain}"
    price = "" if record.price is None else f"price {record.price:.2f}  "
    return f"original {guard or 'not yet checked'}  {price}{found}"


def stage_text(stage: Stage) -> str:
    """Return what a line says of a stage of pre-training."""
    return f"step {stage.step}  loss {stage.loss:.4f}  validation {shown(stage.validation)}"


def trial_text(trial: Trial) -> str:
    """Return what a line says of a trial."""
    ended = "" if trial.outcome.kind == "completed" else f" ({trial.outcome.kind})"
    best = [point.validation for point in trial.curve if point.step == trial.best_step]
    score = f"validation {shown(best[0])}" if best else "no score"
    return f"{trial.subject} {score}{ended}  {trial.strategy.label()}"
