"""The cells of the paper's tables, as data: at their own size and at a small one. No torch.

A cell is an architecture, a restricted domain and a suppression loss; `run_file` and `base_file`
spell it as run files. At paper size the hyper-parameters are those of SOPHON (arXiv 2404.12699),
read second-hand, where a comment says so, and ours elsewhere.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sophon._base.errors import SpecError
from sophon._specs import FreshHead, OptimizerName, Strategy

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")


@dataclass(frozen=True)
class Cell:
    """One cell of the grid."""

    scale: Scale
    architecture: str
    restricted: str
    loss: str

    @property
    def name(self) -> str:
        """Its name, the same at both scales, such as `resnet18-cifar10-ice`."""
        return f"{self.architecture}-{self.restricted}-{self.loss}"


@dataclass(frozen=True)
class Published:
    """What the paper reports for a cell: accuracies in percent, or for diffusion models MSE.

    `before` and `after` are of the original task, the rest of the restricted one after
    fine-tuning: of a fresh network, the unprotected and the protected model. `source` is where the
    numbers were read, `note` what a reader must know to compare them.
    """

    source: str
    note: str = ""
    before: float | None = None
    after: float | None = None
    scratch: float | None = None
    unprotected: float | None = None
    protected: float | None = None


@dataclass(frozen=True)
class Base:
    """An architecture: how its model table reads, and how its original task is learnt."""

    model: str
    pretrain: str
    note: str


_SECOND_HAND = "SOPHON, arXiv 2404.12699, second-hand: read from a secondary source"
_FILE_NAMES = "second-hand: file names of the released research code"
# Only numbers we have a source for; everything else stays empty.
PUBLISHED: dict[str, Published] = {
    "caformer-cifar10-ice": Published(
        _SECOND_HAND,
        "loss not stated there: the numbers stand with the paper's first one, ICE",
        before=99.6,
        after=96.2,
        scratch=62.7,
        unprotected=84.8,
        protected=15.2,
    ),
    "ddpm-celeba-dos": Published(
        _SECOND_HAND,
        "MSE; the released code trains and evaluates at timestep 1 only:"
        " --set task.timestep=1 compares",
        scratch=0.479,
        unprotected=0.445,
        protected=0.705,
    ),
}
PUBLISHED_BEFORE: dict[str, float] = {
    "caformer": 99.6,
    "resnet50": 99.2,
    "resnet34": 99.0,
    "resnet18": 98.6,
    "vgg": 95.4,
}
# By architecture, as a line below its tables: it belongs to no row of them that we could name.
PUBLISHED_ROBUSTNESS: dict[str, str] = {
    "vgg": (
        "Published (second-hand; restricted set, method and loss are not named in our source): VGG"
        " with Adadelta, 40 epochs: scratch about 64 / unprotected 87.3 / protected 56.4."
    ),
}


def published_of(cell: Cell) -> Published:
    """Return what is published for a cell; nothing is filled in for what is not, such as a
    restricted domain that the paper does not have.
    """
    if cell.name in PUBLISHED:
        return PUBLISHED[cell.name]
    if cell.restricted not in RESTRICTED["paper"]:
        return Published("")
    before = PUBLISHED_BEFORE.get(cell.architecture)
    return Published(_FILE_NAMES if before is not None else "", before=before)


_FINE_TUNED = """\
steps = 2000
batch_size = 64
learning_rate = 1e-4
warmup_steps = 200"""
_FROM_SCRATCH = """\
steps = 1500
batch_size = 64
learning_rate = 2e-3
warmup_steps = 100
augmentation = "flip_crop"
every = 250"""
_PUBLISHED_WEIGHTS = "published ImageNet weights, trained on ImageNette"

BASES: dict[Scale, dict[str, Base]] = {
    "paper": {
        "caformer": Base('name = "timm:caformer_m36"', _FINE_TUNED, _PUBLISHED_WEIGHTS),
        "resnet50": Base('name = "torchvision:resnet50"', _FINE_TUNED, _PUBLISHED_WEIGHTS),
        "resnet34": Base('name = "torchvision:resnet34"', _FINE_TUNED, _PUBLISHED_WEIGHTS),
        "resnet18": Base('name = "torchvision:resnet18"', _FINE_TUNED, _PUBLISHED_WEIGHTS),
        # Which VGG is not said where we read; this is the most used one with BatchNorm.
        "vgg": Base('name = "torchvision:vgg16_bn"', _FINE_TUNED, _PUBLISHED_WEIGHTS),
    },
    "small": {
        "resnet18": Base(
            'name = "timm:resnet18"\narguments = { channels = [32, 64, 128, 256] }',
            _FROM_SCRATCH,
            "half its widths but for the stem, from scratch",
        ),
        "resnet50": Base(
            'name = "timm:resnet50"\narguments = { channels = [16, 32, 64, 128] }',
            _FROM_SCRATCH,
            "a quarter of its widths but for the stem, from scratch",
        ),
        "vgg": Base(
            'name = "small_vgg"',
            _FROM_SCRATCH,
            "VGG-11 with BatchNorm,\n# a quarter of the convolutions' widths, 256 instead of 4,096"
            " units in the first of two hidden layers,\n# from scratch",
        ),
        "caformer": Base('name = "small_caformer"', _FROM_SCRATCH, "5 blocks, from scratch"),
    },
}
_DATA = "${SOPHON_DATA}"
ORIGINALS: dict[Scale, str] = {
    "paper": f"""\
