"""KID, FID, precision and recall on real images; what a verdict makes of errors and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from denoisers import digits, unet, write_latent_pipeline
from records import record, trial
from sophon._auditing.extractors import Extractor, check_extractor, make_extractor
from sophon._auditing.picture_quality import (
    _among,
    check_quality,
    measure_quality,
)
from sophon._auditing.samples import picture_grid, spread_labels
from sophon._base.errors import DataError, SophonError, SpecError
from sophon._base.torchvision_patch import prepare_torchvision
from sophon._data import Domain
from sophon._judgement.flags.original import near_chance_on_original, original_task_suffers
from sophon._judgement.pictures import slows, withstands
from sophon._judgement.statistics import winner
from sophon._judgement.verdict import judge, summarise
from sophon._models import diffusers, resolve_model
from sophon._records.audit_record import AuditRecord, ErrorScore, Point, SampleRecord, Score, Trial
from sophon._records.metrics import KINDS, kind_of, shown
from sophon._reporting.report import report
from sophon._specs import Guard, ModelSpec, PretrainSpec, SampleSpec
from sophon._tasks import Denoising, Latents
from sophon._training.pretrain import Pretraining

SPEC = SampleSpec(count=60, kid_subset=30, extractor_steps=60)


class Flat(nn.Module):
    """Pixels as features."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :1, ::2, ::2].float().flatten(1) / 255


@pytest.fixture(scope="module")
def classifier() -> Extractor:
    return make_extractor(SPEC, digits(0, 5), digits(5, 10))


def test_kid_is_the_unbiased_estimate_of_the_kernel_distance() -> None:
    # With subsets of all images each is the same: the plain double sum must come out.
    real, fake = digits(5, 10).train.pixels[:20], digits(0, 5).train.pixels[:20]
    spec = SPEC.model_copy(update={"kid_subset": 20})
    quality = measure_quality(fake, real, Extractor(Flat(), "pixels", 16), spec)
    x, y = (Flat()(part).double().numpy() for part in (real, fake))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    off = ~np.eye(20, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert quality.kid == pytest.approx(expected, rel=1e-3)
    assert quality.kid_std == pytest.approx(0, abs=1e-6)
    gap = x.mean(0) - y.mean(0)
    assert quality.fid >= gap @ gap - 1e-6


def test_other_real_images_are_near_and_another_domain_is_far(classifier: Extractor) -> None:
    same = measure_quality(
        digits(5, 10).train.pixels[:150], digits(5, 10).test.pixels, classifier, SPEC
    )
    other = measure_quality(
        digits(0, 5).train.pixels[:150], digits(5, 10).test.pixels, classifier, SPEC
    )
    assert same.kid + 2 * same.kid_std < other.kid
    assert same.fid < other.fid
    assert same.precision > other.precision
    assert same.recall > other.recall
    assert "small classifier of digits-0-4+digits-5-9 (1 + 1 classes)" in classifier.name
    assert classifier.features(digits(0, 5).test.pixels[:3]).shape == (3, classifier.width)


def test_copies_of_the_real_images_have_full_precision_and_recall() -> None:
    images = digits(5, 10).test.pixels
    quality = measure_quality(images, images, Extractor(Flat(), "pixels", 16), SPEC)
    assert quality.precision == quality.recall == 1
    assert quality.fid == pytest.approx(0, abs=1e-3)
    black = torch.zeros_like(images)
    quality = measure_quality(black, images, Extractor(Flat(), "pixels", 16), SPEC)
    assert quality.recall == 0
    # One of them, again and again, is like the real ones and shows few of them.
    one = images[:1].repeat(len(images), 1, 1, 1)
    quality = measure_quality(one, images, Extractor(Flat(), "pixels", 16), SPEC)
    assert quality.precision == 1
    assert quality.recall < 0.1


def test_a_ball_reaches_to_the_neighbour_asked_for() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    drawn = torch.tensor([[-2.0], [-0.5], [12.0]])
    assert _among(drawn, real, 1) == pytest.approx(1 / 3)
    assert _among(drawn, real, 2) == 1


def test_extractors_of_another_width_and_too_few_images_are_refused(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"width": 2048, "extractor_steps": 1})
    with pytest.raises(SpecError, match=r"width = 2048.*have 72"):
        make_extractor(spec, digits(0, 5), digits(5, 10))
    with pytest.raises(SpecError, match=r"width = 2048.*have 72"):
        check_extractor(spec, digits(0, 5), digits(5, 10))
    with pytest.raises(DataError, match=r"has 179 test images, too few.*at least 200"):
        check_quality(SPEC.model_copy(update={"count": 500, "kid_subset": 100}), (digits(5, 10),))
    with pytest.raises(SpecError, match=r"count = 59.*at least 60 samples"):
        check_quality(SPEC.model_copy(update={"count": 59}), (digits(5, 10),))


