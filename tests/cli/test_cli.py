"""The command line: each command, its exit codes, and every bad input a user can give it."""

from __future__ import annotations

import errno
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from controls import few_attacks
from sophon._auditing import controls as _controls
from sophon._base import errors
from sophon._base.errors import IntactnessError
from sophon._base.remarks import remark
from sophon._cli import app
from sophon._cli.application import guarded
from sophon._cli.controls import _why_missed
from sophon._cli.demo import RUN as DEMO
from sophon._cli.first_look import first_look
from sophon._cli.progress import Display, duration
from sophon._cli.run_file import load, load_pretraining
from sophon._cli.running import run_pretraining, show_protected
from sophon._models.networks import ResNet20, SmallConvNet
from sophon._protection.protection import Protected
from sophon._records.audit_record import Score
from sophon._records.round import Round

RUN = """
[model]
name = "small_convnet"
weights = "letters.safetensors"
in_channels = 1

[original]
source = "embedded"
name = "letters"
limit = 10

[[restricted]]
source = "embedded"
name = "digits"
limit = 12

[protect]
rounds = 3
original_batch_size = 16

[protect.rehearsal]
steps = 2
query_batch_size = 8

[protect.rehearsal.distribution]
batch_sizes = [8]

[protect.guard]
tolerance_points = 60.0
every = 1

[audit]
steps = 2
evaluations = 2
batch_size = 8
"""


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "run.toml").write_text(DEMO)
    case = load_pretraining(
        folder / "run.toml", ["pretrain.steps=60", "pretrain.every=60"], untrained=True
    )
    run_pretraining(case, folder / "start", "quiet")
    return Path(shutil.copy(folder / "start/model.safetensors", folder / "letters.safetensors"))


