"""The Triton sources on a machine without a GPU: the same tests, in a process of its own where
Triton's interpreter runs the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's own process"
)
def test_every_kernel_is_its_twin_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 only")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *sorted(str(path) for path in HERE.glob("test_triton_*.py")),
    ]

    done = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
