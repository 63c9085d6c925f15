"""Does the flag "refused images seen before" find a model that was trained on them?

    python benchmarks/familiarity.py recipes/small16-sampled.toml

For each refused and allowed domain of a run file: how many training and test images a fresh
network and the run's model tell right, and the model after it was trained on the training images:
with a fresh head, or with its own task kept by distillation, as someone would who wants a baseline
that passes for the publisher's.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn

from sophon._auditing.familiarity import familiarity
from sophon._base.seeding import seeded
from sophon._cli.run_file import Case, load
from sophon._data import Domain
from sophon._judgement.flags.images import _both, _lead
from sophon._models import fresh_copy
from sophon._specs import FreshHead, Strategy
from sophon._training.loop import FineTuning, attacker_copy
from sophon._training.setting import Setting, make_setting

STEPS = (50, 200)
KEPT = 250
SEEDS = (0, 1, 2)


def fine_tuned(case: Case, setting: Setting, domain: Domain, steps: int) -> nn.Module:
    """Return the model after so many steps of Adam on the domain, with a fresh head."""
    strategy = Strategy(
        optimizer="adam",
        learning_rate=1e-3,
        steps=steps,
        preparations=(FreshHead(),),
        precision="fp32",
    )
    model, stream = copy.deepcopy(case.model), (1, ("familiarity benchmark",))
    feed = setting.feed(domain, domain.train, batch_size=strategy.batch_size)
    classes = domain.class_count
    attacker_copy(model, strategy, setting, classes=classes, feed=feed, stream=stream)
    for _ in FineTuning(model, strategy, setting, feed, stream=stream).run(steps):
        pass
    return model


def distilled(case: Case, setting: Setting, domain: Domain, seed: int) -> nn.Module:
    """Return the model after it learnt the domain beside its own task, which a copy teaches it."""
    model, teacher = copy.deepcopy(case.model).train(), copy.deepcopy(case.model).eval()
    head: nn.Linear = model.get_submodule(setting.head)  # type: ignore[assignment]
    inputs: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with seeded(seed, "familiarity benchmark"):
        second = nn.Linear(head.in_features, domain.class_count)
    optimizer = torch.optim.Adam([*model.parameters(), *second.parameters()], 1e-3)
    stream = (seed, ("familiarity benchmark",))
    refused = setting.feed(domain, domain.train, batch_size=64, stream=stream)
    own = setting.feed(case.original, case.original.train, batch_size=128, stream=stream)
    for step in range(KEPT):
        images, labels = refused.batch(step)
        kept, _ = own.batch(step)
        optimizer.zero_grad()
        inputs.clear()
        model(images)
        loss = nn.functional.cross_entropy(second(inputs[-1]), labels)
        with torch.no_grad():
            wanted = teacher(kept).softmax(1)
        taught = model(kept).log_softmax(1)
        (loss + nn.functional.kl_div(taught, wanted, reduction="batchmean")).backward()
        optimizer.step()
    handle.remove()
    return model.eval()


def main(run: Path) -> None:
    """Print what each model knows of training and test images, and the lead over a fresh one."""
    case = load(run, None)
    setting = make_setting(
        case.model,
        task=case.task,
        original=case.original,
        restricted=case.restricted,
        head=None,
        precision="fp32",
        device="cpu",
    )
    unborn = fresh_copy(case.model, case.scratch, seed=0, names=("scratch",))
    for domain in (*case.restricted, *case.benign):
        fresh = familiarity(unborn, setting, domain)
        print(f"{domain.name}: {len(domain.train)} training images; training and test images right")
        if fresh is None:
            print("  too few images")
            continue
        print(f"  fresh network: {_both(fresh)}")
        models = {"as it is": case.model}
        for steps in STEPS:
            models[f"{steps} steps of Adam"] = fine_tuned(case, setting, domain, steps)
        for seed in SEEDS:
            models[f"distilled, seed {seed}"] = distilled(case, setting, domain, seed)
        for name, model in models.items():
            held = familiarity(model, setting, domain)
            assert held is not None
            lead, chance = _lead(held, fresh)
            print(f"  {name}: {_both(held)}, lead {100 * lead:.1f} points, by chance {chance:.1g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
