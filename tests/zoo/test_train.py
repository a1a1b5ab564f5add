"""Training: a killed run that is started again ends with the very weights of one that was left
alone.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qsearch.zoo import train
from qsearch.zoo.recipes import RECIPES

STEPS = 6
#: trains the judge for a few steps; "loss 3" dies before the third step of this process, "save 2"
#: in the middle of its second checkpoint
CHILD = """
import dataclasses, os, signal, sys
from pathlib import Path
import torch
from qsearch.zoo import recipes, train

what, when, *argv = sys.argv[1:]
count = {"loss": 0, "save": 0}

def die(place):
    count[place] += 1
    return place == what and count[place] == int(when)

recipe, draw, save = recipes.RECIPES["judge"], recipes.draw_scenes, torch.save

def make(*args):
    module, loss, export = recipe.make(*args)
    def mortal(generator):
        if die("loss"):
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(generator)
    return module, mortal, export

def torn(content, path):
    save(content, path)
    if die("save"):
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)

recipes.RECIPES["judge"] = dataclasses.replace(recipe, make=make)
# the scores at the end: not on 4,096 scenes here
recipes.draw_scenes = lambda count, generator, **split: draw(min(count, 16), generator, **split)
torch.save = torn
train.main(argv)
"""


def run(folder: Path, what: str = "never", when: int = 0) -> subprocess.CompletedProcess[str]:
    """`python -m qsearch.zoo.train judge`, a few steps long, a checkpoint after each; one thread,
    so that sums are in one order.
    """
    argv = [
        "judge",
        "--steps",
        STEPS,
        "--batch",
        4,
        "--save-seconds",
        0,
        "--runs",
        folder / "runs",
        "--out",
        folder / "out",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", CHILD, what, when, *argv]
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder of a training that was killed twice, before a step and inside a checkpoint, and what
    it said each time it started.
    """
    folder = tmp_path_factory.mktemp("killed")
    deaths = [run(folder, "loss", 3), run(folder, "save", 2)]
    assert [d.returncode for d in deaths] == [-signal.SIGKILL] * 2, [d.stderr for d in deaths]
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, [d.stdout.splitlines()[0] if d.stdout else "" for d in (*deaths, done)]


def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(
    disturbed: tuple[Path, list[str]],
) -> None:
    assert disturbed[1] == ["", "resumes at step 2 of 6", "resumes at step 3 of 6"]


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested mappings and lists by its path."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list | tuple)
        else None
    )
    if items is None:
        return {name: content}
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}


def test_a_killed_training_ends_with_the_same_state(
    left_alone: Path, disturbed: tuple[Path, list[str]]
) -> None:
    ours, theirs = (
        flat(torch.load(f / "runs" / "judge" / "checkpoint.pt", weights_only=True))
        for f in (disturbed[0], left_alone)
    )

    assert set(ours) == set(theirs)
    assert ours["/step"] == STEPS
    different = [
        k
        for k, v in theirs.items()
        if not (torch.equal(v, ours[k]) if isinstance(v, Tensor) else v == ours[k])
    ]
    assert different == ["/seconds"]


def test_a_killed_training_ends_with_the_same_weights(
    left_alone: Path, disturbed: tuple[Path, list[str]]
) -> None:
    ours, theirs = (
        load_file(f / "out" / "judge_weights" / "judge.safetensors")
        for f in (disturbed[0], left_alone)
    )

    assert set(ours) == set(theirs)
    assert [k for k, v in theirs.items() if not torch.equal(v, ours[k])] == []


def test_recipe_loss_and_scores_lie_beside_the_weights(disturbed: tuple[Path, list[str]]) -> None:
    folder = disturbed[0] / "out" / "judge_weights"

    assert {p.name for p in folder.iterdir()} == {
        "judge.safetensors",
        "recipe.json",
        "loss.csv",
        "scores.json",
    }
    recipe = json.loads((folder / "recipe.json").read_text())
    assert {k: recipe[k] for k in ("name", "steps", "batch", "seed")} == {
        "name": "judge",
        "steps": STEPS,
        "batch": 4,
        "seed": 0,
    }


class Killed(Exception):
    """What stands for SIGKILL where a process of its own is not needed."""


def fit(
    folder: Path, *, rate: float = 1e-2, stop: int | None = None, until: int | None = None
) -> nn.Module:
    """Three hundred steps of a small regression, with a checkpoint after each if it will be
    stopped, before the step `stop`.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    done = 0

    def loss(generator: torch.Generator) -> Tensor:
        nonlocal done
        done += 1
        if done == stop:
            raise Killed
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x[:, :2]).square().mean()

    return train.fit(
        model,
        loss,
        train.Run(
            folder,
            torch.device("cpu"),
            300,
            rate,
            save_seconds=-1.0 if stop else 120.0,
            until=until,
        ),
    )


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_of_a_resumed_training_has_every_step_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, stop=150)
    with (tmp_path / "loss.csv").open("a") as file:
        file.write("200,9.0,1.00e-02,1\n")  # it had come further than its last checkpoint

    fit(tmp_path)

    assert [row["step"] for row in log(tmp_path)] == ["100", "200", "300"]
    assert "9.0" not in [row["loss"] for row in log(tmp_path)]


def test_a_training_that_stops_early_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", until=130)
    assert [row["step"] for row in log(tmp_path / "parts")] == ["100", "130"]

    parts = fit(tmp_path / "parts")

    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    rates = [row["rate"] for row in log(tmp_path / "parts")]
    assert rates[:2] == ["5.00e-03", "6.50e-03"]  # warming up as on the way to 300 steps


def test_the_logged_loss_is_a_mean_also_after_a_resumption(tmp_path: Path) -> None:
    fit(tmp_path / "alone", rate=0.0)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", rate=0.0, stop=151)
    fit(tmp_path / "killed", rate=0.0)

    alone, killed = (
        [float(row["loss"]) for row in log(tmp_path / name)] for name in ("alone", "killed")
    )
    assert (killed[0], killed[2]) == (alone[0], alone[2])
    assert killed[1] == pytest.approx(
        alone[1], rel=0.2
    )  # of the fifty steps since the resumption, where nothing learns


def test_the_loss_falls_and_the_average_follows(tmp_path: Path) -> None:
    average = fit(tmp_path)

    losses = [float(row["loss"]) for row in log(tmp_path)]
    assert losses[0] > 3 * losses[-1]
    assert not average.training
    assert [(p.requires_grad, p.grad_fn) for p in average.parameters()] == [
        (False, None)
    ] * 2  # no history of the steps behind it


def test_the_rate_warms_up_holds_and_falls_over_the_last_fifth() -> None:
    rates = [train.rate_at(step, 2000, 1.0) for step in (0, 99, 199, 1000, 1600, 1800, 1999)]

    assert rates == pytest.approx([1 / 200, 0.5, 1.0, 1.0, 1.0, 0.5, 0.02])


def test_an_unknown_part_is_answered_with_the_parts_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["jugde"])

    assert caught.value.code == 2
    said = "".join(capsys.readouterr().err.split())  # its lines break anywhere
    assert [name for name in RECIPES if name not in said] == []
