"""What of a denoiser's advantage is denoising as such, what content, and what a protection took.

    python recipes/withstand/denoisers.py RUN.toml [MODEL...] [--only SUBJECT...]

Subjects are the model of the run file, a fresh network, one that was trained as long on images with
the original ones' spectra and none of their content (phases drawn at random), and the models that
are named. Each is trained on the restricted images by Adam at two rates, 200 steps of 32. Printed
for 0 to 200 steps, of the rate with the least validation error: the test error, its quarters of the
timesteps, and KID of what the network then draws. One seed, no interval, no verdict: what is
published is audited.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import nn

from sophon._auditing.extractors import Extractor, make_extractor
from sophon._auditing.picture_quality import measure_quality
from sophon._base.seeding import generator
from sophon._cli.run_file import Case, load, load_subject
from sophon._data import Domain, Images
from sophon._models import fresh_copy
from sophon._records.audit_record import ErrorScore
from sophon._specs import PretrainSpec, SampleSpec
from sophon._training.evaluate import evaluate
from sophon._training.pretrain import pretrain
from sophon._training.setting import Setting

RATES, BUDGETS, BATCH = [1e-3, 1e-2], (0, 5, 20, 50, 200), 32
# As the run's own model was trained.
LEARNING = PretrainSpec(steps=1500, batch_size=32, learning_rate=2e-3, every=250)
PICTURES = SampleSpec(budgets=())


def scrambled(domain: Domain) -> Domain:
    """Return the domain with the spectra of its images and phases drawn at random, all channels of
    an image alike: their colours and correlations stay, what is to be seen goes.
    """

    def of(images: Images, name: str) -> Images:
        pixels = images.pixels.float()
        drawn = torch.randn(
            (len(pixels), 1, *pixels.shape[2:]), generator=generator(0, "phases", name)
        )
        # Of real noise, so that the result is real; the mean keeps its sign.
        turn = torch.fft.rfft2(drawn)
        turn = turn / turn.abs().clamp_min(1e-12)
        turn[..., 0, 0] = 1
        made = torch.fft.irfft2(torch.fft.rfft2(pixels) * turn, s=pixels.shape[2:])
        return Images(made.round().clamp(0, 255).byte(), images.labels)

    return replace(
        domain,
        name=f"{domain.name}-scrambled",
        train=of(domain.train, "train"),
        validation=of(domain.validation, "validation"),
        test=of(domain.test, "test"),
    )


class Attack:
    """A network that is trained on the restricted images by Adam, as far as it is asked to."""

    def __init__(self, model: nn.Module, setting: Setting, domain: Domain, rate: float) -> None:
        self.setting, self.domain = setting, domain
        self.model = setting.place(copy.deepcopy(model))
        self.optimizer = torch.optim.Adam(self.model.parameters(), rate)
        self.feed = setting.feed(
            domain, domain.train, batch_size=BATCH, stream=(0, ("denoisers", "batches"))
        )
        self.taken = 0

    def error(self, images: Images) -> ErrorScore:
        """Return the error on one of the domain's splits."""
        found = evaluate(self.model, self.setting, self.domain, images)
        assert isinstance(found, ErrorScore)
        return found

    def advance(self, step: int) -> None:
        """Take the steps up to that one."""
        task = self.setting.task
        for at in range(self.taken, step):
            images, labels = self.feed.batch(at)
            stream = generator(0, "denoisers", "noise", at)
            outputs, targets = task.outputs(self.model.train(), images, labels, stream)
            task.loss(outputs, targets).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.taken = step


def rows(
    name: str,
    model: nn.Module,
    setting: Setting,
    domain: Domain,
    extractor: Extractor,
    rates: list[float],
) -> None:
    """Print a row for each budget, of the rate that has the least validation error there."""
    kept = evaluate(model, setting, setting.original, setting.original.validation)
    shape = (setting.channels, *domain.image_shape[1:])
    labels = torch.zeros(PICTURES.count, dtype=torch.long)
    attacks = [Attack(model, setting, domain, rate) for rate in rates]
    for step in BUDGETS:
        for attack in attacks:
            attack.advance(step)
        best = min(attacks, key=lambda one: one.error(domain.validation).mse)
        error = best.error(domain.test)
        drawn = setting.task.draw(best.model, shape, labels, steps=PICTURES.steps)
        quality = measure_quality(drawn, domain.test.pixels, extractor, PICTURES)
        quarters = " | ".join(f"{value:.4f}" for value in error.quarters)
        typer.echo(
            f"| {name} | {1 - kept.value:.4f} | {step} | {error.mse:.4f} | {quarters}"
            f" | {quality.kid:.3f} ({quality.kid_std:.3f}) |"
        )


def subjects(case: Case, models: list[Path], store: Path) -> dict[str, nn.Module]:
    """Return the networks to attack, by name."""
    fresh = fresh_copy(case.model, case.scratch, seed=0, names=("scratch",))
    start = fresh_copy(case.model, case.scratch, seed=0, names=("statistics",))
    made = pretrain(
        start,
        original=scrambled(case.original),
        task=case.task,
        spec=LEARNING,
        out=store / "statistics",
    )
    named = {str(path): load_subject(case, path)[0] for path in models}
    return {"unprotected": case.model, "fresh": fresh, "statistics": made.model, **named}


def main(arguments: list[str] | None = None) -> None:
    """Print the table of the run's restricted domain, the first if there are several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--store", type=Path, default=Path("runs/denoisers"))
    parser.add_argument("--only", nargs="+", help="subjects whose rows are printed")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    given = parser.parse_args(arguments)
    case = load(given.run, None)
    setting, domain = case.setting(), case.restricted[0]
    extractor = make_extractor(PICTURES, case.original, domain)
    typer.echo(
        "| subject | original, validation | steps | error | first quarter | second | third | last"
        " | KID |\n|" + "---|" * 9
    )
    for name, model in subjects(case, given.models, given.store).items():
        if given.only is None or name in given.only:
            rows(name, model, setting, domain, extractor, given.rates)


if __name__ == "__main__":
    main()
