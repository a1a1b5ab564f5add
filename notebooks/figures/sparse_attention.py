"""Sparse attention: time saved on a CPU, memory carried, Re-ttention against its rivals.

    python notebooks/figures/sparse_attention.py --part memory
    python notebooks/figures/sparse_attention.py --part times [--pairs 5]
    python notebooks/figures/sparse_attention.py --part video [--heads 4 --pairs 2]
    python notebooks/figures/sparse_attention.py --part pixart
    python notebooks/figures/sparse_attention.py --part methods [--zoo scenes-video --captions 16]

Each part writes sparse_attention-PART.json, `methods` one for each model. Times are processor
seconds of one thread in fp32, so that other programs on the machine count for little; dense and
sparse take turns, and of each the least is taken. `pixart`: one call of PixArt-α with random
weights at 1024 pixels, batch 1.
`methods`: 20 steps of which 5 are dense, then every fifth; every caption has noise of its own, the
same for all methods; drifts are fitted on other captions. scenes-video has 512 tokens in 8 frames
(1/8, 1/16 and 1/32 of the keys kept), scenes-dit 64 (1/4, 1/8, 1/16).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from figure import publish
from torch import Tensor
from worlds import prompts_of, sampling_of

from qsearch import zoo
from qsearch.core.steps import clock_of
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import Outcome, evaluated
from qsearch.measure.pipelines import (
    decode,
    example_inputs,
    load_pipeline,
    record,
    sample,
)
from qsearch.measure.sparse import sparse_attention
from qsearch_kernels.attention_calibration import fit_drift, row_density
from qsearch_kernels.attention_choice import AttentionChoice
from qsearch_kernels.attention_cost import mean_flops, state_bytes
from qsearch_kernels.attention_layout import Dense, Layout, Tokens, layout_of
from qsearch_kernels.carried_attention import (
    Arrangement,
    SparseAttention,
    SparseAttentionState,
    attend,
)
from qsearch_kernels.sparse_attention import attention

PICTURE, VIDEO = Tokens(4096), Tokens(226 + 13 * 1350, text=226, frames=13)
KEPT = (8, 16, 32)
STEPS, WARM = 20, 5
RIVALS = {
    "window alone": "window{n}",
    "rho": "window{n}~rho",
    "rho, drift 0.04": "window{n}~rho~drift0.04",
    "rho, drift fitted": "window{n}~rho~fit",
    "residual": "window{n}~residual",
    "both": "window{n}~rettention",
    "both, drift 0.04": "window{n}~rettention~drift0.04",
    "both, drift fitted": "window{n}~rettention~fit",
    "cached": "dense~cached",
}


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def publish_part(
    part: str, rows: list[dict[str, Any]], title: str, extra: dict[str, Any] | None = None
) -> None:
    script = str(Path(__file__).with_name(f"sparse_attention-{part}.py"))
    publish(script, rows, title=title, seed=0, extra=extra or {})


def drawn(tokens: Tokens, heads: int, size: int) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    made = [torch.randn(1, tokens.total, heads, size, generator=dice) for _ in range(3)]
    return [x.transpose(1, 2) for x in made]


def masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """What one does without a kernel: torch's attention with a mask."""
    return F.scaled_dot_product_attention(q, k, v, layout.mask(q, k))


def race(tokens: Tokens, heads: int, size: int, kinds: tuple[str, ...], pairs: int) -> list[Any]:
    """Dense and sparse attention in turns: the least of each, and the range of what was saved."""
    q, k, v = drawn(tokens, heads, size)
    rows = []
    for kind in kinds:
        for kept in KEPT:
            layout = layout_of(kind, kept, tokens)
            dense, sparse = [], []
            for _ in range(pairs):
                dense.append(seconds(partial(F.scaled_dot_product_attention, q, k, v)))
                sparse.append(min(seconds(partial(attention, q, k, v, layout)) for _ in range(3)))
            saved = sorted(1 - s / d for s, d in zip(sparse, dense, strict=True))
            rows.append(
                {
                    "attention": f"{kind}{kept}",
                    "tokens": tokens.total,
                    "heads": heads,
                    "head size": size,
                    "share of pairs": layout.pairs / tokens.total**2,
                    "dense s": min(dense),
                    "sparse s": min(sparse),
                    "saved %": 100 * (1 - min(sparse) / min(dense)),
                    "saved %, worst pair": 100 * saved[0],
                    "saved %, best pair": 100 * saved[-1],
                }
            )
            print(rows[-1], flush=True)
    return rows


