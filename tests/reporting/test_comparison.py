"""Rankings of several audits, from records made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from records import CURVES, crashed, record
from records import trial as attacked
from sophon._attacks.suites import beyond_rehearsal, beyond_usual, strategies_of
from sophon._base.errors import AuditError
from sophon._cli import app
from sophon._cli.reading import _short
from sophon._records.audit_record import AuditRecord, Score, pack
from sophon._reporting.comparison import Comparison
from sophon._specs import FreshHead, SampleSpec, Strategy

SLOWED, SOUND, BROKEN = (0.2, 0.4, 0.6, 0.8), CURVES["scratch"], CURVES["unprotected"]


def _audit(protected: tuple[float, ...]) -> AuditRecord:
    return record(curves={"protected": protected})


def test_audits_are_ranked_by_verdict_and_then_by_what_was_removed() -> None:
    little = (0.25, 0.45, 0.6, 0.8)
    held = Comparison(
        [
            ("broken", _audit(BROKEN)),
            ("less slowed", _audit(little)),
            ("slowed", _audit(SLOWED)),
            ("sound", _audit(SOUND)),
        ]
    )
    (group,) = held.groups
    assert [entry.name for entry in group.entries] == ["sound", "slowed", "less slowed", "broken"]
    assert group.ranks() == (1, 2, 3, 4)
    assert held.differing == ()
    removed = [entry.worst.advantage.value or 0 for entry in group.entries]
    assert removed[1] > removed[2]


def test_a_row_says_what_was_strongest_and_what_a_head_alone_found() -> None:
    probe = Strategy(preparations=(FreshHead(),), scope="head", learning_rate=1e-2)
    held = record(curves={"protected": SLOWED}, protection={"wall_s": 240.4})
    alone = [
        attacked("protected", (0.1, 0.2, 0.2, 0.3), strategy=probe),
        attacked("unprotected", (0.1, 0.2, 0.5, 0.5), strategy=probe),
    ]
    probed = held.model_copy(update={"trials": (*held.trials, *alone)})
    (group,) = Comparison([("probed", probed), ("broken", _audit(BROKEN))]).tables()
    found = next(row for row in group.rows if "probed" in row)
    row = dict(zip(group.header, found, strict=True))
    assert row["seconds of protection"] == "240"
    alone = row["a head alone, validation: protected, unprotected, fresh"]
    assert alone == "30.0 %, 50.0 %, \u2013"
    assert row["strongest attack"] == "direct-all sgd_momentum 0.01"
    assert row["steps to recover"] == "more than 200"


def test_audits_against_other_baselines_share_the_rank_of_their_verdict() -> None:
    def stronger(held: AuditRecord) -> AuditRecord:
        """The same with a better attack on the unprotected model."""
        better = record(curves={"unprotected": (0.5, 0.75, 0.87, 0.92)}).trials
        kept = [t for t in held.trials if t.subject != "unprotected"]
        more = [t for t in better if t.subject == "unprotected"]
        return held.model_copy(update={"trials": (*kept, *more)})

    pairs = [("a", _audit(SLOWED)), ("b", stronger(_audit((0.25, 0.45, 0.6, 0.8))))]
    held = Comparison([*pairs, ("broken", _audit(BROKEN))])
    (group,) = held.groups
    assert [entry.worst.verdict for entry in group.entries] == ["slowed"] * 2 + ["not protected"]
    assert group.drifted
    assert group.ranks() == (1, 1, 3)
    for text in (held.html(), held.markdown()):
        assert "Those of one verdict share a rank" in text
        assert group.drifted in text
    alike = Comparison([("a", _audit(SLOWED)), ("broken", _audit(BROKEN))])
    assert "share a rank" not in alike.markdown()


def test_void_audits_come_last_and_have_no_rank() -> None:
    void = record([*_audit(SOUND).trials, crashed("protected")])
    held = Comparison([("void", void), ("broken", _audit(BROKEN)), ("sound", _audit(SOUND))])
    (group,) = held.groups
    assert [entry.name for entry in group.entries] == ["sound", "broken", "void"]
    assert group.ranks() == (1, 2, None)
    assert "Not all" not in held.html()
    # Rows of a comparison are never behind a scroll bar of their own.
    assert "wide long" not in held.html()


def _seeds(held: AuditRecord) -> AuditRecord:
    return held.model_copy(update={"spec": held.spec.model_copy(update={"seeds": (0, 1, 2, 3)})})


def _budget(held: AuditRecord) -> AuditRecord:
    more = tuple(one.model_copy(update={"steps": 77}) for one in held.strategies)
    spec = held.spec.model_copy(update={"steps": 77})
    changes = {"spec": spec, "spec_fingerprint": spec.fingerprint(), "strategies": more}
    return held.model_copy(update=changes)


def _suite(held: AuditRecord) -> AuditRecord:
    return held.model_copy(update={"spec": held.spec.model_copy(update={"suite": "standard-1"})})


def _domain(held: AuditRecord) -> AuditRecord:
    other = held.restricted[0].model_copy(update={"sha256": "9" * 64})
    return held.model_copy(update={"restricted": (other,)})


def _model(held: AuditRecord) -> AuditRecord:
    subjects = [
        s.model_copy(update={"weights_sha256": "8" * 64}) if s.name == "unprotected" else s
        for s in held.subjects
    ]
    return held.model_copy(update={"subjects": tuple(subjects)})


def _less(held: AuditRecord) -> AuditRecord:
    return held.model_copy(update={"given_up": ("half",)})


def _images(held: AuditRecord) -> AuditRecord:
    """Return the record as if every trial said which images it had right."""
    trials = []
    for trial in held.trials:
        points = []
        for point in trial.curve:
            score = point.validation
            assert isinstance(score, Score)
            text = pack(np.arange(score.total) < score.correct, score)
            points.append(point.model_copy(update={"by_image": text}))
        trials.append(trial.model_copy(update={"curve": tuple(points)}))
    return held.model_copy(update={"trials": tuple(trials)})


def _weaker(held: AuditRecord) -> AuditRecord:
    """Return the record of `standard-1` with fewer attacks that go on."""
    spec = held.spec.model_copy(update={"suite": "standard-1", "survivors": 1})
    return held.model_copy(update={"spec": spec})


def _other_suite(held: AuditRecord) -> AuditRecord:
    return held.model_copy(update={"suite_fingerprint": "6" * 64})


def _half_precision(held: AuditRecord) -> AuditRecord:
    there = held.environment.model_copy(update={"precision": "bf16"})
    return held.model_copy(update={"environment": there})


def _task(held: AuditRecord) -> AuditRecord:
    return held.model_copy(update={"task_name": "another"})


def _allowed(held: AuditRecord) -> AuditRecord:
    domain = held.restricted[0].model_copy(update={"name": "allowed", "role": "benign"})
    return held.model_copy(update={"benign": (domain,)})


def _beyond(held: AuditRecord) -> AuditRecord:
    """Return the record as if it had an attack that nothing explains."""
    more = Strategy(optimizer="sgd", learning_rate=5.0)
    return held.model_copy(update={"strategies": (*held.strategies, more)})


def _standard(held: AuditRecord, rate: float | None = None, **spec: Any) -> AuditRecord:
    """Return the record as an audit by `standard-1` of a protection that states it rehearsed SGD at
    `rate` would have it, batches and all.
    """
    made = held.spec.model_copy(update={"suite": "standard-1", "search_trials": 16, **spec})
    fixed = {"optimizer": "sgd", "learning_rate": rate}
    protection = None if rate is None else {"spec": {"rehearsal": {"fixed": fixed}}}
    attacks = (*strategies_of(made), *beyond_rehearsal(protection, made), *beyond_usual(made))
    return held.model_copy(
        update={
            "spec": made,
            "strategies": tuple(dict.fromkeys(attacks)),
            "protection": protection,
        }
    )


def test_protections_that_state_other_rates_are_ranked_and_the_page_says_so() -> None:
    audits = [
        ("silent", _standard(_audit(BROKEN))),
        ("tiny", _standard(_audit(SOUND), 1e-5)),
        # Ten times it is an attack of the suite, a hundred times is not.
        ("usual", _standard(_audit(SLOWED), 1e-1)),
        ("high", _standard(_audit(BROKEN), 20.0)),
    ]
    held = Comparison(audits)
    assert held.differing == ()
    (group,) = held.groups
    assert group.ranks() == (1, 2, 3, 4)
    said = "attacked at ten and a hundred times its own as well, and its search reaches as far"
    for text in (held.html(), held.markdown()):
        assert said in " ".join(text.split())
        assert "tiny: sgd 1e-05" in text
        assert "silent: none" in text
    assert [one["stated_rates"] for one in held.data()[0]["audits"]].count({"sgd": 20.0}) == 1
    alike = Comparison(
        [("a", _standard(_audit(SOUND), 0.1)), ("b", _standard(_audit(BROKEN), 0.1))]
    )
    assert alike.groups[0].further == ""


def test_other_extra_attacks_keep_audits_apart_whatever_rates_are_stated() -> None:
    first = _standard(_audit(SOUND), 1e-5)
    # What follows from the stated rate 0.5 of the other, named by the user.
    extra = (Strategy(optimizer="sgd", learning_rate=5.0, steps=first.spec.steps),)
    named = _standard(_audit(SOUND), 1e-5, extra=extra)
    followed = _standard(_audit(SOUND), 0.5)
    assert "suite" in Comparison([("a", first), ("b", named)]).differing
    assert "suite" in Comparison([("a", followed), ("b", named)]).differing
    both = _standard(_audit(SOUND), 0.5, extra=extra)
    assert Comparison([("a", both), ("b", named)]).differing == ()
    # An attack that nothing stated explains.
    more = first.model_copy(update={"strategies": (*first.strategies, *extra)})
    assert Comparison([("a", first), ("b", more)]).differing == ("attacks",)
    # One that left out what every audit has.
    usual = beyond_usual(first.spec)
    less = tuple(s for s in first.strategies if s not in usual)
    milder = first.model_copy(update={"strategies": less})
    assert Comparison([("a", first), ("b", milder)]).differing == ("attacks",)


def test_how_many_were_searched_keeps_audits_apart() -> None:
    fewer = _standard(_audit(SOUND), 1e-5, search_trials=8)
    assert Comparison([("a", _standard(_audit(SOUND))), ("b", fewer)]).differing == ("suite",)


def test_a_statement_that_cannot_be_read_is_compared_as_none() -> None:
    evil = _standard(_audit(SOUND)).model_copy(update={"protection": {"spec": "evil"}})
    held = Comparison([("a", _standard(_audit(SOUND))), ("b", evil)])
    assert held.differing == ()
    assert held.groups[0].further == ""


def test_what_pictures_were_drawn_keeps_audits_apart() -> None:
    first = _audit(SOUND)
    denoising = first.model_copy(update={"task": "denoising"})
    few = first.spec.model_copy(update={"samples": SampleSpec(count=64)})
    fewer = denoising.model_copy(update={"spec": few})
    assert Comparison([("a", denoising), ("b", fewer)]).differing == ("pictures",)


def test_a_suite_that_is_cut_down_is_not_ranked_with_the_whole_one() -> None:
    held = Comparison([("whole", _suite(_audit(SOUND))), ("less", _weaker(_audit(SOUND)))])
    assert held.differing == ("suite",)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_images, "areas"),
        (_other_suite, "suite"),
        (_half_precision, "precision"),
        (_task, "task"),
        (_seeds, "seeds"),
        (_budget, "budget"),
        (_suite, "suite"),
        (_domain, "restricted"),
        (_model, "unprotected model"),
        (_allowed, "allowed tasks"),
        (_beyond, "attacks"),
        (_less, "given up"),
    ],
)
def test_what_cannot_be_compared_is_kept_apart_and_says_why(
    change: Callable[[AuditRecord], AuditRecord], name: str
) -> None:
    alike = [("a", _audit(SOUND)), ("b", _audit(BROKEN))]
    held = Comparison([("other", change(_audit(SLOWED))), *alike])
    assert [len(group.entries) for group in held.groups] == [2, 1]
    assert held.differing == (name,)
    assert held.groups[1].ranks() == (None,)
    for text in (held.html(), held.markdown()):
        assert f"they differ in {name}" in text
        assert "Group 2 of 2" in text


def test_other_protected_weights_are_what_is_compared() -> None:
    first = _audit(SOUND)
    subjects = [
        s.model_copy(update={"weights_sha256": "7" * 64}) if s.name == "protected" else s
        for s in first.subjects
    ]
    other = first.model_copy(update={"subjects": tuple(subjects), "command": "another"})
    assert len(Comparison([("a", first), ("b", other)]).groups) == 1


def test_fewer_than_two_and_names_that_repeat_are_refused() -> None:
    with pytest.raises(AuditError, match="two or more"):
        Comparison([("a", _audit(SOUND))])
    with pytest.raises(AuditError, match="a is named twice"):
        Comparison([("a", _audit(SOUND)), ("a", _audit(BROKEN))])


def test_audits_in_folders_of_one_name_are_named_by_their_paths() -> None:
    assert _short([Path("x/a/record.json"), Path("x/b")]) == ["a", "b"]
    assert _short([Path("x/a/record.json"), Path("y/a")]) == ["x/a", "y/a"]
    assert _short([Path("x/ntl.json.gz"), Path("y/record.json.gz")]) == ["ntl", "y"]


def test_names_are_escaped() -> None:
    held = Comparison([("<b>|x", _audit(SOUND)), ("b", _audit(BROKEN))])
    assert "<b>|x" not in held.html()
    assert "&lt;b&gt;\\|x" in held.markdown()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for name, curve in (("sound", SOUND), ("broken", BROKEN)):
        (tmp_path / name).mkdir()
        text = _audit(curve).model_dump_json()
        (tmp_path / name / "record.json").write_text(text)
    return tmp_path


def test_the_command_writes_pages_and_prints_the_ranking(stored: Path) -> None:
    page, card = stored / "c.html", stored / "c.md"
    words = [str(stored / "broken"), str(stored / "sound" / "record.json")]
    done = CliRunner().invoke(
        app, ["compare", *words, "--html", str(page), "--markdown", str(card)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.index("sound") < done.output.index("broken")
    for text in (page.read_text(), card.read_text()):
        assert str(stored) not in text
        assert "withstood" in text
    # The one script sorts the table, and asks for nothing.
    assert page.read_text().count("<script") == 1
    assert "<script src" not in page.read_text()
    assert 'class="comparison sortable"' in page.read_text()


def test_a_dash_prints_the_markdown_and_nothing_else(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored)
    for words in (["report", "sound"], ["compare", "sound", "broken"]):
        done = CliRunner().invoke(app, [*words, "--markdown", "-", "--html", "page.html"])
        assert done.exit_code == 0, done.output
        assert done.output.startswith("#")
        assert "verdict: " not in done.output
        assert not (stored / "-").exists()
        (stored / "page.html").unlink()
        written = CliRunner().invoke(app, [*words, "--markdown", "page.md"])
        assert written.exit_code == 0
        assert done.output == (stored / "page.md").read_text()
        for more in (["--html", "-"], ["--markdown", "-", "--json"]):
            refused = CliRunner().invoke(app, [*words, *more])
            assert refused.exit_code == 2
            assert f"{more[0]} = -" in refused.output
            assert "name a file" in refused.output


def test_the_command_says_in_what_audits_differ_and_what_an_order_is_worth(
    stored: Path, tmp_path: Path
) -> None:
    (tmp_path / "longer").mkdir()
    text = _budget(_audit(BROKEN)).model_dump_json()
    (tmp_path / "longer" / "record.json").write_text(text)
    words = [str(tmp_path / name) for name in ("sound", "broken", "longer")]
    said = CliRunner().invoke(app, ["compare", *words]).output
    assert "they differ in budget\n" in said
    assert "budget: 77 steps" in said
    assert said.count("budget: ") == 2
    assert "original test before" in " ".join(said.split())
    assert "Where intervals overlap, the order is not certain." in said
    words = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        held = _audit(BROKEN)
        first = [trial for trial in held.trials if trial.seed == held.seeds[0]]
        spec = held.spec.model_copy(update={"seeds": held.seeds[:1]})
        changes = {"spec": spec, "spec_fingerprint": spec.fingerprint(), "trials": tuple(first)}
        alone = held.model_copy(update=changes)
        (tmp_path / name / "record.json").write_text(alone.model_dump_json())
        words.append(str(tmp_path / name))
    said = CliRunner().invoke(app, ["compare", *words]).output
    assert "There are no intervals (one attack seed): within a verdict the order" in said


def test_the_command_in_json(stored: Path) -> None:
    words = ["compare", str(stored / "broken"), str(stored / "sound"), "--json"]
    held = json.loads(CliRunner().invoke(app, words).output)
    assert held["differ_in"] == []
    first, second = held["groups"][0]["audits"]
    assert (first["rank"], first["name"], first["verdict"]) == (1, "sound", "withstood")
    assert second["cost_multiplier"] == 1
    assert first["original_before"] == pytest.approx(0.92)


def test_the_command_refuses_one_audit_and_what_is_none(stored: Path) -> None:
    alone = CliRunner().invoke(app, ["compare", str(stored / "sound")])
    assert alone.exit_code == 2
    gone = CliRunner().invoke(app, ["compare", str(stored / "sound"), str(stored / "gone")])
    assert gone.exit_code == 2
    assert "does not exist: name the folder" in gone.output
    (stored / "many").mkdir()
    (stored / "many" / "a.json.gz").touch()
    several = CliRunner().invoke(app, ["compare", str(stored / "sound"), str(stored / "many")])
    assert several.exit_code == 2
    assert "holds a.json.gz: name such files one by one" in " ".join(several.output.split())
    (stored / "many" / "model.json").touch()
    model = CliRunner().invoke(app, ["report", str(stored / "many")])
    assert "is of a model: name the folder that `sophon audit --out` wrote" in model.output
    misspelt = CliRunner().invoke(app, ["report", str(stored / "recrod.json.gz")])
    assert misspelt.exit_code == 2
    assert "does not exist: name record.json" in misspelt.output


def test_inspect_prints_the_schema() -> None:
    done = CliRunner().invoke(app, ["inspect", "--schema"])
    schema = Path(__file__).parents[2] / "docs" / "schema" / "audit-record-1.schema.json"
    assert done.output == schema.read_text()
    missing = CliRunner().invoke(app, ["inspect"])
    assert missing.exit_code == 2
    assert "PATH is missing" in missing.output
