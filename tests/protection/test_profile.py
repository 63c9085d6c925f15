"""A profile changes no number, and its parts add up."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from builders import original, quick_spec, restricted, trained_model
from sophon._base.errors import SpecError
from sophon._base.spans import Clock, clocked, span, spanned
from sophon._protection.profile import REST, Profiled
from sophon._protection.protection import Protection


def _run(**changes: object) -> Protection:
    return Protection(
        trained_model(),
        original=original(),
        restricted=restricted(),
        spec=quick_spec(**changes),
    )


def test_a_profiled_run_is_bit_identical(tmp_path: Path) -> None:
    plain, watched = _run(rounds=4), _run(rounds=4)
    expected = list(plain)
    profiled = Profiled(watched, 2, tmp_path)
    found = list(profiled)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name])
    assert [r.query_score for r in found] == [r.query_score for r in expected]
    assert profiled.result is not None
    assert profiled.result.rounds == 2
    timed = sum(record.wall_s for record in found[:2])
    # What a round does outside itself counts too, so parts take at least as long as the rounds.
    assert timed <= profiled.result.total_s
    named = {"support passes", "query passes", "attackers' optimizer steps", "input", "guard"}
    assert named <= set(profiled.result.seconds)
    taken = list(profiled.result.seconds.values())
    assert taken == sorted(taken, reverse=True)


def test_the_trace_holds_one_round(tmp_path: Path) -> None:
    profiled = Profiled(_run(rounds=3), 1, tmp_path)
    list(profiled)
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Two attackers of three steps: a query after each.
    assert names.count("sophon: query passes") == 6
    assert names.count("sophon: suppression step") == 1
    assert any(name and name.startswith("aten::") for name in names)
    held = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert sum(held["shares"].values()) == pytest.approx(1)
    assert held["rounds"] == 1


@pytest.mark.parametrize("rounds", [3, 7])
def test_a_run_too_short_to_profile_is_refused(rounds: int, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"--profile {rounds} .* 3 left: use at most 2"):
        Profiled(_run(rounds=3), rounds, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_has_nothing_to_profile(tmp_path: Path) -> None:
    run = _run(rounds=1)
    for _ in run:
        pass
    with pytest.raises(SpecError, match=r"0 rounds left, too few .*give a new --out"):
        Profiled(run, 1, tmp_path)


def test_a_part_does_not_count_what_is_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    with clocked(clock), span("outer"), span("inner"):
        pass
    assert clock.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_without_a_clock_nothing_is_timed() -> None:
    clock = Clock()

    @spanned("part")
    def part() -> int:
        return 3

    assert part() == 3
    with clocked(clock):
        assert part() == 3
    assert part() == 3
    assert set(clock.seconds) == {"part"}
    assert REST not in clock.seconds


def test_an_error_inside_a_part_ends_it() -> None:
    clock = Clock()
    with clocked(clock), span("outer"):
        with pytest.raises(ValueError, match="x"), span("inner"):
            raise ValueError("x")
        with span("after"):
            pass
    assert set(clock.seconds) == {"outer", "inner", "after"}
