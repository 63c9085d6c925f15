"""Runs cells of the grid, their robustness and the ablation study, from where they stopped."""

from __future__ import annotations

import json
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer

import ablation
from grid import ABLATION, Cell, text_of
from robustness import robustness_attacks, robustness_folder, robustness_tables
from sameness import (
    BASE_DONE,
    OF_BASE,
    base_folder,
    key_of,
    require_same_base,
    require_same_protection,
    require_same_training,
)
from sophon._auditing.extractors import torchmetrics
from sophon._base.errors import (
    CheckpointError,
    DataError,
    IntactnessError,
    LockedError,
    NonFiniteError,
    SophonError,
    SpecError,
)
from sophon._base.files import write_text
from sophon._cli.auditing import run_audit, write_audit
from sophon._cli.progress import Mode, toml
from sophon._cli.run_file import (
    load,
    load_pretraining,
    parse_pretraining,
    parse_run,
    read_run,
)
from sophon._cli.run_spec import PretrainRunSpec, RunSpec
from sophon._cli.running import (
    run_pretraining,
    run_protection,
    say,
    show_forecast,
    show_pretrained,
    show_protected,
    show_verdict,
)
from sophon._data import load_domain
from tables import failure_file, folder_of, read_stored, started, table

_TRACEBACK = "traceback.txt"


