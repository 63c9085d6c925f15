"""Verdicts and reports, from records made by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from records import CURVES, crashed, record, trial
from sophon._errors import AuditError
from sophon._records import AuditRecord, Crashed
from sophon._report import report
from sophon._verdict import overall, summarise

STORED = Path(__file__).parent / "data" / "record-v1.json"


def _verdict(**changes: object) -> str:
    return report(record(**changes)).verdict  # type: ignore[arg-type]


def test_a_model_no_better_than_a_fresh_one_withstood() -> None:
    assert _verdict(curves={"protected": (0.1, 0.2, 0.4, 0.5)}) == "withstood"


def test_an_unprotected_model_is_not_protected() -> None:
    assert _verdict(curves={"protected": (0.4, 0.7, 0.85, 0.9)}) == "not protected"


def test_a_model_that_takes_longer_is_slowed_by_that_factor() -> None:
    # Unprotected passes 90 % of 0.91 after 80 steps, protected only after 200.
    assert _verdict(curves={"protected": (0.2, 0.4, 0.6, 0.85)}) == "slowed x2.5"


def test_a_target_never_reached_gives_a_bound() -> None:
    assert _verdict(curves={"protected": (0.3, 0.5, 0.6, 0.7)}) == "slowed x2.5 or more"


@pytest.mark.parametrize(
    "held",
    [
        record(curves={"unprotected": (0.1, 0.2, 0.4, 0.5)}),
        record(original=0.12),
        record([*record().trials, crashed("protected")]),
        record([t for t in record().trials if t.subject != "unprotected"]),
        record([]),
        record(flags=("non_finite_weights",)),
    ],
    ids=["no-gap", "destroyed", "crashed", "no-unprotected", "no-trials", "not-finite"],
)
def test_what_cannot_be_judged_is_void_and_says_why(held: AuditRecord) -> None:
    made = report(held)
    assert made.verdict == "void"
    assert made.worst.reasons
    assert "void" in made.markdown()
    assert "</html>" in made.html()


def _with_a_second_domain(base: AuditRecord, protected: tuple[float, ...]) -> AuditRecord:
    """Return `base` with another restricted domain on which the protected model does so."""
    other = base.restricted[0].model_copy(update={"name": "second"})
    extra = [
        trial(
            t.subject,
            protected if t.subject == "protected" else [p.validation.value for p in t.curve[1:]],
            seed=t.seed,
            domain="second",
        )
        for t in base.trials
    ]
    return base.model_copy(
        update={"restricted": (*base.restricted, other), "trials": (*base.trials, *extra)}
    )


def test_the_worst_domain_speaks_for_the_model() -> None:
    base = record(curves={"protected": (0.1, 0.2, 0.4, 0.5)})
    made = report(_with_a_second_domain(base, (0.4, 0.7, 0.85, 0.9)))
    assert [s.verdict for s in made.summaries] == ["withstood", "not protected"]
    assert made.verdict == "not protected"


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_slowed_domains_the_less_slowed_speaks(swapped: bool) -> None:
    slow, slower = (0.2, 0.5, 0.9, 0.9), (0.2, 0.3, 0.5, 0.9)
    first, second = (slower, slow) if swapped else (slow, slower)
    curves = {"protected": first, "unprotected": (0.6, 0.85, 0.9, 0.9)}
    made = report(_with_a_second_domain(record(curves=curves), second))
    assert [s.verdict for s in made.summaries] == ["slowed", "slowed"]
    factors = sorted(s.multiplier or 0 for s in made.summaries)
    assert factors[0] < factors[1]
    assert overall(made.summaries).multiplier == factors[0]


def test_a_record_without_domains_is_refused() -> None:
    with pytest.raises(AuditError, match="no restricted domain"):
        summarise(record().model_copy(update={"restricted": ()}))


def test_what_ends_above_a_fresh_network_has_not_withstood() -> None:
    # Its area is as low as a fresh network's, but its best attack is not.
    assert _verdict(curves={"protected": (0.1, 0.2, 0.4, 0.62)}) == "slowed x2.5 or more"


def test_an_interval_that_reaches_below_a_half_has_not_withstood() -> None:
    others = [t for t in record().trials if t.subject != "protected"]
    curves = [(0.0, 0.0, 0.1, 0.2), (0.1, 0.2, 0.4, 0.5), (0.35, 0.5, 0.5, 0.5)]
    spread = [trial("protected", values, seed=seed) for seed, values in enumerate(curves)]
    (held,) = summarise(record([*spread, *others]))
    assert held.advantage.interval is not None
    assert held.advantage.interval.low < 0.5
    assert held.advantage.interval.high >= 1
    assert held.verdict == "slowed"


def test_two_seeds_are_too_few_to_withstand() -> None:
    assert _verdict(curves={"protected": CURVES["scratch"]}) == "withstood"
    assert _verdict(curves={"protected": CURVES["scratch"]}, seeds=(0, 1)) == "slowed x2.5 or more"


def test_a_two_class_task_that_works_is_not_destroyed() -> None:
    held = record()
    two = held.model_copy(update={"original": held.original.model_copy(update={"classes": 2})})
    assert report(two).verdict == report(held).verdict != "void"


def test_a_small_lead_on_few_images_tells_nothing() -> None:
    base = record(
        curves={"protected": (0.1, 0.2, 0.4, 0.5), "unprotected": (0.13, 0.23, 0.43, 0.53)}
    )
    assert report(base).verdict == "void"


def test_markdown_cells_cannot_break_the_table() -> None:
    bad = crashed("protected").model_copy(
        update={"outcome": Crashed(error="a | b\n<script>", traceback="")}
    )
    text = report(record([*record().trials, bad])).markdown()
    assert "<script>" not in text.split("## Every trial")[1]
    assert "a \\| b" in text


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped() -> None:
    held = record([*record().trials, crashed("protected")])
    text = report(held).html()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert "<b>no</b>" not in text
    assert "prefers-color-scheme: dark" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert ElementTree.fromstring(svg).tag == "svg"
    for one in held.trials:
        assert one.strategy.label() in text


def test_both_documents_carry_what_a_reader_needs(tmp_path: Path) -> None:
    made = report(record())
    made.write_html(tmp_path / "sub" / "r.html")
    made.write_markdown(tmp_path / "r.md")
    for name in ("sub/r.html", "r.md"):
        text = (tmp_path / name).read_text()
        for needed in (
            "sophon audit run.toml",
            "hreat model",
            "quick-1",
            "90.0 % (",
            "2.13",
            "a processor",
        ):
            assert needed in text, (name, needed)
        assert "non-fine-tunable" not in text.lower()
    assert made.table()[0][0] == "restricted domain"
    assert len(made.table()) == 4


def test_a_stored_record_still_loads() -> None:
    held = AuditRecord.model_validate_json(STORED.read_text())
    made = report(held)
    assert made.verdict == "void"
    assert len(held.trials) == 72


def test_reporting_needs_no_torch() -> None:
    code = "import sys, sophon._report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_report_says_how_attackers_were_scored() -> None:
    held = record()
    first = held.trials[0]
    point = first.curve[1].model_copy(update={"reestimated": True})
    changed = first.model_copy(update={"curve": (first.curve[0], point, *first.curve[2:])})
    anew = held.model_copy(update={"trials": (changed, *held.trials[1:])})
    for text in (report(anew).html(), report(anew).markdown()):
        assert "measured anew" in text
        assert "1 of 45" in text
    assert "measured anew" not in report(held).html() + report(held).markdown()


def test_a_search_is_said_in_the_report() -> None:
    plain = record()
    searched = plain.model_copy(
        update={"spec": plain.spec.model_copy(update={"search_trials": 12})}
    )
    for text, other in (
        (report(searched).html(), report(plain).html()),
        (report(searched).markdown(), report(plain).markdown()),
    ):
        assert "searched with 12 strategies of its own" in text
        assert "searched with" not in other
