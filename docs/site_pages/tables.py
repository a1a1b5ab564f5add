"""Tables that a page asks for, made from measured numbers: `<!-- table NAME columns="a; b"
where="model=x*" -->`.

The comment may run over several lines. NAME is the stem of a JSON in notebooks/figures, or with `*`
that of several of one script, whose rows stand below each other. `columns` chooses and orders
columns (`a as b` renames), `where` keeps rows whose column matches a pattern (several, separated by
semicolons, must all hold), `part` takes another list of the file than `rows`. Below the table
stands where it comes from. `<!-- computed NAME -->` is a table of `site_pages/costs.py`, computed
and not measured.

`<!-- value NAME column="c" where="..." -->0.93<!-- end -->` is one number in a sentence: that of
the only row that is left, with `error="c"` a second column after ±, in `digits="2"` places behind
the point. With `by="c"` several rows may be left: each as that column's text and its number.
`python docs/readme.py` writes it between the comments, for who reads the file itself.
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
from pathlib import Path
from typing import Any

from .costs import COMPUTED
from .figures import Figure, figures_of
from .markdown import cell, table
from .missing import MissingError

_ASKED = re.compile(r"<!--\s*table\b(?P<asked>.*?)-->", re.DOTALL)
_VALUE = re.compile(
    r"(?P<before><!--\s*value\b(?P<asked>.*?)-->)(?:[^<]*<!--\s*end\s*-->)?", re.DOTALL
)
_COMPUTED = re.compile(r"<!--\s*computed\s+(\w+)\s*-->")
_FORM = re.compile(r"\s+(?P<name>[\w.*-]+)(?P<options>(?:\s+\w+=\"[^\"]*\")*)\s*")
_KNOWN = {"columns", "where", "part"}
_OF_VALUE = {"column", "error", "digits", "by"}


def filled(markdown: str, root: Path, page: str = "index.md") -> str:
    """A page's Markdown with its tables put in.

    Raises `MissingError` for a file, a column or rows that are not there, and for a comment that
    begins with `table` and is none of that form.
    """
    markdown = _COMPUTED.sub(lambda found: _computed(found[1], root), markdown)
    markdown = _VALUE.sub(lambda found: _value(found, root), markdown)
    return _ASKED.sub(lambda found: _table(found, root, page), markdown)


def with_values(markdown: str, root: Path) -> str:
    """A page's source with its values written between their comments.

    Raises `MissingError` as `filled` does.
    """
    return _VALUE.sub(lambda found: f"{found['before']}{_value(found, root)}<!-- end -->", markdown)


def rows_of(root: Path, name: str, options: dict[str, str]) -> list[dict[str, Any]]:
    """The chosen rows and columns of a measured table."""
    if unknown := set(options) - _KNOWN:
        raise MissingError(f"table {name}: no option {', '.join(sorted(unknown))}")
    rows = [row for held in figures_of(root, name) for row in _part(held, options.get("part"))]
    for condition in filter(None, map(str.strip, options.get("where", "").split(";"))):
        column, _, pattern = condition.partition("=")
        _known(name, column, rows)
        rows = [r for r in rows if fnmatch.fnmatchcase(cell(r.get(column)), pattern)]
        if not rows:
            raise MissingError(f"{name}.json has no row where {condition}")
    if "columns" in options:
        pairs = [_renamed(c) for c in options["columns"].split(";")]
        for column, _ in pairs:
            _known(name, column, rows)
        rows = [{new: r.get(old) for old, new in pairs} for r in rows]
    return rows


def _part(held: Figure, part: str | None) -> list[dict[str, Any]]:
    rows = held.rows if part is None else held.content.get(part)
    if not isinstance(rows, list):
        raise MissingError(f"{held.name}.json has no list {part!r}")
    return rows


def _computed(name: str, root: Path) -> str:
    if name not in COMPUTED:
        raise MissingError(f"no computed table {name}; there are {', '.join(COMPUTED)}")
    return COMPUTED[name](root)


def _renamed(text: str) -> tuple[str, str]:
    old, _, new = text.strip().partition(" as ")
    return old, new or old


def _known(name: str, column: str, rows: list[dict[str, Any]]) -> None:
    if not any(column in row for row in rows):
        raise MissingError(f"{name}.json has no column {column!r}")


def _value(comment: re.Match[str], root: Path) -> str:
    name, options = _read(comment)
    own = {k: options.pop(k) for k in _OF_VALUE & set(options)}
    if "column" not in own:
        raise MissingError(f"a value has a column: {comment[0]}")
    columns = [own[k] for k in ("column", "error") if k in own]
    rows = rows_of(root, name, options)
    for column in [*columns, *([own["by"]] if "by" in own else [])]:
        _known(name, column, rows)
    digits = own.get("digits")

    def number(row: dict[str, Any]) -> str:
        values = (row[column] for column in columns)
        return " ± ".join(f"{v:.{digits}f}" if digits else cell(v) for v in values)

    if "by" in own:
        return ", ".join(f"{cell(row[own['by']])} {number(row)}" for row in rows)
    if len(rows) != 1:
        raise MissingError(f"{len(rows)} rows instead of one: {comment[0]}")
    return number(rows[0])


def _read(comment: re.Match[str]) -> tuple[str, dict[str, str]]:
    """The name of a JSON and the options of a comment."""
    found = _FORM.fullmatch(comment["asked"])
    if found is None:
        raise MissingError(f'not of the form NAME option="...": {comment[0]}')
    asked = re.findall(r"(\w+)=\"([^\"]*)\"", found["options"])
    return found["name"], {option: " ".join(value.split()) for option, value in asked}


def _table(comment: re.Match[str], root: Path, page: str) -> str:
    name, options = _read(comment)
    rows = rows_of(root, name, options)
    sources = []
    for held in figures_of(root, name):
        link = posixpath.relpath(f"results/{held.script}.md", posixpath.dirname(page) or ".")
        sources.append(f"{held.source()} · [all numbers]({link}#{held.name})")
    return f"{table(rows)}\n<small>{'<br>'.join(sources)}</small>\n"
