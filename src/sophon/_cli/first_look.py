"""A first look: what fits a budget, the work from training to the report, what it leaves open."""

from __future__ import annotations

import shlex
import time
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from sophon._cli import running
from sophon._cli.auditing import audit_of, run_audit, write_audit

if TYPE_CHECKING:
    from sophon._auditing.audit import Audit
    from sophon._cli.progress import Mode
    from sophon._cli.run_file import Case
    from sophon._records.audit_record import AuditRecord

# Where a network that came without weights is trained, beside the run file.
START = "start/model.safetensors"
# What comes before a first look is repeated with another protection.
DELETE_FIRST = "delete its folder `protected` first, trained weights beside it are kept"
# Points that the task to keep may lose: as everywhere, and in a first look.
_TOLERANCE, _SHORT_TOLERANCE = 2.0, 3.0
# Of the budget: for what is not measured before (fresh floors, test scores, vitals, reports), and
# of what is left at most for attacks.
_UNMEASURED, _AUDITING = 0.1, 0.5
_LEAST_ROUNDS, _LEAST_STEPS, _MOST_STEPS = 10, 16, 200
# From the more attacks to the fewer.
_SUITES = ("quick-2", "look-1")


class Chosen(NamedTuple):
    """What a run file leaves to choose; `rounds` of None are as many as the images ask for."""

    rounds: int | None
    suite: str
    steps: int
    tolerance: float


USUAL = Chosen(None, _SUITES[0], _MOST_STEPS, _TOLERANCE)


def affordable(case: Case, mode: Mode, seconds: float, began: float, *, trains: bool) -> Chosen:
    """Return what fits `seconds` from when the command `began`, with training first where it
    `trains`, and the tolerance that the images allow to measure; say what all of it takes.

    The suite of fewer attacks is taken where the other one does not fit. What is least is taken
    though it takes longer, and that is said.
    """
    from sophon._cli.progress import duration
    from sophon._training.pretrain import forecast

    running.remark(mode, "measuring a few rounds and steps, to choose how many there is time for")
    training = 0.0
    if trains:
        common = {"original": case.original, "task": case.task, "model_spec": case.network}
        training = forecast(case.model, spec=case.spec.pretrain, **common)[1]
    expected = running.forecast_of(case)
    audit = audit_of(case, case.model, case.model)
    attacks = audit.cost(audit.spec)
    measuring = time.monotonic() - began
    left = (1 - _UNMEASURED) * seconds - measuring - training
    suite, steps, attacks = _attacks_within(_AUDITING * left, audit)
    most = expected.spec.rounds or _LEAST_ROUNDS
    rounds = max(min(_LEAST_ROUNDS, most), min(most, int((left - attacks) / expected.round_s)))
    protecting = rounds * expected.round_s
    total = measuring + training + protecting + attacks + _UNMEASURED * seconds
    parts = [
        f"measuring took {duration(measuring)}",
        *([f"training {duration(training)}"] if trains else []),
        f"{rounds} rounds {duration(protecting)}",
        f"the attacks of {suite}, {steps} steps each, {duration(attacks)}",
        f"the rest {duration(_UNMEASURED * seconds)}",
    ]
    parts[len(parts) - 3] += " (so few may keep no weights)" * (rounds <= _LEAST_ROUNDS)
    over = f", more than the budget of {duration(seconds)}: the least that tells anything"
    less = over if total > seconds + 1 else ""
    running.remark(mode, f"forecast: about {duration(total)} in all{less} ({', '.join(parts)})")
    # Of few images each is several points: three of them may be lost in a first look.
    fewest = 300 / len(case.original.validation)
    return Chosen(rounds, suite, steps, max(_SHORT_TOLERANCE, round(fewest, 1)))


def _attacks_within(seconds: float, audit: Audit) -> tuple[str, int, float]:
    """Return the suite and the steps of each attack that fit so many seconds, and what they take;
    the least there are where none does.
    """

    def cost(suite: str, steps: int) -> float:
        return audit.cost(audit.spec.model_copy(update={"suite": suite, "steps": steps}))

    fitting = [one for one in _SUITES if cost(one, _LEAST_STEPS) <= seconds]
    suite = (fitting or _SUITES[-1:])[0]
    steps = range(_LEAST_STEPS + 1, _MOST_STEPS + 1)
    # More steps take longer: few plans tell how many fit.
    chosen = _LEAST_STEPS + bisect_right(steps, seconds, key=lambda count: cost(suite, count))
    return suite, chosen, cost(suite, chosen)


def _in_full(
    case: Case, record: AuditRecord, run: Path, out: Path, settings: list[str] | None
) -> list[str]:
    """Return lines that say what a first look leaves open, and the commands that tell it, with the
    `settings` that it had; what is added to them comes last and counts.
    """
    from sophon._protection.presets import completed
    from sophon._records.statement import statement_of

    steps = max(_MOST_STEPS, 10 * statement_of(record.protection).life)
    whole, shorter = out / "whole", case.spec.protect
    usual = shorter.model_copy(update={"rounds": None})
    rounds = completed(usual, case.setting(), case.model).rounds
    given = [word for setting in settings or () for word in ("--set", setting)]
    protect = ["sophon", "protect", run, "--out", whole, *given]
    protect += ["--set", f"protect.rounds={rounds}"]
    audit = ["sophon", "audit", run, "--model", whole, "--out", out / "whole-audit", *given]
    for setting in ('suite="standard-1"', f"steps={steps}", "seeds=[0,1,2]"):
        audit += ["--set", f"audit.{setting}"]
    return [
        f"a first look: few rounds, attacks of {record.spec.steps} steps, one seed. It can convict"
        f" and not acquit: that takes {rounds} rounds, three seeds and {steps} steps (--dry-run"
        " says how long):",
        *(f"  {shlex.join(map(str, words))}" for words in (protect, audit)),
    ]


def first_look(
    run: Path,
    out: Path,
    settings: list[str] | None,
    mode: Mode,
    threads: int | None,
    *,
    pretrained: bool = False,
    note: str = "",
) -> None:
    """Do what a run file says from the first step to the report in `out`, its folder, or go on.

    A network whose weights are to be at `START` is trained first, from published weights where
    `pretrained`; `note` heads the report, and without one what is left open is said. Raises
    SophonError as the commands do.
    """
    from sophon._cli.run_file import load, load_pretraining, read_run
    from sophon._records.metrics import shown

    start = out / START
    if not start.is_file() and read_run(run, settings).model.weights == START:
        published = [*(settings or ()), *(["model.pretrained=true"] if pretrained else ())]
        training = load_pretraining(run, published, threads, untrained=True)
        result = running.run_pretraining(training, start.parent, mode)
        scored = f"{training.original.name} validation {shown(result.score)}"
        running.remark(mode, f"trained: {scored}")
    case = load(run, settings, threads)
    protected = out / "protected"
    made = running.run_protection(case, protected, mode, again=f"; {DELETE_FIRST}")
    if mode != "quiet":
        running.show_protected(made, protected, mode)
    record = run_audit(case, protected, mode, store=out / "audit", note=note, measured=True)
    report = write_audit(record, out / "audit")
    if note and mode in ("bar", "lines"):
        typer.echo(note)
    running.show_verdict(report, mode, {"report": (out / "audit" / "report.html").absolute()})
    if not note and mode in ("bar", "lines"):
        running.say(_in_full(case, record, run, out, settings))