source = "tree"
name = "Imagenette:full"
root = "{_DATA}"
image_size = 224
normalisation = "imagenet\"""",
    "small": f"""\
source = "npz"
name = "tiny-imagenet20"
path = "{_DATA}/tiny_imagenet20_64.npz"
image_size = 32""",
}
RESTRICTED: dict[Scale, dict[str, str]] = {
    "paper": {
        "cifar10": f'source = "torchvision"\nname = "CIFAR10"\nroot = "{_DATA}"',
        "cinic10": f'source = "tree"\nname = "CINIC10"\nroot = "{_DATA}/cinic10"',
        "stl10": (
            f'source = "torchvision"\nname = "STL10"\nroot = "{_DATA}"\nimage_size = 32\n'
            'class_order = "cifar10"'
        ),
        "mnist": f'source = "torchvision"\nname = "MNIST"\nroot = "{_DATA}"\nimage_size = 32',
        "svhn": f'source = "torchvision"\nname = "SVHN"\nroot = "{_DATA}/svhn"',
    },
    "small": {
        "cifar10": f'source = "npz"\nname = "cifar10"\npath = "{_DATA}/cifar10.npz"',
        "mnist": f'source = "npz"\nname = "mnist"\npath = "{_DATA}/mnist.npz"\nimage_size = 32',
        "gtsrb": f'source = "npz"\nname = "gtsrb"\npath = "{_DATA}/gtsrb10.npz"',
    },
}
# Training images by domain, as many as are left beside the validation split: a tenth of every
# class, unless the set has a split of its own (CINIC-10, CelebA).
TRAINING_IMAGES: dict[str, int] = {
    "Imagenette:full": 8_522,
    "CIFAR10": 45_000,
    "CINIC10": 90_000,
    "STL10": 4_500,
    "MNIST": 54_001,
    "SVHN": 65_931,
    "CIFAR100": 45_000,
    "CelebA": 162_770,
    "FFHQ": 54_000,
    "tiny-imagenet20": 4_500,
    "cifar10": 3_290,
    "mnist": 4_500,
    "gtsrb": 2_250,
    "cifar100": 4_500,
    "orl-faces": 280,
}
_PAPER_EPOCHS, _PAPER_BATCH = 20, 150
# Three attack seeds on one cell of each architecture.
HEADLINE = "gtsrb"
LOSSES: dict[Scale, tuple[str, ...]] = {"paper": ("ice", "klu"), "small": ("klu",)}
# A small cell with the loss of the only published numbers of a classifier's restricted domain.
_PUBLISHED_LOSS = {("caformer", "cifar10"): ("ice",)}

