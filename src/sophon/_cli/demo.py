"""The demonstration: a small network for rendered letters, to be kept from learning digits.

Everything is real but tiny, so that the whole job ends within a minute or two.
"""

from __future__ import annotations

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
weights = "start/model.safetensors"   # made by `sophon demo`, as `pretrain` says
in_channels = 1

[original]                  # the task to keep: letters drawn in many fonts
source = "embedded"
name = "letters"

[[restricted]]              # the task to refuse: handwritten digits
source = "embedded"
name = "digits"

[pretrain]
steps = 300
learning_rate = 3e-3
every = 300
augmentation = "none"

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
