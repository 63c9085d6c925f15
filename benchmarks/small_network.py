"""Train the small network of the 16x16 measurements: `small_convnet` on CIFAR-10 at 16x16.

    python benchmarks/small_network.py runs/small_convnet_cifar10_16.safetensors

The images are those of `cifar10_jpeg.npz` in the folder `$SOPHON_DATA`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sophon._base.seeding import seeded
from sophon._data import load_domain
from sophon._models.networks import SmallConvNet
from sophon._specs import DomainSpec, Strategy
from sophon._tasks import Classification
from sophon._training.checkpoints import save_tensors
from sophon._training.evaluate import evaluate
from sophon._training.loop import FineTuning
from sophon._training.setting import make_setting

TRAINING = Strategy(
    optimizer="adamw",
    learning_rate=5e-3,
    weight_decay=0.05,
    schedule="warmup_cosine",
    batch_size=128,
    steps=4000,
    augmentation="flip_crop",
)


def main(file: Path) -> None:
    """Train, print the test accuracy, and write the weights to `file`."""
    base = Path(os.environ["SOPHON_DATA"])
    kept = DomainSpec(source="npz", path="cifar10_jpeg.npz", image_size=16)
    refused = DomainSpec(source="npz", path="cifar100.npz", image_size=16, labels="coarse")
    original = load_domain(kept, base=base)
    with seeded(0, "small network"):
        model = SmallConvNet(classes=original.class_count)
    setting = make_setting(
        model,
        task=Classification(),
        original=original,
        restricted=(load_domain(refused, base=base),),
        head="head",
        precision="fp32",
        device=None,
    )
    stream = (0, ("small network",))
    feed = setting.feed(
        original,
        original.train,
        batch_size=TRAINING.batch_size,
        stream=stream,
        augmentation=TRAINING.augmentation,
    )
    tuning = FineTuning(setting.place(model), TRAINING, setting, feed, stream=stream)
    for _ in tuning.run(TRAINING.steps):
        pass
    score = evaluate(model, setting.exact(), original, original.test)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, model.state_dict())
    print(f"{file}: test accuracy {100 * score.value:.1f} % of {score.total} images")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
