"""Write site/: the Markdown pages, the public API and the command line as HTML."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from jinja2 import Environment
from markdown_it import MarkdownIt
from markupsafe import Markup

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
COMMANDS = ("demo", "protect", "audit", "report", "compare", "evaluate", "inspect")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: 6px; }
code { font: .9em ui-monospace, monospace; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #8886; padding: .2rem .6rem; text-align: left; }
img { max-width: 100%; }
nav a { margin-right: .8rem; }
</style></head><body>
<nav>{% for name, href in links %}<a href="{{ href }}">{{ name }}</a>{% endfor %}</nav>
{{ body }}
</body></html>
"""


def sources() -> list[Path]:
    """Return the Markdown pages, relative to the repository root, the README first."""
    top = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    below = [page.relative_to(ROOT) for page in sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in top if (ROOT / page).is_file()] + below


def api() -> str:
    """Return the public names of the package with signatures and docstrings, as Markdown."""
    import sophon

    parts = ["# API"]
    for name in sophon.__all__:
        thing = getattr(sophon, name)
        parts.append(f"## `sophon.{name}`")
        if inspect.isfunction(thing) or name in ("Audit", "Protection"):
            parts.append(f"```python\n{name}{inspect.signature(thing)}\n```")
        if inspect.isclass(thing) or inspect.isfunction(thing):
            parts.append(inspect.getdoc(thing) or "")
        if inspect.isclass(thing):
            parts.extend(_methods(thing))
    return "\n\n".join(parts)


def _methods(cls: type) -> list[str]:
    lines = []
    for name, member in vars(cls).items():
        if inspect.isfunction(member) and not name.startswith("_") and member.__doc__:
            lines.append(f"**`{name}{inspect.signature(member)}`**\n\n{inspect.getdoc(member)}")
    return lines


def command_line() -> str:
    """Return every command's `--help`, as Markdown."""
    parts = ["# Command line"]
    for arguments in ([], *([name] for name in COMMANDS)):
        title = " ".join(["sophon", *arguments])
        run = subprocess.run(
            [Path(sys.executable).with_name("sophon"), *arguments, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "92"},
        )
        parts.append(f"## `{title}`\n\n```text\n{run.stdout.rstrip()}\n```")
    return "\n\n".join(parts)


def render(markdown: str, page: Path, links: list[Path]) -> str:
    """Return `markdown` as a whole HTML page; links between pages are turned to .html."""
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    body = re.sub(r'href="(?!https?:)([^"#]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)
    navigation = [
        (_name(link), os.path.relpath(link.with_suffix(".html"), page.parent)) for link in links
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(title=f"Sophon: {page.stem}", links=navigation, body=Markup(body))


def _name(page: Path) -> str:
    """Return what a page is called: a README below the root goes by its folder."""
    return page.parent.name if page.stem == "README" and page.parent.name else page.stem


def main() -> None:
    """Build the whole site afresh."""
    pages = {page: (ROOT / page).read_text() for page in sources()}
    pages |= {Path("API.md"): api(), Path("CLI.md"): command_line()}
    links = [page for page in pages if len(page.parts) == 1]
    links += [page for page in pages if page.parts[:1] == ("docs",)]
    shutil.rmtree(SITE, ignore_errors=True)
    for page, markdown in pages.items():
        target = SITE / page.with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(markdown, page, links))
    for kind in ("png", "svg"):
        for picture in (ROOT / "docs").rglob(f"*.{kind}"):
            target = SITE / picture.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, target)
    shutil.copyfile(ROOT / "LICENSE", SITE / "LICENSE")
    shutil.copyfile(SITE / "README.html", SITE / "index.html")
    print(f"{len(pages)} pages in {SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