def times(pairs: int) -> None:
    rows = race(PICTURE, 16, 72, ("window", "block"), pairs)
    q, k, v = drawn(PICTURE, 16, 72)
    layout = layout_of("window", 32, PICTURE)
    dense = min(seconds(partial(F.scaled_dot_product_attention, q, k, v)) for _ in range(2))
    mask = min(seconds(partial(masked, q, k, v, layout)) for _ in range(2))
    saved = 100 * (1 - mask / dense)
    rows.append(rows[0] | {"attention": "torch, window32 as a mask", "dense s": dense})
    rows[-1] |= {"sparse s": mask, "saved %": saved, "share of pairs": 1.0}
    rows[-1] |= {"saved %, worst pair": saved, "saved %, best pair": saved}
    publish_part("times", rows, "sparse attention at 4096 tokens, 16 heads of 72")


def video(heads: int, pairs: int) -> None:
    rows = race(VIDEO, heads, 64, ("window",), pairs)
    publish_part("video", rows, "sparse attention at CogVideoX's 17,776 tokens")


@dataclass
class Timed:
    """An attention by the stopwatch."""

    compute: Callable[..., Tensor]
    seconds: list[float] = field(default_factory=list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        start = time.process_time()
        made = self.compute(q, k, v, scale=scale)
        self.seconds.append(time.process_time() - start)
        return made

    def reset(self) -> None:
        """Times stay."""


@torch.no_grad()
def pixart() -> None:
    from diffusers import PixArtTransformer2DModel

    card = Path(__file__).parents[2] / "configs" / "models" / "pixart-alpha.yaml"
    config = yaml.safe_load(card.read_text(encoding="utf-8"))["config"]
    config |= {"sample_size": 128, "use_additional_conditions": False}
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**config).eval()
    call = {
        "hidden_states": torch.randn(1, 4, 128, 128),
        "encoder_hidden_states": torch.randn(1, 120, 4096),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    names = [f"transformer_blocks.{i}.attn1" for i in range(config["num_layers"])]
    layout = layout_of("window", 32, PICTURE)

    def window(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return attention(q, k, v, layout, scale=scale).output

    rows: list[dict[str, Any]] = []
    for name, compute in (("dense", F.scaled_dot_product_attention), ("window32", window)):
        timed = {module: Timed(compute) for module in names}
        with sparse_attention(model, timed, lambda: 0):
            total = seconds(partial(model, **call))
        spent = sum(sum(one.seconds) for one in timed.values())
        rows.append({"attention": name, "call s": total, "self-attention s": spent})
        rows[-1]["its share %"] = 100 * spent / total
        rows[-1]["call saved %"] = 100 * (1 - total / rows[0]["call s"])
        rows[-1]["self-attention saved %"] = 100 * (1 - spent / rows[0]["self-attention s"])
        print(rows[-1], flush=True)
    publish_part("pixart", rows, "PixArt-α at 1024 pixels, random weights, one call")


def memory() -> None:
    shapes = {
        "PixArt-Σ 1024": (28, PICTURE, 16, 72, 20),
        "CogVideoX-2B": (30, VIDEO, 30, 64, 50),
    }
    rows = []
    for model, (layers, tokens, heads, size, steps) in shapes.items():
        dense = mean_flops(AttentionChoice(), tokens, heads, size, 1)
        for words in ("window32~rho", "window32~residual", "window32~rettention", "dense~cached"):
            choice = AttentionChoice.parse(words)
            carried = state_bytes(choice, tokens.total, heads, size, batch=2)
            mean = mean_flops(choice, tokens, heads, size, steps)
            rows.append(
                {
                    "model": model,
                    "choice": words,
                    "MB a layer": carried / 2**20,
                    "MB": layers * carried / 2**20,
                    "attention FLOPs %": 100 * mean / dense,
                }
            )
    publish_part("memory", rows, "carried from step to step, in 16 bits, two rows for guidance")


@dataclass
class Compared:
    """Dense attention outside; inside, every rival on the same q, k, v, and how far it is off."""

    rivals: dict[str, SparseAttention]
    layouts: dict[int, Layout]
    errors: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    density: dict[int, dict[int, Tensor]] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        dense = attention(q, k, v, Dense(Tokens(q.shape[2])), scale=scale).output
        for kept, layout in self.layouts.items():
            found, rows = self.density.setdefault(kept, {}), row_density(q, k, layout, scale)
            # pipelines may guide in two calls a step
            found[step] = torch.cat([found[step], rows]) if step in found else rows
        if step >= WARM:
            for name, rival in self.rivals.items():
                made = attend(q, k, v, rival.choice, rival.state, step, scale=scale)  # type: ignore[arg-type]  # one choice for all steps
                error = float((made - dense).square().sum() / dense.square().sum())
                self.errors.setdefault(name, []).append((step, error))
        return dense

    def reset(self) -> None:
        for rival in self.rivals.values():
            rival.reset()

    def densities(self, kept: int) -> list[Tensor]:
        """Of the steps behind the first dense ones."""
        return [rows for step, rows in self.density[kept].items() if step >= WARM]


@contextmanager
def routed(pipe: Any, attentions: dict[str, Any]) -> Iterator[None]:
    clock = clock_of(pipe.transformer)
    with (
        clock.following(pipe.scheduler),
        sparse_attention(pipe.transformer, attentions, lambda: clock.step),
    ):
        yield


def warmed(choice: AttentionChoice, step: int) -> AttentionChoice:
    """Dense in the first steps."""
    return choice if step >= WARM else AttentionChoice()


@torch.no_grad()
def methods(name: str, captions: int) -> None:
    pipe = load_pipeline(zoo.folder(name))
    call, *_ = record(pipe, prompts_of(name, 1, seed=0), sampling_of(name, 2), 1)
    graph = extract(pipe.transformer, example_inputs(call, pipe.transformer), name=name)
    specs = graph.self_attentions
    spec = next(iter(specs.values()))
    tokens, dense = Tokens(spec.tokens, frames=spec.frames), AttentionChoice()
    arrangement = Arrangement(frames=spec.frames)
    heads, size = spec.heads, spec.head_size
    layouts = {n: layout_of("window", n, tokens) for n in (KEPT if spec.frames > 1 else (4, 8, 16))}
    calibration = {module: Compared({}, layouts) for module in specs}
    with routed(pipe, calibration):
        sample(
            pipe, prompts_of(name, captions, seed=1), sampling_of(name, STEPS, seed=1000, batch=8)
        )
    drifts = {
        (module, kept): fit_drift(one.densities(kept), 5, tokens)
        for module, one in calibration.items()
        for kept in layouts
    }

    def state(module: str, kept: int) -> SparseAttentionState:
        return SparseAttentionState(arrangement, drifts[module, kept])

    prompts, sampling = (
        prompts_of(name, captions, seed=2),
        sampling_of(name, STEPS, seed=2000, batch=8),
    )
    latents = sample(pipe, prompts, sampling)
    reference = Outcome(prompts, latents, decode(pipe, latents, 8, sampling, prompts), ())
    metrics = ("sqnr", "ssim", "alignment", *(("motion",) if spec.frames > 1 else ()))
    whole, _ = evaluated(reference, reference, metrics)
    print("full precision", whole, flush=True)
    rows = []
    for kept, layout in layouts.items():
        choices = {n: AttentionChoice.parse(w.format(n=kept)) for n, w in RIVALS.items()}
        seen = {
            module: Compared(
                {n: SparseAttention(c, state(module, kept)) for n, c in choices.items()},
                {kept: layout},
            )
            for module in specs
        }
        with routed(pipe, seen):
            sample(pipe, prompts, sampling)
        rho = [float(torch.stack(one.densities(kept)).mean()) for one in seen.values()]
        print("mean rho of each layer", kept, [round(x, 3) for x in rho], flush=True)
        for rival, choice in choices.items():
            attentions = {
                module: SparseAttention(partial(warmed, choice), state(module, kept))
                for module in specs
            }
            with routed(pipe, attentions):
                made = sample(pipe, prompts, sampling)
            found, _ = evaluated(
                Outcome(prompts, made, decode(pipe, made, 8, sampling, prompts), ()),
                reference,
                metrics,
            )
            errors = torch.tensor(
                [
                    [e for step, e in one.errors[rival] if (step - WARM) % 5 or not choice.method]
                    for one in seen.values()
                ]
            ).sqrt()
            flops = [
                mean_flops(dense, tokens, heads, size, 1) * WARM,
                mean_flops(choice, tokens, heads, size, STEPS - WARM) * (STEPS - WARM),
            ]
            row = {
                "kept": f"1/{kept}",
                "method": rival,
                "mean rho": sum(rho) / len(rho),
                "least rho": min(rho),
                "attention error": float(errors.mean()),
                "its worst layer": float(errors.mean(1).max()),
            }
            for metric in metrics:
                row |= {metric: found[metric][0], f"± {metric}": found[metric][1]}
            whole_flops = mean_flops(dense, tokens, heads, size, 1) * STEPS
            rows.append(row | {"attention FLOPs %": 100 * sum(flops) / whole_flops})
            print(rows[-1], flush=True)
    publish_part(
        f"methods-{name}",
        rows,
        f"{name}, {captions} captions, {STEPS} steps, {WARM} dense",
        {"full precision": {m: list(whole[m]) for m in metrics[2:]}},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=["memory", "times", "video", "pixart", "methods"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--zoo", default="scenes-dit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parts: dict[str, Callable[[], None]] = {
        "memory": memory,
        "times": partial(times, options.pairs),
        "video": partial(video, options.heads, options.pairs),
        "pixart": pixart,
        "methods": partial(methods, options.zoo, options.captions),
    }
    parts[options.part]()
