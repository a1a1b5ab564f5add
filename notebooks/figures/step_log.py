"""The range of steps of every call, as a packed layer logs it, against the ranges counted by hand.

    python notebooks/figures/step_log.py

One plan over three ranges (bounds 0.3 and 0.7: inputs of 8, 6 and 4 bits) is packed into a model's
first feed-forward layer and run under several schedulers and numbers of steps, guidance in one
batch and in two calls a step. A forward hook on the packed layer notes its range. By hand: call k
of a schedule with c calls a step lies in step k // c, and step i of n in the range whose number is
that of the bounds <= i / n. Writes step_log.json.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from figure import publish
from torch import nn

from qsearch import zoo
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.execute.ranged import RangedLayer
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    sample,
    scene_prompts,
)

BOUNDS = (0.3, 0.7)
STEPS = (10, 20, 50)
SEED = 0
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {},
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
}
#: PixArtAlphaPipeline scales inputs, StableDiffusion3Pipeline asks for sigmas, WanPipeline sets a
#: begin index
NOT_WITH = {
    "scenes-dit, one batch": ("FlowMatchEulerDiscreteScheduler",),
    "SD3, one batch": tuple(list(SCHEDULERS)[:3]),
    "Wan, two calls": ("DDIMScheduler",),
}
FIRST = {
    "scenes-dit, one batch": "transformer_blocks.0.ff.net.0.proj",
    "SD3, one batch": "transformer_blocks.0.ff.net.0.proj",
    "Wan, two calls": "blocks.0.ffn.net.0.proj",
}


def scenes_dit() -> tuple[Any, dict[str, Any]]:
    """The zoo's trained pipeline."""
    return load_pipeline(zoo.folder("scenes-dit")), {}


def wan() -> tuple[Any, dict[str, Any]]:
    """A tiny WanPipeline, which calls its denoiser twice a step."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    text = torch.randn(1, 8, 32)
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": 0 * text,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "guidance_scale": 3.0,
    }


def sd3() -> tuple[Any, dict[str, Any]]:
    """A tiny StableDiffusion3Pipeline, flow matching with guidance in one batch."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    text, pooled = torch.randn(1, 8, 32), torch.randn(1, 32)
    return pipe, {
        "prompt_embeds": text,
        "negative_prompt_embeds": 0 * text,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": 0 * pooled,
        "height": 64,
        "width": 64,
        "guidance_scale": 3.0,
    }


def packed(pipe: Any, arguments: dict[str, Any], layer: str) -> RangedLayer:
    """The layer of `pipe`'s denoiser under a plan of three ranges."""
    model: nn.Module = denoiser_of(pipe)
    if arguments:
        calls: list[Any] = []
        handle = model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            pipe(**arguments, num_inference_steps=1, output_type="latent")
        handle.remove()
        args, kwargs = calls[0]
        graph = extract(model, {**kwargs, **dict(zip(("hidden_states",), args, strict=False))})
    else:
        call = record(pipe, scene_prompts(1, 0), Sampling(batch=1), 1)[0]
        graph = extract(model, example_inputs(call, model))
    choices: dict[str, Any] = {x.name: "keep" for x in graph}
    choices[layer] = ["int8-c+a8", "int8-c+a6", "int8-c+a4"]
    apply(model, Plan.make(graph, choices, steps=StepRanges(BOUNDS)), graph)
    found = model.get_submodule(layer)
    assert isinstance(found, RangedLayer)
    return found


def by_hand(steps: int, calls: int) -> list[int]:
    """The range of each call."""
    return [sum(b <= i / steps for b in BOUNDS) for i in range(steps) for _ in range(calls)]


def main() -> None:
    """Log and publish."""
    torch.manual_seed(SEED)
    makers = {"scenes-dit, one batch": scenes_dit, "SD3, one batch": sd3, "Wan, two calls": wan}
    rows = []
    for title, made in makers.items():
        pipe, arguments = made()
        layer = packed(pipe, arguments, FIRST[title])
        log: list[int] = []
        layer.register_forward_hook(lambda one, *_: log.append(one.now))  # noqa: B023
        for name, settings in SCHEDULERS.items():
            if name in NOT_WITH[title]:
                continue
            pipe.scheduler = getattr(diffusers, name)(**settings)
            pipe.set_progress_bar_config(disable=True)
            for steps in STEPS:
                log.clear()
                with torch.no_grad():
                    if arguments:
                        pipe(**arguments, num_inference_steps=steps, output_type="latent")
                    else:
                        sample(pipe, scene_prompts(1, 0), Sampling(steps, seed=SEED, batch=1))
                calls = 2 if title.endswith("two calls") else 1
                hand = by_hand(steps, calls)
                rows.append(
                    {
                        "pipeline": title,
                        "scheduler": name,
                        "steps": steps,
                        "calls": len(log),
                        "by hand": " + ".join(str(hand.count(i)) for i in range(3)),
                        "logged": " + ".join(str(log.count(i)) for i in range(3)),
                        "every call": "equal"
                        if log == hand
                        else f"{sum(a != b for a, b in zip(log, hand, strict=False))} differ",
                    }
                )
    publish(__file__, rows, title="Ranges of steps, logged and by hand", seed=SEED)


if __name__ == "__main__":
    main()
