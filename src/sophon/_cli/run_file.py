"""A run file with what it names: read, changed by `--set`, validated and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sophon._attacks.suites import attack_named, resolved, strategies_of
from sophon._base.errors import CheckpointError, SpecError
from sophon._base.files import nearest_present, read_json
from sophon._cli.extras import require_extras
from sophon._cli.preparing import prepared
from sophon._cli.run_spec import PretrainRunSpec, RunSpec
from sophon._data import Domain, load_domain, share_prompts
from sophon._data.loading import expanded, require_variables
from sophon._models import (
    DIFFUSERS,
    PATHS,
    DenoiserSource,
    OwnInput,
    architecture,
    checkpoint_gradients,
    diffusers,
    own_input,
    placed_name,
    require_model,
    resolve_model,
)
from sophon._specs import ModelSpec, TaskSpec, parse_spec, parse_toml
from sophon._specs.parsing import MOST_BYTES
from sophon._tasks import Classification, Denoising, Latents, Task
from sophon._training.checkpoints import require_model_in, require_recorded
from sophon._training.environment import domain_text
from sophon._training.setting import Setting, make_setting

AnyRun = TypeVar("AnyRun", bound=PretrainRunSpec)


@dataclass(frozen=True)
class Case:
    """A run file with its task, its model and its domains loaded.

    For pre-training there is no domain but the original one.
    """

    spec: PretrainRunSpec
    network: ModelSpec
    task: Task
    model: nn.Module
    scratch: Callable[[], nn.Module]
    original: Domain
    restricted: tuple[Domain, ...]
    held_out: tuple[Domain, ...] = ()
    benign: tuple[Domain, ...] = ()

    @property
    def name(self) -> str:
        """The network's name in a record: of a path its last part."""
        name = self.network.name
        library, _, path = name.partition(":")
        return f"{library}:{Path(path).name}" if name.startswith(PATHS) else name

    def read(self, own: OwnInput | None = None) -> list[str]:
        """Return a line a domain: its role and what was read of it; `own` is what another model
        than the run file's says of its input.
        """
        several = {
            "original": (self.original,),
            "restricted": self.restricted,
            "held-out": self.held_out,
            "benign": self.benign,
        }
        default, own = self.task.normalisation, own or own_input(self.model)
        return [
            f"{role} {domain_text(domain, self.original, default, own)}"
            for role, domains in several.items()
            for domain in domains
        ]

    def setting(self) -> Setting:
        """Return the checked setting, in fp32."""
        return make_setting(
            self.model,
            task=self.task,
            original=self.original,
            restricted=self.restricted,
            head=self.network.head,
        )


def read_run(path: Path, settings: list[str] | None) -> RunSpec:
    """Return the specification in `path` with each `key=value` of `settings` applied first.

    Raises SpecError naming the file, the key and what is allowed.
    """
    return parse_run(_text_of(path), settings, where=str(path))


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            held = file.read(MOST_BYTES + 1)
        if len(held) > MOST_BYTES:
            raise SpecError(f"{path} has more than {MOST_BYTES:,} bytes: give a run file")
        return held.decode("utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist: give the path of a run file") from None
    except IsADirectoryError:
        raise SpecError(f"{path} is a folder: give the path of a run file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 text (byte {error.start}): save it as such") from None


def parse_run(text: str, settings: list[str] | None, *, where: str) -> RunSpec:
    """Return the specification in the text of a run file; see `read_run`."""
    spec = _parsed(RunSpec, text, settings, where)
    # A suite or an attack that does not exist is found out before anything is trained.
    resolved(spec.audit)
    strategies_of(spec.audit)
    return spec


def parse_pretraining(text: str, settings: list[str] | None, *, where: str) -> PretrainRunSpec:
    """Return what `pretrain` reads of a run file, which needs no restricted domain."""
    return _parsed(PretrainRunSpec, text, settings, where)


def _parsed(kind: type[AnyRun], text: str, settings: list[str] | None, where: str) -> AnyRun:
    data = parse_toml(text, where=where)
    for setting in settings or ():
        _apply(data, setting)
    _name_attacks(data, where)
    return parse_spec(kind, data, where=where)


def _name_attacks(data: dict[str, Any], where: str) -> None:
    """Put the values of a suite's attacks in the place of their names, in `audit.extra`."""
    audit = data.get("audit")
    extra: Any = audit.get("extra") if isinstance(audit, dict) else None
    for index, one in enumerate(extra if isinstance(extra, list) else ()):
        if isinstance(one, str):
            try:
                extra[index] = attack_named(one).model_dump(mode="json")
            except SpecError as error:
                raise SpecError(f"{where}: audit.extra.{index} = {error}") from None


