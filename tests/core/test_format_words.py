"""Words of formats: each is one plug-in's, and the grammar, costs and learners ask it."""

from __future__ import annotations

import pytest

from qsearch.core.format_words import families, format_word, formats, groups_of, input_format
from qsearch.core.scheme import Scheme


def test_every_word_is_that_of_one_plug_in() -> None:
    known = formats()

    assert known[0] == "keep"
    assert len(known) == len(set(known))
    assert all(format_word(word) is not None for word in known[1:])
    assert format_word("int9") is None


def test_families_are_those_of_the_formats() -> None:
    assert set(families()) == {Scheme(word).family for word in formats()[1:]}


@pytest.mark.parametrize(("word", "form"), [("8", "uint8"), ("e3m4", "e3m4"), ("9", None)])
def test_an_input_has_the_grid_of_a_format(word: str, form: str | None) -> None:
    assert input_format(word) == form


@pytest.mark.parametrize(("group", "count"), [(-1, 1), (0, 3), (4, 9), (5, 6), (10, 3), (100, 3)])
def test_an_incomplete_group_counts_whole(group: int, count: int) -> None:
    assert groups_of(3, 10, group) == count
