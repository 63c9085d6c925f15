"""Tables of published and re-measured numbers, filled from stored records. No torch."""

from __future__ import annotations

import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophon._attacks import resolved, strategies_of
from sophon._errors import CheckpointError, SpecError
from sophon._files import read_json
from sophon._grid import (
    CELLS,
    PUBLISHED_ROBUSTNESS,
    TRAINING_IMAGES,
    Cell,
    Published,
    Scale,
    base_file,
    base_name,
    published_of,
    robustness,
    run_file,
)
from sophon._metric_kinds import MetricKind, kind_of_record
from sophon._records import AuditRecord, DomainRecord, Trial
from sophon._specs import (
    AuditSpec,
    DomainSpec,
    ModelSpec,
    PretrainRunSpec,
    PretrainSpec,
    ProtectSpec,
    RunSpec,
    Strategy,
    Subject,
    parse_spec,
)
from sophon._verdict import overall, summarise

SUBJECTS: tuple[Subject, ...] = ("scratch", "unprotected", "protected")
Triple = tuple[float | None, ...]
# What stands for a cell that never ran, or a number nobody published.
EMPTY = ""


@dataclass(frozen=True)
class Measured:
    """What an audit says of its first restricted domain, on the test split, in [0, 1].

    `rehearsed` and `worst` hold scratch, unprotected and protected: after the attack that
    protection rehearsed, and after each subject's best attack. `seeds` counts attack seeds.
    `changes` names what was not run as the cell says.
    """

    kind: MetricKind
    before: float | None
    after: float | None
    rehearsed: Triple
    worst: Triple
    verdict: str
    seeds: int
    changes: tuple[str, ...] = ()


def record_file(out: Path, cell: Cell) -> Path:
    """Return where `sophon reproduce --out` keeps the record of a cell."""
    return out / cell.scale / cell.name / "audit" / "record.json"


def failure_file(folder: Path) -> Path:
    """Return where the reason is kept for which what runs in `folder` could not be finished."""
    return folder / "failed.txt"


def failure_of(folder: Path) -> str | None:
    """Return why what runs in `folder` could not be finished, fit for a table; None: nothing says
    so.
    """
    file = failure_file(folder)
    if not file.is_file():
        return None
    reason = " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    return f"failed: {reason}".replace("|", "\\|")


def read_measured(out: Path, cell: Cell) -> Measured | None:
    """Return what a cell's stored record below `out` says, None where there is none.

    Raises CheckpointError for a damaged one.
    """
    record = read_stored(record_file(out, cell))
    return None if record is None else measured(record, cell, base_folder(out, cell))


def read_stored(file: Path) -> AuditRecord | None:
    """Return the record in `file`, None where there is none; raises as `read_measured`."""
    if not file.is_file():
        return None
    try:
        return AuditRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValidationError):
        raise CheckpointError(
            f"{file} is not a whole audit record of this version: repeat the audit"
        ) from None


def measured(record: AuditRecord, cell: Cell, base: Path | None = None) -> Measured:
    """Return the numbers of a record's first restricted domain, and how it differs from `cell`,
    whose model of the original task is in `base`.
    """
    summaries = summarise(record)
    first = summaries[0]
    scores = {subject.name: subject.original for subject in record.subjects}
    own, kept = scores.get("unprotected"), scores.get("protected")
    worst = [first.subjects.get(name) for name in SUBJECTS]
    attack = rehearsed_attack(record)
    return Measured(
        kind=kind_of_record(record),
        before=None if own is None else own.value,
        after=None if kept is None else kept.value,
        rehearsed=(None,) * 3 if attack is None else scores_of(record, attack),
        worst=tuple(s.test.value if s is not None and s.test is not None else None for s in worst),
        verdict=overall(summaries).text,
        seeds=len(record.seeds),
        changes=changes_of(record, cell, base),
    )


def rehearsed_attack(record: AuditRecord) -> Strategy | None:
    """Return the attack of the record that protection rehearsed: the same but for its steps."""
    spec: Any = (record.protection or {}).get("spec") or {}
    fixed = (spec.get("rehearsal") or {}).get("fixed")
    if not fixed:
        return None
    wanted = Strategy.model_validate(fixed, strict=False)
    return next((s for s in record.strategies if _alike(s, wanted)), None)


def _alike(one: Strategy, other: Strategy) -> bool:
    return one == other.model_copy(update={"steps": one.steps})


