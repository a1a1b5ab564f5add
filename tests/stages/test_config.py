"""Configs: paths that hold wherever one stands, limits that don't join each other, keys set and
unset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.stages import config
from qsearch.stages.allocate import AllocateSettings
from qsearch.stages.config import Config, load, parse, save, with_changes


def written(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def saved_pipeline(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_configs_are_read_as_editors_leave_them(tmp_path: Path, encoding: str, end: str) -> None:
    text = f"model: scenes-dit{end}folder: läufe/eins{end}"
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "c.yaml").write_bytes(mark + text.encode(encoding))

    found = load(tmp_path / "c.yaml")

    assert (found.model, found.folder) == ("scenes-dit", tmp_path / "läufe" / "eins")


def test_relative_paths_are_read_from_the_config_s_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_pipeline(tmp_path / "models" / "mine")
    content = {
        "model": "../models/mine",
        "folder": "../runs/mine",
        "prompts": "prompts.txt",
        "allocate": {"device": "latency.json", "latency": 1.0},
    }
    path = written(tmp_path / "configs" / "mine.yaml", content)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    found = load(path)

    assert Path(found.model) == tmp_path / "models" / "mine"
    assert (found.folder or Path()).resolve() == tmp_path / "runs" / "mine"
    assert found.prompts == tmp_path / "configs" / "prompts.txt"
    assert found.allocate.device == str(tmp_path / "configs" / "latency.json")


def test_a_config_written_by_hand_into_a_run_s_folder_is_that_run_s(tmp_path: Path) -> None:
    written(tmp_path / "mine" / "config.yaml", {"model": "scenes-dit"})

    assert load(tmp_path / "mine").folder == tmp_path / "mine"
    assert load(written(tmp_path / "other.yaml", {"model": "x"})).folder == Path("runs/other")


def test_a_run_may_lie_beside_a_config_and_a_file_of_a_run_is_no_run(tmp_path: Path) -> None:
    written(tmp_path / "config.yaml", {"model": "scenes-dit"})
    written(tmp_path / "mine" / "config.yaml", {"model": "scenes-unet"})
    plan = tmp_path / "mine" / "plan.json"
    plan.write_text("{}")

    assert load(tmp_path / "mine").model == "scenes-unet"
    with pytest.raises(QSearchError, match=r"plan.json is a file; give the run's folder, such as"):
        load(plan)


def test_a_run_s_config_holds_wherever_one_stands_and_after_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_pipeline(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    monkeypatch.chdir(tmp_path)
    made = Config(model="pipe", folder=Path("run"), prompts=Path("prompts.txt"))
    save(made, Path("run/config.yaml"))
    monkeypatch.chdir("/")
    (tmp_path / "run").rename(tmp_path / "moved")

    found = load(tmp_path / "moved")

    assert found.folder == tmp_path / "moved"
    assert Path(found.model) == tmp_path / "pipe"
    assert found.prompts == tmp_path / "prompts.txt"


def test_a_saved_config_names_every_section_and_no_default(tmp_path: Path) -> None:
    made = parse({"model": "scenes-dit", "evaluate": {"samples": 3}}, "here")
    save(made, tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert content.pop("evaluate") == {"samples": 3}
    assert content.pop("model") == "scenes-dit"
    sections = "sampling profile calibrate allocate reconstruct fit explain".split()
    assert content == {name: {} for name in sections}
    assert load(tmp_path / "config.yaml").evaluate == made.evaluate


def test_names_that_are_no_folders_stay_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "mine.yaml", {"model": "scenes-dit", "allocate": {"device": "h200"}})

    found = load(path)

    assert (found.model, found.allocate.device) == ("scenes-dit", "h200")


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ({}, Budget(average_bits=4.0)),
        ({"bytes": 1000}, Budget(bytes=1000)),
        ({"latency": 0.5}, Budget(latency=0.5)),
        ({"average_bits": 3.0, "bytes": 1000}, Budget(average_bits=3.0, bytes=1000)),
        ({"groups": {"*": {"bytes": 9}}}, Budget(groups={"*": {"bytes": 9}})),
    ],
    ids=str,
)
def test_four_bits_are_the_budget_where_nothing_is_limited_and_join_no_other(
    given: dict[str, Any], budget: Budget
) -> None:
    assert AllocateSettings(**given).budget == budget
    kept = parse({"model": "m", "allocate": given}, "a test").model_dump(mode="json")
    assert parse(kept, "what was saved").allocate.budget == budget


def test_settings_are_set_and_taken_back() -> None:
    start = Config(model="m")

    changed = with_changes(
        start,
        {"allocate.formats": "2", "profile.schemes": "[uint4-c, uint8-c]", "sampling.steps": "7"},
    )

    assert changed.allocate.formats == 2
    assert changed.profile.schemes == ("uint4-c", "uint8-c")
    assert changed.sampling.steps == 7
    back = {"allocate.formats": "", "profile.schemes": "", "sampling.steps": ""}
    assert with_changes(changed, back) == start


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("allocate.format", "2", "there is no setting 'allocate.format'; did you mean 'formats'?"),
        ("allocat.formats", "2", "did you mean 'allocate'?"),
        ("sampling.step", "2", "did you mean 'steps'?"),
        ("allocate.formats", "two", "allocate.formats: input should be a valid integer"),
        ("model", "", "model: field required"),
    ],
)
def test_a_setting_that_there_is_not_is_answered_with_the_nearest(
    key: str, value: str, message: str
) -> None:
    with pytest.raises(QSearchError) as raised:
        with_changes(Config(model="m"), {key: value})

    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"refine": 1, "inputs": {"*": "+a8"}}, "leave inputs out, or refine"),
        ({"refine": 1, "layers": {"*": "uint4-c"}}, "leave layers out, or refine"),
        ({"refine": 1, "decibels": True}, "leave weights, at_most and decibels out, or refine"),
    ],
)
def test_what_refinement_can_t_do_is_said_before_anything_is_measured(
    section: dict[str, Any], word: str
) -> None:
    with pytest.raises(QSearchError, match=f"allocate.refine: .*{word}"):
        parse({"model": "m", "allocate": section}, "a test")


def test_an_unknown_key_of_the_sampler_is_answered_with_the_nearest() -> None:
    with pytest.raises(QSearchError, match=r"unknown key 'sampling.step'; did you mean 'steps'"):
        parse({"model": "m", "sampling": {"step": 3}}, "a test")
    with pytest.raises(QSearchError, match=r"sampling.steps: input should be greater than"):
        parse({"model": "m", "sampling": {"steps": 0}}, "a test")


def test_every_setting_but_the_model_has_a_default_and_a_description() -> None:
    for name, field in Config.model_fields.items():
        kind: Any = field.annotation
        for key, inner in getattr(kind, "model_fields", {}).items():
            assert not inner.is_required(), f"{name}.{key}"
            assert inner.description, f"{name}.{key}"
    assert config.Config(model="m").model == "m"
