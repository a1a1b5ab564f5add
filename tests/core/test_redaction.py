"""What goes into files that people publish holds no passwords and no places of somebody's machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qsearch.core.artifacts import Header, write_json
from qsearch.core.redaction import published, redacted


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("postgresql://me:secret@db.lab:5432/x", "postgresql://***@db.lab:5432/x"),
        ("--storage=mysql+pymysql://me:s%40e@h/x", "--storage=mysql+pymysql://***@h/x"),
        ("redis://token@h", "redis://***@h"),
        ("https://h/a@b", "https://h/a@b"),
        ("fit runs/dit --folds 5", "fit runs/dit --folds 5"),
        ("me@h", "me@h"),
    ],
)
def test_user_names_and_passwords_of_urls_go(given: str, shown: str) -> None:
    assert redacted(given) == shown
    assert published(given) == shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("evaluate /home/ada/runs/dit --plans 4", "evaluate …/dit --plans 4"),
        ("model: /home/ada/models/pipe\n", "model: …/pipe\n"),
        ("--output=/srv/x/y", "--output=…/y"),
        ("'/srv/x/y'", "'…/y'"),
        (r"C:\Users\ada\runs\dit", "…/dit"),
        ("runs/dit and ../other/run and ./a/b", "runs/dit and ../other/run and ./a/b"),
        ("noise/step, 3/4, a / b", "noise/step, 3/4, a / b"),
        ("https://h.lab/a/b", "https://h.lab/a/b"),
    ],
)
def test_absolute_paths_are_known_by_their_ends(given: str, shown: str) -> None:
    assert published(given) == shown


def test_a_header_keeps_the_command_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = "postgresql://me:secret@db/x"
    monkeypatch.setattr(
        sys, "argv", ["/home/ada/bin/qsearch", "fit", "/home/ada/run", "--storage", storage]
    )

    write_json(tmp_path / "x.json", Header("qsearch.poem/1"), {})

    text = (tmp_path / "x.json").read_text()
    assert json.loads(text)["header"]["command"] == (
        "qsearch fit …/run --storage postgresql://***@db/x"
    )
    assert "secret" not in text
    assert "ada" not in text
