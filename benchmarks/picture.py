"""Profile rounds of a protection and draw where the time goes.

    python benchmarks/picture.py docs/profile.svg

ResNet-20 at 32x32, K = 20, batches of 135 + 15 and one reinforcement step, in the precision that
`auto` chooses: what `sophon protect --profile 3` measures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from cases import Sizes, protection

from sophon._protection.profile import Profile, Profiled
from sophon._training.environment import environment

ROUNDS, SIZES = 3, Sizes(20)
# Parts below this share are drawn as one.
_LEAST = 0.003


def measured(sizes: Sizes, rounds: int) -> tuple[Profile, str]:
    """Return the profile of a run, the first round of which only warms it up, and where it ran."""
    run = protection("ResNet-20", sizes, rounds=rounds + 2)
    next(iter(run))
    with tempfile.TemporaryDirectory() as folder:
        profiled = Profiled(run, rounds, Path(folder))
        for _ in profiled:
            pass
    where = environment(run.setting.device, run.setting.precision)
    if profiled.result is None:
        raise RuntimeError("the run ended before its profile")
    return profiled.result, f"{where.processor}, {where.threads} threads, {where.precision}"


def shares(profile: Profile) -> list[tuple[str, float]]:
    """Return parts and shares, the largest first, the small ones together at the end."""
    all_parts = [(part, taken / profile.total_s) for part, taken in profile.seconds.items()]
    large = [(part, share) for part, share in all_parts if share >= _LEAST]
    rest = sum(share for _, share in all_parts) - sum(share for _, share in large)
    return [*large, ("all others", rest)] if rest > 0 else large


def draw(profile: Profile, where: str, file: Path) -> None:
    """Draw one bar a part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = shares(profile)[::-1]
    with matplotlib.rc_context({"svg.hashsalt": "profile", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(parts) + 1), layout="constrained")
        bars = axes.barh([part for part, _ in parts], [100 * share for _, share in parts])
        axes.bar_label(bars, fmt="%.1f %%", padding=3)
        axes.set_xlim(0, 105)
        axes.set_xlabel(f"share of a round ({profile.total_s / profile.rounds:.1f} s), %")
        axes.set_title(f"ResNet-20, K = {SIZES.steps}, {SIZES.batch} images a step; {where}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(*measured(SIZES, ROUNDS), Path(sys.argv[1]))