def scores_of(record: AuditRecord, attack: Strategy) -> Triple:
    """Return the mean test score over seeds after an attack on each subject, None if not run.

    It is of the record's first restricted domain, at the step that validation chose.
    """
    domain = record.restricted[0].name
    found: list[float | None] = []
    for subject in SUBJECTS:
        trials = [t for t in record.trials if t.subject == subject and t.domain == domain]
        values = [t.test.value for t in trials if _of(t, attack) and t.test is not None]
        found.append(sum(values) / len(values) if values else None)
    return tuple(found)


def _of(trial: Trial, attack: Strategy) -> bool:
    return trial.strategy == attack


# --- Is it the cell? ---------------------------------------------------------------------------

# An image set without `image_size` has images of this many pixels a side.
_OWN_SIDE = 32


def changes_of(record: AuditRecord, cell: Cell, base: Path | None = None) -> tuple[str, ...]:
    """Return the keys in which a record was not run as the cell says, such as `audit.steps`.

    Of a domain the record tells its name, its size and how many images it is trained on; of what
    else was changed it tells the command. `base` is the folder of the model of the original task,
    whose training is compared with the cell's where it is there. Raises CheckpointError where its
    description is damaged.
    """
    wanted = parse_spec(RunSpec, tomllib.loads(run_file(cell, cell.name, ".")), where=cell.name)
    found = [] if record.model == _named(wanted.model) else ["model.name"]
    if record.task != wanted.task.name:
        found.append("task.name")
    if _timestep(record.task_name) != wanted.task.timestep:
        found.append("task.timestep")
    found += _domain_changes("original", (record.original,), (wanted.original,))
    found += _domain_changes("restricted", record.restricted, wanted.restricted)
    for role, added in (("held_out", record.held_out), ("benign", record.benign)):
        found += [role] if added else []
    held = (record.protection or {}).get("spec")
    found += _differing("protect", _completed(ProtectSpec, held), _plain(wanted.protect))
    found += _differing("audit", _plain(record.spec), _plain(resolved(wanted.audit)))
    found += _set_in(record.command)
    if base is not None and (base / BASE_DONE).is_file():
        found += _training_changes(base, cell)
    return tuple(dict.fromkeys(found))


def _timestep(task_name: str) -> int | None:
    """Return the only timestep of a diffusion task, from its name in a record; None: all."""
    found = re.search(r"\btimestep (\d+) alone\b", task_name)
    return int(found.group(1)) if found else None


def _set_in(command: str) -> list[str]:
    """Return the keys that a command sets and that no value in the record tells of.

    Where images and published weights lie is no change.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    given = [word for option, word in itertools.pairwise(words) if option == "--set"]
    given += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    keys = [key_of(one) for one in given]
    return [
        key
        for key in keys
        if key.partition(".")[0] not in ("audit", "protect")
        and key.rpartition(".")[2] not in ("root", "path", "download")
        and key not in OF_BASE
    ]


def key_of(setting: str) -> str:
    """Return the key of a `key=value`."""
    return ".".join(part.strip() for part in setting.partition("=")[0].split("."))


def _training_changes(base: Path, cell: Cell) -> list[str]:
    """Return the keys in which the model in `base` was not trained as the cell says."""
    wanted = parse_spec(PretrainRunSpec, tomllib.loads(base_file(cell, "")), where=cell.name)
    held = _trained_as(base)
    found = _differing("pretrain", _completed(PretrainSpec, held["spec"]), _plain(wanted.pretrain))
    if _timestep(held["identity"].get("task", "")) != wanted.task.timestep:
        found.append("task.timestep")
    return found


def _plain(spec: AuditSpec | ProtectSpec | PretrainSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _completed(kind: type[ProtectSpec] | type[PretrainSpec], held: Any) -> Any:
    """Return a stored specification with what later versions added to it."""
    try:
        return _plain(parse_spec(kind, held, where="stored"))
    except SpecError:
        return held


def _named(model: ModelSpec) -> str:
    """Return a network's name as records have it: of a path its last part."""
    kind, _, rest = model.name.partition(":")
    return f"{kind}:{Path(rest).name}" if kind == "diffusers" else model.name


def _domain_changes(
    role: str, held: tuple[DomainRecord, ...], wanted: tuple[DomainSpec, ...]
) -> list[str]:
    if [one.name for one in held] != [one.name for one in wanted]:
        return [role]
    found = []
    for number, (one, spec) in enumerate(zip(held, wanted, strict=True)):
        where = role if role == "original" else f"{role}.{number}"
        if one.image[1:] != (spec.image_size or _OWN_SIDE,) * 2:
            found.append(f"{where}.image_size")
        if one.train != TRAINING_IMAGES[one.name]:
            found.append(f"{where} ({one.train:,} of {TRAINING_IMAGES[one.name]:,} images)")
    return found


