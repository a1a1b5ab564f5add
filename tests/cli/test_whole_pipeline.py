"""Text encoder, denoiser and VAE in one plan, from the shell: measured, planned, evaluated, packed,
loaded, handed on; and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.execute import packed_file
from qsearch.measure.decoding import decode
from qsearch.measure.pipelines import Prompts, Sampling, load_pipeline, model_of, sample
from qsearch.measure.simulation import simulate
from tests.conftest import Command
from tests.tiny_pipelines import build

COMPONENTS = ("text_encoder", "transformer", "vae")
PROMPTS, SAMPLING = Prompts(("red circle", "two blue squares")), Sampling(steps=3, guidance=3.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "pixart"
    build("pixart_alpha").save_pretrained(folder)
    return folder


def config(model: Path, folder: Path, **changes: Mapping[str, Any]) -> Path:
    """A run's folder with a config for all components of `model`; sections with some keys
    changed.
    """
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(f"red circle {i}" for i in range(8)))
    content: dict[str, Any] = {
        "model": str(model),
        "folder": str(folder),
        "prompts": str(folder / "prompts.txt"),
        "components": ["vae", "transformer", "text_encoder"],
        "sampling": {"steps": 3, "guidance": 3.0},
        "profile": {
            "schemes": ["uint4-c", "int8-c"],
            "samples": 2,
            "probes": 2,
            "mode": "trajectory",
            "metrics": ["psnr"],
        },
        "allocate": {"bytes": "50%", "metric": "psnr"},
        "evaluate": {"samples": 3, "metrics": ["psnr"], "uniform": None, "random": 0},
    }
    for section, keys in changes.items():
        known = content.get(section)
        content[section] = {**known, **keys} if isinstance(known, dict) else keys
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was done end to end, with its packed model."""
    from qsearch.stages.run import run as whole

    folder = config(model, tmp_path_factory.mktemp("runs") / "run")
    whole(folder)
    return folder


def pictures(pipe: Any) -> torch.Tensor:
    return decode(pipe, sample(pipe, PROMPTS, SAMPLING))


def test_one_plan_holds_all_components_within_a_share_of_their_bytes(run: Path) -> None:
    graph = OpGraph.load(run / "graph.json")
    plan = Plan.load(run / "plan.json", graph)

    assert graph.components == COMPONENTS  # in order of execution
    assert graph.spans == {"text_encoder": (0, 0, 2), "transformer": (0, 2, 2), "vae": (0, 0, 2)}
    assert 0.45 * 2 * graph.weights < plan.achieved.bytes <= 0.5 * 2 * graph.weights
    for name in COMPONENTS:
        chosen = {str(s) for n, (s,) in plan.weights.items() if n.startswith(f"{name}.")}
        assert chosen & {"uint4-c", "int8-c"}, name
    # the VAE's encoder, and embeddings, are run by no call or looked up: kept, and paid for
    assert all(not layer.quantizable for layer in graph if layer.name.startswith("vae.encoder."))
    table = SensitivityTable.load(run / "sensitivity.parquet", graph.id)
    for name in COMPONENTS:  # gradients reach each of them
        rows = [r for n, r in table.values("psnr").items() if n.startswith(f"{name}.")]
        coarse, fine = (sum(row[s] for row in rows) for s in ("uint4-c", "int8-c"))
        assert coarse > 10 * fine > 0, name
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert {row["plan"] for row in rows} == {"full precision", "plan"}
    assert "By component: text_encoder " in (run / "report.html").read_text()


def test_a_packed_pipeline_loads_and_makes_the_pictures_that_were_measured(
    run: Path, model: Path, command: Command
) -> None:
    graph = OpGraph.load(run / "graph.json")
    plan = Plan.load(run / "plan.json", graph)
    pipe = load_pipeline(model)
    full = pictures(pipe)
    with simulate(model_of(pipe, graph.components), plan, graph):
        wanted = pictures(pipe)
    assert (wanted - full).abs().max() > 1e-3

    assert command("apply", run)[0] == 0
    empty = packed_file.skeleton(model, graph.components)
    packed = packed_file.load(run / "model.safetensors", empty, graph)
    for name in graph.components:
        setattr(pipe, name, packed.get_submodule(name))

    assert (pictures(pipe) - wanted).abs().max() < 1e-4


def test_methods_and_static_ranges_are_calibrated_in_every_component(
    model: Path, tmp_path: Path, command: Command
) -> None:
    layers = {"vae.*": "uint4-c@gptq", "*": "uint4-c+a8t@gptq"}
    by_hand = {"layers": layers, "bytes": None, "metric": "weight_error"}
    given = {"calibrate": {"samples": 2, "bins": 1}, "profile": {"estimator": "weight_error"}}
    folder = config(model, tmp_path / "run", allocate=by_hand, **given)
    for verb in ("profile", "allocate", "evaluate", "apply"):
        code, out, err = command(verb, folder)
        assert code == 0, out + err

    graph = OpGraph.load(folder / "graph.json")
    packed = packed_file.load(
        folder / "model.safetensors", packed_file.skeleton(model, graph.components), graph
    )
    pipe = load_pipeline(model)
    full = pictures(pipe)
    for name in graph.components:
        setattr(pipe, name, packed.get_submodule(name))
    assert 1e-3 < (pictures(pipe) - full).abs().max() < 1


