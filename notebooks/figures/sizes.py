"""Do real architectures go through the verbs in the memory that people have, and what do narrow
types cost?

    python notebooks/figures/sizes.py save sdxl|flux-dev|wan-14b
    python notebooks/figures/sizes.py profile sdxl|flux-dev [--offload disk]
    python notebooks/figures/sizes.py times sdxl
    python notebooks/figures/sizes.py verbs flux-dev|wan-14b
    python notebooks/figures/sizes.py types scenes-dit|scenes-unet

`save` writes the card's denoiser with random weights in bf16 as shards, with one-layer text
encoders and a small VAE of the right classes, into --folder. `profile` and `verbs` run qsearch's
own commands, each in a process of its own whose peak of resident memory is what the kernel counted
(ru_maxrss); a command that was killed goes on where it was. `times` measures one round of probes
with all weights in memory and streamed from disk, in turns. `types` profiles a model of the zoo in
fp32 and in bf16, all else the same. Every call adds its row to sizes.json, in place of the same row
of before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from figure import publish
from torch import Tensor, nn

GIB = 2**30
NAME = Path(__file__).with_suffix(".json")
#: model -> options of its commands
ASKED: dict[str, dict[str, Any]] = {
    "sdxl": {
        "steps": 1,
        "guidance": 1.0,
        "height": 512,
        "width": 512,
        "probes": 4,
        "schemes": "uint2-g64,uint3-g64,int4-g64,uint4-g64,int4-c,int8-c,mxfp4,nvfp4",
    },
    "flux-dev": {
        "steps": 1,
        "guidance": 3.5,
        "height": 256,
        "width": 256,
        "probes": 2,
        "schemes": "uint2-g64,uint3-g64,int4-g64,uint4-g64,int8-c,nvfp4",
    },
}


def main() -> None:
    """The row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", choices=("save", "profile", "times", "verbs", "types"))
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--offload", default="disk")
    parser.add_argument("--probes", type=int, default=16, help="of `types`")
    parser.add_argument("--bins", type=int, default=3, help="of `types`")
    o = parser.parse_args()
    place = o.folder / o.model
    if o.row == "save":
        save(o.model, place)
        return
    made = {"profile": profiled, "times": timed, "verbs": verbs, "types": types}[o.row](o, place)
    kept = json.loads(NAME.read_text("utf-8"))["rows"] if NAME.exists() else []
    new = {(row["model"], row["what"]) for row in made}
    rows = [row for row in kept if (row["model"], row["what"]) not in new] + made
    publish(__file__, rows, title="Real sizes", seed=0)


def save_denoiser(name: str, folder: Path, shard: int) -> Path:
    """A card's denoiser in its pipeline's folder, its weights random, in files of `shard` bytes."""
    from qsearch.execute.weights import write_shards
    from qsearch.graphs.families import cards

    card = cards.card(name)
    model, _ = cards.load(name)
    part = folder / ("unet" if "UNet" in card.class_name else "transformer")
    part.mkdir(parents=True, exist_ok=True)
    model.register_to_config(**card.config)  # type: ignore[operator]
    model.save_config(part)  # type: ignore[operator]
    write_shards(part, weights(model), shard)
    return part


def save(name: str, folder: Path) -> None:
    """A pipeline with the card's denoiser, its weights random."""
    import diffusers
    from transformers import T5EncoderModel, UMT5EncoderModel

    from qsearch.graphs.families import cards
    from qsearch.zoo.painters import new_tokenizer

    part = save_denoiser(name, folder, 2 * GIB).name
    causal, both = new_tokenizer(causal=True), new_tokenizer(causal=False)
    if name == "sdxl":
        kind: Any = diffusers.StableDiffusionXLPipeline
        parts: dict[str, Any] = {
            "text_encoder": _clip(768, False),
            "text_encoder_2": _clip(1280, True),
            "tokenizer": causal,
            "tokenizer_2": causal,
            "vae": _vae(4),
            "scheduler": diffusers.EulerDiscreteScheduler(),
        }
    elif name == "flux-dev":
        kind = diffusers.FluxPipeline
        parts = {
            "text_encoder": _clip(768, False),
            "text_encoder_2": _t5(T5EncoderModel),
            "tokenizer": causal,
            "tokenizer_2": both,
            "vae": _vae(16),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        }
    else:
        kind = diffusers.WanPipeline
        vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
        parts = {
            "text_encoder": _t5(UMT5EncoderModel),
            "tokenizer": both,
            "vae": vae,
            "scheduler": diffusers.UniPCMultistepScheduler(),
        }
    pipe = kind(**parts, **{part: None}).to(torch.bfloat16)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index[part] = ["diffusers", cards.card(name).class_name]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), "utf-8")


def weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Random weights of a model on the meta device in bf16, that keep activations about as large as
    they are.
    """
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        fan = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 1
        if tensor.ndim > 1:
            made = torch.empty(tensor.shape, dtype=torch.bfloat16)
            made.normal_(0, 1 / math.sqrt(fan), generator=generator)
        else:
            made = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        yield {name: made}


def _vae(latents: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=latents,
        mid_block_add_attention=False,
        sample_size=512,
    )


def _clip(width: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from qsearch.zoo.painters import MAX_WORDS, new_tokenizer

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=8,
        projection_dim=width,
        vocab_size=len(new_tokenizer(causal=True)),
        max_position_embeddings=MAX_WORDS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def _t5(kind: Any) -> Any:
    from qsearch.zoo.painters import new_tokenizer

    config = kind.config_class(
        d_model=4096,
        d_ff=64,
        d_kv=64,
        num_heads=2,
        num_layers=1,
        vocab_size=len(new_tokenizer(causal=False)),
    )
    return kind(config)


def command(*words: str) -> tuple[float, float]:
    """Run qsearch with these words in a process of its own: (GiB of its peak, seconds).

    Raises:
        SystemExit: it failed.
    """
    began = time.time()
    child = subprocess.Popen([sys.executable, "-m", "qsearch.cli", *words])
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(
            f"qsearch {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}"
        )
    return used.ru_maxrss * 1024 / GIB, time.time() - began


def profiled(o: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """`qsearch profile`, streamed."""
    run = o.folder / f"{o.model}-{o.offload}"
    asked = {"bins": 1, "samples": 2, "offload": o.offload, "dtype": "bfloat16", **ASKED[o.model]}
    words = [x for name, value in asked.items() for x in (f"--{name}", str(value))]
    target = [str(run)] if (run / "config.yaml").exists() else [str(place), "--output", str(run)]
    if not (run / "graph.json").exists():
        small = {
            k: v for k, v in asked.items() if k not in ("bins", "samples", "probes", "schemes")
        }
        more = [x for name, value in small.items() for x in (f"--{name}", str(value))]
        command("extract", *target, *more)
        target = [str(run)]
    peak, seconds = command("profile", *target, *words)
    return [
        _row(o.model, f"profile, offload {o.offload}", peak, f"{seconds / 60:.0f} min, this call")
    ]


def _row(model: str, what: str, peak: float, more: str) -> dict[str, Any]:
    return {"model": model, "what": what, "peak GiB": round(peak, 2), "more": more}


def timed(o: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """One round of probes, in memory and streamed, in turns."""
    from contextlib import ExitStack

    from qsearch.core.graph import OpGraph
    from qsearch.core.scheme import Scheme
    from qsearch.measure.estimators.probe import measure
    from qsearch.measure.gradients import Contraction
    from qsearch.measure.options import ProfileOptions
    from qsearch.measure.pipelines import Prompts, Sampling, load_pipeline, model_of, record
    from qsearch.measure.profiling import ProfileWork, questioned

    a = ASKED[o.model]
    graph = OpGraph.load(o.folder / f"{o.model}-{o.offload}" / "graph.json")
    schemes = tuple(map(Scheme.parse, a["schemes"].split(",")))
    options = ProfileOptions(probes=2, bins=1, samples=2, batch=1)
    sampling = Sampling(a["steps"], a["guidance"], 0, 1, height=a["height"], width=a["width"])
    ready, does = ExitStack(), {}
    for kind in ("none", o.offload):
        pipe = load_pipeline(place, dtype="bfloat16", offload=kind)
        calls = record(pipe, Prompts(("a red circle",)), sampling, 1)
        given = ProfileWork(pipe=pipe, sampling=sampling)
        asked = questioned(model_of(pipe), graph, schemes, calls, options, given)
        task = ready.enter_context(asked)
        contraction = Contraction(task)
        ready.enter_context(contraction.watching())
        does[kind] = task, contraction
        _ = task.observations[0].scale
    spent: dict[str, list[float]] = {kind: [] for kind in does}
    for _ in range(2):
        for kind, (task, contraction) in does.items():
            began = time.process_time()
            measure(task, contraction, (0, 0, 0))
            spent[kind].append(time.process_time() - began)
    whole, streamed = (min(times) for times in spent.values())
    ratio = f"{streamed / whole:.2f} times the CPU time of weights in memory, two probes a round"
    return [
        {"model": o.model, "what": f"time, offload {o.offload}", "peak GiB": 0.0, "more": ratio}
    ]


def verbs(o: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Allocate, evaluate, apply and export of a profiled model; extract, --quick and export of one
    that was not.
    """
    run = o.folder / f"{o.model}-{o.offload}"
    rows = []
    size = {"steps": 2, "height": 256, "width": 256, "offload": o.offload, "dtype": "bfloat16"}
    words = [x for name, value in size.items() for x in (f"--{name}", str(value))]
    if o.model not in ASKED:
        peak, _ = command(
            "allocate", str(place), "--quick", "--average-bits", "4.0", "--output", str(run)
        )
        rows.append(_row(o.model, "allocate --quick", peak, "4.0 bits"))
        tools: tuple[str, ...] = ("gguf",)
    else:
        peak, _ = command("allocate", str(run), "--average-bits", "4.0")
        rows.append(_row(o.model, "allocate", peak, "4.0 bits"))
        peak, seconds = command("evaluate", str(run), "--samples", "3", *words)
        rows.append(_row(o.model, "evaluate, 2 steps", peak, f"{seconds / 60:.0f} min"))
        peak, _ = command("apply", str(run), *words)
        size_ = (run / "model.safetensors").stat().st_size / 1e9
        rows.append(_row(o.model, "apply", peak, f"{size_:.2f} GB"))
        tools = ("torchao", "gguf", "comfyui")
    for tool in tools:
        folder = run / f"export-{tool}"
        peak, _ = command("export", str(run), "--to", tool, "--nearest", "--force", *words[-4:])
        size_ = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e9
        rows.append(_row(o.model, f"export to {tool}", peak, f"{size_:.2f} GB"))
    return rows