def _differing(path: str, held: Any, wanted: Any) -> list[str]:
    """Return the keys below `path` in which two specifications differ."""
    if not isinstance(held, dict) or not isinstance(wanted, dict):
        return [] if held == wanted else [path]
    keys = [*wanted, *(key for key in held if key not in wanted)]
    return [
        one for key in keys for one in _differing(f"{path}.{key}", held.get(key), wanted.get(key))
    ]


# --- The model of the original task ------------------------------------------------------------

BASE_DONE = "pretraining.json"
# They say where the original task's model comes from; the cell's own comes from its folder.
OF_BASE = ("model.weights", "model.pretrained")


def base_folder(out: Path, cell: Cell) -> Path:
    """Return where `sophon reproduce --out` keeps the model that a cell protects."""
    return out / "bases" / base_name(cell)


def _trained_as(folder: Path) -> dict[str, Any]:
    """Return what is kept of the training of the model in `folder`."""
    held = read_json(folder / BASE_DONE)
    if not all(isinstance(held.get(key), dict) for key in ("spec", "identity")):
        raise CheckpointError(
            f"{folder / BASE_DONE} is damaged: delete {folder} and repeat the command"
        )
    return held


def require_same_base(folder: Path, wanted: PretrainRunSpec) -> None:
    """Raise CheckpointError unless the model in `folder` was trained as `wanted` says."""
    held = _trained_as(folder)
    model = read_json(folder / "model.json").get("model") or {}
    pairs = {
        **_values("pretrain", held["spec"], wanted.pretrain, PretrainSpec),
        "original.name": (held["original"], wanted.original.name),
    }
    if wanted.task.name == "classification":
        # The folder of a diffusion model names itself.
        pairs |= _values("model", model, wanted.model, ModelSpec)
    different = [
        f"{key} = {before!r}, not {now!r}" for key, (before, now) in pairs.items() if before != now
    ]
    if different:
        raise CheckpointError(
            f"{folder} was trained with {'; '.join(different[:3])}: give another --out, or repeat"
            " the same --set"
        )


def require_same_training(folder: Path, fingerprint: str, task: str) -> None:
    """Raise CheckpointError unless the model in `folder` was trained on images of `fingerprint`,
    and for the task of that name: a diffusion model's says its timesteps and its schedule.
    """
    held = _trained_as(folder)
    trained = held["identity"].get("task")
    if trained != task:
        raise CheckpointError(
            f"{folder} was trained for {trained}, not for {task}: give another --out, or repeat the"
            " same --set"
        )
    if held["identity"].get("domains") != fingerprint:
        raise CheckpointError(
            f"{folder} was trained on other images of {held['original']!r} than this run's: give"
            " another --out, or repeat the same --set"
        )


def require_same_protection(folder: Path, wanted: ProtectSpec) -> None:
    """Raise CheckpointError unless the model in `folder` was protected as `wanted` says."""
    held = read_json(folder / "model.json").get("protection") or {}
    found = _differing("protect", _completed(ProtectSpec, held.get("spec")), _plain(wanted))
    if found:
        raise CheckpointError(
            f"{folder} was protected with other {', '.join(found[:3])}: give another --out, or"
            " repeat the same --set"
        )


def _values(
    path: str, held: dict[str, Any], now: ModelSpec | PretrainSpec, kind: type[Any]
) -> dict[str, tuple[Any, Any]]:
    """Return each field of two specifications with both values; absent ones have defaults."""
    before = parse_spec(kind, held, where=path)
    names = type(now).model_fields
    return {f"{path}.{name}": (getattr(before, name), getattr(now, name)) for name in names}


# --- Tables ------------------------------------------------------------------------------------

HEADER = (
    "| cell | published at paper size: original, before and after"
    " | published at paper size: scratch / unprotected / protected"
    " | original, before and after | rehearsed rate: scratch / unprotected / protected"
    " | worst case: scratch / unprotected / protected | attack seeds | verdict |"
)


def table(out: Path, scale: Scale) -> str:
    """Return the Markdown table of all cells of a scale, from the records below `out`, and where
    the published numbers come from. A record that cannot be read marks its own row.
    """
    cells = [cell for cell in CELLS if cell.scale == scale]
    notes = _notes(cells)
    rows = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for cell in cells:
        try:
            held = read_measured(out, cell)
        except CheckpointError as error:
            rows.append(row(cell, None, notes, verdict=f"unreadable: {error}"))
        else:
            failed = failure_of(record_file(out, cell).parent.parent) if held is None else None
            rows.append(row(cell, held, notes, verdict=failed or EMPTY))
    return "\n".join([*rows, "", *(f"[{number}] {text}" for text, number in notes.items())])


