"""Announce: what a verb is about to do, in words, before it begins: model, machine, sampler,
prompts, and what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .checks import check

if TYPE_CHECKING:
    from .folder import Run


def begin(run: Run, *verbs: str) -> None:
    """Check what the verbs need (`checks.check`), and say once what they will do it with."""
    check(run, *verbs)
    for line in settings_lines(run, *verbs):
        if line not in run.said:
            run.said.add(line)
            run.progress.say(line)


def settings_lines(run: Run, *verbs: str) -> list[str]:
    """The lines: the model and its sampler, then one for each verb that measures."""
    c, s, own = run.config, run.sampling, run.own
    chosen = c.sampling
    marks = {
        "steps": f"{s.steps} steps" + ("" if chosen.steps else "*"),
        "guidance": f"guidance {s.guidance:g}" + ("" if chosen.guidance is not None else "*"),
        "size": _size(run),
    }
    mine = any(text.endswith("*") for text in marks.values())
    found = [
        f"{run.model_name}: {', '.join(marks.values())}, {run.dtype} on {run.device}"
        + (f" (*: {own.why})" if mine else "")
    ]
    if run.offload.kind != "none":
        found.append(f"offload {run.offload.kind}: {run.offload.why}")
    if "profile" in verbs:
        p = c.profile
        found.append(
            f"profile: {p.samples} samples of {_prompts(run, p.samples, 0)}, {run.bins} step bins, "
            f"{', '.join(p.schemes)} by {p.estimator}"
        )
    if "evaluate" in verbs:
        found.append(
            f"evaluate: {run.samples} samples of {_prompts(run, run.samples, 1)}, "
            f"{', '.join(run.metrics)}"
        )
    return found


def _size(run: Run) -> str:
    size, own = run.own.sized(run.sampling), run.own
    asked = run.sampling.size != (None, None) or "height" in run.sampling.call
    if size is None:
        return "its own size*"
    frames = run.sampling.call.get("num_frames") or run.sampling.frames or own.frames
    text = f"{size[1]}x{size[0]}" + (f", {frames} frames" if frames else "")
    return text if asked else f"{text}*"


def _prompts(run: Run, count: int, part: int) -> str:
    """`4 prompts of FILE`, and what there is to know about too few."""
    if run.config.prompts is None and run.own.zoo:
        return f"{count} captions of the zoo"
    first, rest = run.prompt_parts
    have = len(rest if part else first)
    told = f"{min(count, have)} prompts of {Path(run.prompts_name).name}"
    if have < count:
        told += ", in turn with other noise"
    if part and rest.texts == first.texts:
        told += ", which profiling sees too"
    return told