class Jobs:
    """Runs cells below one folder: bases, then protections, then audits that share a store."""

    def __init__(
        self,
        out: Path,
        settings: list[str] | None,
        mode: Mode,
        threads: int | None,
        workers: int,
    ) -> None:
        self.out, self.mode = out, mode
        self.settings = [_from_here(one) for one in settings or ()]
        self.threads, self.workers = threads, workers

    @property
    def of_cells(self) -> list[str]:
        """The settings that concern a cell; where its base comes from is the base's affair."""
        return [one for one in self.settings if key_of(one) not in OF_BASE]

    @property
    def of_bases(self) -> list[str]:
        """The settings that concern the training of the original task."""
        parts = ("original", "model", "pretrain", "task")
        return [one for one in self.settings if key_of(one).partition(".")[0] in parts]

    def run(self, cell: Cell) -> None:
        """Run a cell from where it stopped."""
        self._announce(f"{cell.name} ({cell.scale})")
        with _failure_kept(folder_of(self.out, cell)):
            file, base = self._prepared(cell)
            self._protected_and_audited(file, file.parent, base, [])

    def forecast(self, cell: Cell) -> None:
        """Print what protecting a cell is expected to take, with random weights where its base is
        not trained yet; nothing is written.
        """
        self._require_fitting(cell)
        weights = base_folder(self.out, cell).absolute() / "model.safetensors"
        place = _setting("model.weights", str(weights))
        if cell.unet_file is not None:
            place = _setting("model.name", f"diffusers:{cell.unet_file}")
        case = load(cell.run_file, [*self.of_cells, place], self.threads, untrained=True)
        show_forecast(case, as_json=False)

    def show_row(self, cell: Cell) -> None:
        """Print the cell's row of the table, published beside re-measured; nothing where quiet."""
        if self.mode in ("bar", "lines"):
            say(["", table(self.out, cell.scale, cell)])

    def _prepared(self, cell: Cell) -> tuple[Path, Path]:
        """Return a cell's run file and the folder of its base, which is trained if it is missing.

        Raises SpecError or CheckpointError before anything is trained where the settings do not fit
        or something else was run there.
        """
        self._require_fitting(cell)
        self._require_pictures(cell)
        folder, base = folder_of(self.out, cell), base_folder(self.out, cell)
        text = text_of(cell.run_file)
        file = _recipe(folder / "run.toml", text, tomllib.loads, ran=[folder])
        if cell.unet_file is not None:
            unet = base.with_name(cell.unet_file.name)
            _recipe(unet, text_of(cell.unet_file), json.loads, ran=[base])
        self._trained(base, cell.base_file, file)
        return file, base

    def _require_fitting(self, cell: Cell) -> None:
        """Raise SpecError for settings that do not fit a cell or its base."""
        if cell.unet_file is not None and "model.name" in map(key_of, self.settings):
            raise SpecError(
                f"--set model.name: {cell.name} protects the network that it trained first; for"
                " another one write run files of your own, for `sophon pretrain` and the rest"
            )
        self._check(cell.run_file)
        self._check_base(cell.base_file)

    def _require_pictures(self, cell: Cell) -> None:
        """Raise SpecError where the audit of a diffusion model could not judge its pictures."""
        run = self._check(cell.run_file)
        drawn = run.audit.samples.count and run.task.timestep is None
        if cell.unet_file is not None and drawn:
            torchmetrics("torchmetrics")

    def _check(self, file: Path, settings: tuple[str, ...] = ()) -> RunSpec:
        """Return what a run file says with its settings. Raises SpecError, before anything is
        trained, for settings that do not fit it.
        """
        return parse_run(text_of(file), [*self.of_cells, *settings], where="--set")

    def _check_base(self, file: Path) -> PretrainRunSpec:
        """Return what the run file of a base says with its settings; raise as `_check`."""
        return parse_pretraining(text_of(file), self.of_bases, where="--set")

    def _announce(self, what: str) -> None:
        if self.mode in ("bar", "lines"):
            typer.echo(what, err=True)

    def _protected_and_audited(
        self, file: Path, folder: Path, base: Path, settings: Iterable[str]
    ) -> None:
        """Run a protection and its audit in `folder`, from where they stopped."""
        together = [*self.of_cells, *settings]
        case = load(file, together, self.threads)
        require_same_training(base, case.original.fingerprint(), case.task.name)
        result = run_protection(case, folder / "protected", self.mode)
        show_protected(result, folder / "protected", self.mode)
        self._audit(file, folder / "protected", folder / "audit", together)

    def run_all(self, cells: list[Cell]) -> None:
        """Run cells in turn, going on where one cannot be run; raise the first error at the end."""
        works = {c.name: (folder_of(self.out, c), partial(self.run, c)) for c in cells}
        _raise_first(_failures(works), len(cells), "cells")

    def all_robustness(self, cells: list[Cell]) -> None:
        """Attack the protected models of some cells in turn, going on where one cannot be."""
        for cell in cells:
            self._require_fitting(cell)
            self._require_pictures(cell)
        if len(cells) == 1:
            self.robustness(cells[0])
            return
        works = {
            c.name: (robustness_folder(self.out, c), partial(self.robustness, c)) for c in cells
        }
        _raise_first(_failures(works), len(cells), "cells")

    def robustness(self, cell: Cell) -> None:
        """Attack a cell's protected model with the attacks of the robustness tables.

        Raises CheckpointError where the model was protected otherwise than the settings say.
        """
        file, base = self._prepared(cell)
        run = read_run(file, self.of_cells)
        protected = folder_of(self.out, cell) / "protected"
        if (protected / "model.safetensors").is_file():
            require_same_protection(protected, run.protect)
        else:
            self.run(cell)
        attacks = (*run.audit.extra, *robustness_attacks(run.audit))
        extra = _setting("audit.extra", [s.model_dump(mode="json") for s in attacks])
        folder = robustness_folder(self.out, cell)
        self._audit(file, protected, folder / "audit", [*self.of_cells, extra])
        record = read_stored(folder)
        assert record is not None
        tables = robustness_tables(record, cell, base)
        write_text(folder / "tables.md", tables)
        say([tables])

    def ablation(self) -> None:
        """Run the study of what the paper ablates; go on where a run of it fails."""
        ablation.pyplot()
        variations = ablation.variations()
        for variation in variations:
            self._check(ablation.RUN_FILE, variation.settings)
        self._check_base(ablation.BASE_FILE)
        folder = self.out / "small" / ABLATION
        base = self.out / "bases" / f"small-{ABLATION}"
        ran = [folder / variation.name for variation in variations]
        file = _recipe(folder / "run.toml", text_of(ablation.RUN_FILE), tomllib.loads, ran=ran)
        self._trained(base, ablation.BASE_FILE, file)

        def work(variation: ablation.Variation) -> None:
            self._announce(f"{ABLATION}: {variation.name}")
            place = folder / variation.name
            self._protected_and_audited(file, place, base, variation.settings)

        failed = _failures({v.name: (folder / v.name, partial(work, v)) for v in variations})
        found = ablation.results(folder)
        tables = ablation.table(folder, found)
        write_text(folder / "table.md", tables)
        ablation.draw(found, folder / "ablation.svg")
        say([tables, str(folder / "ablation.svg")])
        # Weights that never meet the tolerance, or diverge, are what the study is to find out.
        told = (IntactnessError, NonFiniteError)
        faults = {name: error for name, error in failed.items() if not isinstance(error, told)}
        _raise_first(faults, len(variations), "runs of the study")

    def _audit(self, file: Path, protected: Path, out: Path, settings: list[str]) -> None:
        case = load(file, settings, self.threads)
        # Below one folder a scale: trials of unprotected models and fresh networks are shared.
        store = out.parent.parent / "store"
        record = run_audit(case, protected, self.mode, store=store, workers=self.workers)
        show_verdict(write_audit(record, out), self.mode, {"report": out / "report.html"})

    def _trained(self, folder: Path, base_file: Path, file: Path) -> None:
        """Train the model of `base_file` in `folder`, unless it was; the data of the run file
        `file` must be there before.

        Raises CheckpointError where `folder` holds a model trained otherwise, LockedError where
        another process is training it.
        """
        wanted = self._check_base(base_file)
        kept = folder.with_name(f"{folder.name}.toml")
        recipe = _recipe(kept, text_of(base_file), _of_base, ran=[folder])
        if (folder / BASE_DONE).is_file() and (folder / "model.safetensors").is_file():
            require_same_base(folder, wanted)
            return
        case = load_pretraining(recipe, self.of_bases, self.threads)
        for domain in read_run(file, self.of_cells).restricted:
            # Raises DataError before anything is trained.
            load_domain(domain, base=file.parent, role="restricted")
        try:
            result = run_pretraining(case, folder, self.mode)
        except LockedError:
            raise LockedError(
                f"{folder}: the base is being trained by another process; wait for it and repeat"
                " the command"
            ) from None
        show_pretrained(result, folder, self.mode)


