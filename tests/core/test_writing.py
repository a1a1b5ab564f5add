"""Writing: one line for a full disk in any library's words, and headers that tell nothing of the
machine they were made on.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qsearch.core.artifacts import command_line, redacted, write_atomic, writing
from qsearch.core.errors import QSearchError


class RustError(Exception):
    """As safetensors raises it: no OSError."""


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RustError(FULL)])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(
        QSearchError, match=r"cannot write .*model\.safetensors: No space left on device;"
    ):
        write_atomic(path, fails)

    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_text() == "old"


def test_what_a_library_wraps_is_found() -> None:
    with pytest.raises(QSearchError, match="cannot write x: Permission denied"), writing(Path("x")):
        try:
            raise PermissionError(13, "Permission denied")
        except PermissionError as error:
            raise RuntimeError("could not") from error


def test_other_errors_are_raised_as_they_are() -> None:
    with pytest.raises(ValueError, match="a mistake of ours"), writing(Path("x")):
        raise ValueError("a mistake of ours")


def test_headers_hold_no_passwords_and_no_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    secret = f"{os.sep}srv{os.sep}clients{os.sep}acme{os.sep}model"
    argv = [
        f"{os.sep}opt{os.sep}bin{os.sep}qsearch",
        "evaluate",
        str(work / "run"),
        f"--prompts={home / 'lists' / 'p.txt'}",
        "--storage",
        "postgresql://me:pw@db.example:5432/trials?password=pw2",
        f"sqlite:///{home / 'a.db'}",
        secret,
        "0.5/step",
    ]

    assert command_line(argv) == (
        "qsearch evaluate run --prompts=~/lists/p.txt --storage "
        "postgresql://***@db.example:5432/trials?password=*** sqlite:///~/a.db …/model 0.5/step"
    )
    assert redacted("plain words, a=b") == "plain words, a=b"
