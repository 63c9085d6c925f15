"""Which optional packages a run file needs, said in one line before any of its work."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from sophon._attacks.suites import resolved, strategies_of
from sophon._base.errors import SpecError
from sophon._base.torchvision_patch import installing
from sophon._cli.run_spec import PretrainRunSpec
from sophon._models import DIFFUSERS, TRANSFORMERS
from sophon._specs import DomainSpec

# What is imported of each extra in `pyproject.toml`.
_PACKAGES = {
    "vision": ("timm", "torchvision"),
    "diffusion": ("diffusers",),
    "demo": ("matplotlib", "sklearn"),
    "transformers": ("transformers", "torchvision"),
    "datasets": ("datasets",),
    "peft": ("peft",),
    "search": ("optuna",),
}


def require_extras(spec: PretrainRunSpec, domains: tuple[DomainSpec, ...]) -> None:
    """Raise SpecError where the model or the domains need packages that are not there, naming all
    that the run lacks, those of its audit too.
    """
    if any(map(_lacking, _of_model_and_domains(spec, domains))):
        wanted = (*_of_model_and_domains(spec, domains), *_of_audit(spec))
        lacking = {extra: _lacking(extra) for extra in dict.fromkeys(wanted) if _lacking(extra)}
        packages = ", ".join(name for names in lacking.values() for name in names)
        raise SpecError(
            f"this run needs {packages}, which Python does not find: {installing(*lacking)}"
        )


def _lacking(extra: str) -> list[str]:
    return [name for name in _PACKAGES[extra] if find_spec(name) is None]


def _of_model_and_domains(spec: PretrainRunSpec, domains: tuple[DomainSpec, ...]) -> Iterator[str]:
    sources = {domain.source for domain in domains}
    name = spec.model.name
    if name.startswith(("timm:", "torchvision:")) or "torchvision" in sources:
        yield "vision"
    if name.startswith(DIFFUSERS):
        yield "diffusion"
    if name.startswith(TRANSFORMERS):
        yield "transformers"
    if "datasets" in sources:
        yield "datasets"
    if "embedded" in sources:
        yield "demo"


def _of_audit(spec: PretrainRunSpec) -> Iterator[str]:
    if any(attack.lora_rank for attack in strategies_of(spec.audit)):
        yield "peft"
    if resolved(spec.audit).search_trials:
        yield "search"
