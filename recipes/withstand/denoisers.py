"""What of a denoiser's advantage is denoising as such, what content, and what a protection took.

    python recipes/withstand/denoisers.py RUN.toml [MODEL...] [--store FOLDER] [--only SUBJECT...]

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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

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

RATES, BUDGETS, BATCH = (1e-3, 1e-2), (0, 5, 20, 50, 200), 32
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


@dataclass
class Reached:
    """What the best rate reached within a budget: weights, and the error on validation images."""

    error: float
    weights: dict[str, Tensor]


def envelope(model: nn.Module, setting: Setting, domain: Domain) -> dict[int, Reached]:
    """Return what attacks on `model` reach at each budget; the least error of all rates counts."""
    best: dict[int, Reached] = {}
    for rate in RATES:
        attacked = setting.place(copy.deepcopy(model))
        optimizer = torch.optim.Adam(attacked.parameters(), rate)
        feed = setting.feed(
            domain, domain.train, batch_size=BATCH, stream=(0, ("denoisers", "batches"))
        )
        for step in range(BUDGETS[-1] + 1):
            if step in BUDGETS:
                error = 1 - evaluate(attacked, setting, domain, domain.validation).value
                if step not in best or error < best[step].error:
                    held = {k: v.detach().clone() for k, v in attacked.state_dict().items()}
                    best[step] = Reached(error, held)
            attacked.train()
            images, labels = feed.batch(step)
            stream = generator(0, "denoisers", "noise", step)
            with setting.autocast():
                outputs, targets = setting.task.outputs(attacked, images, labels, stream)
            setting.task.loss(outputs, targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return best


def rows(
    name: str, model: nn.Module, setting: Setting, domain: Domain, extractor: Extractor
) -> None:
    """Print a row for each budget."""
    kept = evaluate(model, setting, setting.original, setting.original.validation)
    subject, shape = copy.deepcopy(model), (setting.channels, *domain.image_shape[1:])
    labels = torch.zeros(PICTURES.count, dtype=torch.long)
    for step, reached in envelope(model, setting, domain).items():
        subject.load_state_dict(reached.weights)
        error = evaluate(subject, setting, domain, domain.test)
        assert isinstance(error, ErrorScore)
        drawn = setting.task.draw(subject, shape, labels, steps=PICTURES.steps)
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
            rows(name, model, setting, domain, extractor)


if __name__ == "__main__":
    main()