def _apply(data: dict[str, Any], setting: str) -> None:
    """Apply `a.b=c` to parsed TOML; `restricted.0.limit=5` reaches into arrays."""
    path, equals, text = setting.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys) or len(keys) > 9:
        raise SpecError(f"--set {setting!r}: write it as key=value, such as protect.rounds=50")
    target: Any = data
    for key in keys[:-1]:
        target = _inside(target, key, setting)
    if isinstance(target, list):
        _inside(target, keys[-1], setting)
        target[int(keys[-1])] = _value(text)
    else:
        target[keys[-1]] = _value(text)


def _inside(target: Any, key: str, setting: str) -> Any:
    if isinstance(target, list):
        if not key.isdecimal() or len(key) > 9 or int(key) >= len(target):
            raise SpecError(
                f"--set {setting!r}: {key!r} is no index here; use 0 to {len(target) - 1}"
            )
        return target[int(key)]
    found = target.setdefault(key, {})
    if not isinstance(found, dict | list):
        raise SpecError(f"--set {setting!r}: {key} = {found!r} is a value, not a table")
    return found


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}", where="--set")["value"]
    except SpecError:
        return text


def _located(spec: ModelSpec, base: Path) -> ModelSpec:
    """Return the model with `${VARIABLES}` and `~` in its paths replaced."""
    changes = {}
    if spec.weights is not None:
        changes["weights"] = str(expanded(spec.weights, base).absolute())
    if spec.name.startswith(PATHS):
        library, _, path = spec.name.partition(":")
        changes["name"] = placed_name(f"{library}:{expanded(path, base)}", Path())
    elif spec.name.startswith(("~", "$")):
        changes["name"] = str(expanded(spec.name, base).absolute())
    return spec.model_copy(update=changes)


def load(
    path: Path,
    settings: list[str] | None,
    threads: int | None = None,
    *,
    untrained: bool = False,
) -> Case:
    """Return the run in `path`, its model and its domains loaded; see `load_spec`.

    Paths in it start at its folder.
    """
    return load_spec(read_run(path, settings), path.parent, threads, untrained=untrained)


def load_spec(
    spec: RunSpec, base: Path, threads: int | None = None, *, untrained: bool = False
) -> Case:
    """Return a run whose paths start at `base`, its model and its domains loaded.

    With `untrained` nobody uses the model's own weights: if their file is not there, the model has
    random ones. Raises DataError, UnsupportedModelError or CheckpointError.
    """
    require_variables(spec.model_dump_json())
    roles = ("restricted", "held_out", "benign")
    return _case(_without_weights(spec, base) if untrained else spec, base, roles, threads)


def load_pretraining(
    path: Path,
    settings: list[str] | None,
    threads: int | None = None,
    *,
    untrained: bool = False,
) -> Case:
    """Return the run in `path` for pre-training: no domain but the original one is loaded.

    `untrained` and what is raised are as of `load_spec`.
    """
    spec = parse_pretraining(_text_of(path), settings, where=str(path))
    require_variables(spec.model_dump_json())
    spec = _without_weights(spec, path.parent) if untrained else spec
    return _case(spec, path.parent, (), threads)


def _without_weights(spec: AnyRun, base: Path) -> AnyRun:
    """Return a run without weights where their file is not there."""
    weights = _located(spec.model, base).weights
    if weights is None or Path(weights).is_file():
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"weights": None})})


def _case(
    spec: PretrainRunSpec,
    base: Path,
    roles: tuple[str, ...],
    threads: int | None,
) -> Case:
    if threads is not None:
        torch.set_num_threads(threads)
    # What takes no time goes first: images may take minutes to decode.
    require_extras(spec, (spec.original, *(s for role in roles for s in getattr(spec, role))))
    located = _located(spec.model, base)
    network = spec.model if located.weights else architecture(located, base=base)
    if located.name.startswith(PATHS):
        network = network.model_copy(update={"name": located.name})
    source = _denoiser_of(spec.task, network)
    require_model(located, base=base)
    spec = prepared(spec, network, located.name, base)
    original = load_domain(spec.original, base=base, role="original")
    several: dict[str, tuple[Domain, ...]] = {"restricted": ()}
    several |= {
        role: tuple(load_domain(s, base=base, role=role) for s in getattr(spec, role))
        for role in roles
    }
    if source is not None and source.pipeline is not None and source.conditional:
        flat = [original, *(domain for domains in several.values() for domain in domains)]
        shared = iter(share_prompts(flat))
        original = next(shared)
        several = {r: tuple(next(shared) for _ in domains) for r, domains in several.items()}
    task = _task(spec.task, source, original)
    model, scratch = resolve_model(located, base=base, default_classes=original.class_count)
    return Case(spec, network, task, model, scratch, original, **several)