@pytest.mark.slow
def test_a_file_of_inceptions_weights_is_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The network can only be made from a file of its weights: random ones do here.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("any", ["2048"], "any")
    file = tmp_path / "inception.safetensors"
    save_file(network.state_dict(), file)
    spec = SPEC.model_copy(update={"extractor": str(file)})
    extractor = make_extractor(spec, digits(0, 5), digits(5, 10))
    assert extractor.width == 2048
    assert extractor.name == "Inception v3 pool features (inception.safetensors)"
    assert extractor.features(digits(0, 5).test.pixels[:2]).shape == (2, 2048)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(SpecError, match="does not hold the weights"):
        make_extractor(spec, digits(0, 5), digits(5, 10))


def test_every_model_draws_from_the_same_noise_whatever_the_batch() -> None:
    task, labels = Denoising(), torch.zeros(70, dtype=torch.long)
    model = unet().train()
    many = task.draw(model, (1, 8, 8), labels, steps=2)
    few = task.draw(model, (1, 8, 8), labels[:5], steps=2)
    assert model.training
    assert many.shape == (70, 1, 8, 8)
    assert (many[:5].int() - few.int()).abs().max() <= 1
    grid = picture_grid(many[:4])
    assert grid.startswith("data:image/png;base64,")


class Knowing(nn.Module):
    """The denoiser that is optimal for a single image or latent."""

    def __init__(self, task: Denoising, image: torch.Tensor) -> None:
        super().__init__()
        self.task, self.image = task, image
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, **_: Any) -> Any:
        alphas = self.task.alphas[times].view(-1, 1, 1, 1)
        noise = (noisy - alphas.sqrt() * self.image) / (1 - alphas).sqrt()
        velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * self.image
        return ({"epsilon": noise, "v_prediction": velocity}[self.task.prediction],)


SCHEDULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"prediction_type": "v_prediction"}),
    # Schedules that DDIM cannot make itself, and schedulers that say nothing of clipping.
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDPMScheduler", {"beta_schedule": "laplace"}),
    ("DDPMScheduler", {"trained_betas": [0.001 * step for step in range(1, 51)]}),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
    ("PNDMScheduler", {"set_alpha_to_one": False}),
)


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_a_perfect_denoiser_draws_the_image_it_knows(name: str, options: dict[str, Any]) -> None:
    task = Denoising(getattr(diffusers(), name)(**options))
    image = digits(5, 10).test.pixels[:1]
    knowing = Knowing(task, image.float() / 127.5 - 1)
    drawn = task.draw(knowing, (1, 8, 8), torch.zeros(2, dtype=torch.long), steps=10)
    assert (drawn.int() - image.int()).abs().max() <= 3


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler"])
def test_latents_are_not_clipped(name: str, tmp_path: Path) -> None:
    latents = Latents.from_pipeline(write_latent_pipeline(tmp_path / "pipeline"), ["a digit"])
    task = Denoising(getattr(diffusers(), name)(), latents=latents)
    stream = torch.Generator().manual_seed(0)
    latent = 4 * torch.randn(task.shape((3, 16, 16)), generator=stream)[None]
    labels = torch.zeros(2, dtype=torch.long)
    drawn = task.draw(Knowing(task, latent), (3, 16, 16), labels, steps=10)
    expected, clipped = (
        ((latents.decoded(held) / 2 + 0.5).clamp(0, 1) * 255).round().int()
        for held in (latent, latent.clamp(-1, 1))
    )
    assert (expected - clipped).abs().max() > 10
    assert (drawn.int() - expected).abs().max() <= 3


