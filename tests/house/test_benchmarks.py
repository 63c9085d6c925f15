"""Benchmarks run: at sizes whose numbers mean nothing, but whose table is whole."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from builders import original, restricted, scratch_model, trained_model
from records import trial
from scripts import script_at
from sophon._attacks.suites import SUITES, Suite, depth_attacks, strategies_of
from sophon._auditing.audit import Audit
from sophon._auditing.trial import Bench
from sophon._base.errors import AuditError
from sophon._cli.run_file import load
from sophon._judgement.statistics import Interval
from sophon._protection.terms.rehearsal import RehearsalTerm
from sophon._records.audit_record import Crashed, Point, Score, Trial, pack, unpack
from sophon._specs import AuditSpec, Strategy

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Parts, and how many rows each has.
PARTS = {
    "start": 3,
    "floor, ResNet-20": 3,
    "floor, U-Net": 1,
    "retained graphs": 4,
    "precision": 2,
    "denormals": 6,
    "input": 5,
    "stacking": 2,
    "growth": 12,
}
# Rows that are there only where there is something to time.
MORE = {"denormals": 4}


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures_and_judges(part: str) -> None:
    if part == "retained graphs":
        pytest.importorskip("torchopt", reason="graphs are kept with torchopt: the bench extra")
    run = ran("--quick", "--only", part)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert PARTS[part] <= len(rows) <= PARTS[part] + MORE.get(part, 0)
    assert "not measured" not in run.stdout
    if part == "retained graphs":
        assert next(row for row in rows if "float64" in row).endswith("| met |")


@pytest.mark.slow
def test_ray_that_is_absent_is_a_row_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "ray", None)
    run = importlib.import_module("run")
    rows = run.of_ranks(True)
    assert [(row.bar, row.n) for row in rows] == [
        ("", 2), ("", 2), ("at least 1.7x", 2),
        ("", 2), ("", 2), ("at least 1.8x", 2), ("at least 1.8x", 0),
    ]  # fmt: skip
    *_, shown = run.show(rows)
    assert "| at least 1.8x | not measured |" in shown
    assert "not measured: ray cannot be imported" in run.notes(rows)[-1]


def test_a_part_that_fails_is_named_and_takes_no_other_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run = importlib.import_module("run")

    def failing(short: bool) -> list[object]:
        raise ValueError if short else ValueError("no\nroom")

    monkeypatch.setattr(run, "PARTS", {"a": failing, "b": lambda short: ["row"]})
    assert run.measured(True, ["a", "b"]) == (["row"], {"a": "ValueError"})
    assert run.measured(False, ["a", "b"]) == (["row"], {"a": "ValueError: no"})


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("growth")


def test_amounts_are_timed_in_turn_there_and_back(
    growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def seconds(action: Callable[[], None]) -> float:
        action()
        return float(len(order))

    monkeypatch.setattr(growth, "seconds", seconds)
    actions = [functools.partial(order.append, name) for name in "abc"]
    assert growth.in_turn(actions, 3) == ((1.0, 6.0, 7.0), (2.0, 5.0, 8.0), (3.0, 4.0, 9.0))
    assert "".join(order) == "abccbaabc"


def test_growth_at_the_top_is_judged_by_itself(
    growth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fixed second, and what grows with the square of the amount.
    amounts = (1.0, 2.0, 4.0, 8.0)
    seconds = tuple((1 + amount**2 / 16,) * 2 for amount in amounts)
    monkeypatch.setattr(growth, "curves", lambda short: (growth.Curve("x", amounts, seconds),))
    whole, last = growth.rows(False)
    assert whole.met
    assert not last.met
    assert last.what == "exponent of time in x, 4 to 8"
    assert last.measured == pytest.approx(np.log2(5 / 2))


@pytest.mark.parametrize("grows", [False, True])
def test_memory_that_grows_with_the_steps_misses_its_bar(
    grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("retained_graphs")
    environments = []

    def run(command: list[str], **kept: Any) -> Any:
        environments.append(kept["env"])
        extra = 100.0 * int(command[4]) if grows else 100.0
        return SimpleNamespace(stdout=f'{{"seconds": 1.0, "extra": {extra}}}')

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "ratios", lambda *_: [1.0])
    monkeypatch.setattr(script, "difference", lambda _: 0.0)
    row = script.rows(True)[-1]
    assert row.what.startswith("extra memory, K = 3 / K = 2")
    assert row.met is not grows
    assert all("MALLOC_MMAP_THRESHOLD_" in held for held in environments)


def test_fp32_is_not_compared_with_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # Where `auto` would be fp32, too.
    monkeypatch.setenv("SOPHON_PLAIN", "1")
    precision = importlib.import_module("precision")
    removed = {"fp32": (0.1, 0.2, 0.3), "bf16": (0.2, 0.3, 0.4)}
    protected = []

    def run(command: list[str], check: bool) -> None:
        if "protect" in command:
            protected.append(next(w for w in command if w.startswith("protect.precision=")))
        assert command[-2:] == ["--set", "audit.suite=quick-1"] or "protect" in command
        assert "protect.rounds=2" in command

    monkeypatch.setattr(precision.subprocess, "run", run)
    monkeypatch.setattr(
        precision, "advantage", lambda place: removed[place.name[:4]][int(place.name[-1])]
    )
    precision.compare_protection(Path("run.toml"), Path("folder"), ("--set", "protect.rounds=2"))
    assert protected == ["protect.precision=fp32"] * 3 + ["protect.precision=bf16"] * 3
    shown = capsys.readouterr().out
    assert "fp32: 20.0 % of the advantage removed" in shown
    assert "apart: 10.0 points; of chance about 8.2" in shown


def test_a_round_augments_as_the_feed_it_is_held_against(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    feeding = importlib.import_module("feeding")
    made: list[Any] = []

    def protection(*arguments: Any, **changes: Any) -> Any:
        made.append(feeding_protection(*arguments, **{**changes, "count": 100}))
        return made[-1]

    feeding_protection = feeding.protection
    feeds: list[Any] = []
    feed = RehearsalTerm.feed
    monkeypatch.setattr(feeding, "protection", protection)
    monkeypatch.setattr(RehearsalTerm, "feed", lambda *of: feeds.append(of[1]) or feed(*of))
    sizes = feeding.quick(feeding.Sizes(2))
    assert len(feeding.share("small network", sizes, 16, 2, "flip_crop")) == 2
    assert made[0].keep.feed.augmentation == "flip_crop"
    assert made[0].hinder[0].strategy(0).augmentation == "flip_crop"
    # Rounds take attackers 0 to 2, and the feeds beside them 0 to 2 as well, each for itself.
    assert sorted(feeds) == [0, 0, 1, 1, 2, 2]


def test_a_command_that_imports_torch_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    starting = importlib.import_module("starting")
    monkeypatch.setattr(starting, "seconds", lambda action: 0.1)
    for heavy in (True, False):
        monkeypatch.setattr(starting, "imports_torch", lambda *words, heavy=heavy: heavy)
        assert starting.started("help", ("--help",), 0.3, 2).met is not heavy


def test_no_trial_of_a_made_up_record_is_there_twice(growth: Any) -> None:
    held = growth.record(400)
    met = {(t.subject, t.strategy.fingerprint(), t.seed) for t in held.trials}
    assert len(met) == len(held.trials) == 400
    assert {t.strategy for t in held.trials} <= set(held.strategies)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def test_activations_are_what_another_image_adds(
    scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "bytes_kept", lambda model, images: 100 + 7 * len(images))
    found = scaling.counted("small_convnet", 16)
    assert (found.kept, found.kept_once) == (7, 100)
    # Six convolutions at 16, 8 and 4 pixels, and the head.
    widths = ((3, 24, 16), (24, 24, 16), (24, 48, 8), (48, 48, 8), (48, 72, 4), (72, 72, 4))
    assert found.forward == 2 * (sum(9 * a * b * side**2 for a, b, side in widths) + 72 * 10)
    # Six more each of BatchNorm and ReLU, at least.
    assert found.calls >= 19


def test_the_run_that_is_costed_is_the_recipes(scaling: Any) -> None:
    recipe = BENCHMARKS.parent / "recipes" / "paper" / "caformer-cifar10-ice.toml"
    held = tomllib.loads(recipe.read_text(encoding="utf-8"))["protect"]
    assert held["rounds"] == scaling.ROUNDS
    assert held["original_batch_size"] == scaling.REINFORCED
    assert held["rehearsal"]["steps"] == scaling.K
    assert held["rehearsal"]["query_batch_size"] == scaling.QUERY
    assert held["rehearsal"]["fixed"]["batch_size"] == scaling.SUPPORT


def test_what_cannot_be_started_has_no_hours(scaling: Any) -> None:
    large, small = (scaling.Counted(1, forward, 1, 1, 1000) for forward in (1e10, 1.0))
    cost = scaling.Round(restricted=large, original=large)
    share = scaling.SHARES[1]
    batch = 3 * 150 * 1e10 / (scaling.PEAK * share)
    assert cost.hours(2, share) == pytest.approx(800 * (2 * 100 + 1) * batch / 3600)
    assert cost.work(2) == 3 * 150 * 1e10 * (2 * 100 + 1)
    # Of tiny images starting the kernels takes longer.
    started = scaling.Round(restricted=small, original=small).hours(1, share)
    assert started == pytest.approx(800 * 101 * 3 * 1000 * scaling.LAUNCH / 3600)
    assert [scaling.cell(cost, 8, cards) for cards in (16, 3)] == ["refused"] * 2
    assert scaling.cell(cost, 8, 8) == scaling.cell(cost, 1, 1) != "refused"


def test_quick_numbers_are_not_written() -> None:
    run = ran("--quick", "--write")
    assert run.returncode == 2
    assert "--write needs the whole" in run.stderr


@pytest.mark.parametrize(("precision", "name"), [("bf16", "speed"), ("fp32", "speed-without-bf16")])
def test_results_go_to_the_page_of_their_precision_and_keep_its_remarks(
    precision: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run.growth, "curves", lambda short: ())
    drawn: list[Path] = []
    monkeypatch.setattr(run.growth, "draw", lambda made, file: drawn.append(file))
    where = {
        "date": "2026-01-01", "commit": "abc", "processor": "p", "threads": 2,
        "precision": precision, "versions": {"torch": "2"}, "seconds": 61,
    }  # fmt: skip
    made = run.write([run.row("first", [1.0], at_most=2.0)], {}, where, True)
    assert made == tmp_path / f"{name}.md"
    assert drawn == ([tmp_path / "growth.svg"] if name == "speed" else [])
    text = made.read_text().replace(run.BEGIN, f"{run.BEGIN}\nby hand")
    made.write_text(text)
    run.write([run.row("second", [1.0], at_most=2.0)], {}, where, True)
    assert "by hand" in made.read_text()
    assert "| second |" in made.read_text()
    assert "| first |" not in made.read_text()
    held = BENCHMARKS.parent / "docs" / "results" / f"{name}.md"
    assert "**About this run.**" in run.remarks(held.read_text(encoding="utf-8"))


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return pytest.importorskip("timing")


def test_a_row_is_judged_by_its_median(timing: object) -> None:
    row = timing.row  # type: ignore[attr-defined]
    assert row("a", [1.0, 1.2, 9.0], at_most=1.2).met is True
    assert row("a", [1.0, 1.21, 1.3], at_most=1.2).met is False
    assert row("a", [1.0, 1.7, 9.0], at_least=1.7).met is True
    assert row("a", [1.0, 1.6, 9.0], at_least=1.7).met is False
    held = row("a", [3.0, 1.0, 2.0])
    assert (held.met, held.bar, held.measured, held.low, held.high, held.n) == (
        None, "", 2.0, 1.0, 3.0, 3,
    )  # fmt: skip


def test_both_are_run_in_turn_as_often(timing: object) -> None:
    order: list[str] = []
    pairs = timing.side_by_side(  # type: ignore[attr-defined]
        lambda: order.append("a"), lambda: order.append("b"), 2
    )
    assert "".join(order) == "ab" + "ab" + "ba"
    assert len(pairs) == 2
    assert all(first > 0 and second > 0 for first, second in pairs)


def test_a_slow_machine_measures_less_often(
    timing: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "seconds", lambda action: 4.0)

    def pairs(within: float) -> int:
        found = timing.side_by_side(list, list, 5, list, within)  # type: ignore[attr-defined]
        return len(found)

    assert [pairs(within) for within in (1.0, 15.0, 16.0, 39.0, 40.0, 99.0)] == [1, 1, 2, 4, 5, 5]


def test_a_round_and_its_bare_passes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    floor = importlib.import_module("floor")
    order: list[str] = []

    class Feed:
        def batch(self, step: int) -> int:
            return step

    def action() -> None:
        feed, other = Feed(), Feed()
        other.batch(floor.PIECE)
        for step in range(12):
            order.append(f"a{feed.batch(step)}")
            other.batch(step)

    def bare() -> Iterator[None]:
        for step in range(12):
            if step and step % floor.PIECE == 0:
                yield
            order.append(f"b{step}")

    monkeypatch.setattr(floor, "Feed", Feed)
    first: list[object] = []

    def counts(feed: Feed) -> bool:
        first.append(feed)
        # The feed met first is not the attacker's.
        return feed is not first[0]

    pairs = floor.in_turn(action, bare(), of=counts)
    pieces = [range(5), range(5, 10), range(10, 12)]
    assert order == [f"{who}{step}" for piece in pieces for who in "ab" for step in piece]
    assert len(pairs) == 3


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("floor")


def test_a_single_round_has_the_spread_of_its_pieces(floor: Any) -> None:
    one = floor.Compared([[(1.0, 1.0), (3.0, 2.0), (2.0, 1.0)]])
    assert one.ratios() == [1.5]
    assert one.ratios(less=[1.0]) == [2.0]
    # Residuals -0.5, 0 and 0.5 of a ratio of 1.5: 0.75 is the sum of their squares, times 3 / 2.
    assert one.note().startswith("3 pieces of 5 steps take turns, each 1.00 to 2.00;")
    assert one.note().endswith(f"1.500, standard error over pieces {0.75**0.5 / 4:.3f}")
    assert "standard error" not in floor.Compared([[(1.0, 1.0)]]).note()


def test_a_bare_trial_is_scored_at_its_end_and_keeps_its_statistics(floor: Any) -> None:
    assert floor.TRIAL_STEPS in floor.evaluation_steps(floor.TRIAL_STEPS, floor.EVALUATIONS)
    model = floor.nn.Sequential(floor.nn.BatchNorm2d(1), floor.nn.Flatten()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = [(floor.torch.rand(4, 1, 2, 2), floor.torch.zeros(4).long())]

    class Exact:
        autocast = staticmethod(contextlib.nullcontext)

    assert floor.scored_anew(model, Exact(), batch, batch) > 0
    assert model.training
    for name, value in model.state_dict().items():
        assert bool((value == before[name]).all())


# --- The suite against a grid -----------------------------------------------------------------

SMALL_RUN = """
[model]
name = "small_convnet"
in_channels = 1

