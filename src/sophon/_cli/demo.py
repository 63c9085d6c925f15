"""The demonstration: a small network for rendered letters, to be kept from learning digits.

Everything is real but tiny, so that the whole job ends within a minute or two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sophon._base.files import require_writable, write_text
from sophon._base.seeding import seeded
from sophon._data import load_domain
from sophon._models import load_weights, read_tensors
from sophon._models.networks import SmallConvNet
from sophon._records.audit_record import Measurement
from sophon._specs import DomainSpec, Strategy
from sophon._tasks import Classification
from sophon._training.checkpoints import save_tensors
from sophon._training.evaluate import evaluate
from sophon._training.loop import train
from sophon._training.setting import make_setting

WHAT_IT_SHOWS = (
    "This is a demonstration on toy data: a network of 0.1 million weights, rendered letters as "
    "the task to keep, handwritten digits as the task to refuse. It shows the steps and the "
    "report. It is no evidence about your model: protection and attacks are far too short, there "
    "is one seed, and a real attacker has more compute."
)

RUN = """\
# Written by `sophon demo`. Change it and run the two commands yourself:
#   sophon protect run.toml --out protected
#   sophon audit run.toml --model protected/model.safetensors --out audit

[model]
name = "small_convnet"
weights = "letters.safetensors"
in_channels = 1

[original]                  # the task to keep: letters drawn in many fonts
source = "embedded"
name = "letters"

[[restricted]]              # the task to refuse: handwritten digits
source = "embedded"
name = "digits"

[protect]                   # readers at every depth, and attackers that are rehearsed
rounds = 100

[protect.guard]
tolerance_points = 3.0
every = 5

[audit]
suite = "quick-2"
steps = 60
evaluations = 6
batch_size = 32
seeds = [0]
"""

TRAINING = Strategy(
    optimizer="adam", learning_rate=3e-3, schedule="cosine", batch_size=64, steps=300
)


@dataclass(frozen=True)
class Start:
    """What the demonstration starts from: its run file and the network's validation score."""

    run: Path
    score: Measurement
    trained: bool


def prepare(folder: Path, *, training: Strategy = TRAINING) -> Start:
    """Write the run file and the pre-trained weights into `folder`, unless they are there.

    Raises CheckpointError if the folder cannot be written.
    """
    original, restricted = (
        load_domain(DomainSpec(source="embedded", name=name), base=folder, role=role)
        for name, role in (("letters", "original"), ("digits", "restricted"))
    )
    with seeded(0, "demo"):
        model = SmallConvNet(classes=original.class_count, in_channels=1)
    setting = make_setting(
        model, task=Classification(), original=original, restricted=(restricted,), head="head"
    )
    require_writable(folder)
    if not (folder / "run.toml").is_file():
        write_text(folder / "run.toml", RUN)
    weights = folder / "letters.safetensors"
    trained = not weights.is_file()
    if trained:
        stream = (0, ("demo", "training"))
        train(setting.place(model), training, setting, original, stream=stream)
        save_tensors(weights, model.state_dict())
    else:
        load_weights(model, read_tensors(weights), source=os.fspath(weights))
        setting.place(model)
    score = evaluate(model, setting, original, original.validation)
    return Start(folder / "run.toml", score, trained)