def test_clipping_is_the_schedulers_own_where_it_says_so() -> None:
    library = diffusers()
    for scheduler, clips in (
        (library.DDPMScheduler(), True),
        (library.DDPMScheduler(clip_sample=False), False),
        (library.PNDMScheduler(), False),
    ):
        assert Denoising(scheduler).sampler(5).config.clip_sample is clips


def test_more_steps_than_timesteps_are_refused() -> None:
    library = diffusers()
    short = Denoising(library.DDPMScheduler(num_train_timesteps=20))
    assert len(short.sampler(20).timesteps) == 20
    with pytest.raises(SpecError, match="steps = 25: the schedule has timesteps 0 to 19"):
        short.sampler(25)
    shifted = Denoising(library.DDPMScheduler(num_train_timesteps=20, steps_offset=1))
    with pytest.raises(SpecError, match="steps = 20: the schedule"):
        shifted.sampler(20)


def test_pictures_are_of_every_class_in_its_share() -> None:
    labels = torch.arange(5).repeat_interleave(100)
    assert spread_labels(labels, 128).bincount().tolist() == [26, 26, 25, 26, 25]
    assert spread_labels(torch.arange(3), 7).bincount().tolist() == [3, 2, 2]


def test_a_given_classifier_sees_images_as_it_was_trained_on_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    domain = Domain.from_arrays(
        "own", images, np.arange(40) % 2, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)
    )
    named = ModelSpec(name="small_convnet", classes=2)
    model, _ = resolve_model(named)
    short = PretrainSpec(steps=1, batch_size=8, precision="fp32")
    run = Pretraining(model, original=domain, spec=short, out=tmp_path / "mine", model_spec=named)
    list(run)
    trained = run.result().model
    spec = SPEC.model_copy(update={"extractor": str(tmp_path / "mine")})
    extractor = make_extractor(spec, domain, domain)
    words = "the classifier in mine (16x16 pixels, mean 0.4, 0.5, 0.6, std 0.1, 0.2, 0.3)"
    assert words in extractor.name
    seen: list[torch.Tensor] = []
    trained.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[union-attr]
    pixels, _ = next(run.setting.feed(domain, domain.test, batch_size=40).in_order())
    with torch.no_grad():
        trained(pixels)
    torch.testing.assert_close(extractor.features(domain.test.pixels), seen[0])
    # Larger ones are made as large as it knows them.
    larger = domain.test.pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    met: list[torch.Size] = []
    extractor.module.body.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, given: met.append(given[0].shape[-2:])
    )
    extractor.features(larger)
    assert met == [(16, 16)]
    # What says nothing of its input is named as such.
    described = json.loads((tmp_path / "mine" / "model.json").read_text())
    del described["pretraining"]
    (tmp_path / "mine" / "model.json").write_text(json.dumps(described), encoding="utf-8")
    assert "none are recorded" in make_extractor(spec, domain, domain).name
    # What cannot be loaded is said of the key that names it.
    (tmp_path / "mine" / "model.json").unlink()
    with pytest.raises(SophonError, match=r"audit\.samples\.extractor = .*mine"):
        make_extractor(spec, domain, domain)


# --- Records of errors ----------------------------------------------------------------------------

ERRORS = {
    "protected": (0.85, 0.41, 0.155, 0.15),
    "unprotected": (0.2, 0.1, 0.06, 0.05),
    "scratch": (0.8, 0.4, 0.145, 0.14),
}


def _error(value: float, total: int = 100) -> ErrorScore:
    return ErrorScore(mse=value, variance=0.001, total=total, quarters=(value,) * 4)


