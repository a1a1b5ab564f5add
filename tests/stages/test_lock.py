"""Two commands in one run's folder: the second is told of the first, and nothing is touched; a
command that was killed holds nothing.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsearch.core.errors import QSearchError
from qsearch.stages.lock import NAME, locked

_HOLD = """
import sys, time
from pathlib import Path
from qsearch.stages.lock import locked
with locked(Path(sys.argv[1]), "profile", together=sys.argv[2] == "together"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def other(folder: Path, together: bool) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    how = "together" if together else "alone"
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("theirs", "ours"), [(False, False), (False, True), (True, False)], ids=str
)
def test_a_second_command_is_told_the_process_of_the_first(
    tmp_path: Path, theirs: bool, ours: bool
) -> None:
    with other(tmp_path, theirs) as process:
        with (
            pytest.raises(QSearchError, match=rf"process {process.pid} \(qsearch profile\); wait"),
            locked(tmp_path, "evaluate", together=ours),
        ):
            pytest.fail("both had it")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path, "evaluate", together=ours):
            pass


def test_those_that_add_to_one_study_share_the_folder(tmp_path: Path) -> None:
    with other(tmp_path, True), locked(tmp_path, "evaluate", together=True):
        pass


def test_one_command_leaves_no_lock_and_a_folder_of_no_locks_is_used(tmp_path: Path) -> None:
    with locked(tmp_path, "profile"):
        assert (tmp_path / NAME).is_file()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "missing", "profile"):
        pass
