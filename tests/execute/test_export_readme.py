"""Every block under Exports in the README runs: its command through the command line, its Python in the same folder."""

from __future__ import annotations

import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qsearch import Plan, cli, zoo
from qsearch.core.graph import OpGraph
from qsearch.execute.contracts import graph_of
from qsearch.stages import config
from tests.execute.exporting import needs

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SCHEMES = ("uint4-c", "keep", "uint8-c", "uint3-c")


#: tools that watch a whole call before they export, or take as long to be imported
SLOW = ("ONNX", "OpenVINO", "ModelOpt")
#: modules of tools that are too large to be wanted of everybody who develops
LARGE = ("modelopt", "openvino", "auto_round")


@cache
def recipes() -> dict[str, tuple[str, str]]:
    """Tool -> its command (nothing for diffusers itself) and its Python."""
    text = README.partition("\n## Exports\n")[2].partition("\n## ")[0]
    found = re.findall(
        r"^\*\*([^*]+)\*\*((?:(?!^\*\*)[\s\S])*?)^```python\n([\s\S]*?)^```", text, re.MULTILINE
    )
    commands = {title: re.search(r"`(qsearch export [^`]+)`", words) for title, words, _ in found}
    return {title: (hit[1] if (hit := commands[title]) else "", code) for title, _, code in found}


def runs(folder: Path) -> None:
    """runs/scenes-dit and runs/scenes-unet as the main job leaves them, as far as exports look at them."""
    for name in ("scenes-dit", "scenes-unet"):
        graph = graph_of(zoo.folder(name))
        run = folder / "runs" / name
        config.save(config.Config(model=name, folder=Path("runs") / name), run / "config.yaml")
        OpGraph(name, graph.layers).save(run / "graph.json")
        chosen = [SCHEMES[i % len(SCHEMES)] for i in range(len(graph.layers))]
        Plan.make(
            graph, {layer.name: scheme for layer, scheme in zip(graph, chosen, strict=True)}
        ).save(run / "plan.json")


# optimum-quanto compiles a C++ extension when it is first asked to unpack.
@pytest.mark.parametrize(
    "title",
    [
        pytest.param(t, marks=pytest.mark.slow if t in (*SLOW, "optimum-quanto") else ())
        for t in recipes()
    ],
)
def test_a_block_of_the_readme_runs(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    monkeypatch.chdir(tmp_path)
    command, code = recipes()[title]
    words = shlex.split(command)
    runs(tmp_path)
    if words:
        needs(words[words.index("--to") + 1])
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code

    if title == "AutoRound":  # diffusers itself says that it is missing, as another kind of error
        pytest.importorskip("auto_round")
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "README.md", "exec"), names)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LARGE:
            raise
        pytest.skip(f"{error.name} not installed")

    model = names.get("model", nn.Module())
    assert isinstance(getattr(model, "_wrapped", model), nn.Module)  # quanto wraps what it loads
    assert {"model", "config", "policy", "session"} & set(names)


def test_there_is_a_block_for_every_exporter_that_this_section_promises() -> None:
    told = {
        words[words.index("--to") + 1]
        for command, _ in recipes().values()
        if (words := shlex.split(command))
    }

    assert told >= {
        "torchao",
        "sdnq",
        "gguf",
        "quanto",
        "bitsandbytes",
        "step_policy",
        "compressed_tensors",
        "autoround",
        "modelopt",
        "onnx",
        "openvino",
        "comfyui",
        "aimet",
    }
