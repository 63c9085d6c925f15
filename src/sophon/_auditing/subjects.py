"""The subjects of an audit: what attacks start from, and what the record says of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sophon._auditing.trial import Start
from sophon._auditing.vitals import measure_vitals
from sophon._base.counting import counted
from sophon._base.errors import AuditError
from sophon._data import Domain
from sophon._models import (
    Bare,
    bare_parameters,
    blocks,
    code_differences,
    differing_keys,
    fresh_copy,
    network_identity,
    require_network,
    similarity,
    weights_sha256,
)
from sophon._records.audit_record import Measurement, SubjectRecord, Vitals
from sophon._specs import Subject, fingerprint_of
from sophon._training.environment import health
from sophon._training.evaluate import evaluate
from sophon._training.rounding import TOLERATED, rounding_error
from sophon._training.setting import Setting


class Subjects:
    """The models that are attacked alike; of a fresh network there is one for each attack seed.

    `scratch` makes the fresh one; without it every layer of the `unprotected` model is
    re-initialised, of the `protected` one where there is no other. `seed` is the first attack
    seed; `starts` holds what was asked for. Raises AuditError for two architectures.
    """

    def __init__(
        self,
        protected: nn.Module,
        unprotected: nn.Module | None,
        scratch: Callable[[], nn.Module] | None,
        seed: int,
    ) -> None:
        require_network(protected)
        if unprotected is not None:
            require_network(unprotected, "unprotected")
        self.protected, self.unprotected = protected, unprotected
        self.scratch, self.seed = scratch, seed
        self.models: dict[Subject, nn.Module] = {"protected": protected}
        if unprotected is not None:
            _require_same_architecture(protected, unprotected)
            self.models["unprotected"] = unprotected
        self.starts: dict[tuple[Subject, int], Start] = {}
        # Of those beside the protected model: audits of the same may share them.
        self.vitals: dict[tuple[str, ...], Vitals] = {}

    @property
    def names(self) -> tuple[Subject, ...]:
        """The subjects' names, in the order of the record."""
        return (*self.models, "scratch")

    @property
    def before(self) -> nn.Module:
        """The model before protection; the protected one where that is not given."""
        return self.protected if self.unprotected is None else self.unprotected

    def start(self, subject: Subject, seed: int) -> Start:
        """Return what an attack starts from: only a fresh network depends on the seed."""
        at = (subject, seed if subject == "scratch" else 0)
        if at not in self.starts:
            model = self.models.get(subject)
            if model is None:
                # Not of the protected one where that can be helped: a copy keeps its hooks.
                model = fresh_copy(self.before, self.scratch, seed=seed, names=("scratch",))
            network = network_identity(model)
            if subject == "protected" and (code := self.code()):
                # Not all of it is in the name; trials of other code are other trials.
                network += f"+{fingerprint_of(list(code))[:16]}"
            self.starts[at] = Start(model, network, weights_sha256(model))
        return self.starts[at]

    @property
    def fresh(self) -> nn.Module:
        """The fresh network of the first seed: it can be trained, whatever the others are."""
        return self.start("scratch", self.seed).model

    def code(self) -> tuple[str, ...]:
        """Return what the protected model computes otherwise, beside its weights."""
        other = self.unprotected
        if other is None and self.scratch is not None:
            other = self.fresh
        return code_differences(self.protected, other)

    def bare(self, seeds: Sequence[int]) -> dict[int, Bare]:
        """Return fresh values of what no reset reaches, by attack seed; none if it reaches all."""
        if not bare_parameters(self.fresh).values:
            return {}
        return {seed: bare_parameters(self.start("scratch", seed).model) for seed in seeds}

    def original_scores(self, setting: Setting) -> dict[Subject, Measurement]:
        """Return each subject's original test score. Raises AuditError if a model raises."""
        original = setting.original
        scores: dict[Subject, Measurement] = {}
        for name, model in self.models.items():
            held = setting.place(copy.deepcopy(model))
            try:
                scores[name] = evaluate(held, setting.exact(), original, original.test)
            except Exception as error:
                raise AuditError(
                    f"the {name} model raises on test images of {original.name!r}"
                    f" ({type(error).__name__}: {error}): no verdict can be given on a model that"
                    " cannot do its own task; mend it first"
                ) from error
        return scores

    def precise_enough(self, setting: Setting) -> Setting:
        """Return the setting, in fp32 where `auto` chose a precision in which a subject is lost."""
        errors = [rounding_error(model, setting) or 0.0 for model in self.models.values()]
        return setting.exact() if max(errors) > TOLERATED else setting

    def records(
        self,
        setting: Setting,
        restricted: tuple[Domain, ...],
        scores: Mapping[Subject, Measurement],
        files: Mapping[Subject, str],
    ) -> tuple[SubjectRecord, ...]:
        """Return what the record says of each subject; `files` are checksums of their files."""
        measured = replace(setting, restricted=restricted)
        code, other = self.code(), self.unprotected
        alike = None if other is None else similarity(self.protected, other)
        return tuple(
            SubjectRecord(
                name=name,
                weights_sha256=start.sha256,
                file_sha256=files.get(name),
                original=scores.get(name),
                parameters=sum(p.numel() for p in start.model.parameters()),
                flags=health(start.model, other),
                blocks=len(blocks(start.model, setting.head)),
                vitals=self._vitals(name, start, measured),
                code=code if name == "protected" else (),
                similarity=alike if name == "protected" else None,
            )
            for name in counted(self.names, "model", len(self.names))
            for start in (self.start(name, self.seed),)
        )

    def _vitals(self, subject: Subject, start: Start, setting: Setting) -> Vitals:
        if subject == "protected":
            return measure_vitals(start.model, setting)
        of = (subject, start.network, start.sha256, setting.precision)
        if of not in self.vitals:
            self.vitals[of] = measure_vitals(start.model, setting)
        return self.vitals[of]


def _require_same_architecture(protected: nn.Module, other: nn.Module) -> None:
    if different := differing_keys(protected, other):
        raise AuditError(
            "the model to audit has another architecture than the unprotected one:"
            f" {len(different)} keys differ ({', '.join(different[:3])}): compare checkpoints of"
            " one architecture"
        )