# K = 50, alpha 3e-4, beta 5e-4, 800 rounds, batch 150, clipping at 0.5: arXiv 2404.12699, read
# second-hand. The rehearsed rate and optimizer are those of the released research code, which
# starts from a fresh head and applies its gradient; the paper's own loss on the original task, 3.4
# points, is the tolerance.
_PAPER_PROTECT = """\
suppression = "{loss}"
rounds = 800                   # the paper's
suppression_steps = 1          # the paper's
suppression_rate = 3e-4        # alpha, the paper's
reinforcement_steps = 1        # the paper's
reinforcement_rate = 5e-4      # beta, the paper's
original_batch_size = 150      # the paper's
clip_norm = 0.5                # the paper's

[protect.rehearsal]
strategies = 1                 # the released code's
steps = 50                     # K, the paper's
query_batch_size = 150

[protect.rehearsal.fixed]      # rate and optimizer of the released code; the head is kept (ours)
optimizer = "sgd"
learning_rate = 1e-4
batch_size = 150

[protect.guard]
tolerance_points = 3.4         # the paper's own loss (CAFormer, CIFAR-10)
every = 20"""
_PAPER_AUDIT = """\
suite = "quick-1"
steps = {steps:<22} # 20 epochs, the paper's: 20 * {images:,} images / 150
batch_size = 150
seeds = [0, 1, 2]

[[audit.extra]]                # the rehearsed attack: rate and optimizer of the released code
optimizer = "sgd"
learning_rate = 1e-4
batch_size = 150"""
# Chosen so that a cell takes about twenty minutes on two cores.
_SMALL_PROTECT = """\
suppression = "{loss}"
rounds = 120
suppression_rate = 1e-3        # about three times the paper's alpha: there are few rounds
original_batch_size = 64
reinforcement_steps = 2

[protect.rehearsal]
strategies = 1
steps = 20
horizon = 150                  # an attacker outlives an attack: no 800 rounds of K = 50
pool = 4
query_batch_size = 32

[protect.rehearsal.fixed]      # the rehearsed rate: an attack of the suite, too
optimizer = "sgd_momentum"
learning_rate = 1e-3
batch_size = 64

[protect.guard]
tolerance_points = 3.4         # the paper's own loss (CAFormer, CIFAR-10)
every = 10"""
_SMALL_AUDIT = """\
suite = "quick-1"
steps = 100
seeds = {seeds}"""

# Diffusion: a DDPM of CIFAR-100 (T = 1000, linear beta, noise prediction), at 32x32 and at 16x16.
UNET_FILES: dict[Scale, str] = {"paper": "ddpm-unet-32.json", "small": "ddpm-unet-16.json"}
UNETS: dict[Scale, str] = {
    "paper": """\
{
  "_class_name": "UNet2DModel",
  "sample_size": 32,
  "in_channels": 3,
  "out_channels": 3,
  "layers_per_block": 2,
  "block_out_channels": [128, 256, 256, 256],
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
  "attention_head_dim": null,
  "downsample_padding": 0,
  "flip_sin_to_cos": false,
  "freq_shift": 1,
  "norm_eps": 1e-06
}
""",
    "small": """\
{
  "_class_name": "UNet2DModel",
  "sample_size": 16,
  "in_channels": 3,
  "out_channels": 3,
  "layers_per_block": 1,
  "block_out_channels": [16, 32, 32],
  "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
  "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
  "attention_head_dim": 8,
  "norm_num_groups": 8
}
""",
}
DIFFUSION = "ddpm"
FACES: dict[Scale, dict[str, str]] = {
    "paper": {
        "celeba": f'source = "tree"\nname = "CelebA"\nroot = "{_DATA}/celeba"  # images, and'
        ' list_eval_partition.txt\nlabels = "none"\nimage_size = 32',
        "ffhq": f'source = "tree"\nname = "FFHQ"\nroot = "{_DATA}/ffhq"\nlabels = "none"\n'
        "image_size = 32",
    },
    "small": {
        "orl": f'source = "npz"\nname = "orl-faces"\npath = "{_DATA}/orl_faces64.npz"\n'
        "image_size = 16\njoin = true",
    },
}
_CIFAR100: dict[Scale, str] = {
    "paper": f'source = "torchvision"\nname = "CIFAR100"\nroot = "{_DATA}"\nlabels = "none"',
    "small": f'source = "npz"\nname = "cifar100"\npath = "{_DATA}/cifar100.npz"\nimage_size = 16\n'
    'labels = "coarse"',
}
_DIFFUSION_PRETRAIN: dict[Scale, str] = {
    "paper": """\
steps = 100000
batch_size = 128
learning_rate = 2e-4
warmup_steps = 5000
every = 1000""",
    "small": """\
steps = 1500
batch_size = 32
learning_rate = 2e-3
every = 250""",
}
_SMALL_DIFFUSION_PROTECT = """\
suppression = "{loss}"
rounds = 150
original_batch_size = 32
reinforcement_steps = 2

[protect.rehearsal]
strategies = 1
steps = 10
horizon = 175                  # an attacker lives as long as an attack: no 800 rounds of K = 50
pool = 4
query_batch_size = 16

[protect.rehearsal.fixed]      # the rehearsed rate: an attack of the suite, too
optimizer = "sgd_momentum"
learning_rate = 1e-3
batch_size = 32

[protect.guard]
tolerance_relative = 0.1       # ours: the paper reports no loss here
every = 10"""
_SMALL_DIFFUSION_AUDIT = """\
suite = "quick-1"
steps = {steps:<22} # 20 epochs, the paper's: 20 * {images:,} images / 32
batch_size = 32
seeds = [0]"""