[original]
source = "embedded"
name = "letters"
limit = 10

[[restricted]]
source = "embedded"
name = "digits"
limit = 12

[audit]
precision = "fp32"
"""


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the benchmark of the suite with two attacks of four steps, and a grid of three."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("search")
    (tmp_path / "run.toml").write_text(SMALL_RUN)
    attacks = tuple(
        Strategy(optimizer="adam", learning_rate=rate, batch_size=32, steps=4)
        for rate in (1e-4, 1e-3, 1e-2)
    )
    monkeypatch.setattr(module, "RECIPE", tmp_path / "run.toml")
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(module, "grid", lambda: list(attacks))
    monkeypatch.setattr(module, "depth_attacks", lambda blocks, spec: ())
    monkeypatch.setitem(SUITES, "standard-1", Suite(attacks[:2], prefilter=0.5, survivors=1))
    return module


@pytest.mark.slow
def test_the_suite_is_held_against_a_grid_on_any_network(
    search: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(load(tmp_path / "run.toml", None, None).model.state_dict(), weights)
    store = tmp_path / "store"
    words = ["--store", str(store), "--workers", "1", "--seeds", "0"]
    # Two early attacks and one to the end are more than a third of three.
    assert search.main(words) == 1
    held = len(list((store / "trials").iterdir()))
    assert search.main([*words, "--weights", str(weights)]) == 1
    assert len(list((store / "trials").iterdir())) == 2 * held
    shown = capsys.readouterr().out
    assert "unprotected\n   0  " in shown
    assert f"protected: {weights}\n   0  " in shown
    assert shown.count("MISSED: ") == 4
    assert shown.count("\nmean  ") == 2


def test_several_seeds_are_compared_by_their_mean(search: Any) -> None:
    one = [trial("unprotected", (0.2, 0.3, 0.4, 0.5))]
    other = [trial("unprotected", (0.22, 0.32, 0.42, 0.52))]
    ahead, behind = search.compared([other], [one]), search.compared([one], [other])
    assert (ahead.worst, behind.worst) == (-2.0, 2.0)
    both = search.compared([one, other], [other, one])
    assert both.worst == 0.0
    assert both.taken == ahead.taken + behind.taken


def test_a_crashed_trial_is_no_result(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = search.Runner(None, tmp_path / "store", 1)
    assigned = [runner.job(search.grid()[0], 0)]
    run = Bench.run

    def crashing(*arguments: Any) -> Trial:
        failed = Crashed(error="RuntimeError: no luck", traceback="")
        return run(*arguments).model_copy(update={"outcome": failed})

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "run", crashing)
        with pytest.raises(AuditError, match="no luck"):
            list(runner.run(assigned))
    assert [trial.outcome.kind for trial in runner.run(assigned)] == ["completed"]


def test_the_suite_may_fall_a_point_short_and_take_a_third(search: Any) -> None:
    row = search.Row(taken=100, whole=300, worst=1.0, worst_at=5, last=0.0, area=0.0)
    assert str(row).endswith("met")
    assert row.missed == ""
    assert "1.1 points short" in row._replace(worst=1.1).missed
    assert "0.34 of the steps" in row._replace(taken=101).missed
    assert "MISSED" in str(row._replace(worst=float("nan")))


# --- Intervals --------------------------------------------------------------------------------


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("intervals")


def test_intervals_are_of_attacks_that_an_audit_takes(intervals: Any) -> None:
    assert set(intervals.ATTACKS) <= set(strategies_of(intervals.specified(7)))


@pytest.mark.slow
def test_intervals_are_asked_of_other_images_and_of_another_seed(
    intervals: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def small(chosen: argparse.Namespace) -> Audit:
        attacks = tuple(s.model_copy(update={"batch_size": 16}) for s in intervals.ATTACKS[:2])
        monkeypatch.setattr(intervals, "ATTACKS", fitted(attacks, steps=4))
        return Audit(
            trained_model(),
            unprotected=trained_model(),
            scratch=scratch_model,
            original=original(),
            restricted=restricted(),
            spec=AuditSpec(
                suite="quick-1",
                steps=4,
                evaluations=2,
                seeds=tuple(range(chosen.seeds)),
                extra=intervals.ATTACKS,
            ),
        )

    def fitted(attacks: tuple[Strategy, ...], steps: int) -> tuple[Strategy, ...]:
        return tuple(s.model_copy(update={"steps": steps}) for s in attacks)

    monkeypatch.setattr(intervals, "audited", small)
    code = intervals.main(["a", "b", "--seeds", "7", "--draws", "2"])
    shown = capsys.readouterr().out
    assert "of 2 draws of 6 seeds: defined" in shown
    assert code == int("MISSED" in shown)
    with pytest.raises(SystemExit):
        intervals.main(["a", "b", "--seeds", "6"])


def test_intervals_that_hold_too_little_or_do_not_exist_are_a_miss(intervals: Any) -> None:
    good = intervals.Draw(Interval(0.0, 1.0), 0.5, Interval(0.0, 1.0), 0.5)
    assert intervals.judged([good] * 10)[1]
    assert intervals.judged([good] * 9 + [good._replace(truth=2.0)])[1]
    assert not intervals.judged([good] * 8 + [good._replace(truth=2.0)] * 2)[1]
    assert not intervals.judged([good] * 8 + [good._replace(value=float("nan"))] * 2)[1]
    lines, met = intervals.judged([intervals.Draw(None, 0.5, None, 0.5)])
    assert not met
    assert "no draw has such an interval" in lines[1]


def test_a_trial_as_of_some_images_has_their_score(intervals: Any) -> None:
    right = np.array([1.0, 0.0, 1.0, 1.0])
    score = Score(correct=3, total=4)
    point = Point(step=1, samples=1, validation=score, by_image=pack(right, score))
    whole = trial("protected", (0.5,)).model_copy(update={"curve": (point,)})
    part = intervals.only(whole, np.array([3, 1]))
    assert part.curve[0].validation == Score(correct=1, total=2)
    assert unpack(part.curve[0].by_image, part.curve[0].validation).tolist() == [1.0, 0.0]


def test_what_a_batch_costs_is_told_from_what_an_image_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("architectures")
    sizes = []

    def seconds(model: object, name: str, batch: int, steps: int, reinforced: int) -> float:
        del model, name
        sizes.append((batch, reinforced))
        return 2 * steps * (0.5 + 0.01 * batch) + reinforced * (2.0 + 0.1 * batch)

    monkeypatch.setattr(script, "seconds_of", seconds)
    row = script.measure("small_convnet", (2, 8), 3)
    assert sizes == [(2, 0), (8, 0), (2, 1), (8, 1)]
    assert "| 3 | 2, 8 | 0.500 s | 0.0100 s | 2.000 s | 0.1000 s |" in row
    minutes = (100 * (0.5 + 0.01 * 150) + 2.0 + 0.1 * 150) / 60
    assert row.endswith(f"| {minutes:.1f} min |")
    assert row.count("|") == script.HEADER.splitlines()[0].count("|")
    shapes = [script.noise("a", 0, 2, size).image_shape for size in (script.ORIGINAL, 32)]
    assert shapes == [(3, 224, 224), (3, script.RESTRICTED, script.RESTRICTED)]


def test_a_round_of_the_papers_size_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("architectures")
    monkeypatch.setattr(script, "ORIGINAL", 32)
    taken = []
    whole = script.protection

    def noted(model: object, name: str, batch: int, *rest: object) -> object:
        taken.append((batch, *rest))
        return whole(model, name, batch, *rest)

    monkeypatch.setattr(script, "protection", noted)
    row = script.measure_full("small_caformer", checkpointed=True, steps=2, batch=4)
    assert taken == [(2, 1, 1, "auto"), (4, 2, 1, "auto")]
    assert (script.PAPER_STEPS, script.PAPER_BATCH) == (50, 150)
    assert "| on | " in row
    assert row.startswith("| `small_caformer` | ")
    assert row.count("|") == script.FULL_HEADER.splitlines()[0].count("|")


def test_familiarity_shows_what_a_trained_model_remembers(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = BENCHMARKS.parent
    weights = root / "docs/results/weights/small_convnet_cifar10_16.safetensors"
    monkeypatch.setenv("SOPHON_DATA", str(shared_data))
    monkeypatch.setenv("SMALL_NETWORK", str(weights))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("familiarity")
    for name, value in {"STEPS": (30,), "KEPT": 3, "SEEDS": (0,)}.items():
        monkeypatch.setattr(module, name, value)
    module.main(root / "recipes/small16-sampled.toml")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5
    leads = [
        float(line.partition("lead ")[2].partition(" ")[0]) for line in lines if "lead" in line
    ]
    assert leads[0] < 10 < leads[1]


def test_the_quick_suite_reaches_what_all_attacks_reached_on_every_record() -> None:
    quick = script_at(BENCHMARKS / "quick.py")
    held = quick.cells()
    assert len(held) >= 39
    gaps = {cell[0]: quick.gap(cell, quick.suite(cell, "quick-2")) for cell in held}
    assert {name: gap for name, gap in gaps.items() if gap > 2} == {}
    assert max(quick.gap(cell, quick.suite(cell, "quick-1")) for cell in held) > 20
    # Of nothing, everything is missing.
    assert min(quick.gap(cell, []) for cell in held) > 20


def test_standard_2_loses_no_leader_of_the_records(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaders = script_at(BENCHMARKS / "leaders.py")
    held = leaders.cells()
    assert len(held) > 150
    led = {leaders.shape(s) for cell in held for s in leaders.leaders(cell)}
    assert (led & leaders.has("standard-1")) <= leaders.has("standard-2") | {
        leaders.shape(s)
        for count in range(1, 33)
        for s in depth_attacks(count, AuditSpec(suite="standard-1"))
    }
    gaps = [leaders.gap(c, leaders.left(c)) for c in held if c[0].startswith("standard-1")]
    assert len(gaps) == 48
    assert max(gaps) < 1
    monkeypatch.setattr(leaders, "cells", lambda: held)
    leaders.main()
    assert "\nNever: 52 of 92.\n" in capsys.readouterr().out