def _denoiser_of(spec: TaskSpec, network: ModelSpec) -> DenoiserSource | None:
    """Return where the U-Net comes from; SpecError where task and model do not fit each other."""
    of_diffusers = network.name.startswith(DIFFUSERS)
    if of_diffusers != (spec.name == "denoising"):
        wanted = "denoising" if of_diffusers else "classification"
        raise SpecError(
            f"task.name = {spec.name!r} does not fit model.name = {network.name!r}: set task.name ="
            f" {wanted!r}, or name another model (a diffusion model is diffusers:PATH)"
        )
    return DenoiserSource(Path(network.name.removeprefix(DIFFUSERS))) if of_diffusers else None


def _task(spec: TaskSpec, source: DenoiserSource | None, original: Domain) -> Task:
    if source is None:
        return Classification()
    scheduler = source.scheduler()
    if scheduler is not None and spec.schedule is not None:
        raise SpecError("task.schedule: the pipeline has a scheduler of its own: leave it out")
    if scheduler is None and spec.schedule is not None:
        scheduler = diffusers().DDPMScheduler(
            num_train_timesteps=spec.schedule.timesteps,
            prediction_type=spec.prediction or "epsilon",
            **spec.schedule.model_dump(exclude={"timesteps"}),
        )
    latents = None
    if source.conditional and source.pipeline is not None:
        latents = Latents.from_pipeline(source.pipeline, original.classes)
    return Denoising(scheduler, prediction=spec.prediction, timestep=spec.timestep, latents=latents)


def require_place(folder: Path) -> None:
    """Raise CheckpointError if `folder` could not be made; nothing is made yet."""
    nearest = nearest_present(folder)
    if not nearest.is_dir():
        raise CheckpointError(f"cannot write to {folder}: {nearest} is a file; choose another")
    if not os.access(nearest, os.W_OK):
        raise CheckpointError(f"cannot write to {folder}: {nearest} is read-only; choose another")


def require_outside(folder: Path, spec: RunSpec, base: Path) -> None:
    """Raise CheckpointError if `folder` lies in images that the run reads: it would be a class."""
    for domain in (spec.original, *spec.restricted, *spec.held_out, *spec.benign):
        if domain.source != "folder" or domain.path is None:
            continue
        images = expanded(domain.path, base).resolve()
        if images == folder.resolve() or images in folder.resolve().parents:
            raise CheckpointError(
                f"{folder} lies in the images of a domain, {domain.path}: write elsewhere, where"
                " it is not taken for a class"
            )


def weights_file(path: Path) -> Path:
    """Return the file of weights that `path`, a file or a checkpoint's folder, names.

    It is there only if `path` is a checkpoint's; a folder that diffusers wrote holds its weights in
    another file.
    """
    if not path.is_dir():
        return path
    names = ("model.safetensors", "diffusion_pytorch_model.safetensors")
    files = [path / name for name in (*names, f"unet/{names[1]}")]
    return next((file for file in files if file.is_file()), files[0])


def load_subject(case: Case, path: Path) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the model in `path` and, if sophon wrote it, how it was protected.

    `path` is a file or a folder; without a `model.json` that names the network, it holds weights
    for the network of the run. Raises CheckpointError or UnsupportedModelError.
    """
    file = weights_file(path)
    ours = path.is_file() or (path / "model.safetensors").is_file()
    if path.is_dir() and not ours and case.network.name.startswith(DIFFUSERS):
        return _load_denoiser(case, path), None
    if not ours and (path.is_dir() or file.name == "model.safetensors"):
        require_model_in(file.parent, "name a checkpoint")
    description = file.parent / "model.json"
    held: dict[str, Any] = {}
    if file.name == "model.safetensors" and description.is_file():
        held = read_json(description)
        require_recorded(file, held)
    if held.get("model"):
        spec = ModelSpec(
            name=str(file.absolute()),
            head=case.network.head,
            gradient_checkpointing=case.network.gradient_checkpointing,
        )
    else:
        # A subject is judged with the head it has; only a model to be trained may get a fresh one.
        named = {"weights": str(file.absolute()), "weights_key": None}
        loaded = {**named, "pretrained": False, "classes": None}
        spec = case.network.model_copy(update=loaded)
    model, _ = resolve_model(spec, base=Path(), default_classes=case.original.class_count)
    return model, held.get("protection")


def _load_denoiser(case: Case, folder: Path) -> nn.Module:
    """Return the U-Net of a folder that diffusers wrote, which predicts what the run's does."""
    source = DenoiserSource(folder)
    scheduler = source.scheduler()
    if scheduler is not None:
        case.task.require_alike(scheduler, folder)
    model = source.load()
    return (checkpoint_gradients(model) if case.network.gradient_checkpointing else model).eval()