def _cells() -> tuple[Cell, ...]:
    found: list[Cell] = []
    for scale in SCALES:
        for architecture in BASES[scale]:
            for restricted in RESTRICTED[scale]:
                losses = LOSSES[scale]
                if scale == "small":
                    losses = _PUBLISHED_LOSS.get((architecture, restricted), losses)
                found += [Cell(scale, architecture, restricted, loss) for loss in losses]
        found += [Cell(scale, DIFFUSION, faces, "dos") for faces in FACES[scale]]
    return tuple(found)


CELLS: tuple[Cell, ...] = _cells()


def cell_of(name: str, scale: Scale) -> Cell:
    """Return a cell by name. Raises SpecError with near matches, or naming its other scale."""
    held = {cell.name: cell for cell in CELLS if cell.scale == scale}
    if name in held:
        return held[name]
    other = [cell.scale for cell in CELLS if cell.name == name]
    if other:
        raise SpecError(f"{name} is no cell at scale {scale}: use --scale {other[0]}")
    known = [*held, ROBUSTNESS, "ablation", "all"]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise SpecError(f"{name!r} is no cell of the grid; {hint}--list shows all cells")


def base_name(cell: Cell) -> str:
    """Return the name of the pre-trained model that a cell protects; cells share it."""
    return f"{cell.scale}-{cell.architecture}"


def base_file(cell: Cell, recipe: str) -> str:
    """Return the run file that trains the cell's model on its original task.

    `recipe` is where the file lies, as its opening comment says it.
    """
    original, _ = _domains(cell)
    out = f"runs/bases/{base_name(cell)}"
    head = f"sophon pretrain {recipe} --out {out}"
    if cell.architecture == DIFFUSION:
        file = UNET_FILES[cell.scale]
        model = f'name = "diffusers:{file}"\n\n[task]\nname = "denoising"'
        pretrain = _DIFFUSION_PRETRAIN[cell.scale]
        note = "a DDPM U-Net, from scratch"
    else:
        base = BASES[cell.scale][cell.architecture]
        published = "\npretrained = true" if cell.scale == "paper" else ""
        classes = "\nclasses = 10" if cell.scale == "paper" else ""
        model, pretrain, note = base.model + published + classes, base.pretrain, base.note
    return (
        f"# The model that the {cell.scale} cells of {cell.architecture} protect: {note}.\n"
        f"#   {head}\n"
        f"# {_taken(cell)}.\n\n"
        f"[model]\n{model}\n\n[original]\n{original}\n\n[pretrain]\n{pretrain}\n"
    )


