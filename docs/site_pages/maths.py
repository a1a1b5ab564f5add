"""Formulas as MathML, made while the site is built: browsers draw it themselves, no script is
needed.
"""

from __future__ import annotations

import html
import re

from .missing import MissingError

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def as_mathml(page: str) -> str:
    """A page with its formulas (pymdownx.arithmatex, generic) as MathML.

    Raises `MissingError` for a formula that is no LaTeX.
    """
    return _FORMULA.sub(_formula, page)


def _formula(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    block = found[2] == "["
    text = html.unescape(found[3])
    try:
        made = convert(text, display="block" if block else "inline")
    except Exception as error:  # the library raises many kinds, all of which mean: not LaTeX
        raise MissingError(f"the formula {text!r} does not render: {error}") from error
    return f'<div class="formula">{made}</div>' if block else made
