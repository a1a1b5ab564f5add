"""Ctrl-C and SIGKILL at random moments: the same command goes on to the same end, and nothing is
left behind. All verbs, at more moments: `notebooks/figures/interrupts.py`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruption import Shell, moments, prepared

MOMENTS = 3
#: the command, whose modules take a minute to import
SLOW_IMPORT = """
import sys, time
from importlib.abc import MetaPathFinder

class Slow(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "qsearch.cli.commands":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
from qsearch.cli import main
main()
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Where commands are typed."""
    return Shell(tmp_path_factory.mktemp("interrupted"))


@pytest.fixture(scope="module")
def ready(shell: Shell) -> Path:
    """A finished run."""
    return prepared(shell)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.parametrize("verb", ["profile", "plans", "export", "run"])
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


def test_ctrl_c_while_python_imports_ends_without_a_traceback() -> None:
    done = subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    assert done.stdout.readline() == "importing\n"

    done.send_signal(signal.SIGINT)
    _, said = done.communicate(timeout=600)

    assert (done.returncode, said) == (-signal.SIGINT, "")


def test_a_worker_whose_parent_ended_before_it_began_ends_too() -> None:
    script = "import time; from qsearch.measure.workers import follow_parent; {}; time.sleep(600)"
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], check=True, stdout=subprocess.PIPE
    )

    orphan = subprocess.run(
        [sys.executable, "-c", script.format(f"follow_parent({int(ended.stdout)})")],
        timeout=300,
        check=False,
    )

    assert orphan.returncode == 1