def _trial(subject: Any, seed: int) -> Trial:
    errors = [1.0, *(value + 0.001 * seed for value in ERRORS[subject])]
    plain = trial(subject, (), seed=seed)
    points = [
        Point(step=step, samples=64 * step, validation=_error(value))
        for step, value in zip((0, 5, 20, 80, 200), errors, strict=True)
    ]
    return plain.model_copy(
        update={"curve": tuple(points), "best_step": 200, "test": _error(errors[-1])}
    )


def _picture(subject: Any, kid: float, attack: str = "adam") -> SampleRecord:
    return SampleRecord(
        subject=subject, domain="refused", attacked="refused", attack=attack, count=60, images=100,
        steps=25, extractor="the features of a test", features=72, kid=kid, kid_std=0.01, fid=1.0,
        precision=0.5, recall=0.5, grid="data:image/png;base64,AAAA",
    )  # fmt: skip


def _record(kids: tuple[float, float, float] | None = (0.5, 0.1, 0.5)) -> AuditRecord:
    trials = [_trial(subject, seed) for subject in ERRORS for seed in (0, 1, 2)]
    held = record(trials)
    subjects = [
        subject.model_copy(update={"original": _error(value) if value else None})
        for subject, value in zip(held.subjects, (0.055, 0.05, None), strict=True)
    ]
    pictures = zip(ERRORS, kids or (), strict=False)
    return held.model_copy(
        update={
            "task": "denoising",
            "task_name": "denoising, epsilon prediction, timesteps 0 to 999 of 1000",
            "subjects": tuple(subjects),
            "samples": tuple(_picture(subject, kid) for subject, kid in pictures),
        }
    )


def test_recovering_an_error_means_90_percent_of_the_way_from_scratch() -> None:
    (summary,) = summarise(_record())
    assert summary.goal == pytest.approx(1 - (0.14 - 0.9 * (0.14 - 0.05)))
    steps = {name: s.costs.get("unprotected") for name, s in summary.subjects.items()}
    assert steps["unprotected"] is not None
    assert steps["unprotected"].steps == 200
    assert steps["protected"] is not None
    assert steps["protected"].steps is None


@pytest.mark.parametrize(
    ("kids", "verdict", "words"),
    [
        ((0.5, 0.1, 0.5), "withstood", "100 % of the unprotected model's lead in KID is gone"),
        ((0.2, 0.1, 0.5), "not protected", "only 25 %"),
        ((0.5, 0.49, 0.5), "void", "KID does not tell"),
        (None, "void", "no pictures were judged"),
    ],
)
def test_a_good_verdict_needs_the_pictures(
    kids: tuple[float, float, float] | None, verdict: str, words: str
) -> None:
    held = _record(kids)
    (summary,) = summarise(held)
    assert summary.advantage.defined
    assert summary.verdict == verdict, summary.reasons
    assert any(words in reason for reason in summary.reasons)
    assert words in withstands(held, "refused").reason


@pytest.mark.parametrize(("kid", "verdict"), [(0.5, "void"), (0.1, "not protected")])
def test_pictures_convict_where_a_flag_forbids_to_acquit(kid: float, verdict: str) -> None:
    held = _record((kid, 0.1, 0.5))
    frozen = [
        s.model_copy(update={"flags": ("frozen_parameters",) if s.name == "protected" else ()})
        for s in held.subjects
    ]
    (summary,) = summarise(held.model_copy(update={"subjects": tuple(frozen)}))
    assert summary.verdict == verdict, summary.reasons


@pytest.mark.parametrize("changes", [{"budget": 20}, {"named": True}])
def test_good_pictures_after_any_attack_convict(changes: dict[str, Any]) -> None:
    held = _record((0.5, 0.1, 0.5))
    one = _picture("protected", 0.1).model_copy(update={**changes, "best_step": 15})
    more = held.model_copy(update={"samples": (*held.samples, one)})
    assert withstands(held, "refused").kind == "for"
    assert withstands(more, "refused").kind == "against"
    assert summarise(more)[0].verdict == "not protected"
    page = report(more).html()
    words = "after adam" if "named" in changes else "after its best attack within 20 steps"
    assert f"protected, {words} (best at step 15)" in page