def test_a_tool_gets_the_components_that_it_takes(run: Path, model: Path, command: Command) -> None:
    from transformers import T5EncoderModel

    code, out, err = command("export", run, "--to", "torchao", "--nearest")
    assert code == 0, out + err
    assert "vae: torchao takes it in no format, so it is written unquantized" in " ".join(
        err.split()
    )
    folder = run / "export-torchao"
    assert {path.name for path in folder.iterdir()} == set(COMPONENTS)
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    graph = OpGraph.load(run / "graph.json")
    plan, pipe = Plan.load(run / "plan.json", graph), load_pipeline(model)
    ids = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        full = pipe.text_encoder(ids)[0]
        with simulate(model_of(pipe, graph.components), plan, graph):
            wanted = pipe.text_encoder(ids)[0]
        loaded = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        got = loaded(ids)[0]
    assert (got - wanted).abs().max() < 1e-3 < (wanted - full).abs().max()


@pytest.mark.parametrize("to", ["gguf", "comfyui", "step_policy"])
def test_a_tool_refuses_by_name_a_component_that_it_does_not_take(
    to: str, run: Path, command: Command
) -> None:
    code, _, err = command("export", run, "--to", to, "--output", run / f"out-{to}")

    assert code == 2
    said = " ".join(err.split())
    assert f"{to} takes a component that is a denoiser, and the plan changes" in said
    assert "text_encoder: keep them" in said
    assert not (run / f"out-{to}").exists()


def test_diffusers_loads_one_component_of_the_plan_by_its_name(run: Path, model: Path) -> None:
    from diffusers import AutoencoderKL

    from qsearch.core.errors import QSearchError
    from qsearch.diffusers import QSearchConfig

    with pytest.raises(QSearchError, match=r'component="text_encoder"\); given None'):
        QSearchConfig(run / "plan.json")
    said = QSearchConfig(run / "plan.json", component="vae")
    loaded = AutoencoderKL.from_pretrained(model / "vae", quantization_config=said)
    graph = OpGraph.load(run / "graph.json")
    plan, pipe = Plan.load(run / "plan.json", graph), load_pipeline(model)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), simulate(model_of(pipe, graph.components), plan, graph):
        wanted = pipe.vae.decode(latents)[0]
    with torch.no_grad():
        assert (loaded.decode(latents)[0] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"components": ["transformer", "text_encoder_2"]},
            "components: pixart has no component 'text_encoder_2'; did you mean 'text_encoder'?",
        ),
        (
            {
                "components": ["transformer"],
                "allocate": {"groups": {"text_encoder.*": {"bytes": 9}}},
            },
            (
                "which is not in the graph; it holds transformer: set components: [transformer, "
                "text_encoder]"
            ),
        ),
        (
            {"profile": {"mode": "step"}},
            (
                "recorded calls of the denoiser reach nothing of text_encoder, vae: set "
                "profile.mode to trajectory"
            ),
        ),
        (
            {"profile": {"metrics": ["sqnr"]}},
            (
                "vae is priced by metrics of decoded pictures, such as psnr and ssim; sqnr looks "
                "at latents"
            ),
        ),
        (
            {
                "allocate": {
                    "layers": {"text_encoder.*": ["int8-c", "uint4-c"], "*": "keep"},
                    "steps": 2,
                }
            },
            "text_encoder runs in none of the sampler's steps, so",
        ),
        ({"allocate": {"bytes": "140%"}}, "or a share of 16-bit bytes from 0 to 100 such as 40%"),
        ({"allocate": {"bytes": "3%"}}, "no plan reaches average_bits 0.48"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_work(
    changes: dict[str, Any], said: str, model: Path, tmp_path: Path, command: Command
) -> None:
    folder = config(model, tmp_path / "run", **changes)

    code, _, err = command("run", folder)

    assert code == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err
    assert not (folder / "sensitivity.parquet").exists()


def test_a_denoiser_that_runs_in_some_steps_is_named_in_no_others(
    tmp_path: Path, command: Command
) -> None:
    build("wan_22").save_pretrained(tmp_path / "wan")
    size = {"height": 16, "width": 16, "num_frames": 5}
    apart = {"layers": {"transformer.*": ["int8-c", "int4-c"], "*": "keep"}, "steps": 2}
    folder = config(
        tmp_path / "wan",
        tmp_path / "run",
        components=["transformer", "transformer_2"],  # type: ignore[arg-type]
        sampling={"steps": 4, "call": size},
        profile={"mode": "step", "metrics": ["noise"], "schemes": ["int4-c", "int8-c"], "bins": 2},
        allocate={"bytes": None, "average_bits": 6.5, "metric": "noise", "steps": 2},
        evaluate={"metrics": ["sqnr"]},
    )
    code, out, err = command("profile", folder)
    assert code == 0, err
    assert "0 of them at the measurement floor" in " ".join((out + err).split())
    assert command("allocate", folder)[0] == 0

    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["allocate"] |= apart
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    code, _, err = command("allocate", folder)
    assert code == 2
    said = " ".join(err.split())
    assert "transformer runs in steps 0 to 1 of 4, not in range 1 of 2, where transformer." in said
    assert "is given int4-c; say there what range 0 says, int8-c" in said