def _taken(cell: Cell) -> str:
    """Return what of a base is the paper's."""
    if cell.scale == "small" and cell.architecture != DIFFUSION:
        return "Values and original task are ours; the architecture is the paper's, scaled down"
    chosen = {"vgg": "which VGG", "ddpm": "the U-Net's widths"}.get(cell.architecture)
    which = "" if chosen is None else f";\n# ours, too: {chosen}"
    return (
        "Values are ours; architecture and original task are the paper's"
        f"{_SMALLER[cell.scale]}{which}"
    )


def run_file(cell: Cell, recipe: str, bases: str, extra: Sequence[Strategy] | None = None) -> str:
    """Return the run file of a cell.

    `recipe` is where the file lies, as its opening comment says it, `bases` the folder of the
    pre-trained models seen from there. With `extra` it is the one that attacks the cell's protected
    model with these attacks as well: the robustness tables'.
    """
    original, restricted = _domains(cell)
    protect, audit = _work(cell)
    folder = f"{bases}/{base_name(cell)}"
    if cell.architecture == DIFFUSION:
        model = f'name = "diffusers:{folder}"\n\n[task]\nname = "denoising"'
    else:
        base = BASES[cell.scale][cell.architecture].model
        model = f'{base}\nweights = "{folder}/model.safetensors"'
    opening = _opening(cell, recipe) if extra is None else _robust_opening(cell, recipe)
    attacks = "".join(f"\n[[audit.extra]]\n{_attack(one)}" for one in extra or ())
    return (
        f"{opening}\n"
        f"[model]\n{model}\n\n[original]\n{original}\n\n[[restricted]]\n{restricted}\n\n"
        f"[protect]\n{protect}\n\n[audit]\n{audit}\n{attacks}"
    )


def _attack(strategy: Strategy) -> str:
    """Return an attack as the lines of its table; the audit fills in the steps."""
    held = {"optimizer": strategy.optimizer, "learning_rate": strategy.learning_rate}
    lines = [f"{key} = {json.dumps(value)}" for key, value in held.items()]
    lines.append(f"batch_size = {strategy.batch_size}")
    kinds = ", ".join(f'{{ kind = "{one.kind}" }}' for one in strategy.preparations)
    lines += [f"preparations = [{kinds}]"] if kinds else []
    lines += [f'scope = "{strategy.scope}"'] if strategy.scope != "all" else []
    return "\n".join(lines) + "\n"


# Attacked with the attacks of the robustness tables: one cell of each mode.
ROBUST_CELLS: dict[Scale, tuple[str, ...]] = {
    "small": ("resnet18-gtsrb-klu", "ddpm-orl-dos"),
    "paper": ("vgg-cifar10-ice", "ddpm-celeba-dos"),
}
ROBUSTNESS = "robustness"
_SMALLER: dict[Scale, str] = {"paper": "", "small": ", scaled down"}
_VALUES: dict[Scale, str] = {
    "paper": "# Values marked as the paper's: SOPHON, arXiv 2404.12699, read second-hand. The rest"
    " is ours.\n",
    "small": "# Values are ours, but for what is marked as the paper's: SOPHON, arXiv 2404.12699,"
    " read\n# second-hand.\n",
}


def _opening(cell: Cell, recipe: str) -> str:
    scale = "" if cell.scale == "small" else f" --scale {cell.scale}"
    runs = f"runs/{cell.scale}/{cell.name}"
    folder = recipe.rpartition("/")[0]
    return (
        f"# {cell.architecture}: {cell.restricted} refused, {cell.loss}; the {cell.scale} cell.\n"
        f"{_VALUES[cell.scale]}"
        "# Set SOPHON_DATA to the folder that holds the image sets, then either\n"
        f"#   sophon reproduce {cell.name}{scale}\n"
        "# which first trains the model of the original task if it is missing, or by hand:\n"
        f"#   sophon pretrain {folder}/base-{cell.architecture}.toml --out"
        f" runs/bases/{base_name(cell)}\n"
        f"#   sophon protect {recipe} --out {runs}/protected\n"
        f"#   sophon audit {recipe} --model {runs}/protected --out {runs}/audit"
        f" --store runs/{cell.scale}/store\n"
    )