def test_test_images_choose_none_of_the_pictures() -> None:
    """What an unprotected or fresh network drew better at some other moment does not count."""
    held = _record((0.34, 0.1, 0.5))
    said = withstands(held, "refused")
    for subject, kid in (("unprotected", 0.0), ("scratch", 0.3)):
        other = _picture(subject, kid).model_copy(update={"budget": 20})
        more = held.model_copy(update={"samples": (*held.samples, other)})
        assert withstands(more, "refused") == said


def test_pictures_acquit_only_beyond_their_own_spread() -> None:
    held = _record((0.34, 0.1, 0.5))
    assert withstands(held, "refused").kind == "for"
    rows = [row.model_copy(update={"kid_std": 0.05}) for row in held.samples]
    wide = held.model_copy(update={"samples": tuple(rows)})
    assert withstands(wide, "refused")[:2] == (
        "none",
        "pictures are too few to tell: 60 % of the unprotected model's lead in KID is gone, but"
        " within KID's spread only 25 % may be",
    )
    other = [*held.samples[1:], held.samples[0].model_copy(update={"extractor_key": "another"})]
    mixed = withstands(held.model_copy(update={"samples": tuple(other)}), "refused")
    assert mixed.kind == "none"
    assert "different extractors" in mixed.reason


def test_a_slowed_model_is_judged_by_pictures_while_it_lags() -> None:
    # In the end all draw as well: that is what slowed means.
    held = _record((0.1, 0.1, 0.5))
    assert slows(held, "refused", 20, 80, 1.5).kind == "none"
    assert "audit.samples.budgets" in slows(held, "refused", 20, 80, 1.5).reason

    def lagging(kid: float, *, within: int = 40, of: AuditRecord = held) -> AuditRecord:
        early = [
            _picture(subject, own).model_copy(update={"budget": within})
            for subject, own in zip(ERRORS, (kid, 0.15, 0.5), strict=True)
        ]
        return of.model_copy(update={"samples": (*of.samples, *early)})

    said = slows(lagging(0.5), "refused", 20, 80, 1.5)
    assert (said.kind, said.until) == ("for", 40)
    assert "100 % of the unprotected model's lead in KID is gone within 40 steps" in said.reason
    assert slows(lagging(0.16), "refused", 20, 80, 1.5).kind == "against"
    # Before the unprotected model recovers, or after the protected one did, they say nothing.
    assert slows(lagging(0.5), "refused", 41, 80, 1.5).kind == "none"
    assert slows(lagging(0.5), "refused", 20, 40, 1.5).kind == "none"
    # They bear it out as far as they go, and no further.
    both = lagging(0.16, within=60, of=lagging(0.5))
    said = slows(both, "refused", 20, 80, 1.5)
    assert (said.kind, said.until) == ("for", 40)
    assert "no longer within 60: pictures speak against it" in said.reason
    assert slows(lagging(0.5, within=60, of=lagging(0.5)), "refused", 20, 80, 1.5).until == 60
    # Less than is called slowed is not.
    assert slows(both, "refused", 30, 80, 1.5).kind == "against"
    short = slows(lagging(0.5), "refused", 30, 80, 1.5)
    assert short.kind == "none"
    assert "less than 1.5 times the 30 steps" in short.reason


