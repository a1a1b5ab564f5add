"""extract from the shell: of pipelines whose call wants more than a prompt, in a run folder whose
config says it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from qsearch.core.graph import OpGraph
from tests import tiny_parts as tiny
from tests.conftest import Command
from tests.tiny_pipelines import build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved image-to-image pipeline."""
    folder = tmp_path_factory.mktemp("model")
    parts = {k: v for k, v in build("stable_diffusion_3").components.items() if v is not None}
    tiny.prepared(tiny.pipeline("StableDiffusion3Img2ImgPipeline", parts)).save_pretrained(folder)
    return folder


def config(run: Path, model: Path, picture: Path, **call: Any) -> None:
    run.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(picture)
    call = {"image": str(picture), "height": 16, "width": 16, **call}
    content = {"model": str(model), "sampling": {"steps": 5, "call": call}}
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_a_run_folder_is_read_by_its_config(model: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    config(run, model, tmp_path / "red.png")
    before = (run / "config.yaml").read_text()

    code, _, err = command("extract", run)

    assert code == 0, err
    assert OpGraph.load(run / "graph.json").quantizable
    assert (run / "config.yaml").read_text() == before
    (run / "graph.json").unlink()
    code, _, err = command("extract", model, "-o", run)  # the same model: its config stays
    assert code == 0, err
    assert (run / "graph.json").is_file()


def test_a_strength_that_leaves_no_step_of_two_is_read_from_all_steps(
    model: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    config(run, model, tmp_path / "red.png", strength=0.1)

    code, _, err = command("extract", run)

    assert code == 0, err
    assert OpGraph.load(run / "graph.json").quantizable


def test_a_strength_that_leaves_no_step_at_all_is_one_line(
    model: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    config(run, model, tmp_path / "red.png", strength=0.0)

    code, _, err = command("extract", run)

    assert code == 2
    assert len(err.strip().splitlines()) <= 2
    assert not (run / "graph.json").exists()


def test_what_is_missing_can_be_said_and_asked_again(
    model: Path, tmp_path: Path, command: Command
) -> None:
    run, picture = tmp_path / "run", tmp_path / "red.png"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(picture)

    code, _, err = command("extract", model, "-o", run)
    assert code == 2
    assert "by `call`: image" in err
    code, _, err = command("set", run, f"sampling.call={{image: {picture}, height: 16, width: 16}}")
    assert code == 0, err
    code, _, err = command("extract", run)

    assert code == 0, err