def types(o: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """Tables of a model of the zoo in two types."""
    from qsearch import zoo
    from qsearch.graphs.extraction import extract
    from qsearch.measure.pipelines import (
        Sampling,
        example_inputs,
        load_pipeline,
        model_of,
        record,
        scene_prompts,
    )
    from qsearch.measure.profiling import profile_pipeline

    prompts, sampling = scene_prompts(4, 0), Sampling(10, 4.0, 0, 4)
    schemes = ("uint2-c", "uint3-c", "uint4-c", "uint8-c", "int4-g64", "int8-c+a8")
    tables, graph = {}, None
    for kind in ("float32", "bfloat16"):
        pipe = load_pipeline(zoo.folder(o.model), dtype=kind)
        model = model_of(pipe)
        if graph is None:
            call, *_ = record(pipe, prompts[:1], sampling, 1)
            graph = extract(model, example_inputs(call, model))
        asked = {"bins": o.bins, "samples": 4, "batch": 2, "probes": o.probes}
        made = profile_pipeline(pipe, graph, prompts, sampling, schemes=schemes, **asked)
        o.folder.mkdir(parents=True, exist_ok=True)
        made.save(o.folder / f"{o.model}-{kind}.parquet")
        graph.save(o.folder / f"{o.model}.graph.json")
        tables[kind] = made.frame.set_index(["site", "scheme", "step"])["estimate"]
    wide, narrow = tables["float32"], tables["bfloat16"].reindex(tables["float32"].index)
    rank = wide.corr(narrow, method="spearman")
    within = [
        wide.xs(s, level="scheme").corr(narrow.xs(s, level="scheme"), method="spearman")
        for s in schemes
    ]
    ratio = (narrow / wide).sort_values()
    worst = max(ratio.index[[0, -1]], key=lambda i: abs(math.log(ratio[i])))
    each = ", ".join(f"{s} {r:.4f}" for s, r in zip(schemes, within, strict=True))
    more = (
        f"Spearman {rank:.5f} over {len(wide):,} cells ({each}); median ratio "
        f"{ratio.median():.4f}, "
        f"most {ratio[worst]:.2f} at {worst[0]}, {worst[1]}, bin {worst[2]}"
    )
    what = f"bf16 against fp32, {o.bins} bins, {o.probes} probes"
    return [{"model": o.model, "what": what, "peak GiB": 0.0, "more": more}]


if __name__ == "__main__":
    main()
