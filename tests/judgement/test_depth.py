"""Advantage by depth, from records made by hand."""

from __future__ import annotations

import pytest

from records import CURVES, record, trial
from sophon._attacks.suites import depth_attacks
from sophon._judgement.data_sizes import data_sizes
from sophon._judgement.depth import depth_rows
from sophon._records.audit_record import AuditRecord, Trial
from sophon._reporting.report import report
from sophon._specs import Strategy

BLOCKS = 8


def _by_depth(lead: dict[int, float], *, protected: float = 1.0) -> AuditRecord:
    """Return a record in which keeping n blocks keeps the share `lead[n]` of the lead.

    The unprotected model then scores 0.3 + 0.5 `lead[n]` throughout, a fresh network 0.3, the
    protected one that share of the lead times `protected`.
    """
    base = record()
    first = base.subjects[0].model_copy(update={"blocks": BLOCKS})
    trials: list[Trial] = []
    for strategy in depth_attacks(BLOCKS, base.spec):
        kept = BLOCKS - sum(p.blocks for p in strategy.preparations if hasattr(p, "blocks"))
        for subject, share in (
            ("protected", protected * lead[kept]),
            ("unprotected", lead[kept]),
            ("scratch", 0.0),
        ):
            values = (0.3 + 0.5 * share,) * 4
            trials.append(trial(subject, values, strategy=strategy))  # type: ignore[arg-type]
    return base.model_copy(
        update={"subjects": (first, *base.subjects[1:]), "trials": (*base.trials, *trials)}
    )


LEAD = {2: 0.4, 4: 0.7, 6: 0.9, 8: 1.0}


def test_rows_hold_the_share_of_the_lead_that_each_depth_keeps() -> None:
    rows = depth_rows(_by_depth(LEAD, protected=0.5), "refused")
    assert [row.kept for row in rows] == [2, 4, 6, 8]
    assert {row.blocks for row in rows} == {BLOCKS}
    for row in rows:
        assert row.shares["unprotected"] == pytest.approx(LEAD[row.kept], abs=0.01)
        assert row.shares["protected"] == pytest.approx(LEAD[row.kept] / 2, abs=0.01)
        assert row.shares["scratch"] == pytest.approx(0.0, abs=0.01)
        assert row.areas["scratch"] == pytest.approx(0.3, abs=0.01)


def test_equal_models_have_equal_rows() -> None:
    for row in depth_rows(_by_depth(LEAD), "refused"):
        assert row.areas["protected"] == row.areas["unprotected"]


def test_only_the_first_seed_counts() -> None:
    held = _by_depth(LEAD)
    strong = trial("protected", (0.99,) * 4, seed=1, strategy=depth_attacks(BLOCKS, held.spec)[-1])
    more = held.model_copy(update={"trials": (*held.trials, strong)})
    assert depth_rows(more, "refused") == depth_rows(held, "refused")


def test_without_a_lead_there_are_no_shares_and_without_attacks_no_rows() -> None:
    flat = depth_rows(_by_depth(dict.fromkeys(LEAD, 0.0)), "refused")
    assert all(share is None for row in flat for share in row.shares.values())
    assert depth_rows(record(), "refused") == ()


def test_the_report_shows_depth_where_it_was_tried() -> None:
    made = report(_by_depth(LEAD, protected=0.5))
    for text in (made.html(), made.markdown()):
        shown = text.partition("Advantage by depth")[2].partition("Red flags")[0]
        assert "4 of 8" in shown
        assert "(70 %)" in shown
        assert "(35 %)" in shown
    assert "Advantage by depth" not in report(record(curves=dict(CURVES))).html()


# --- Data sizes -----------------------------------------------------------------------------------

SHARES = (0.01, 0.1, 1.0)


def _by_size(*, stopped: bool = False, without: str = "") -> AuditRecord:
    """Return a record in which a subject scores its base, and 0.2 more a tenfold of its images."""
    trials = []
    for subject, start in (("protected", 0.2), ("unprotected", 0.5), ("scratch", 0.1)):
        for power, share in enumerate(SHARES):
            if subject == without and share == 0.1:
                continue
            strategy = Strategy(data_fraction=share, batch_size=8 if share == 0.01 else 64)
            held = [start + 0.2 * power] * 3 + [0.99]
            curve = held[:3] if stopped and share == 0.1 else held
            trials.append(trial(subject, curve, strategy=strategy))  # type: ignore[arg-type]
    return record(trials)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_area_over_data_sizes_is_the_mean_over_their_logarithm(stopped: bool) -> None:
    held = _by_size(stopped=stopped)
    found = data_sizes(held, "refused")
    assert found is not None
    assert found.shares == SHARES
    if stopped:
        # What the others gained after one was stopped does not count.
        assert found.reached["unprotected"] == pytest.approx((0.5, 0.7, 0.9))
        assert found.areas == pytest.approx({"protected": 0.4, "unprotected": 0.7, "scratch": 0.3})
    else:
        assert list(found.areas.values()) == pytest.approx([0.99] * 3)
    text = report(held).markdown()
    assert "### Few images" in text
    assert "| 10 % |" in text.split("### Few images")[1]


def test_without_three_sizes_on_every_subject_there_is_no_area() -> None:
    assert data_sizes(record(), "refused") is None
    assert data_sizes(_by_size(without="scratch"), "refused") is None
    assert "### Few images" not in report(record()).markdown()


def test_larger_batches_on_all_images_do_not_compare_with_those_on_few() -> None:
    held = _by_size()
    strategy = Strategy(batch_size=128)
    large = [trial(name, (1.0,) * 4, strategy=strategy) for name in ("protected", "unprotected")]
    more = held.model_copy(update={"trials": (*held.trials, *large)})
    assert data_sizes(more, "refused") == data_sizes(held, "refused")