@contextmanager
def _failure_kept(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Keep the reason for which work fails in `folder`, if that is there by then or is to be made.

    An earlier one goes when work begins. Work that lacks its images, or whose folder another
    process is writing to, has not begun.
    """
    file = failure_file(folder)
    earlier = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    file.unlink(missing_ok=True)
    try:
        yield
    except (DataError, LockedError):
        if earlier is not None:
            write_text(file, earlier)
        raise
    except Exception as error:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            write_text(file, f"{_said(error)}\n")
        raise


def _failures(works: Mapping[str, tuple[Path, Callable[[], None]]]) -> dict[str, Exception]:
    """Do all works; return what those that failed raised, whose tracebacks are in their folders."""
    failed: dict[str, Exception] = {}
    for name, (folder, work) in works.items():
        kept = folder / _TRACEBACK
        kept.unlink(missing_ok=True)
        try:
            with _failure_kept(folder, make=True):
                work()
        except Exception as error:  # noqa: BLE001 - the others are still to be done
            folder.mkdir(parents=True, exist_ok=True)
            write_text(kept, traceback.format_exc())
            typer.echo(f"{name}: {_said(error)} (see {kept})", err=True)
            failed[name] = error
    return failed


def _said(error: Exception) -> str:
    """Return what an error says, on one line; the kind of one that was not raised on purpose."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SophonError) else f"{type(error).__name__}: {text}"


def _raise_first(failed: dict[str, Exception], count: int, what: str) -> None:
    """Raise an error of the first one's kind that names all that failed, if any did."""
    if failed:
        first = next(iter(failed.values()))
        kind = type(first) if isinstance(first, SophonError) else SophonError
        raise kind(f"{len(failed)} of {count} {what} failed: {', '.join(failed)}")


def _from_here(setting: str) -> str:
    """Return a `key=value` whose path, if it is a relative one, starts at the working directory: a
    recipe lies in a folder that the user did not choose.
    """
    key, value = key_of(setting), setting.partition("=")[2].strip()
    place = value.strip("\"'")
    named = key == "model.weights" or key.rpartition(".")[2] in ("path", "root")
    if not named or not place or place.startswith(("$", "~")):
        return setting
    return _setting(key, str(Path(place).absolute()))


def _setting(key: str, value: object) -> str:
    """Return `key=value` as `--set` takes it."""
    return f"{key}={toml(value)}"


def _of_base(text: str) -> dict[str, Any]:
    """Return the tables of a run file that pre-training reads."""
    return {name: held for name, held in tomllib.loads(text).items() if name != "restricted"}


def _recipe(
    path: Path, text: str, read: Callable[[str], dict[str, Any]], *, ran: Iterable[Path]
) -> Path:
    """Write a recipe afresh and return its path.

    Raises CheckpointError where the file there says something else and a run of it is in one of the
    folders `ran`: what lies there would pass for a run of today's recipe.
    """
    held = path.read_text(encoding="utf-8") if path.is_file() else text
    if held != text and not _same(held, text, read):
        held_in = next((folder for folder in ran if started(folder)), None)
        if held_in is not None:
            raise CheckpointError(
                f"{path} is not today's recipe and {held_in} holds a run of it: give another"
                f" --out, or delete {held_in} to start over"
            )
    if held != text or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


def _same(one: str, other: str, read: Callable[[str], dict[str, Any]]) -> bool:
    """Return whether two recipes say the same, whatever their comments."""
    try:
        return read(one) == read(other)
    except ValueError:
        return False
