"""Artefacts: whole or not there at all, and refused with a clear line when they are somebody
else's.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from qsearch.core import artifacts
from qsearch.core.artifacts import Header
from qsearch.core.errors import ArtifactError, QSearchError

HEADER = Header("qsearch.thing/1", graph="g1", parents={"table": "abc"}, seed=3, key="k")
Writer = Callable[[Path], None]


def write_large_json(path: Path) -> None:
    artifacts.write_json(path, HEADER, {"rows": list(range(50_000))})


def write_large_parquet(path: Path) -> None:
    artifacts.write_parquet(
        path, HEADER, pd.DataFrame({"a": [str(i * 7919) for i in range(50_000)]})
    )


WRITERS = pytest.mark.parametrize("write", [write_large_json, write_large_parquet])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose disk takes only 64 KB more: a small memory disk, or where none can be mounted
    a limit on the size of files.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
            check=False,
            capture_output=True,
        ).returncode
        == 0
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_json_artefact_comes_back_with_its_header(tmp_path: Path) -> None:
    content = {"a": 1, "rows": {"x": [1, 2], "y": "z"}, "list": [1, {"b": None}], "none": {}}

    artifacts.write_json(tmp_path / "f.json", HEADER, content, lines=("rows", "list", "none"))

    assert artifacts.read_json(tmp_path / "f.json", "qsearch.thing/1") == (HEADER, content)


def test_sections_named_in_lines_get_a_line_an_entry(tmp_path: Path) -> None:
    artifacts.write_json(
        tmp_path / "f.json", HEADER, {"rows": {"x": [1, 2], "y": "z"}}, lines=("rows",)
    )

    assert '    "x": [1, 2],\n    "y": "z"\n' in (tmp_path / "f.json").read_text()


def test_a_parquet_artefact_comes_back_with_its_header(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})

    artifacts.write_parquet(tmp_path / "f.parquet", HEADER, frame)

    header, read = artifacts.read_parquet(tmp_path / "f.parquet", "qsearch.thing/1", graph="g1")
    assert header == HEADER
    pd.testing.assert_frame_equal(read, frame)


def test_the_digest_depends_on_content_and_not_on_order() -> None:
    assert artifacts.digest({"a": 1, "b": [1, 2]}) == artifacts.digest({"b": [1, 2], "a": 1})
    assert artifacts.digest({"a": 1, "b": [1, 2]}) != artifacts.digest({"a": 1, "b": [2, 1]})


def test_what_is_not_a_number_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.canonical({"a": float("nan")})


def test_a_header_records_the_command_and_the_versions() -> None:
    assert HEADER.command.startswith(Path(sys.argv[0]).name)
    assert HEADER.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "optuna" in HEADER.versions


@WRITERS
def test_a_full_disk_leaves_nothing_behind(small_disk: Path, write: Writer) -> None:
    with pytest.raises(
        QSearchError,
        match=r"cannot write .*(No space left on device|File too large); give a folder with room",
    ):
        write(small_disk / "sub" / "file")

    assert [p for p in small_disk.rglob("*") if p.is_file()] == []


@WRITERS
def test_a_full_disk_leaves_the_older_file_as_it_was(small_disk: Path, write: Writer) -> None:
    (small_disk / "file").write_text("older")

    with pytest.raises(QSearchError, match="cannot write"):
        write(small_disk / "file")

    assert [(p.name, p.read_text()) for p in small_disk.iterdir()] == [("file", "older")]


def test_a_disk_that_fills_up_while_it_is_flushed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(QSearchError, match="No space left on device"):
        artifacts.write_text(tmp_path / "file", "content")

    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_for_another_reason_leaves_nothing_and_says_which(
    tmp_path: Path,
) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        artifacts.write_atomic(tmp_path / "file", write)

    assert list(tmp_path.iterdir()) == []


def test_content_that_has_no_json_form_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(tmp_path / "file", HEADER, {"a": float("inf")})

    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_halfway_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("older")
    script = (
        "import os, signal, sys; from pathlib import Path; from qsearch.core.artifacts import "
        "write_atomic\n"
        "write_atomic(Path(sys.argv[1]), lambda t: (t.write_text('half'), os.kill(os.getpid(), "
        "signal.SIGKILL)))"
    )

    done = subprocess.run([sys.executable, "-c", script, tmp_path / "file"], check=False)

    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "older"
    artifacts.write_text(tmp_path / "file", "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # what it left is taken away


@WRITERS
def test_a_folder_that_cannot_be_written_is_named_in_one_line(
    blocked_folder: Path, write: Writer
) -> None:
    with pytest.raises(QSearchError) as caught:
        write(blocked_folder / "file")

    assert str(blocked_folder / "file") in str(caught.value)
    assert "give a folder with room and write permission" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_way_to_make_it(tmp_path: Path) -> None:
    for read in (artifacts.read_json, artifacts.read_parquet):
        with pytest.raises(
            ArtifactError, match=r"nowhere does not exist; make it with the verb before this one"
        ):
            read(tmp_path / "nowhere", "qsearch.thing/1")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    for write, read in (
        (write_large_json, artifacts.read_json),
        (write_large_parquet, artifacts.read_parquet),
    ):
        write(tmp_path / "file")
        whole = (tmp_path / "file").read_bytes()
        (tmp_path / "file").write_bytes(whole[: int(part * len(whole))])

        with pytest.raises(
            ArtifactError, match=r"not readable as (JSON|Parquet), perhaps truncated"
        ):
            read(tmp_path / "file", "qsearch.thing/1")


@pytest.mark.parametrize(
    "foreign", ["[1, 2]", "{}", '{"header": 3}', '"text"', "null", '{"layers": {}}']
)
def test_a_foreign_json_file_is_refused(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "f.json").write_text(foreign)

    with pytest.raises(ArtifactError, match="has no qsearch header"):
        artifacts.read_json(tmp_path / "f.json", "qsearch.thing/1")


def test_a_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "f.parquet")

    with pytest.raises(ArtifactError, match="has no qsearch header"):
        artifacts.read_parquet(tmp_path / "f.parquet", "qsearch.thing/1")


def test_json_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text("[" * 200_000 + "]" * 200_000)

    with pytest.raises(ArtifactError, match="not readable as JSON"):
        artifacts.read_json(tmp_path / "f.json", "qsearch.thing/1")
    with pytest.raises(ArtifactError, match="not a qsearch artefact"):
        artifacts.peek(tmp_path / "f.json")


def test_an_artefact_of_another_kind_is_refused_with_both_names(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "f.json", HEADER, {})

    with pytest.raises(
        ArtifactError,
        match=(
            r"must be a qsearch\.plan/1 file, its header says 'qsearch\.thing/1'; give the file "
            r"that holds the plan"
        ),
    ):
        artifacts.read_json(tmp_path / "f.json", "qsearch.plan/1")


def test_an_artefact_of_another_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "f.json", HEADER, {})

    with pytest.raises(
        ArtifactError, match=r"has schema 'qsearch\.thing/1', this qsearch reads version 2"
    ):
        artifacts.read_json(tmp_path / "f.json", "qsearch.thing/2")


def test_an_artefact_of_another_graph_is_refused_with_both_graphs(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "f.json", HEADER, {})
    artifacts.write_parquet(tmp_path / "f.parquet", HEADER, pd.DataFrame({"a": [1]}))

    for path, read in (
        (tmp_path / "f.json", artifacts.read_json),
        (tmp_path / "f.parquet", artifacts.read_parquet),
    ):
        with pytest.raises(
            ArtifactError, match="was made for graph g1, the model here is graph g2"
        ):
            read(path, "qsearch.thing/1", "g2")


def test_a_header_with_entries_of_a_later_qsearch_is_read(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "f.json", HEADER, {})
    whole = json.loads((tmp_path / "f.json").read_text())
    whole["header"]["later"] = 1
    (tmp_path / "f.json").write_text(json.dumps(whole))

    assert artifacts.read_json(tmp_path / "f.json", "qsearch.thing/1") == (HEADER, {})


def test_peek_tells_the_schema_of_any_artefact(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "f.json", HEADER, {})
    artifacts.write_parquet(tmp_path / "f.parquet", HEADER, pd.DataFrame({"a": [1]}))

    assert [artifacts.peek(tmp_path / name) for name in ("f.json", "f.parquet")] == [
        "qsearch.thing/1"
    ] * 2


@pytest.mark.parametrize("name", ["f.json", "f.parquet", "nowhere.json", "nowhere.parquet"])
def test_peek_refuses_what_is_no_artefact(tmp_path: Path, name: str) -> None:
    if name.startswith("f"):
        (tmp_path / name).write_text("[]")

    with pytest.raises(ArtifactError, match="is not a qsearch artefact"):
        artifacts.peek(tmp_path / name)
