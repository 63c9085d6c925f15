"""The documentation site builds without a warning, and the notebook runs from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import sophon

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built strictly in a process whose network leads nowhere."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs: the docs extra")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **nowhere},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "WARNING" not in run.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text())


@pytest.mark.parametrize("script", ["tabulate.py", "tabulate_errors.py"])
def test_a_script_of_the_results_says_which_audit_is_not_there(script: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = [str(tmp_path / "figure.svg"), f"one={tmp_path / 'nowhere'}"]
    words[1:1] = [str(tmp_path / "pictures.png")] if script == "tabulate_errors.py" else []
    command = [sys.executable, str(ROOT / "docs" / "results" / script), *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"error: {tmp_path / 'nowhere'} does not exist: name the folder")
    assert len(run.stderr.splitlines()) == 1


def test_every_page_is_there(site: Path) -> None:
    names = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    wanted = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert {f"{name}.html" for name in wanted} <= names
    assert {"results/index.html", "results/architectures.html", "design/engine.html"} <= names
    assert (site / "notebooks" / "first_steps.ipynb").is_file()
    assert (site / "report.png").is_file()


def test_the_api_has_every_public_name_with_its_docstring(site: Path) -> None:
    page = (site / "api.html").read_text()
    names = [name for name in sophon.__all__ if not name.startswith("__")]
    assert len(names) > 30
    assert [name for name in names if f'id="sophon.{name}"' not in page] == []
    text = " ".join(text_of(site / "api.html").split())
    for name in ("Protection", "Strategy", "protect"):
        first = " ".join((getattr(sophon, name).__doc__ or "").split("\n")[0].split())
        assert first.replace("`", "")[:40] in text


def test_the_command_line_page_has_every_command(site: Path) -> None:
    from typer.main import get_command

    from sophon._cli.application import app

    text = text_of(site / "cli.html")
    commands = get_command(app).commands
    assert len(commands) == 11
    assert [name for name in commands if f"Usage: sophon {name}" not in text] == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = [
        address
        for page in site.rglob("*.html")
        for address in re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(\w+:)?//", page.read_text()
        )
    ]
    assert loaded == []


def test_extending_fits_on_one_screen() -> None:
    assert len((ROOT / "docs" / "extend.md").read_text().splitlines()) <= 40


def test_the_pages_name_dictionaries_that_exist() -> None:
    rows = re.findall(
        r"`([A-Z]+(?:_[A-Z]+)*)`.*?`(_[\w/]+\.py)`", (ROOT / "docs/extend.md").read_text()
    )
    assert len(rows) >= 8
    for name, file in rows:
        source = (ROOT / "src" / "sophon" / file).read_text()
        assert re.search(rf"^{name}\b", source, re.MULTILINE), f"{name} in {file}"


def test_run_files_of_the_pages_are_valid() -> None:
    import tomllib

    from sophon._cli.run_spec import RunSpec
    from sophon._specs import parse_spec

    text = (ROOT / "docs/protect.md").read_text()
    first, terms = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    run = tomllib.loads(first)
    assert parse_spec(RunSpec, run, where="protect.md").restricted
    spec = parse_spec(RunSpec, {**run, **tomllib.loads(terms)}, where="protect.md").protect
    assert [term.kind for term in spec.hinder or ()] == ["erasure", "rehearsal"]


def test_what_the_page_of_python_iterates_tells_each_round_and_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from builders import original, quick_spec, restricted, trained_model

    text = (ROOT / "docs/python.md").read_text()
    (code,) = re.findall(r"```python\n(run = sophon.*?)```", text, re.DOTALL)
    attacks = sophon.AuditSpec(suite="look-1", steps=2, evaluations=2, seeds=(0,), batch_size=16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sophon, "ProtectSpec", quick_spec, raising=False)
    monkeypatch.setattr(sophon, "AuditSpec", lambda suite: attacks, raising=False)
    held: dict[str, Any] = {"sophon": sophon, "keep": original(), "refuse": restricted()}
    exec(code, held | {"model": trained_model()})
    said = capsys.readouterr().out.splitlines()
    rounds = [line.split(",")[0] for line in said if line.startswith("round ")]
    assert rounds == [f"round {number} of 6" for number in range(1, 7)]
    trials = [line.split(":")[0].split(" of ") for line in said if line.startswith("trial ")]
    assert [one for one, _ in trials] == [f"trial {at}" for at in range(1, len(trials) + 1)]
    assert len(trials) >= int(trials[-1][1]) >= 3


def test_the_page_of_sources_has_a_domain_of_each() -> None:
    import tomllib

    from sophon._data import SOURCES
    from sophon._specs import DomainSpec, parse_spec

    text = (ROOT / "docs/data.md").read_text()
    rows = re.findall(r"^\| `(\w+)` .*\| (`\[original\]`<br>.*) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == set(SOURCES)
    for name, lines in rows:
        held = tomllib.loads(lines.replace("<br>", "\n").replace("`", ""))
        assert parse_spec(DomainSpec, held["original"], where="data.md").source == name


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    nbformat: Any = pytest.importorskip("nbformat", reason="needs the docs extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nbclient: Any = pytest.importorskip("nbclient", reason="needs the docs extra")
        notebook = nbformat.read(ROOT / "docs/notebooks/first_steps.ipynb", as_version=4)
        assert all(not cell.get("outputs") for cell in notebook.cells)
        client = nbclient.NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "48 trials" in printed
    assert re.search(r"^verdict: \w+", printed, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


# What else a verdict's reasons are of: they convict, acquit or only report.
NOT_VOID = {"removed", "withstood", "slowed", "convicted", "profit"}
# Of each reason for a void verdict some of its words.
VOID = {
    "undefined": "leads a fresh one by only",
    "flag": "a flag's name",
    "looks": "an attacker may keep",
    "no room": "the budget ends too soon",
    "too little": "too little to tell",
    "unsure": "but seeds do not bear it out",
    "unlearnt": "no attack on the unprotected model learns this task",
    "luck": "its lead may be luck",
    "alone": "the model before protection was not given",
    "pictures": "pictures say nothing",
    "allowed": "whether allowed tasks are blocked as much cannot be told",
}


def test_every_reason_of_a_void_verdict_has_a_remedy() -> None:
    page = (ROOT / "docs/my-model.md").read_text(encoding="utf-8").partition("When it is void")[2]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")][2:]
    rooms = [path.read_text() for path in (ROOT / "src/sophon/_judgement").glob("*.py")]
    codes = {code for text in rooms for code in re.findall(r'Reason\("([a-z ]+)"', text)}
    assert codes == VOID.keys() | NOT_VOID
    assert all(any(words in row[1] for row in rows) for words in VOID.values())
    # What the page quotes is what is said, whatever lines it stands on there.
    said = re.sub(r'"\s*f?"|\s+', "", "".join(rooms))
    for words in re.findall(r'"([^"]+)"', " ".join(row[1] for row in rows)):
        assert re.sub(r"\s+", "", words) in said, words
