"""A protected model as a folder that the Hugging Face hub knows, and the library of its network.

Of a classifier `config.json` and `model.safetensors`, of one of transformers its image processor,
of a diffusion model the pipeline of diffusers with its parts; and `README.md`, a model card whose
metadata carries the verdict. States to resume from hold the unprotected weights and stay behind.
Nothing is uploaded.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import nn

from sophon._base.errors import AuditError, CheckpointError, SpecError
from sophon._base.files import read_json, require_writable, write_text
from sophon._base.torchvision_patch import installing, library
from sophon._models import (
    DIFFUSERS,
    TRANSFORMERS,
    head_classes,
    of_transformers,
    require_parts,
    resolve_model,
    save_classifier,
    untied,
    weights_sha256,
)
from sophon._records.audit_record import AuditRecord
from sophon._reporting.rendering import render
from sophon._reporting.report import Report, report
from sophon._specs import ModelSpec, parse_spec
from sophon._training.checkpoints import require_model_in, require_recorded, save_tensors

FILES: tuple[str, ...] = ("config.json", "model.safetensors", "README.md")
# What timm says of the weights that it publishes for a network; these are not they.
_OF_OTHERS = (
    *("tag", "license", "description", "notes", "origin_url", "paper_name", "paper_ids"),
    *("url", "file", "source", "stated", "hf_hub_id", "hf_hub_filename"),
)
_LIBRARIES = ("timm", "torchvision", "diffusers", "transformers")
_INDEX, _UNET_WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Exported:
    """A protected checkpoint: its network, its model and what `model.json` says of it.

    `pipeline` is its folder where it is a diffusion model, which has no classes.
    """

    network: ModelSpec
    model: nn.Module
    protection: dict[str, Any]
    classes: int
    pipeline: Path | None = None

    @property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` of the pipeline says; of a classifier nothing."""
        return {} if self.pipeline is None else read_json(self.pipeline / _INDEX)


def load_protected(folder: Path) -> Exported:
    """Return the checkpoint in `folder`, as `sophon protect --out` wrote it.

    Raises CheckpointError where there is none, it was changed or parts of a pipeline are missing.
    """
    file = folder / "model.safetensors"
    require_model_in(folder, "name a finished protection")
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} has no model.json: name a folder that `sophon protect --out` wrote"
        )
    held = read_json(folder / "model.json")
    require_recorded(file, held)
    if not held.get("model"):
        raise CheckpointError(
            f"{folder / 'model.json'} does not name the network: protect with the command line,"
            " or with model_spec="
        )
    network = parse_spec(ModelSpec, held["model"], where=str(folder / "model.json"))
    if not held.get("protection"):
        raise CheckpointError(f"{folder} is not protected: name a folder of `sophon protect`")
    if network.name.startswith(DIFFUSERS):
        require_parts(folder)
    model, _ = resolve_model(ModelSpec(name=str(folder.absolute())), base=Path())
    if network.name.startswith(DIFFUSERS):
        return Exported(network, model, held["protection"], 0, folder)
    head: str = held["protection"]["head"]
    return Exported(network, model, held["protection"], head_classes(model, head))


def export(folder: Path, to: Path, record: AuditRecord | None = None) -> tuple[Path, ...]:
    """Write the checkpoint in `folder` to the new or empty folder `to`; return its files.

    `record` is its audit, for the card. Raises as `load_protected`, AuditError where the record is
    of other weights, SpecError where `to` holds something or a package is missing.
    """
    if to.is_dir() and any(to.iterdir()):
        raise SpecError(f"{to} is not empty: name a new folder to export to")
    source = load_protected(folder)
    if record is not None:
        _require_same_weights(source, record, folder)
    texts = {"README.md": model_card(source, record)}
    ours = source.pipeline is None and not of_transformers(source.model)
    if ours:
        texts["config.json"] = _config(source)
    require_writable(to)
    if ours:
        names = FILES
        save_tensors(to / "model.safetensors", untied(source.model))
    elif source.pipeline is None:
        takes = source.protection["input"]
        names = (*save_classifier(to, source.model, _class_names(source), takes), "README.md")
    else:
        names = (*_copied_pipeline(source, source.pipeline, to), "README.md")
    for name, text in texts.items():
        write_text(to / name, text)
    return tuple(to / name for name in names)


def _class_names(source: Exported) -> list[str]:
    """Return what the original domain calls the classes; none where it only numbers them."""
    names: list[str] = source.protection.get("classes") or []
    return [] if all(map(str.isdecimal, names)) else names


def _copied_pipeline(source: Exported, folder: Path, to: Path) -> tuple[str, ...]:
    """Copy the parts that the pipeline's index names, and the index, to `to`; return their names.

    The U-Net's weights are those that were checked.
    """
    parts = [n for n, one in source.index.items() if isinstance(one, list) and one[0] is not None]
    for part in parts:
        leave = shutil.ignore_patterns("*.safetensors", "*.bin") if part == "unet" else None
        shutil.copytree(folder / part, to / part, ignore=leave)
    save_tensors(to / "unet" / _UNET_WEIGHTS, source.model.state_dict())
    shutil.copyfile(folder / _INDEX, to / _INDEX)
    return (_INDEX, *parts)


def _require_same_weights(source: Exported, record: AuditRecord, folder: Path) -> None:
    audited = [s.weights_sha256 for s in record.subjects if s.name == "protected"]
    if audited != [weights_sha256(source.model)]:
        raise AuditError(
            f"the record is of other weights than those in {folder}: audit this checkpoint, or name"
            " its own record"
        )


# --- config.json -----------------------------------------------------------------------------


