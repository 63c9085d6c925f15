"""Numbers as text, tables, and the templates that documents are rendered with. No torch."""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sophon._base.errors import CheckpointError
from sophon._base.files import write_text
from sophon._judgement.statistics import interval_of
from sophon._records.audit_record import Measurement
from sophon._records.metrics import NONE, kind_of, shown

_SHORT = 26
# What Markdown would take for emphasis, code, a link, an image, the end of a cell or, at first, for
# a heading or a list, and pages that show addresses as links for one; underscores within a word are
# none.
_MARKS = re.compile(
    r"[\\`*|~@]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#+=-](?=[#+=-]*(\s|$))"
    r"|(?<=[A-Za-z]):(?=//)|(?<=\bwww)\."
)
# How reports and comparisons begin.
_WRITTEN_HERE = re.compile(
    rb"\A# (Fine-tuning audit of |Comparison of fine-tuning audits)"
    rb"|\A<!doctype html>.*?<title>(Audit of |Comparison of fine-tuning audits)",
    re.DOTALL,
)
Thing = TypeVar("Thing")


class Table(NamedTuple):
    """A table of text, the same in every document; `note` says what its numbers are."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def table(header: Iterable[str], rows: Iterable[Iterable[str]], note: str = "") -> Table:
    """Return a table of these rows."""
    return Table(tuple(header), tuple(tuple(row) for row in rows), note)


def by_column(
    things: Iterable[Thing], columns: Mapping[str, Callable[[Thing], str]], note: str = ""
) -> Table:
    """Return a table with a row for each thing; a column is its title and what it says of one."""
    return table(columns, ([cell(one) for cell in columns.values()] for one in things), note)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash for none."""
    return NONE if value is None else f"{100 * value:z.{digits}f} %"


def score_text(score: Measurement | None) -> str:
    """Return a score in its unit with its 95 % interval, or a dash."""
    if score is None:
        return NONE
    low, high = kind_of(score).interval(interval_of(score))
    return f"{shown(score)} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"


def plain(text: str) -> str:
    """Return `text` as one line that Markdown shows as it is, in a table cell too."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    safe = str(escape(_MARKS.sub(r"\\\g<0>", line)))
    # Quotes do no harm outside an attribute, and a Markdown file is read as text, too.
    return safe.replace("&#39;", "'").replace("&#34;", '"')


def fenced(text: str) -> Markup:
    """Return `text` for a fenced block of Markdown, which it cannot end."""
    return Markup(text.replace("```", "'''"))


def markdown_table(held: Table) -> Markup:
    """Return a table as Markdown."""
    lines = [held.header, ("---",) * len(held.header)]
    lines += [tuple(map(plain, row)) for row in held.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return Markup(f"{text}\n\n{plain(held.note)}" if held.note else text)


def html_table(held: Table, kind: str = "") -> Markup:
    """Return a table as HTML that scrolls sideways where it must; `kind` is its class."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in held.header)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in held.rows)
    long = " long" if "trials" in kind else ""
    note = f'<p class="soft">{escape(held.note)}</p>' if held.note else ""
    return Markup(
        f'<div class="wide{long}" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>{note}"
    )


def _cell(text: str) -> str:
    # Numbers stay on one line; what is long may wrap.
    kind = ' class="text"' if len(text) > _SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


def render(name: str, **values: Any) -> str:
    """Return the template `name` filled in; all but `Markup` is escaped."""
    page = name.endswith(".html.j2")
    environment = Environment(
        loader=PackageLoader("sophon._reporting"),
        autoescape=page,
        finalize=None if page else lambda v: v if isinstance(v, Markup) else plain(str(v)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"fenced": fenced, "markdown": markdown_table, "as_table": html_table}
    return environment.get_template(name).render(**values)


def require_replaceable(path: Path) -> None:
    """Raise CheckpointError unless `path` is free, a report or comparison of sophon's, which may be
    replaced, or a device or pipe, which may be written to.
    """
    remedy = "name a new file, or a report that sophon wrote"
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to nothing: {remedy}") from None
        return
    if stat.S_ISREG(mode):
        with path.open("rb") as file:
            if not _WRITTEN_HERE.search(file.read(2000)):
                raise CheckpointError(f"{path} is no report and stays as it is: {remedy}")
    elif not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise CheckpointError(f"{path} is no file to write to: {remedy}")


class Document:
    """What is shown as one HTML page, and as Markdown."""

    def rendered(self, form: str) -> str:
        """Return it as `html`, without references to anything outside, or as `md`."""
        raise NotImplementedError

    def html(self) -> str:
        """Return it as one self-contained HTML page, which says everything without scripts."""
        return self.rendered("html")

    def markdown(self) -> str:
        """Return it as Markdown."""
        return self.rendered("md")

    def write_html(self, path: str | Path) -> None:
        """Write the HTML page to `path`, whole or not at all; folders are made.

        Raises CheckpointError as `require_replaceable`.
        """
        self._write(Path(path), "html")

    def write_markdown(self, path: str | Path) -> None:
        """Write the Markdown text to `path`, as `write_html`."""
        self._write(Path(path), "md")

    def _write(self, path: Path, form: str) -> None:
        require_replaceable(path)
        text = self.rendered(form)
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a link the file that it names is replaced.
        write_text(path.resolve(), text)
