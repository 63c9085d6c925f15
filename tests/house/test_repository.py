"""The repository keeps its own rules: tests assert, docs stay true, imports stay clean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "sophon").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
TEXTS = sorted(
    path
    for pattern in ("src/**/*", "tests/**/*", "docs/**/*", "recipes/**/*", "benchmarks/**/*", "*")
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".md", ".toml", ".txt", ".j2", ".html", ".css", ".json", ".svg"}
)
FORBIDDEN = {"learn2learn", "higher", "hydra", "wandb"}
TORCHLESS = ("_attacks", "_judgement", "_records", "_reporting", "_specs")
RAISING = {"raises", "warns", "deprecated_call", "fail"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def call_names(node: ast.AST) -> Iterator[str]:
    """Yield the last part of each called name below `node`: `a.b.c(...)` gives `c`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            function = call.func
            if isinstance(function, ast.Attribute):
                yield function.attr
            elif isinstance(function, ast.Name):
                yield function.id


def asserts_something(function: ast.AST) -> bool:
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    return any(name in RAISING or name.startswith("assert_") for name in call_names(function))


def toothless(module: ast.Module) -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    # A test may assert through a function of its own module.
    asserting = {
        node.name
        for node in module.body
        if isinstance(node, functions)
        and not node.name.startswith("test_")
        and asserts_something(node)
    }
    return [
        node.name
        for node in ast.walk(module)
        if isinstance(node, functions)
        and node.name.startswith("test_")
        and not asserts_something(node)
        and not asserting & set(call_names(node))
    ]


def imported(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each import; the name is empty for `import module`."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def torch_loads(module: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            yield node


def weights_only(call: ast.Call) -> bool:
    return any(
        word.arg == "weights_only"
        and isinstance(word.value, ast.Constant)
        and word.value.value is True
        for word in call.keywords
    )


@pytest.mark.parametrize("path", TESTS, ids=named)
def test_every_test_asserts_something(path: Path) -> None:
    assert toothless(tree(path)) == []


def test_a_test_without_assertion_would_be_found() -> None:
    module = ast.parse(
        "def test_a():\n  f()\n"
        "def test_b():\n  assert f()\n"
        "def test_c():\n  with pytest.raises(E):\n    f()\n"
        "def test_d():\n  assert_close(f(), 1)\n"
    )
    assert toothless(module) == ["test_a"]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_source_imports_nothing_forbidden(path: Path) -> None:
    roots = {module.split(".")[0] for module, _ in imported(tree(path))}
    assert not roots & FORBIDDEN
    # The exception class is needed to refuse pickles politely.
    pickles = {pair for pair in imported(tree(path)) if pair[0] in {"pickle", "cPickle", "dill"}}
    assert pickles <= {("pickle", "UnpicklingError"), ("pickle", "PicklingError")}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_source_loads_tensors_only(path: Path) -> None:
    careless = [call.lineno for call in torch_loads(tree(path)) if not weights_only(call)]
    assert careless == [], "torch.load needs weights_only=True"


def test_a_careless_load_would_be_found() -> None:
    module = ast.parse("torch.load(f)\ntorch.load(f, weights_only=False)\n")
    assert [weights_only(call) for call in torch_loads(module)] == [False, False]
    module = ast.parse("torch.load(f, weights_only=True)\n")
    assert [weights_only(call) for call in torch_loads(module)] == [True]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_only_the_command_line_prints(path: Path) -> None:
    prints = any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "input"}
        for node in ast.walk(tree(path))
    )
    assert path.parent.name == "_cli" or not prints


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_public_names_have_docstrings(path: Path) -> None:
    module = tree(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    silent = [
        node.name
        for node in module.body
        if isinstance(node, kinds)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert silent == []
    assert not module.body or ast.get_docstring(module), "the module says what it is for"


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_no_file_names_a_machine_path(path: Path) -> None:
    # Built from parts, so that this file does not find itself.
    pattern = "|".join("/" + folder + "/" for folder in ("home", "root", "work", "opt", "Users"))
    found = re.findall(rf"(?<![\w.:/])(?:{pattern})\S*", path.read_text())
    assert found == []


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 65


def test_contributing_names_every_room_and_no_other() -> None:
    package = ROOT / "src" / "sophon"
    rooms = {path.name for path in package.iterdir() if (path / "__init__.py").is_file()}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `(_\w+)` \|", text, re.MULTILINE)) == rooms
    inner = {str(p.parent.relative_to(package)) for p in package.glob("*/*/__init__.py")}
    assert inner == {"_protection/terms", "_judgement/flags", "_data/sources"}
    assert list(package.glob("*/*/*/__init__.py")) == []


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_modules_and_functions_are_short_and_names_plain(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        node.name
        for node in ast.walk(tree(path))
        if isinstance(node, functions) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []
    inside = path.relative_to(ROOT / "src" / "sophon").parts
    assert sum(part.startswith("_") and not part.startswith("__") for part in inside) <= 1


READ_FIRST = ("index", "my-model", "protect", "loading", "data", "python", "diffusion", "suites")


def test_the_readme_shows_the_two_commands() -> None:
    lines = [line.strip().lstrip("$ ") for line in (ROOT / "README.md").read_text().splitlines()]
    for command in ("make demo", "make test"):
        assert any(line.split("#")[0].strip() == command for line in lines), command


def test_the_readme_run_file_is_valid() -> None:
    from sophon._cli.run_spec import RunSpec
    from sophon._specs import parse_spec

    for page, source in (("README.md", "folder"), ("docs/diffusion.md", "npz")):
        block, *_ = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        spec = parse_spec(RunSpec, tomllib.loads(block), where=page)
        assert spec.original.source == source


def test_the_readme_fits_three_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in READ_FIRST)])
def test_sentences_are_short(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    prose = " ".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    sentences = [s.split() for s in re.split(r"(?<=[.:?;])\s", prose) if len(s.split()) > 2]
    assert sum(map(len, sentences)) / len(sentences) <= 25


def test_readme_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_continuous_integration_runs_what_the_readme_says() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines.index("make check") < lines.index("make test")
    assert lines[-1] == "make test", "the last line printed is pytest's own"


def test_constraints_are_exact_and_cover_the_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", pin)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["vision"], *extras["demo"], *extras["dev"][1:]]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in wanted}
    assert names <= {pin.split("==")[0].lower() for pin in pins}


def test_rooms_without_torch_stay_so() -> None:
    folders = [ROOT / "src" / "sophon" / room for room in TORCHLESS]
    files = [p for folder in folders for p in sorted(folder.rglob("*.py")) if p.stem != "export"]
    names = [".".join(p.relative_to(ROOT / "src").with_suffix("").parts) for p in files]
    assert len(names) > len(TORCHLESS)
    code = "import sys, {}; print(sorted({{'torch', 'torchvision'}} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code.format(", ".join(names))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_the_import_rules_name_each_room_without_torch() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(item for item in contracts["contracts"] if item["id"] == "no-torch")
    assert {f"sophon.{room}" for room in TORCHLESS} == set(contract["source_modules"])


def test_only_the_kind_of_score_asks_what_a_task_is_called() -> None:
    asked = [named(p) for p in SOURCES if re.search(r"\.task (==|!=|in) ", p.read_text())]
    assert asked == ["src/sophon/_records/metrics.py"]
