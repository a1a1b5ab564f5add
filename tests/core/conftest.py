"""Storages of every kind for tests of what is stored, real database servers among them: each test
has one of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.databases import SERVERS, AbstractServer, server

#: "postgresql" or "mysql" -> the URL of a new database
NewDatabase = Callable[[str], str]


@pytest.fixture(scope="session")
def new_database() -> Iterator[NewDatabase]:
    """Starts each kind of server when it is first asked for; skips where one is not installed."""
    running, count = dict[str, AbstractServer](), itertools.count()
    with ExitStack() as stack:

        def made(kind: str) -> str:
            if SERVERS[kind].binaries() is None:
                pytest.skip(SERVERS[kind].missing)
            pytest.importorskip(SERVERS[kind].driver)
            if kind not in running:
                running[kind] = stack.enter_context(server(kind))
            name = f"trials{next(count)}"
            running[kind].create(name)
            return running[kind].url(name)

        yield made


@pytest.fixture(
    params=["sqlite", "journal", *(pytest.param(name, marks=pytest.mark.slow) for name in SERVERS)]
)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new storage."""
    if request.param in SERVERS:
        made: str = request.getfixturevalue("new_database")(request.param)
        return made
    return f"{request.param}:///{tmp_path}/trials"
