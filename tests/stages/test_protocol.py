"""Protocols: what they fix, whose prompts they take, and the tables that they leave."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsearch.core import shipped
from qsearch.core.errors import QSearchError
from qsearch.core.gates import gates_of
from qsearch.measure.calling import arguments
from qsearch.measure.pipelines import Prompts, Sampling
from qsearch.measure.protocols import name_seed, protocol_prompts, read_protocol
from qsearch.stages import config
from tests.conftest import Command
from tests.models import tiny_pipeline


@pytest.mark.parametrize("name", shipped.names("protocols"))
def test_every_protocol_that_ships_can_be_read_and_names_what_there_is(name: str) -> None:
    from qsearch.core import plugins

    card = read_protocol(name)

    for metric in card.metrics:
        plugins.check("metrics", metric)
    assert {gate.metric for gate in gates_of(card.gates)} <= set(card.metrics)
    parsed = config.parse({"model": "scenes-dit", "protocol": name}, "mine.yaml")
    assert parsed.evaluate.samples == card.samples
    assert parsed.evaluate.metrics == card.metrics


def test_the_gate_of_servers_takes_one_prompt_with_five_seeds(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")

    prompts = protocol_prompts("vllm-gate", tmp_path / "p.txt")

    assert prompts.texts == ("a cat",) * 5
    assert [v["seed"] for v in prompts.values] == [42, 43, 44, 45, 46]


def test_mjhq_s_prompts_are_shuffled_cut_and_sorted_with_seeds_by_name(tmp_path: Path) -> None:
    held = {f"{i:05x}": {"prompt": f"picture {i}"} for i in range(6000)}
    (tmp_path / "meta_data.json").write_text(json.dumps(held))

    prompts = protocol_prompts("mjhq-5000", tmp_path / "meta_data.json")

    names = list(held)
    random.Random(0).shuffle(names)
    chosen = sorted(names[:5000])
    assert prompts.texts == tuple(held[n]["prompt"] for n in chosen)
    assert prompts.values[7]["seed"] == name_seed(chosen[7])
    # by hand: ((97 * 31) + 98) mod p
    assert name_seed("ab") == 97 * 31 + 98


def test_a_prompt_s_own_seed_is_that_of_its_noise() -> None:
    pipe = tiny_pipeline()
    prompts = Prompts(("a", "b", "c"), values=({"seed": 7}, {}, {"seed": 9}))

    made = arguments(pipe, prompts, 4, Sampling(steps=2, seed=1))

    seeds = [g.initial_seed() for g in made["generator"]]
    assert seeds == [7, 1_000_003 + 5, 9]
    assert "seed" not in made


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"protocol": "mjhq"}, "did you mean 'mjhq-5000'?"),
        (
            {"protocol": "zoo", "sampling": {"steps": 50}},
            "protocol zoo fixes sampling.steps at 20; given 50: leave out sampling.steps",
        ),
        (
            {"protocol": "zoo", "evaluate": {"metrics": ["sqnr"]}},
            "protocol zoo fixes evaluate.metrics at",
        ),
        (
            {"protocol": {"name": "zoo", "prompt": "p"}},
            "unknown key 'protocol.prompt'; did you mean 'prompts'?",
        ),
    ],
)
def test_a_config_that_says_otherwise_than_its_protocol_is_refused(
    content: dict[str, Any], message: str
) -> None:
    with pytest.raises(QSearchError) as caught:
        config.parse({"model": "scenes-dit", **content}, "mine.yaml")

    assert message in str(caught.value)


def test_other_prompts_than_the_published_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"caption {i}" for i in range(1024)))
    other = hashlib.sha256((tmp_path / "p.txt").read_bytes()).hexdigest()[:12]

    with pytest.raises(QSearchError, match=f"begins with 0dcf74917bad; that of .* with {other}"):
        protocol_prompts("coco-1024", tmp_path / "p.txt")
    with pytest.raises(QSearchError, match=r"takes 200 prompts; .* holds 3"):
        (tmp_path / "few.txt").write_text("a\nb\nc")
        protocol_prompts("drawbench", tmp_path / "few.txt")
    with pytest.raises(QSearchError, match="takes its prompts from a file that you have"):
        protocol_prompts("drawbench", None)
    with pytest.raises(QSearchError, match=r"must be MJHQ-30K's meta_data\.json"):
        protocol_prompts("mjhq-5000", tmp_path / "few.txt")
    with pytest.raises(QSearchError, match=r"can't be read"):
        protocol_prompts("drawbench", tmp_path / "nothing.txt")


def test_a_protocol_of_one_s_own_leaves_its_table_in_three_forms(
    tmp_path: Path, command: Command
) -> None:
    torch.manual_seed(0)
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "p.txt").write_text("a cat\n")
    card = {
        "title": "ours",
        "source": "here",
        "prompts": {"samples": 1},
        "seeds": [1, 2, 3],
        "sampling": {"steps": 2, "guidance": 3.0},
        "metrics": ["psnr", "sqnr"],
        "gates": {"psnr": ">= 1"},
    }
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(card))
    content = {
        "model": "pipe",
        "folder": "run",
        "protocol": {"name": str(tmp_path / "ours.yaml"), "prompts": "p.txt"},
        "profile": {"schemes": ["uint4-c", "uint8-c"], "bins": 1, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 6.0},
        "evaluate": {"uniform": None, "random": 0},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))

    code, _, said = command("run", tmp_path / "mine.yaml")

    assert code == 0, said
    run = tmp_path / "run"
    rows = json.loads((run / "results.json").read_text())["rows"]
    with (run / "results.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0][:3] == ["plan", "bits", "MB"]
    assert [row[0] for row in table[1:]] == [row["plan"] for row in rows]
    assert table[2][3] == f"{rows[1]['metrics']['psnr'][0]:.1f}"
    assert (run / "results.md").read_text().count("|") == 6 * 4
    assert r"PSNR, dB $\uparrow$" in (run / "results.tex").read_text()
    assert command("evaluate", run)[0] == 0