def state(out: Path, cell: Cell) -> str:
    """Return what `--list` says of a cell: measured, changed, unreadable, not run, or failed."""
    try:
        record = read_stored(record_file(out, cell))
        if record is None:
            return failure_of(record_file(out, cell).parent.parent) or "not run"
        return "changed" if changes_of(record, cell, base_folder(out, cell)) else "measured"
    except CheckpointError:
        return "unreadable"


def _notes(cells: list[Cell]) -> dict[str, int]:
    """Return the footnotes of the published numbers, numbered from 1."""
    said = [published_of(cell) for cell in cells]
    texts = dict.fromkeys(_note(one) for one in said if one.source)
    return {text: number for number, text in enumerate(texts, start=1)}


def _note(said: Published) -> str:
    return f"{said.source}; {said.note}" if said.note else said.source


def row(cell: Cell, held: Measured | None, notes: dict[str, int], verdict: str = EMPTY) -> str:
    """Return a cell's row; what was not published or not run stays empty.

    `notes` numbers the sources; `verdict` stands where there are no numbers.
    """
    # Beside a small cell the paper's own numbers say what was seen at its size.
    said = published_of(cell)
    mark = f" [{notes[_note(said)]}]" if said.source else ""
    published = (_pair(_numbers(said.before, said.after)), _triple(_published(said)))
    cells = [cell.name, *(text + mark if text else EMPTY for text in published)]
    if held is None:
        cells += [EMPTY] * 4 + [verdict]
    else:
        own = [EMPTY if v is None else held.kind.show(v, 1) for v in (held.before, held.after)]
        cells += [
            _pair(own),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.rehearsed]),
            _triple([EMPTY if v is None else _text(held.kind, v) for v in held.worst]),
            str(held.seeds),
            f"changed: {', '.join(held.changes)}" if held.changes else held.verdict,
        ]
    return "| " + " | ".join(cells) + " |"


def _numbers(*values: float | None) -> list[str]:
    return [EMPTY if value is None else f"{value:g}" for value in values]


def _published(said: Published) -> list[str]:
    return _numbers(said.scratch, said.unprotected, said.protected)


def _text(kind: MetricKind, value: float) -> str:
    return kind.show(value, 1).removesuffix(" %")


def _pair(values: list[str]) -> str:
    return ", ".join(value or "?" for value in values) if any(values) else EMPTY


def _triple(values: list[str]) -> str:
    return " / ".join(value or "?" for value in values) if any(values) else EMPTY


# --- Robustness --------------------------------------------------------------------------------


def robustness_file(cell: Cell, recipe: str, bases: str) -> str:
    """Return the run file that attacks a cell's protected model with the robustness tables'
    attacks; see `run_file`.
    """
    spec = parse_spec(RunSpec, tomllib.loads(run_file(cell, recipe, bases)), where=cell.name)
    return run_file(cell, recipe, bases, robustness_attacks(spec.audit))


def robustness_attacks(spec: AuditSpec) -> tuple[Strategy, ...]:
    """Return the attacks of the robustness tables that the specification does not have yet."""
    held = set(strategies_of(spec))
    wanted = [s for rows in _tables(spec).values() for s in rows.values()]
    return tuple(s for s in dict.fromkeys(wanted) if s not in held)


def _tables(spec: AuditSpec) -> dict[str, dict[str, Strategy]]:
    return robustness(spec.steps, spec.batch_size)


def robustness_tables(record: AuditRecord, architecture: str) -> str:
    """Return the three robustness tables of a record as Markdown: test score after each attack.

    Below them stand the steps and the seeds, and what is published of the architecture.
    """
    kind, parts = kind_of_record(record), []
    for title, rows in _tables(record.spec).items():
        lines = [f"| {title} | scratch | unprotected | protected |", "|---|---|---|---|"]
        for name, attack in rows.items():
            shown = [EMPTY if v is None else kind.show(v, 1) for v in scores_of(record, attack)]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    seeds = ", ".join(map(str, record.seeds))
    parts.append(
        f"{record.spec.steps:,} steps an attack; test scores at the step that validation chose,"
        f" mean over attack seeds {seeds}."
    )
    if architecture in PUBLISHED_ROBUSTNESS:
        parts.append(PUBLISHED_ROBUSTNESS[architecture])
    return "\n\n".join(parts) + "\n"
