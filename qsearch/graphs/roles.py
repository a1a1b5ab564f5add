"""Roles: what a layer is for (query, feed-forward input, ResNet convolution, …), from how it is
wired, never from its name.

self-, cross-, joint-attention-q, -k, -v, -qkv, -kv, …, -out, -gate
                                    by what feeds the attention and what consumes it;
                                    joint-attention-add-q, … are the text's side, as diffusers calls
                                    them; pooling-attention-… make one vector of a text
parallel-in, parallel-out           one layer for attention and feed-forward (Flux's single blocks)
feed-forward-in, -mid, -out         a residual branch without attention, by place; resnet-conv where
                                    it is made of convolutions
shortcut, residual                  the layer on the stream beside a branch; a branch of one layer
projection-in, -out                 first and last of a branch that holds other branches (a U-Net's
                                    transformer)
modulation                          reaches scales, shifts and gates alone
time-, text-, label-embedding       see no picture; by what they see (position-embedding: nothing
                                    that is given)
input, output, resample, skip       first and last of the picture's path; around a change of
                                    resolution; behind a long skip
router, adapter                     chooses among experts; a low-rank pair added to a layer
projection, convolution, unused     what is left: by kind, and layers that this call never runs
"""

from __future__ import annotations

from .folding import Step
from .wiring import Branch, Wiring, depthwise, spatial, stride

UNUSED = "unused"


def assign(wiring: Wiring) -> dict[Step, str]:
    """Role of every step that has a weight."""
    layers = [step for step in wiring.steps if step.weight is not None]
    out = dict.fromkeys(_adapters(wiring), "adapter")
    out.update(
        {step: found for step in layers if step not in out and (found := _attached(wiring, step))}
    )
    for branch in wiring.branches:
        for step, found in _in_branch(wiring, branch, out).items():
            out.setdefault(step, found)
    for branch in wiring.branches:  # a last layer beside the stream is the output all the same
        if any(link.what == "output" for link in wiring.targets[branch.add]):
            out.update(
                {
                    step: "output"
                    for step in branch.layers
                    if out[step] in ("residual", "projection-out")
                }
            )
    inner = [s for branch in wiring.branches for s in (*branch.layers, *branch.attentions)]
    held = [
        step
        for step in (*inner, *out)
        if out.get(step, "attention").startswith(
            ("self-", "cross-", "joint-", "attention", "feed-forward", "resnet")
        )
    ]
    for step in layers:
        out.setdefault(step, _outside(wiring, step, held))
    return out


def _adapters(wiring: Wiring) -> list[Step]:
    """Pairs of layers whose product is added to what another layer makes of the same input."""
    out = []
    for step in wiring.steps:
        if (
            step.kind == "add"
            and len(step.inputs) == 2
            and all(made.weight is not None for made in step.inputs)
        ):
            for base, last in (step.inputs, step.inputs[::-1]):
                if (
                    last.inputs
                    and last.inputs[0].weight is not None
                    and last.inputs[0].inputs == base.inputs
                ):
                    out += [last.inputs[0], last]
    return out


def projections(wiring: Wiring, step: Step) -> tuple[str, Step | None]:
    """Which of an attention's q, k, v a layer makes, "" for none, and the attention."""
    links = [link for link in wiring.targets[step] if link.what in ("q", "k", "v")]
    slots = "".join(slot for slot in "qkv" if any(link.what == slot for link in links))
    return slots, links[0].step if links else None


def _attached(wiring: Wiring, step: Step) -> str:
    """Roles that hang on an attention, on modulations, or on the ends of the picture's path."""
    targets, sources = wiring.targets[step], wiring.sources(step)
    if step.kind == "embedding":
        return _embedding(wiring, step)
    slots, attention = projections(wiring, step)
    if attention is not None:
        beside = [
            link
            for link in targets
            if link.what == "layer" and link.via & {"activation", "multiply"}
        ]
        if slots == "qkv" and any("concat" in link.via for link in beside):
            return "parallel-in"
        return f"{_side(wiring, step, attention)}{slots}"
    if (
        "image" not in wiring.given_sees(step)
        and targets
        and all(link.what == "modulated" for link in targets)
    ):
        return "modulation"
    attended = [link for link in sources if link.what == "attention"]
    if attended:
        beside = [
            link
            for link in sources
            if link.what == "layer" and "concat" in link.via and "activation" in link.via
        ]
        return (
            "parallel-out"
            if beside and "concat" in attended[0].via
            else f"{_side(wiring, step, attended[0].step)}out"
        )
    if (
        sources
        and all(link.what == "input" for link in sources)
        and "image" in wiring.given_sees(step)
    ):
        return "input"
    if targets and all("topk" in link.via for link in targets):
        return "router"
    if any(link.what == "output" for link in targets) and "image" in wiring.given_sees(step):
        return "output"
    return ""