def _robust_opening(cell: Cell, recipe: str) -> str:
    scale = "" if cell.scale == "small" else f" --scale {cell.scale}"
    runs = f"runs/{cell.scale}/{cell.name}"
    return (
        f"# {cell.name}, robustness: three methods by five optimizers, five rates, five batch sizes"
        f" against\n# the model that the {cell.scale} cell protects."
        " The attacks' values are ours.\n"
        "# Set SOPHON_DATA to the folder that holds the image sets, then either\n"
        f"#   sophon reproduce {ROBUSTNESS} --of {cell.name}{scale}\n"
        "# which first protects the model if it is missing, or by hand, once the cell's recipe was"
        " run:\n"
        f"#   sophon audit {recipe} --model {runs}/protected --out {runs}-{ROBUSTNESS}/audit"
        f" --store runs/{cell.scale}/store\n"
    )


def _domains(cell: Cell) -> tuple[str, str]:
    if cell.architecture == DIFFUSION:
        return _CIFAR100[cell.scale], FACES[cell.scale][cell.restricted]
    return ORIGINALS[cell.scale], RESTRICTED[cell.scale][cell.restricted]


def _work(cell: Cell) -> tuple[str, str]:
    if cell.scale == "small" and cell.architecture == DIFFUSION:
        images = training_images(cell)
        audit = _SMALL_DIFFUSION_AUDIT.format(steps=_PAPER_EPOCHS * images // 32, images=images)
        return _SMALL_DIFFUSION_PROTECT.format(loss=cell.loss), audit
    if cell.scale == "small":
        seeds = "[0, 1, 2]" if cell.restricted == HEADLINE else "[0]"
        return _SMALL_PROTECT.format(loss=cell.loss), _SMALL_AUDIT.format(seeds=seeds)
    protect = _PAPER_PROTECT.format(loss=cell.loss)
    if cell.architecture == DIFFUSION:
        relative = "tolerance_relative = 0.1       # ours: the paper reports no loss here"
        paper = "tolerance_points = 3.4         # the paper's own loss (CAFormer, CIFAR-10)"
        protect = protect.replace(paper, relative)
    images = training_images(cell)
    steps = round(_PAPER_EPOCHS * images / _PAPER_BATCH)
    return protect, _PAPER_AUDIT.format(steps=steps, images=images)


def training_images(cell: Cell) -> int:
    """Return how many images of the cell's restricted domain are trained on."""
    return TRAINING_IMAGES[str(tomllib.loads(_domains(cell)[1])["name"])]


# --- Robustness: methods by optimizers, rates, batch sizes ---------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "direct-all": {},
    "init-FC-all": {"preparations": (FreshHead(),)},
    "init-FC-only": {"preparations": (FreshHead(),), "scope": "head"},
}
# A usual rate of each of the paper's optimizers; the paper's rates are not in our sources.
OPTIMIZERS: dict[OptimizerName, float] = {
    "sgd_momentum": 1e-2,
    "nesterov": 1e-2,
    "adagrad": 1e-2,
    "adadelta": 1.0,
    "adam": 1e-3,
}
RATES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
BATCH_SIZES = (16, 32, 64, 128, 256)


def robustness(steps: int, batch_size: int | None = None) -> dict[str, dict[str, Strategy]]:
    """Return the paper's three robustness tables: rows by name, each with its attack.

    Methods by optimizers; five rates and five batch sizes of SGD with momentum, direct-all. All
    take `steps` steps of `batch_size` images (without one: a strategy's own), but for the table of
    batch sizes.
    """
    usual = Strategy().batch_size if batch_size is None else batch_size

    def attack(optimizer: OptimizerName, rate: float, **fields: Any) -> Strategy:
        fields = {"batch_size": usual, **fields}
        return Strategy(optimizer=optimizer, learning_rate=rate, steps=steps, **fields)

    return {
        "method and optimizer": {
            f"{method}, {optimizer}": attack(optimizer, rate, **fields)
            for method, fields in METHODS.items()
            for optimizer, rate in OPTIMIZERS.items()
        },
        "learning rate": {f"{rate:g}": attack("sgd_momentum", rate) for rate in RATES},
        "batch size": {
            str(size): attack("sgd_momentum", OPTIMIZERS["sgd_momentum"], batch_size=size)
            for size in BATCH_SIZES
        },
    }
