"""Fills the pages that are written from the code: the API, the command line, contributing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- filled when the site is built -->"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page's Markdown with its mark replaced by what the code says."""
    fill = FILLED.get(page.file.src_uri)
    return markdown if fill is None else markdown.replace(MARK, fill())


def api() -> str:
    """Return a mkdocstrings directive for every public name."""
    import sophon

    names = [name for name in sophon.__all__ if not name.startswith("__")]
    return "\n\n".join(f"::: sophon.{name}" for name in names)


def command_line() -> str:
    """Return every command's `--help`."""
    from sophon._cli import app

    group: Any = get_command(app)
    runner, parts = CliRunner(), []
    environment = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "92"}
    for arguments in ([], *([name] for name in group.commands)):
        result = runner.invoke(app, [*arguments, "--help"], env=environment, prog_name="sophon")
        title = " ".join(["sophon", *arguments])
        parts.append(f"## {title}\n\n```text\n{result.output.rstrip()}\n```")
    return "\n\n".join(parts)


def contributing() -> str:
    """Return CONTRIBUTING.md without its title."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n")[2]


FILLED = {"api.md": api, "cli.md": command_line, "contributing.md": contributing}