@pytest.mark.parametrize(
    ("role", "kid", "verdict"),
    [
        ("restricted", 0.5, "slowed x3.0 or more"),
        ("restricted", 0.16, "not protected"),
        ("restricted", None, "void"),
        ("held_out", 0.5, "slowed x3.0 or more"),
        ("held_out", None, "void"),
    ],
)
def test_slowed_is_a_verdict_only_as_far_as_pictures_bear_it_out(
    role: Any, kid: float | None, verdict: str
) -> None:
    late = {**ERRORS, "protected": (0.8, 0.4, 0.3, 0.05), "unprotected": (0.1, 0.05, 0.05, 0.05)}
    held = _record((0.1, 0.1, 0.5))
    trials = []
    for old in held.trials:
        errors = [1.0, *(value + 0.001 * old.seed for value in late[old.subject])]
        points = [
            point.model_copy(update={"validation": _error(value)})
            for point, value in zip(old.curve, errors, strict=True)
        ]
        update = {"curve": tuple(points), "test": _error(errors[-1])}
        trials.append(old.model_copy(update=update))
    early = [
        _picture(subject, own).model_copy(update={"budget": 60})
        for subject, own in zip(ERRORS, (kid or 0.0, 0.15, 0.5), strict=True)
    ]
    pictures = (*held.samples, *(early if kid is not None else ()))
    changes: dict[str, Any] = {"trials": tuple(trials), "samples": pictures}
    if role == "held_out":
        other = held.restricted[0].model_copy(update={"name": "other"})
        own = held.restricted[0].model_copy(update={"role": "held_out"})
        changes |= {"restricted": (other,), "held_out": (own,)}
    judged = held.model_copy(update=changes)
    # Recovered at step 20 and at step 200: ten times, of which pictures show three.
    summary = judge(judged).held_out[0] if role == "held_out" else summarise(judged)[0]
    assert summary.text == verdict, summary.reasons


def test_an_allowed_domain_blocked_as_much_needs_no_pictures() -> None:
    held = _record((0.5, 0.1, 0.5))
    allowed = held.restricted[0].model_copy(update={"name": "allowed", "role": "benign"})
    moved = [t.model_copy(update={"domain": "allowed", "key": f"b{t.key}"}) for t in held.trials]
    both = held.model_copy(update={"benign": (allowed,), "trials": (*held.trials, *moved)})
    (summary,) = summarise(both)
    assert summary.verdict == "untrainable", summary.reasons


def test_the_winner_within_a_budget_is_what_was_best_by_then() -> None:
    slow = trial("protected", (0.2, 0.3, 0.4, 0.9))
    fast = trial("protected", (0.5, 0.6, 0.55, 0.6))
    best = winner([slow, fast], 80)
    assert best is not None
    assert (best.key, best.best_step) == (fast.key, 20)
    assert winner([slow, fast]) == slow
    assert winner([], 80) is None


def test_a_report_of_errors_shows_errors() -> None:
    page = report(_record()).html()
    for words in ("0.0500", "timesteps 0 to 999", "the features of a test", "72 of them"):
        assert words in page
    assert "accuracy" not in page
    assert "data:image/png;base64,AAAA" in page


def test_flags_on_the_original_task_know_errors() -> None:
    held = _record()
    assert near_chance_on_original(held, "refused") is None
    assert original_task_suffers(held, "refused") is None

    def with_error(value: float) -> AuditRecord:
        first = held.subjects[0].model_copy(update={"original": _error(value, 10_000)})
        return held.model_copy(update={"subjects": (first, *held.subjects[1:])})

    suffers = original_task_suffers(with_error(0.07), "refused")
    assert suffers is not None
    assert not suffers.voids
    assert "0.0500 before, 0.0700 after" in suffers.detail
    ruined = original_task_suffers(with_error(0.11), "refused")
    assert ruined is not None
    assert ruined.voids
    assert near_chance_on_original(with_error(0.99), "refused") is not None


def test_the_guard_tolerates_a_share_of_the_error() -> None:
    kind = kind_of(_error(0.05))
    guard = Guard(tolerance_relative=0.1)
    assert 1 - kind.allowed(0.95, guard) == pytest.approx(0.055)
    assert kind.interval((0.9, 0.95)) == ("0.0500", "0.1000")
    assert shown(_error(0.05)) == "0.0500"
    assert shown(Score(correct=1, total=2)) == "50.0 %"
    assert KINDS["accuracy"].allowed(0.9, Guard(tolerance_points=2.0)) == pytest.approx(0.88)


def test_domains_without_labels_have_one_class() -> None:
    images = np.zeros((20, 8, 8), np.uint8)
    domain = Domain.from_arrays("plain", images, test_images=images[:4])
    assert domain.classes == ("image",)
    assert len(domain.test) == 4