def _side(wiring: Wiring, step: Step, attention: Step) -> str:
    kind = wiring.attention(attention)
    text = kind == "joint" and wiring.holds(step.reads[0]) == {"text"}
    return f"{kind}-attention-{'add-' if text else ''}"


def _embedding(wiring: Wiring, step: Step) -> str:
    sees = wiring.given_sees(step)
    if "image" in sees:
        return "input"
    known = {
        frozenset({"pooled"}): "label-embedding",
        frozenset({"step"}): "time-embedding",
        frozenset(): "position-embedding",
    }
    return known.get(sees, "text-embedding")


def _in_branch(wiring: Wiring, branch: Branch, known: dict[Step, str]) -> dict[Step, str]:
    """Roles within a residual branch, by place."""
    if "image" not in wiring.sees[branch.add] and len(branch.add.call.shape) <= 2:
        return {}  # an embedding of the timestep or of a label, which are vectors
    layers = [step for step in branch.layers if step not in known]
    inside, out = set(layers), dict[Step, str]()
    if branch.shortcut is not None:
        out[branch.shortcut] = "shortcut"
    first = {
        step for step in layers if not any(link.step in inside for link in wiring.sources(step))
    }
    last = {
        step for step in layers if not any(link.step in inside for link in wiring.targets[step])
    }
    for step in layers:
        at = "in" if step in first else "out" if step in last else "mid"
        if branch.attentions:
            gate = any(
                "multiply" in link.via
                and "concat" not in link.via
                and "attention-out" in known.get(link.step, "")
                for link in wiring.targets[step]
            )
            out[step] = (
                f"{wiring.attention(branch.attentions[0])}-attention-gate"
                if gate
                else f"feed-forward-{at}"
            )
        elif step in first & last and branch.nested:
            out[step] = (
                "projection-out"
                if any(link.step is branch.add for link in wiring.targets[step])
                else "projection-in"
            )
        elif step in first & last:
            out[step] = (
                "resnet-conv" if spatial(step) and branch.shortcut is not None else "residual"
            )
        else:
            out[step] = (
                "resnet-conv" if all(spatial(s) for s in first | last) else f"feed-forward-{at}"
            )
    return out


def _outside(wiring: Wiring, step: Step, held: list[Step]) -> str:
    """Roles of layers that are in no branch."""
    sees, sources, targets = wiring.given_sees(step), wiring.sources(step), wiring.targets[step]
    if "image" not in sees:
        tokens = wiring.holds(step.reads[0]) if step.reads else frozenset()
        if not sees:
            return "position-embedding"
        return (
            "time-embedding"
            if "step" in sees and "text" not in tokens
            else "text-embedding"
            if not _labels(wiring, step)
            else "label-embedding"
        )
    if (
        stride(step) > 1
        or step.kind.startswith("conv-")
        or any("resample" in link.via for link in (*sources, *targets))
    ):
        return "resample"
    if any("concat" in link.via for link in sources) and len(sources) > 1:
        return "skip"
    if held and not any(wiring.after(step, other) for other in held):
        return "input"
    if held and not any(wiring.after(other, step) for other in held):
        return "output"
    if depthwise(step):
        return "convolution"
    return "convolution" if step.kind.startswith("conv") else "projection"


def _labels(wiring: Wiring, step: Step) -> bool:
    """Whether what a layer sees began with a table of labels."""
    before = [s for s in wiring.steps if s.kind == "embedding" and wiring.after(step, s)]
    return bool(before) and "text" not in wiring.given_sees(step)
