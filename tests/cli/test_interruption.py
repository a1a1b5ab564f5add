"""Ctrl-C and SIGKILL at random moments: the same command goes on to the same end, and nothing is left
behind. All verbs, at more moments: `notebooks/figures/interrupts.py`.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.interruption import Shell, moments, prepared

pytestmark = pytest.mark.slow
MOMENTS = 3


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Where commands are typed."""
    return Shell(tmp_path_factory.mktemp("interrupted"))


@pytest.fixture(scope="module")
def ready(shell: Shell) -> Path:
    """A finished run."""
    return prepared(shell)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.parametrize("verb", ["start", "profile", "plans", "export", "run"])
def test_an_interrupted_command_goes_on_to_the_same_end(
    verb: str, how: signal.Signals, shell: Shell, ready: Path
) -> None:
    found = moments(shell, ready, verb, MOMENTS, how)

    assert all(found.same), [end.text for end in found.ended]
    assert found.left == ()
    for end in (*found.cut, *found.ended):
        assert "Traceback" not in end.text
        assert end.processes == 0
    if how == signal.SIGINT:
        assert all(end.tidy for end in found.cut)
        assert {end.code for end in found.cut} <= {130, -signal.SIGINT}
