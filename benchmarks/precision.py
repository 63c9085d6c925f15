"""A whole round in fp32, in channels_last and in the default layout, against bf16 autocast.

    python benchmarks/precision.py --protection RUN.TOML FOLDER [--set KEY=VALUE ...]

protects the model of a run file in fp32 and in bf16, with three seeds each, audits every result
with `quick-1` in the run file's precision, and prints the advantage removed beside its spread over
seeds. A processor that does not compute in bf16 rounds alike, but takes several times as long.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from cases import Sizes, protection, quick
from timing import Row, alone, ratios, row

from sophon._records.audit_record import AuditRecord
from sophon._reporting.report import report
from sophon._training import setting as _setting

SEEDS = (0, 1, 2)


def rows(short: bool) -> list[Row]:
    """Return a round in fp32 against one as `auto` chooses, in its memory layout and in torch's."""
    sizes, repeats = (quick(Sizes()), 1) if short else (Sizes(5), 3)
    chosen = protection("ResNet-20", sizes)
    exact = protection("ResNet-20", sizes, precision="fp32")
    with mock.patch.object(_setting, "choose_channels_last", return_value=False):
        usual = protection("ResNet-20", sizes, precision="fp32")
    fast, slow, slowest = iter(chosen), iter(exact), iter(usual)
    precision = chosen.setting.precision
    what = f"ResNet-20, K = {sizes.steps}, batch {sizes.batch}"
    native = precision == "bf16"
    together = "precision and memory layout together" if native else "the memory layout alone"
    same = ratios(lambda: next(slow), lambda: next(fast), repeats) if native or short else []
    layouts = ratios(lambda: next(slowest), lambda: next(fast), repeats)
    return [
        row(
            f"fp32 round / bf16 round, channels_last in both: {what}",
            same,
            note="precision alone" if native else "this processor does not compute in bf16",
        ),
        row(
            f"fp32 round in the default layout / {precision} round in channels_last: {what}",
            layouts,
            at_least=1.7 if native else None,
            note=f"{together}, against what torch does unless told",
        ),
    ]


def removed(
    run_file: Path, folder: Path, precision: str, seed: int, words: Sequence[str] = ()
) -> float:
    """Return the advantage that one protection removes in its audit, of the first domain."""
    place = folder / f"{precision}-{seed}"
    store = ["--store", str(folder / "store")]
    choice = ["--set", f"protect.precision={precision}", "--set", f"protect.seed={seed}", *words]
    command = [sys.executable, "-m", "sophon"]
    threads = ["--threads", str(torch.get_num_threads()), "--quiet"]
    subprocess.run(
        [*command, "protect", str(run_file), "--out", str(place), *choice, *threads], check=True
    )
    attack = [*command, "audit", str(run_file), "--model", str(place), "--out", str(place / "a")]
    subprocess.run([*attack, *store, *choice, *threads, "--set", "audit.suite=quick-1"], check=True)
    return advantage(place)


def advantage(place: Path) -> float:
    """Return the advantage removed that an audit in `place` has measured."""
    text = (place / "a" / "record.json").read_text(encoding="utf-8")
    made = report(AuditRecord.model_validate_json(text))
    value = made.summaries[0].advantage.value
    if value is None:
        raise SystemExit(f"{place}: no advantage could be measured: {made.summaries[0].reasons}")
    return value


def compare_protection(run_file: Path, folder: Path, words: Sequence[str] = ()) -> None:
    """Print what protections in fp32 and in bf16 remove, and how far apart seeds are by chance."""
    found = {
        precision: [removed(run_file, folder, precision, seed, words) for seed in SEEDS]
        for precision in ("fp32", "bf16")
    }
    for precision, values in found.items():
        shown = ", ".join(f"{100 * value:.1f} %" for value in values)
        spread = 100 * statistics.stdev(values)
        mean = 100 * statistics.mean(values)
        print(f"{precision}: {mean:.1f} % of the advantage removed ({shown}; sd {spread:.1f})")
    means = [statistics.mean(values) for values in found.values()]
    noise = statistics.mean(statistics.stdev(values) for values in found.values())
    apart = abs(means[0] - means[1])
    # Two means of three seeds differ by chance by about 0.8 of a seed's deviation.
    print(f"apart: {100 * apart:.1f} points; of chance about {100 * noise * (2 / 3) ** 0.5:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--protection"]:
        compare_protection(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        alone(rows)