def _config(source: Exported) -> str:
    owner, _, name = source.network.name.partition(":")
    if owner == "timm" and name:
        held = _timm_config(source)
    else:
        held = {
            "architecture": name or owner,
            "library_name": owner if name else "sophon",
            "num_classes": source.classes,
            "model_args": source.network.arguments,
        }
    if source.protection.get("classes"):
        held["label_names"] = source.protection["classes"]
    held["sophon"] = {"model": source.network.name, **_about(source)}
    return json.dumps(held, indent=2, sort_keys=True) + "\n"


def _timm_config(source: Exported) -> dict[str, Any]:
    """Return what timm itself writes, which `create_model("local-dir:...")` reads.

    Images are prepared as Sophon does: resized to the side, the middle cut out.
    """
    hub = importlib.import_module("timm.models._hub")
    takes = source.protection.get("input") or {}
    data: dict[str, Any] = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    stated = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    data |= {key: takes[key] for key in stated if key in takes}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.json"
        arguments = dict(source.network.arguments)
        hub.save_config_for_hf(source.model, str(file), model_args=arguments, data_config=data)
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key in _OF_OTHERS:
        held["pretrained_cfg"].pop(key, None)
    return held


def _about(source: Exported) -> dict[str, Any]:
    kept = ("original", "restricted", "rounds", "shipped_round", "head", "input")
    return {key: source.protection[key] for key in kept if key in source.protection}


# --- README.md -------------------------------------------------------------------------------


def model_card(source: Exported, record: AuditRecord | None) -> str:
    """Return the model card: metadata that the hub reads, and the audit's report.

    Under `sophon` the metadata hold the verdict with its scope; without a record, `not audited`.
    Raises SpecError without huggingface_hub.
    """
    remedy = installing("vision")
    hub = library("huggingface_hub", "the model card needs huggingface_hub", remedy, SpecError)
    owner = source.network.name.partition(":")[0]
    made = None if record is None else report(record)
    results = [] if made is None else _results(hub, made, _kind_of_task(source))
    data = hub.ModelCardData(
        library_name=owner if owner in _LIBRARIES else "pytorch",
        pipeline_tag=_kind_of_task(source),
        tags=["sophon", "non-fine-tunable-learning"],
        model_name=f"{_name(source).rpartition(':')[2]}, protected against fine-tuning",
        eval_results=results or None,
        sophon=_metadata(source, made),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(source, made)}\n"


def _name(source: Exported) -> str:
    """Return what the network is called: its class in diffusers or transformers."""
    if of_transformers(source.model):
        return f"{TRANSFORMERS}{type(source.model).__name__}"
    return f"{DIFFUSERS}{source.index['unet'][1]}" if source.index else source.network.name


def _kind_of_task(source: Exported) -> str:
    """Return the task as the hub names it."""
    if not source.index:
        return "image-classification"
    prompted = "text_encoder" in source.index
    return "text-to-image" if prompted else "unconditional-image-generation"


def _results(hub: Any, made: Report, task: str) -> list[Any]:
    """Return one result per number: the original task, and the best attack on each domain."""
    record, kind = made.record, made.record.kind
    scores = {subject.name: subject.original for subject in record.subjects}
    kept = scores.get("protected")
    original = record.original.name
    found = [] if kept is None else [("original task", original, kept.value)]
    for summary in made.summaries:
        subject = summary.subjects.get("protected")
        if subject is not None and subject.test is not None:
            what = f"best of {len(record.strategies)} attacks, {record.spec.steps} steps"
            what += ", of an audit that is void" if summary.verdict == "void" else ""
            found.append((what, summary.domain.name, subject.test.value))
    return [
        hub.EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type=kind.name,
            metric_name=f"{kind.noun} ({what})",
            # An error is kept as 1 minus it.
            metric_value=round(value if kind.higher_is_better else 1 - value, 6),
        )
        for what, dataset, value in found
    ]


def _metadata(source: Exported, made: Report | None) -> dict[str, Any]:
    if made is None:
        return {"verdict": "not audited", **_about(source)}
    return {
        "verdict": made.verdict,
        **_about(source),
        "suite": made.record.spec.suite,
        "steps": made.record.spec.steps,
        "attack_seeds": list(made.record.seeds),
        "domains": [
            {
                "name": one.domain.name,
                "verdict": one.text,
                # A number that may not be believed is none for whoever reads no further.
                "advantage_removed": None if one.verdict == "void" else one.advantage.value,
            }
            for one in made.summaries
        ],
    }


def _body(source: Exported, made: Report | None) -> str:
    owner, _, name = _name(source).partition(":")
    return render(
        "card.md.j2",
        network=_name(source),
        owner=owner,
        loads_alone=owner in _LIBRARIES,
        inner=name,
        channels=source.network.in_channels,
        classes=source.classes,
        options=_options(source, owner, name),
        kept=source.protection.get("original", "its original task"),
        refused=", ".join(source.protection.get("restricted", ())) or "unnamed domains",
        # The report brings its own title; a card has one.
        report=None if made is None else Markup("#" + made.markdown().strip()),
    ).rstrip("\n")


def _options(source: Exported, owner: str, name: str) -> str:
    """Return the arguments of a network's constructor in code, each after a comma."""
    held: dict[str, object] = {}
    if owner == "timm" and source.network.in_channels != 3:
        held["in_chans"] = source.network.in_channels
    if owner == "timm" and getattr(source.model, "dynamic_img_size", False):
        held["dynamic_img_size"] = True
    if owner == "torchvision" and name in ("googlenet", "inception_v3"):
        # What is built without them in `_models` has no such weights.
        held |= {"aux_logits": False, "init_weights": False}
    for key, value in source.network.arguments.items():
        held[key] = tuple(value) if isinstance(value, list) else value
    return "".join(f", {key}={value!r}" for key, value in held.items())