@pytest.fixture
def run_file(tmp_path: Path, weights: Path) -> Path:
    """Return a run of a second or two, its weights beside it."""
    (tmp_path / "letters.safetensors").symlink_to(weights)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """Return a folder with a run that was protected and audited."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "letters.safetensors").symlink_to(weights)
    (folder / "run.toml").write_text(RUN)
    assert sophon("protect", folder / "run.toml", "--out", folder / "p", "--quiet")[0] == 0
    model = folder / "p" / "model.safetensors"
    audit = ("audit", folder / "run.toml", "--model", model, "--out", folder / "a", "--quiet")
    assert sophon(*audit)[0] == 0
    return folder


def sophon(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def fresh_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def loaded_by(*arguments: str) -> list[str]:
    """Return the heavy modules that a command has loaded by its end."""
    code = (
        "import sys\nfrom sophon._cli import app\n"
        f"try:\n    app({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'numpy', 'pydantic', 'rich', 'timm', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    found: list[str] = json.loads(fresh_process(code).stderr.splitlines()[-1].replace("'", '"'))
    return found


# --- Help -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["", "protect", "audit", "report", "compare", "evaluate", "inspect"]
)
def test_help_has_examples_and_loads_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code, out, _ = sophon(*arguments)
    assert code == 0
    assert f"  sophon {command or 'demo'}" in out
    if not command:
        assert loaded_by("--help") == []


def test_help_documents_the_exit_codes() -> None:
    out = sophon("--help")[1]
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    raised = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    codes = [str(code) for code in sorted({0, 1, 130} | raised)]
    assert re.findall(r"^    (\d+) ", out, re.MULTILINE) == codes
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == codes


def test_no_arguments_print_help_and_version_the_version() -> None:
    import sophon as package

    assert "Commands:" in sophon()[1]
    assert sophon("--version")[1].split() == ["sophon", package.__version__]


# --- Protect ----------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", [True, False])
def test_a_model_that_does_not_know_its_task_is_told_before_any_round(
    knows: bool, run_file: Path, tmp_path: Path
) -> None:
    if not knows:
        torch.manual_seed(0)
        untrained = SmallConvNet(in_channels=1, classes=26).state_dict()
        (tmp_path / "letters.safetensors").unlink()
        save_file(untrained, tmp_path / "letters.safetensors")
    settings = ("--set", "protect.guard.tolerance_points=99.0", "--set", "protect.rounds=1")
    code, out, err = sophon("protect", run_file, "--out", tmp_path / "p", *settings)
    assert code == 0, err
    assert ("does not know its original task" in out + err) != knows
    assert ("set `classes` to the order" in out + err) != knows


def test_a_tolerance_below_one_image_is_told_before_any_round(
    run_file: Path, tmp_path: Path
) -> None:
    settings = ("--set", "protect.guard.tolerance_points=0.01", "--set", "protect.rounds=1")
    for words in (("--out", tmp_path / "p"), ("--dry-run",)):
        _, _, err = sophon("protect", run_file, *words, *settings)
        assert "points, more than the tolerance of 0.01: give more images" in err


def test_protect_says_what_it_did_and_repeats_it(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    code, first, err = sophon("protect", run_file, "--out", out)
    assert code == 0
    assert "round 3/3" in err
    assert "hardly protected" not in err
    assert "before" in first
    assert "after; weights of round 3 of 3" in first
    assert str(out / "model.safetensors") in first
    before = load_file(out / "model.safetensors")
    code, again, err = sophon("protect", run_file, "--out", out)
    assert (code, again) == (0, first)
    assert "is complete" in err
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_json_is_one_object_a_line(run_file: Path, tmp_path: Path) -> None:
    code, out, err = sophon("protect", run_file, "--out", tmp_path / "p", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [event["event"] for event in events] == ["round", "round", "round", "summary"]
    assert events[-1]["shipped_round"] == 3
    assert events[0]["index"] == 0


def test_quiet_prints_the_result_alone(run_file: Path, tmp_path: Path) -> None:
    code, out, err = sophon("protect", run_file, "--out", tmp_path / "p", "--quiet")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1


def test_dry_run_resolves_forecasts_and_writes_nothing(run_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, _ = sophon("protect", run_file, "--dry-run", "--set", "protect.rounds=70")
    assert code == 0
    assert "protect.rounds = 70" in out
    assert "forecast: 70 rounds of" in out
    assert sorted(tmp_path.iterdir()) == before
    code, out, _ = sophon("protect", run_file, "--dry-run", "--json")
    held = json.loads(out)
    assert held["spec"]["protect"]["rounds"] == 3
    assert held["total_s"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("audit", "--model", "letters.safetensors"), "trials, "),
        (("pretrain", "--set", "pretrain.steps=90"), "90 steps of "),
    ],
)
def test_every_dry_run_validates_forecasts_and_writes_nothing(
    run_file: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    given = [tmp_path / word if word.endswith("tensors") else word for word in words]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, out, _ = sophon(given[0], run_file, "--dry-run", *given[1:])
    assert code == 0
    *resolved, last = out.splitlines()
    assert last.startswith("forecast: ")
    assert said in last
    assert last.endswith("nothing was written")
    assert resolved[-1].startswith("# ")
    held = json.loads(sophon(given[0], run_file, "--dry-run", *given[1:], "--json")[1])
    assert held["total_s"] > 0
    assert held["domains"] == [line[2:] for line in resolved if line.startswith("# ")]
    code, _, err = sophon(given[0], run_file, "--dry-run", *given[1:], "--set", "original.limit=1")
    assert code == 2
    assert len(err.splitlines()) <= 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "--out is missing" in sophon(given[0], run_file, *given[1:])[2]


def test_the_resolved_run_is_toml_that_runs_again(run_file: Path, tmp_path: Path) -> None:
    out = sophon("protect", run_file, "--dry-run")[1]
    again = tmp_path / "again.toml"
    again.write_text("".join(f"{line}\n" for line in out.splitlines()[:-1]))
    assert sophon("protect", again, "--dry-run")[1].splitlines()[:-1] == out.splitlines()[:-1]


def test_each_domain_has_a_line_before_any_work(run_file: Path, tmp_path: Path) -> None:
    changes = ("original.limit=10", "restricted.0.mean=[0.5]", "restricted.0.std=[0.25]")
    settings = [word for change in changes for word in ("--set", change)]
    kept = "original letters: 26 classes (A, B, C, D, "
    refused_line = "restricted digits: 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), 16x16x1; "
    cut = "; test and validation cut from the training images; "
    normalised = (
        "mean 0.485 0.456 0.406 std 0.229 0.224 0.225 (by default)",
        "mean 0.5 std 0.25 (given)",
    )
    run_file.write_text(RUN)
    out, err = sophon("protect", run_file, "--dry-run", *settings)[1:]
    said = [line.removeprefix("# ") for line in out.splitlines() if line.startswith("# ")]
    assert len(said) == 2
    for line, start, values in zip(said, (kept, refused_line), normalised, strict=True):
        assert line.startswith(start)
        assert f"; {values}{cut}" in line
    assert " train, " in said[0]
    forecast = json.loads(sophon("protect", run_file, "--dry-run", "--json", *settings)[1])
    assert forecast["domains"] == said
    for words in (("protect",), ("pretrain", "--set", "pretrain.steps=1")):
        folder = tmp_path / words[0]
        err = sophon(words[0], run_file, "--out", folder, *words[1:], *settings)[2]
        expected = said if words == ("protect",) else said[:1]
        assert err.splitlines()[: len(expected)] == expected


def test_set_takes_toml_values_text_and_indices(run_file: Path) -> None:
    changes = ("restricted.0.limit=11", "protect.suppression=ice", "audit.seeds=[4, 5]")
    settings = [word for change in changes for word in ("--set", change)]
    out = sophon("protect", run_file, "--dry-run", *settings)[1]
    assert "limit = 11" in out
    assert 'loss = "ice"' in out
    assert "audit.seeds = [4, 5]" in out


def test_variables_in_paths_are_replaced(
    run_file: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOPHON_TEST_FOLDER", str(weights.parent))
    setting = "model.weights=${SOPHON_TEST_FOLDER}/letters.safetensors"
    assert sophon("evaluate", run_file, "--set", setting)[0] == 0
    monkeypatch.delenv("SOPHON_TEST_FOLDER")
    code, _, err = sophon("evaluate", run_file, "--set", setting)
    assert code == 2
    assert "SOPHON_TEST_FOLDER" in err


def test_tolerance_not_met_is_exit_3_and_keeps_files(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    settings = ["protect.guard.tolerance_points=0.0", "protect.suppression_rate=1.0"]
    words = [word for setting in settings for word in ("--set", setting)]
    code, printed, err = sophon("protect", run_file, "--out", out, "--quiet", *words)
    assert (code, printed) == (3, "")
    assert err.startswith("error: no weights stayed within")
    assert (out / "rounds.jsonl").read_text().count("\n") == 3
    assert not (out / "model.safetensors").exists()


def test_infinite_losses_are_exit_4_and_name_the_round(run_file: Path, tmp_path: Path) -> None:
    wild = '{optimizer="sgd", learning_rate=1000.0, weight_decay=10.0, batch_size=8}'
    words = ["--set", f"protect.rehearsal={{steps=12, query_batch_size=8, fixed={wild}}}"]
    code, _, err = sophon("protect", run_file, "--out", tmp_path / "p", "--quiet", *words)
    assert code == 4
    assert err.startswith("error: round 0")
    assert "sgd 1e+03" in err


def test_interrupting_leaves_a_run_that_resumes(run_file: Path, tmp_path: Path) -> None:
    command = ["protect", str(run_file), "--set", "protect.rounds=40", "--threads", "1"]
    code = "import sys; sys.argv[0] = 'sophon'\nfrom sophon._cli import main\nmain()"
    words = [sys.executable, "-c", code, *command, "--out", str(tmp_path / "p"), "--json"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert shlex.join(["sophon", *command]) in err
    assert rest.count('"round"') < 39
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100)
    assert 0 < done.stdout.count('"event": "round"') < 40
    uninterrupted = [*words[:-3], "--out", str(tmp_path / "q"), "--quiet"]
    subprocess.run(uninterrupted, check=True, timeout=100, capture_output=True)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "pq")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_an_audit_ends_its_workers_and_keeps_its_trials(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = ["--workers", "2", "--set", "audit.steps=120", "--json"]
    command = ["audit", str(finished / "run.toml"), "--model", str(finished / "p"), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "sophon", *command, "--out", str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    while '"event": "trial"' not in process.stdout.readline():
        assert process.poll() is None
    if number is signal.SIGINT:
        # As a terminal does: to the command and its workers alike.
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "to resume, repeat the command" in err
    assert "Traceback" not in err
    assert list((tmp_path / "a/trials").glob("*.json"))
    assert not (tmp_path / "a/record.json").exists()
    code, _, err = sophon("report", tmp_path / "a")
    assert code == 2
    assert "not finished" in err
    assert "trials are stored" in err
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("workers were left behind")


def test_a_killed_command_repeated_gives_identical_weights(run_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sophon", "protect", str(run_file), "--threads", "1"]
    command += ["--set", "protect.rounds=30", "--set", "protect.checkpoint_every=2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for lines in (1, 6, 9):
        words = [*command, "--out", str(tmp_path / "p")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as killed:
            assert killed.stdout is not None
            for _ in range(lines):
                killed.stdout.readline()
            killed.kill()
        assert killed.returncode == -9
        assert not (tmp_path / "p" / "model.safetensors").exists()
    for name in "pq":
        words = [*command, "--out", str(tmp_path / name)]
        subprocess.run(words, check=True, timeout=100, capture_output=True, env=environment)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "pq")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((tmp_path / "p" / "rounds.jsonl").read_text().splitlines()) == 30


def test_protect_profiles_and_shows_the_parts(run_file: Path, tmp_path: Path) -> None:
    code, out, _ = sophon("protect", run_file, "--out", tmp_path / "p", "--profile", "2")
    assert code == 0
    assert "support passes" in out
    assert (tmp_path / "p" / "profile" / "trace.json.gz").stat().st_size > 1000
    again = ("protect", run_file, "--out", tmp_path / "q", "--profile", "1", "--json")
    code, out, _ = sophon(*again)
    events = {line["event"]: line for line in map(json.loads, out.splitlines())}
    assert (code, events["profile"]["rounds"]) == (0, 1)
    code, _, err = sophon("protect", run_file, "--out", tmp_path / "r", "--profile", "9")
    assert (code, err.count("\n")) == (2, 1)
    assert "--profile 9" in err
    assert not (tmp_path / "r").exists()


# --- Audit and report -------------------------------------------------------------------------


def test_audit_writes_record_and_reports(finished: Path) -> None:
    record = json.loads((finished / "a" / "record.json").read_text())
    assert len(record["trials"]) == 36
    assert record["protection"]["shipped_round"] == 3
    assert record["model"] == "small_convnet"
    html = (finished / "a" / "report.html").read_text()
    assert html.lstrip().lower().startswith("<!doctype html>")
    assert (finished / "a" / "report.md").stat().st_size > 500


def test_what_was_read_is_in_the_record_and_in_the_reports(finished: Path, tmp_path: Path) -> None:
    said = [
        line
        for line in sophon("inspect", finished / "run.toml")[1].splitlines()
        if ": 1" in line or ": 2" in line
    ]
    record = json.loads((finished / "a" / "record.json").read_text())
    held = {"original": record["original"], "restricted": record["restricted"][0]}
    for role, domain in held.items():
        # The checkpoint says of its input what the run file took by default.
        stated = re.sub(r"\([^()]*model\.json\)", "(by default)", domain["read"])
        assert f"{role} {stated}" in said
        assert "model.json)" in domain["read"]
        assert all(
            domain["read"].removeprefix(f"{domain['name']}: ")
            in html.unescape((finished / "a" / f"report.{form}").read_text())
            for form in ("md", "html")
        )
    model = finished / "p" / "model.safetensors"
    err = sophon("audit", finished / "run.toml", "--model", model, "--out", tmp_path / "a")[2]
    assert err.splitlines()[0].startswith(f"original {held['original']['read']}")


def test_repeating_an_audit_runs_nothing(finished: Path) -> None:
    stamps = {f: f.stat().st_mtime_ns for f in (finished / "a" / "trials").iterdir()}
    words = ("audit", finished / "run.toml", "--model", finished / "p", "--out", finished / "a2")
    code, out, err = sophon(*words, "--store", finished / "a")
    assert code == 0
    assert "trial 36/36  stored" in err
    assert "verdict:" in out
    assert str(finished / "a2" / "report.html") in out.replace("\n", "")
    assert {f: f.stat().st_mtime_ns for f in (finished / "a" / "trials").iterdir()} == stamps


def test_any_two_checkpoints_are_audited(finished: Path, tmp_path: Path) -> None:
    protected = finished / "p" / "model.safetensors"
    plain = tmp_path / "theirs.safetensors"
    plain.write_bytes(protected.read_bytes())
    words = ["audit", finished / "run.toml", "--model", finished / "letters.safetensors", "--quiet"]
    assert sophon(*words, "--unprotected", plain, "--out", tmp_path / "a")[0] == 0
    swapped = json.loads((tmp_path / "a" / "record.json").read_text())
    record = json.loads((finished / "a" / "record.json").read_text())
    held, other = (
        {s["name"]: s["weights_sha256"] for s in r["subjects"]} for r in (record, swapped)
    )
    assert (held["protected"], held["unprotected"]) == (other["unprotected"], other["protected"])
    assert other["scratch"] == held["scratch"]
    assert swapped["protection"] is None
    # The run file's own weights are not used, and need not be there.
    absent = ("--set", "model.weights=absent.safetensors", "--store", tmp_path / "a")
    for before in (plain, "none"):
        given = ("--unprotected", before, "--out", tmp_path / f"without-{Path(before).name}")
        assert sophon(*words, *given, *absent)[0] == 0
    own = json.loads((tmp_path / f"without-{plain.name}" / "record.json").read_text())
    assert own["subjects"] == swapped["subjects"]
    assert own["trials"] == swapped["trials"]
    code, _, err = sophon(*words, "--out", tmp_path / "c", *absent)
    assert code == 2
    assert "absent.safetensors does not exist" in err
    code, _, err = sophon(*words, "--unprotected", tmp_path / "none.pth", "--out", tmp_path / "b")
    assert code == 2
    assert "none.pth" in err
    assert not (tmp_path / "b").exists()


def test_audit_in_json_ends_with_the_verdict(finished: Path) -> None:
    words = ("audit", finished / "run.toml", "--model", finished / "p", "--out", finished / "a")
    out = sophon(*words, "--json")[1]
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["trial"] * 36 + ["summary"]
    assert events[-1]["verdict"]


def test_weights_without_a_description_are_audited(finished: Path, tmp_path: Path) -> None:
    tensors = load_file(finished / "p" / "model.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    words = ("audit", finished / "run.toml", "--model", tmp_path / "plain.safetensors")
    code, _, err = sophon(*words, "--out", tmp_path / "a", "--store", finished / "a")
    assert code == 0, err
    assert json.loads((tmp_path / "a" / "record.json").read_text())["protection"] is None


def test_report_judges_without_torch(finished: Path, tmp_path: Path) -> None:
    html, card = tmp_path / "r.html", tmp_path / "card.md"
    code, out, _ = sophon("report", finished / "a", "--html", html, "--markdown", card)
    assert code == 0
    assert "verdict:" in out
    assert html.is_file()
    assert card.is_file()
    assert "torch" not in loaded_by("report", str(finished / "a" / "record.json"))


# --- Evaluate and inspect ---------------------------------------------------------------------


def test_evaluate_gives_accuracy_and_interval(finished: Path) -> None:
    for words in ((), ("--model", finished / "p"), ("--split", "test")):
        code, out, _ = sophon("evaluate", finished / "run.toml", *words)
        assert code == 0
        assert "95 % interval" in out
    held = json.loads(sophon("evaluate", finished / "run.toml", "--json")[1])
    assert held["low"] < held["correct"] / held["total"] <= 1
    assert held["low"] < held["high"] <= 1
    assert sophon("evaluate", finished / "run.toml", "--split", "train")[0] == 2


def test_evaluate_scores_the_split_and_the_model_that_it_is_asked_for(
    finished: Path, tmp_path: Path
) -> None:
    def scored(*words: object) -> dict[str, int]:
        held = json.loads(sophon("evaluate", finished / "run.toml", "--json", *words)[1])
        return {name: held[name] for name in ("correct", "total")}

    # Of 120 pictures of each letter 24 are for the test; of ten to train on one is held out.
    assert scored("--split", "test")["total"] == 26 * 24
    assert scored()["total"] == 26
    state = load_file(finished / "p" / "model.safetensors")
    # It says A whatever it sees.
    state["head.weight"].zero_()
    state["head.bias"] = torch.eye(26)[0]
    save_file(state, tmp_path / "a.safetensors")
    told = scored("--split", "test", "--model", tmp_path / "a.safetensors")
    assert told == {"correct": 24, "total": 26 * 24}


def test_every_domain_of_a_run_file_is_loaded_in_its_place(run_file: Path) -> None:
    tables = [
        f'[[{role}]]\nsource = "embedded"\nname = "{role}"\ndataset = "digits"\n'
        f"classes = [{low}, {low + 1}]\n"
        for role, low in (("held_out", 2), ("benign", 4))
    ]
    run_file.write_text(RUN + "\n".join(tables))
    changes = ["restricted.0.name=refused", "restricted.0.dataset=digits"]
    threads = torch.get_num_threads()
    try:
        case = load(run_file, changes, threads + 1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    roles = ("restricted", "held_out", "benign")
    assert [[domain.name for domain in getattr(case, role)] for role in roles] == [
        ["refused"],
        ["held_out"],
        ["benign"],
    ]
    assert [getattr(case, role)[0].classes for role in roles[1:]] == [("2", "3"), ("4", "5")]


def test_inspect_describes_what_it_is_given(finished: Path) -> None:
    run = sophon("inspect", finished / "run.toml")[1]
    assert "head head" in run
    assert "original letters: 26 classes (A, B, C" in run
    assert "restricted digits: 10 classes (0, 1, 2" in run
    checkpoint = sophon("inspect", finished / "p")[1]
    assert "as recorded" in checkpoint
    assert "round 3 of 3" in checkpoint
    assert "verdict:" in sophon("inspect", finished / "a")[1]
    assert "not written by sophon" in sophon("inspect", finished / "letters.safetensors")[1]


def test_a_changed_checkpoint_is_noticed_before_anything_is_done_with_it(
    finished: Path, tmp_path: Path
) -> None:
    tensors = load_file(finished / "p" / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text((finished / "p" / "model.json").read_text())
    run = finished / "run.toml"
    for words in (
        ("inspect", tmp_path),
        ("evaluate", run, "--model", tmp_path),
        ("audit", run, "--model", tmp_path, "--out", tmp_path / "a"),
    ):
        assert "checksum" in refused(tmp_path, *words)


# --- Bad input --------------------------------------------------------------------------------


def refused(folder: Path, *words: object) -> str:
    """Run a command that must be refused, cleanly and without a trace; return its message."""
    before = sorted(folder.rglob("*"))
    code, out, err = sophon(*words)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("protect.roundz=5", ["protect.roundz", "rounds"]),
        ("protect.rounds=many", ["protect.rounds", "many"]),
        ("protect.rounds=1.5", ["protect.rounds", "1.5"]),
        ("protect.guard.every=0", ["protect.guard.every", "0"]),
        ("protect.rehearsal.distribution.learning_rates.adam=[1.0, 0.1]", ["adam"]),
        ("restricted.0.limit=0", ["restricted.0.limit", "0"]),
        ("restricted.3.limit=5", ["restricted.3.limit", "0 to 0"]),
        ('restricted.3={source="embedded", name="digits"}', ["restricted.3=", "0 to 0"]),
        ("protect.rounds.fast=1", ["rounds", "value"]),
        ("protect.rounds", ["key=value"]),
        (
            "protect.rehearsal.distribution.preparations="
            '[[], [{kind="reset_last_blocks", blocks=99}]]',
            ["reset_last_blocks", "99"],
        ),
        ("audit.suite=standard-9", ["standard-9", "quick-1"]),
        ('protect.rehearsal.fixed={optimizer="nesterov", momentum=0}', ["nesterov", "momentum"]),
        ("model.name=resnet21", ["resnet21", "resnet20"]),
        ("model.name=resnet20", ["keys"]),
        ("model.head=nothing", ["nothing"]),
        ("model.weights=", ["model.weights", "1 character"]),
        ("model.weights=gone.safetensors", ["gone.safetensors", "does not exist"]),
        ("original.source=npy", ["npy", "npz"]),
        ("original.name=greek", ["greek", "letters"]),
        ("restricted.0.limit=1", ["restricted", "limit"]),
        ("protect.rehearsal.distribution.batch_sizes=[500]", ["digits", "batch"]),
        ("original.classes=[0, 1]", ["26", "2"]),
        ('restricted.0={source="npz", path="gone.npz"}', ["gone.npz"]),
        ('restricted.0={source="folder", path="gone"}', ["gone"]),
        ('restricted.0={source="embedded", name="letters"}', ["letters"]),
    ],
)
def test_bad_values_are_named(
    run_file: Path, tmp_path: Path, setting: str, fragments: list[str]
) -> None:
    err = refused(tmp_path, "protect", run_file, "--out", tmp_path / "p", "--set", setting)
    for fragment in fragments:
        assert fragment in err


def test_bad_run_files(run_file: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "p")
    assert "does not exist" in refused(tmp_path, "protect", tmp_path / "gone.toml", *out)
    assert "folder" in refused(tmp_path, "protect", tmp_path, *out)
    run_file.write_text("[model]\nname = \n")
    assert "line 2" in refused(tmp_path, "protect", run_file, *out)
    run_file.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refused(tmp_path, "protect", run_file, *out)
    run_file.write_text("")
    assert "model is missing" in refused(tmp_path, "protect", run_file, *out)


def test_places_that_cannot_be_written(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "p"
    run = finished / "run.toml"
    assert str(below) in refused(tmp_path, "protect", run, "--out", below)
    audit = ("audit", run, "--model", finished / "p")
    assert str(below) in refused(tmp_path, *audit, "--out", below)
    assert str(below) in refused(tmp_path, *audit, "--out", tmp_path / "a", "--store", below)
    assert "file" in refused(tmp_path, "report", finished / "a", "--html", below)
    assert str(below) in refused(tmp_path, "demo", "--out", below, "--quiet")
    assert "--out" in refused(tmp_path, "protect", run)


def test_a_full_disk_is_noticed_before_anything_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    full = usage._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    run = finished / "run.toml"
    for words in (
        ("protect", run, "--out", tmp_path / "p"),
        ("audit", run, "--model", finished / "p", "--out", tmp_path / "a"),
        ("demo", "--out", tmp_path / "d", "--quiet"),
    ):
        err = refused(tmp_path, *words)
        assert "0 MiB free" in err
        assert "make room" in err


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room"), (errno.EACCES, "permission"), (errno.EIO, "damaged")],
)
def test_what_a_system_refuses_has_the_remedy_that_fits(
    number: int, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    with pytest.raises(typer.Exit):
        guarded(failing)()
    err = capsys.readouterr().err
    assert "some/file" in err
    assert remedy in err


def test_a_remark_is_made_once_in_a_command(caplog: pytest.LogCaptureFixture) -> None:
    def remarking() -> None:
        for line in ("one", "two", "one"):
            remark(line)

    for _ in range(2):
        guarded(remarking)()
    assert caplog.messages == ["one", "two"] * 2


def test_a_quiet_command_silences_no_later_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sophon("report", tmp_path, "--quiet")[0] != 0
    remark("still heard")
    assert caplog.messages == ["still heard"]


def test_a_folder_of_another_run_is_not_touched(run_file: Path, tmp_path: Path) -> None:
    assert sophon("protect", run_file, "--out", tmp_path / "p", "--quiet")[0] == 0
    other = ("--set", "protect.seed=9")
    err = refused(tmp_path, "protect", run_file, "--out", tmp_path / "p", *other)
    assert "another spec" in err


def archive(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def grey(count: int = 200, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, side, side)).astype(np.uint8)


def test_archives_that_cannot_be_used(run_file: Path, tmp_path: Path) -> None:
    labels = np.arange(200) % 10
    file = tmp_path / "x.npz"
    words = ("protect", run_file, "--out", tmp_path / "p")
    words = (*words, "--set", 'restricted.0={source="npz", path="x.npz"}')

    def fault() -> str:
        err = refused(tmp_path, *words)
        assert "restricted" in err or "domain 'x'" in err
        return err

    file.write_bytes(b"")
    assert "x.npz" in fault()
    archive(file, grey(), labels)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "x.npz" in fault()
    archive(file, grey().astype(object), labels)
    assert "x.npz" in fault()
    archive(file, grey().astype(str), labels)
    assert "x.npz" in fault()
    archive(file, np.full((200, 16, 16), np.nan, np.float32), labels)
    assert "NaN" in fault()
    archive(file, grey(), labels - 1)
    assert "-1" in fault()
    archive(file, grey(), labels + 10**6)
    assert "1000009" in fault().replace(",", "")
    archive(file, grey(), labels * 0)
    assert "class" in fault()
    archive(file, grey(12), np.arange(12) % 2)
    assert "batch" in fault()
    archive(file, grey(side=3), labels)
    assert "3" in fault()
    archive(file, np.stack([grey()] * 3, 3), labels)
    assert "channel" in fault()


def test_the_same_data_as_both_domains(run_file: Path, tmp_path: Path) -> None:
    archive(tmp_path / "x.npz", grey(260), np.arange(260) % 26)
    domain = '{source="npz", path="x.npz", name="%s"}'
    settings = ("original=" + domain % "a", "restricted.0=" + domain % "b")
    words = [word for setting in settings for word in ("--set", setting)]
    err = refused(tmp_path, "protect", run_file, "--out", tmp_path / "p", *words)
    assert "same data" in err


def test_checkpoints_that_cannot_be_used(finished: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00\x01")
    (tmp_path / "empty").mkdir()
    run = finished / "run.toml"
    for name, fragment in [
        ("pickle.pth", "refused"),
        ("foreign.safetensors", "another architecture"),
        ("torn.safetensors", "damaged"),
        ("empty", "model.safetensors"),
        ("gone.safetensors", "does not exist"),
    ]:
        words = ("audit", run, "--model", tmp_path / name, "--out", tmp_path / "a")
        assert fragment in refused(tmp_path, *words)
    weights = f"model.weights={tmp_path / 'pickle.pth'}"
    words = ("protect", run, "--out", tmp_path / "p", "--set", weights)
    assert "pickle" in refused(tmp_path, *words)


def test_the_checkpoint_that_is_of_another_network_is_named(finished: Path, tmp_path: Path) -> None:
    other, own = tmp_path / "other", finished / "p"
    other.mkdir()
    save_file(ResNet20(classes=26).state_dict(), other / "model.safetensors")
    digest = hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()
    held = {"model": {"name": "resnet20", "classes": 26}, "sha256": digest}
    (other / "model.json").write_text(json.dumps(held))
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--model", other), "--model"),
        (("--model", other, "--unprotected", own), "--model"),
        (("--model", other, "--unprotected", "none"), "--model"),
        (("--model", own, "--unprotected", other), "--unprotected"),
    ]
    for words, at_fault in cases:
        err = refused(tmp_path, "audit", finished / "run.toml", *words, "--out", tmp_path / "a")
        assert f"{at_fault} {other} is of another architecture than small_convnet" in err


def test_reports_of_what_is_no_audit(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path, "report", tmp_path / "gone")
    (tmp_path / "record.json").write_text('{"schema_version": 1}')
    assert "record.json" in refused(tmp_path, "report", tmp_path)
    assert "does not exist" in refused(tmp_path, "inspect", tmp_path / "gone")


def test_usage_errors_are_exit_2() -> None:
    code, out, err = sophon("protekt")
    assert (code, out) == (2, "")
    assert "protekt" in err


def test_a_head_that_cannot_be_found_lists_the_candidates(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = SmallConvNet.forward
    monkeypatch.setattr(SmallConvNet, "forward", lambda self, x: forward(self, x).softmax(1))
    err = refused(tmp_path, "protect", run_file, "--out", tmp_path / "p")
    assert "head was not found: set model.head to one of head" in err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("role", ["original", "restricted", "held_out", "benign"])
def test_a_folder_inside_the_images_is_refused(run_file: Path, tmp_path: Path, role: str) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
    table = f'source = "folder", path = "{tmp_path / "photos"}"'
    table = f"{{{table}}}" if role == "original" else f"[{{{table}}}]"
    folder = ["--set", f"{role}={table}"]
    where = str(tmp_path / "photos" / "run")
    message = refused(tmp_path, "protect", run_file, "--out", where, *folder)
    assert "lies in the images of a domain" in message
    places = {"--out": tmp_path / "a", "--store": tmp_path / "a"}
    for option in places:
        words = [word for pair in (places | {option: where}).items() for word in pair]
        message = refused(tmp_path, "audit", run_file, "--model", "m", *words, *folder)
        assert "lies in the images of a domain" in message
    assert not (tmp_path / "photos" / "run").exists()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ((), "--model is missing"),
        (("--controls", "--model", "x"), "leave one out"),
        (("--controls", "--budget", "5m"), "--budget is not for --controls"),
        (("--model", "x", "--budget", "soon"), "write a time such as"),
        (("--model", "x", "--budget", "0m"), "write a time such as"),
    ],
)
def test_audit_options_that_do_not_go_together(
    words: tuple[str, ...], fragment: str, run_file: Path, tmp_path: Path
) -> None:
    assert fragment in refused(tmp_path, "audit", run_file, "--out", tmp_path / "a", *words)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("audit", "--workers", "0"),
        ("protect", "--threads", "two"),
        ("audit", "--workers", "-1"),
    ],
)
def test_what_counts_is_a_whole_number(command: str, option: str, value: str) -> None:
    code, _, err = sophon(command, "x", option, value)
    assert code == 2
    assert f"'{option}': {value} is not a whole number from 1 on" in err


def test_a_dry_run_has_nothing_to_profile(run_file: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, "protect", run_file, "--dry-run", "--profile", "2")
    assert "leave one of them out" in said


def test_a_store_is_no_folder_of_the_users(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    words = ("audit", run_file, "--model", tmp_path / "letters.safetensors", "--out")
    said = refused(tmp_path, *words, tmp_path / "a", "--store", tmp_path / "photos")
    assert "photos is not empty (one.jpg)" in said
    assert [one.name for one in (tmp_path / "photos").iterdir()] == ["one.jpg"]


def test_an_audit_misses_its_run_file_first(tmp_path: Path) -> None:
    assert "none.toml does not exist" in refused(tmp_path, "audit", "none.toml", "--out", "a")


def test_a_file_of_words_is_no_dangerous_one(run_file: Path, tmp_path: Path) -> None:
    words = ("audit", run_file, "--model", run_file, "--out", tmp_path / "a")
    said = refused(tmp_path, *words)
    assert "is no file of weights" in said
    assert "pickle" not in said
    assert "is no audit record" in refused(tmp_path, "report", run_file)


def test_lines_beyond_what_was_expected_are_few_and_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("sophon._cli.progress.time.monotonic", lambda: next(clock))
    display = Display("lines", noun="trial", total=10, todo=10)
    for _ in range(60):
        display.step({}, "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) < 20
    assert " more than expected)" in lines[-1]
    assert "left" not in lines[-1]


@pytest.mark.slow
def test_controls_are_found_out_by_the_command(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The others are found out in test_controls.py.
    few_attacks(monkeypatch)
    few = dict(list(_controls.DECOYS.items())[:2])
    monkeypatch.setattr(_controls, "DECOYS", few)
    settings = ("--set", "audit.steps=4", "--set", "audit.evaluations=2")
    code, out, err = sophon(
        "audit", run_file, "--controls", "--out", tmp_path / "c", "--json", *settings
    )
    held = json.loads((tmp_path / "c" / "controls.json").read_text())["controls"]
    assert [row["control"] for row in held][:2] == list(few)
    assert len(held) == 4
    missed = [row["control"] for row in held if not row["passed"]]
    # On so few steps and images not all need be found out; what is said must agree.
    assert code == (5 if missed else 0), err
    assert all(name in err for name in missed)
    assert out.count('"event": "control"') == 4
    assert held[0]["control"] == "raises when trained"
    assert "crashed attacks" in held[0]["flags"]
    ran = len(list((tmp_path / "c" / "trials").glob("*.json")))
    forecast = json.loads(out.splitlines()[0])
    assert (forecast["event"], forecast["trials"]) == ("forecast", ran)
    # What was found can be read again, and is no audit of a model.
    code, out, _ = sophon("inspect", tmp_path / "c")
    assert code == 0
    assert "raises when trained" in out
    assert "controls" in refused(tmp_path, "report", tmp_path / "c")


def test_an_audit_with_a_budget_says_what_it_gives_up(run_file: Path, tmp_path: Path) -> None:
    words = ("audit", run_file, "--model", tmp_path / "letters.safetensors", "--out")
    code, _, err = sophon(*words, tmp_path / "a", "--budget", "1h")
    assert code == 0
    assert "forecast: 36 trials, 72 steps" in err
    code, _, err = sophon(*words, tmp_path / "b", "--budget", "0.001s")
    assert (code, (tmp_path / "b" / "record.json").exists()) == (2, False)
    assert "a budget of 0.001 s is too short" in err


def test_an_audit_without_the_model_before_says_what_it_cannot_claim(
    run_file: Path, tmp_path: Path
) -> None:
    words = ("--model", tmp_path / "letters.safetensors", "--unprotected", "none")
    code, out, err = sophon("audit", run_file, *words, "--out", tmp_path / "a")
    assert code == 0, err
    assert "verdict: void" in out
    text = (tmp_path / "a" / "report.md").read_text()
    assert "unprotected" in text
    for name in ("report.md", "report.html"):
        said = " ".join((tmp_path / "a" / name).read_text().split())
        assert "the model before protection was not given" in said
        assert "on the model before protection" not in said
    assert "&#39;" not in text


@pytest.mark.parametrize("command", ["audit", "pretrain", "demo", "evaluate", "export"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_is_refused_where_each_process_would_do_all(
    command: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    code, out, err = sophon(command)
    said = f"error: torchrun started 2 processes, and `sophon {command}` is work for one"
    assert (code, out) == (2, "")
    assert err.startswith(said) if rank == "0" else not err
    assert "torchrun" not in sophon("report", "nowhere")[2]


def test_an_audit_overwrites_nothing_but_its_own(finished: Path, tmp_path: Path) -> None:
    words = ["audit", finished / "run.toml", "--model"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.md").write_text("my own words")
    code, _, err = sophon(*words, finished / "p", "--out", mine)
    assert code == 2
    assert f"{mine} is not empty (report.md)" in err
    assert (mine / "report.md").read_text() == "my own words"
    other = tmp_path / "other.safetensors"
    state = load_file(finished / "p/model.safetensors")
    save_file({name: value + 0.001 for name, value in state.items()}, other)
    shutil.copytree(finished / "a", tmp_path / "a")
    code, _, err = sophon(*words, other, "--out", tmp_path / "a")
    assert code == 2
    assert f"{tmp_path / 'a'} holds the audit of another model than {other}" in err
    assert (tmp_path / "a/record.json").read_bytes() == (finished / "a/record.json").read_bytes()
    steps = json.loads((tmp_path / "a/record.json").read_text())["spec"]["steps"]
    again = [*words, finished / "p", "--out", tmp_path / "a", "--set", f"audit.steps={steps + 1}"]
    code, _, err = sophon(*again)
    assert code == 2
    assert f"holds the record of another audit of this model (audit.steps = {steps})" in err
    assert (tmp_path / "a/record.json").read_bytes() == (finished / "a/record.json").read_bytes()
    (tmp_path / "a/record.json").write_text("half a rec")
    code, _, err = sophon(*words, finished / "p", "--out", tmp_path / "a")
    assert code == 0, err
    assert json.loads((tmp_path / "a/record.json").read_text())["schema_version"]


def test_an_audit_of_other_images_does_not_take_the_place_of_the_first(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "a", tmp_path / "a")
    words = ("audit", finished / "run.toml", "--model", finished / "p", "--out", tmp_path / "a")
    code, _, err = sophon(*words, "--set", "restricted.0.limit=11")
    assert code == 2
    assert "holds the record of another audit of this model (other images)" in err
    assert (tmp_path / "a/record.json").read_bytes() == (finished / "a/record.json").read_bytes()


def test_weights_of_an_early_round_are_said_to_be_hardly_protected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    score = Score(correct=9, total=10)
    numbers = ("suppression_loss", "query_score", "suppression_gradient_norm", "wall_s")
    none = dict.fromkeys(("original_loss", "reinforcement_gradient_norm"))
    one = Round(
        index=0,
        strategies=(),
        domains=(),
        reinforcement_steps=1,
        **dict.fromkeys(numbers, 0.1),
        **none,
    )
    for shipped, warned in ((1, True), (2, False), (4, False)):
        made = Protected(SmallConvNet(), (one,) * 4, score, score, shipped, None)
        show_protected(made, tmp_path, "lines")
        assert ("hardly protected" in capsys.readouterr().err) is warned


def test_the_same_weights_twice_are_noticed(finished: Path, tmp_path: Path) -> None:
    words = ["--unprotected", finished / "p", "--set", "audit.steps=1", "--set", "audit.seeds=[0]"]
    words += ["--set", "audit.evaluations=2", "--out", tmp_path / "a"]
    code, _, err = sophon("audit", finished / "run.toml", "--model", finished / "p", *words)
    assert code == 0
    assert f"warning: {finished / 'p'} has the weights of the model before protection" in err
    assert "same weights" in (tmp_path / "a/report.md").read_text()


def _want_much_memory() -> None:
    torch.empty(1 << 50)


def _want_a_card() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _want_more_of_it() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")


def _want_pictures() -> None:
    np.empty(1 << 50, np.uint8)


def _want_a_map() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.parametrize(
    ("wanting", "said"),
    [
        (_want_much_memory, "can't allocate memory"),
        (_want_a_card, "Tried to allocate 2.00 GiB"),
        (_want_more_of_it, "ALLOC_FAILED"),
        (_want_pictures, "Unable to allocate 1.00 PiB"),
        (_want_a_map, "Cannot allocate memory"),
    ],
)
def test_a_run_out_of_memory_says_what_to_change(
    wanting: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        guarded(wanting)()
    assert ended.value.exit_code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: not enough memory (")
    assert len(line.splitlines()) <= 2
    assert said in line
    assert "original_batch_size" in line
    assert "model.gradient_checkpointing = true" in line


def test_another_fault_of_torch_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))()


def test_the_time_left_counts_no_trial_that_turns_out_to_be_stored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("sophon._cli.progress.time.monotonic", lambda: next(clock))
    display = Display("lines", noun="trial", total=10, todo=9)
    for fresh in (False, False, False, False, False, False, False, True):
        display.step({}, "", fresh=fresh)
    last = capsys.readouterr().err.splitlines()[-1]
    # Eight are seen: two are left, whatever was expected; each takes as long as the one that ran.
    rate, left = re.search(r"(\d+)\.0 s/trial, (.*) left", last).groups()  # type: ignore[union-attr]
    assert left == duration(2 * int(rate))


def test_a_suite_that_does_not_exist_is_refused_before_protecting(
    run_file: Path, tmp_path: Path
) -> None:
    words = ("protect", run_file, "--out", tmp_path / "p", "--set", "audit.suite=quik-1")
    assert "'quik-1' is no suite; there is quick-1, quick-2, standard-1" in refused(
        tmp_path, *words
    )


def test_weights_in_a_folder_of_the_hubs_layout(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    words = ("evaluate", run_file, "--set", f'model.weights="{tmp_path / "hub"}"')
    assert "is a folder without model.safetensors or pytorch_model.bin" in refused(tmp_path, *words)
    shutil.copy(tmp_path / "letters.safetensors", tmp_path / "hub" / "model.safetensors")
    assert sophon(*words)[:2] == sophon("evaluate", run_file)[:2]


def test_controls_that_could_say_nothing_say_why() -> None:
    row = {"failed": "neither convicted nor flagged", "reasons": ["no lead"]}
    assert _why_missed({**row, "advantage_removed": None}).endswith("flagged; no lead")
    assert _why_missed({**row, "advantage_removed": 0.4}) == row["failed"]


def test_an_extra_attack_may_be_named_as_reports_name_it(run_file: Path, tmp_path: Path) -> None:
    name = "init-FC-all +ridge_head adam 0.003 (batch size 128)"
    words = ("--set", f'audit.extra=["{name}"]')
    code, out, err = sophon("protect", run_file, "--dry-run", *words)
    assert code == 0, err
    assert "ridge_head" in out
    said = refused(
        tmp_path, "protect", run_file, "--dry-run", "--set", 'audit.extra=["ridge adam"]'
    )
    assert "audit.extra.0 = 'ridge adam' is no attack of a suite; did you mean" in said
    said = refused(tmp_path, "protect", run_file, "--dry-run", "--set", 'audit.extra=["0"]')
    assert "is no attack of a suite; name it as reports do, such as 'direct-all" in said


def test_a_protection_that_kept_no_weights_is_not_called_unfinished(
    run_file: Path, tmp_path: Path
) -> None:
    strict = ["protect.guard.tolerance_points=0", "protect.suppression_rate=5.0"]
    strict += ["protect.reinforcement_steps=0"]
    settings = [word for setting in strict for word in ("--set", setting)]
    out = tmp_path / "p"
    code, _, err = sophon("protect", run_file, "--out", out, *settings)
    assert code == 3, err
    assert err.splitlines()[-1].endswith(", into a new --out")
    for words in (
        ("inspect", out),
        ("export", out, "--to", tmp_path / "e"),
        ("audit", run_file, "--model", out, "--out", tmp_path / "a"),
    ):
        said = " ".join(sophon(*words)[1:])
        assert "finished, 3 of 3 rounds; no weights met the tolerance" in said
        assert "with a larger one (protect.guard), or less hindrance, into a new --out" in said
    look = tmp_path / "look"
    (look / "start").mkdir(parents=True)
    text = run_file.read_text().replace('"letters.', '"../letters.')
    (look / "run.toml").write_text(f"# Written by `sophon try`.\n{text}")
    with pytest.raises(IntactnessError, match=r"; delete its folder `protected` first, trained"):
        first_look(look / "run.toml", look, strict, "quiet", 1)
    for folder in (look, look / "audit"):
        said = sophon("report", folder)[2]
        assert "no weights met the tolerance: repeat its `sophon try`" in said
        assert "delete its folder `protected` first" in said


@pytest.mark.parametrize(
    ("resolved", "part", "done", "said"),
    [
        ({"rounds": 9}, "round", 2, "a protection not finished, 2 of 9 rounds"),
        ({"rounds": 9}, "round", 0, "a protection not finished, 0 of 9 rounds"),
        ({"steps": 100, "every": 30}, "stage", 2, "a pre-training not finished, 2 of 4 stages"),
    ],
)
def test_what_is_not_finished_is_said_to_be_so(
    resolved: dict[str, int], part: str, done: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"resolved": resolved}))
    if done:
        (tmp_path / f"{part}s.jsonl").write_text("{}\n" * done)
    code, out, _ = sophon("inspect", tmp_path)
    assert code == 0
    assert said in out
