"""Reachability: which inputs a layer's input depends on, and whose tokens a tensor holds.

Two questions, both answered by data flow. *Sees*: all that a value depends on; a layer that sees
the timestep alone has a handful of different inputs in a whole run, one that sees the text alone
has one a prompt. *Tokens*: what the rows of a tensor are, image or text or one after the other;
modulation by the timestep does not change it, concatenation and slicing do. Cross-attention is told
by the tokens of its keys: what a text token depends on after two joint blocks (everything) would
not tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import QSearchError, nearest
from . import operations as ops
from .folding import Step
from .trace import Call, Trace

CLASSES = ("image", "step", "text", "pooled", "structure")
#: what an input is -> conventional names of it, as patterns; the first row that fits counts. Where
#: an argument is a dict or a list, its
#: members' names count first (`added_cond_kwargs.text_embeds` is pooled), then its own. A name of
#: one letter is pooled when it is a vector.
_NAMES = (
    ("text", "input_ids (input_|text_|prompt_)?tokens"),
    (
        "pooled",
        """pooled.* text_embeds (added_)?time_ids class_labels? labels? resolution aspect_ratio
        original_size target_size crop_coords? image_meta_size style vector vec guidance_embeds?
        proj_embedding""",
    ),
    (
        "structure",
        """.*mask .*_ids? .*rotary.* .*pos_emb.* .*position.* .*coords? .*_shapes? .*_len(gth)?s?
        .*rope.* .*freqs.* indices.* grid.* seq_?len.* num_frames height width fps cu_seqlens.*""",
    ),
    (
        "step",
        (
            ".*timesteps?(_.*)? t time sigmas? noise_level noise_labels c_noise "
            "guidance(_scale|_cond)? log_snr step"
        ),
    ),
    (
        "text",
        """encoder_hidden_states(_.*)? context(_.*)? text(_.*)? txt prompt(_.*)? caption.*
        cap_feats.* crossattn.* encoder_outputs? image_embeds? clip_(text|img).* cond(itioning)? y
        c""",
    ),
    (
        "image",
        (
            "hidden_states(_.*)? sample x x_t xt .*latents? latent_model_input noisy.* z z_t "
            "img images? video inputs? control.* .*pixel_values"
        ),
    ),
)
#: write rows into a sequence at places that are data
_SCATTERS = frozenset("index_copy index_put scatter scatter_add masked_scatter index_add".split())
Tokens = tuple[tuple[str, int], ...]


def classify(
    given: Mapping[str, Call], override: Mapping[str, str], signature: str
) -> dict[str, str]:
    """Input -> one of `CLASSES`: by `override`, by its conventional name, else by dtype and shape.

    Raises `QSearchError` where none decides, and where no input is a picture though `override` does
    not name them all.
    """
    for name, chosen in override.items():
        if chosen not in CLASSES:
            raise QSearchError(
                f"an input is one of {', '.join(CLASSES)}; given {chosen!r} for "
                f"{name!r}{nearest(chosen, CLASSES)}"
            )
        if not any(name in (path, path.partition(".")[0]) for path in given):
            raise QSearchError(
                f"there is no tensor among the example inputs called {name!r}{nearest(name, given)}"
            )
    out: dict[str, str] = {}
    for path, call in given.items():
        root, last = (
            path.partition(".")[0],
            next((p for p in reversed(path.split(".")) if not p.isdigit()), path),
        )
        chosen = (
            override.get(path) or override.get(root) or _named(last, call) or _named(root, call)
        )
        out[path] = chosen or ""
    for path, call in given.items():
        out[path] = out[path] or _shaped(call, "image" in out.values())
    said = all(override.get(path) or override.get(path.partition(".")[0]) for path in given)
    if ("image" not in out.values() and not said) or "" in out.values():
        unknown = [p for p, c in out.items() if not c]
        what = (
            f"{unknown[0]} of shape {given[unknown[0]].shape} may be anything"
            if unknown
            else f"none of {', '.join(given)} looks like the noisy picture"
        )
        raise QSearchError(
            f"can't tell what the inputs are: {what}; say it with extract(model, "
            f"example_inputs, inputs={{'NAME': 'image'}}), each one of "
            f"{', '.join(CLASSES)}; the forward takes {signature}"
        )
    return out


def _named(name: str, call: Call) -> str:
    found = next(
        (
            found
            for found, patterns in _NAMES
            if any(re.fullmatch(p, name, re.IGNORECASE) for p in patterns.split())
        ),
        "",
    )
    # PixArt's y is a caption, DiT's are labels, SDXL's is the pooled text: it has as many axes as
    # the thing has.
    return (
        "pooled"
        if found == "text" and len(name) == 1 and (call.integer or len(call.shape) <= 2)
        else found
    )


def _shaped(call: Call, have_image: bool) -> str:
    rank = len(call.shape)
    if call.integer:
        return (
            "step" if rank == 0 else "pooled" if rank == 1 else "text" if rank == 2 else "structure"
        )
    if rank <= 1:
        return "step"
    if rank >= 4 or (rank == 3 and not have_image):
        return "image"
    return "text" if rank == 3 else "pooled"


def sees(steps: list[Step], classes: Mapping[str, str]) -> dict[Step, frozenset[str]]:
    """Step -> classes of all inputs that its result depends on."""
    out: dict[Step, frozenset[str]] = {}
    for step in steps:
        if step.kind == "input":
            found = frozenset({classes[step.call.name]} - {"structure"})
        else:
            found = (
                frozenset().union(*(out[made] for made in step.inputs))
                if step.inputs
                else frozenset()
            )
        out[step] = found
    return out


def word(found: frozenset[str]) -> str:
    """One of `core.graph.SEES` for a set of classes."""
    if "image" in found:
        return "image"
    return "constant" if not found else f"{min(found)}-only" if len(found) == 1 else "mixed"


def tokens(trace: Trace, classes: Mapping[str, str]) -> dict[Call, Tokens]:
    """Call -> whose tokens it holds: `(("text", 77), ("image", 1024))` where they lie one after the
    other, one pair where they are of one kind.
    """
    out: dict[Call, Tokens] = {}
    for call in trace.calls:
        found = _tokens(call, out, classes)
        if found:
            out[call] = found
            if ops.in_place(call.op):
                _write(call, found, out)
    return out


def _write(call: Call, found: Tokens, known: dict[Call, Tokens]) -> None:
    """What is written into a view is seen through the tensor that the view shows; slices written
    one after the other are a sequence.
    """
    target, size = call.given[0], 0
    while target.op in ops.LAYOUT and target.given:
        if target.op in ("slice", "narrow") and not size:
            size = target.shape[ops.axis_of(target)]
        target = target.given[0]
    old = known.get(target, ())
    if not old:
        known[target] = found if len(found) > 1 else ((found[0][0], size),)
    elif len(found) == 1 and size and found[0][0] not in {kind for kind, _ in old}:
        known[target] = (*old, (found[0][0], size))


def _tokens(call: Call, known: Mapping[Call, Tokens], classes: Mapping[str, str]) -> Tokens:
    op = ops.plain(call.op)
    if call.op == "input":
        chosen = classes[call.name]
        return () if chosen == "structure" else ((chosen, 0),)
    held = [(g, known[g]) for g in call.given if g in known]
    if not held or op in ops.SHAPES:
        return ()
    if op in ops.CONCATENATIONS and not ops.in_place(call.op) and len(call.given) > 1:
        return _joined(call, known)
    if op in _SCATTERS and len({kind for _, state in held for kind, _ in state}) > 1:
        return tuple(dict.fromkeys((kind, 0) for _, state in held for kind, _ in state))
    if len(held) == 1 or op in ops.LAYOUT | ops.ATTENTIONS | ops.MATMULS | ops.CONVOLUTIONS:
        state = held[0][1]
        return _cut(call, state) if len(state) > 1 and op in ops.LAYOUT else state
    largest = max(g.numel for g, _ in held)
    return max((state for g, state in held if g.numel == largest), key=_rank)


def _rank(state: Tokens) -> tuple[bool, bool, bool]:
    kinds = {kind for kind, _ in state}
    return (
        "image" in kinds,
        "step" in kinds,
        "pooled" in kinds,
    )  # text summed up with the timestep is conditioning


def _joined(call: Call, known: Mapping[Call, Tokens]) -> Tokens:
    axis = ops.axis_of(call)
    states = [known[g] for g in call.given if g in known]
    kinds = {kind for state in states for kind, _ in state}
    if len(kinds) == 1 or all(state == states[0] for state in states):
        return states[0]
    if kinds <= {"step", "pooled"} or axis == len(call.shape) - 1:
        return max(states, key=_rank)
    out: list[tuple[str, int]] = []
    for g in call.given:
        state, size = known.get(g, (("constant", 0),)), g.shape[axis] if len(g.shape) > axis else 1
        out += (
            state if len(state) > 1 and sum(n for _, n in state) == size else [(_main(state), size)]
        )
    return tuple(out)


def _main(state: Tokens) -> str:
    return max(state, key=lambda pair: pair[1])[0]


def _cut(call: Call, state: Tokens) -> Tokens:
    """The part of a sequence that a slice, a split or an index takes, where it runs along the
    sequence.
    """
    source = call.given[0]
    op, arguments = call.op, call.arguments
    total = sum(n for _, n in state)
    if op == "getitem" and source.op in (
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unsafe_split",
        "unsafe_chunk",
    ):
        whole, axis = source.given[0], ops.axis_of(source)
        if whole.shape[axis] != total:
            return state
        pieces = _pieces(source, total)
        at = int(arguments["1"])
        start = sum(pieces[:at])
        return _between(state, start, start + pieces[at])
    axis = ops.axis_of(call)
    if (
        op not in ("slice", "narrow", "select")
        or source.shape[axis] != total
        or arguments.get("step", 1) != 1
    ):
        return state
    given = arguments.get("start", arguments.get("index"))
    start = given if isinstance(given, int) else 0
    start += total if start < 0 else 0
    return _between(state, start, start + (1 if op == "select" else call.shape[axis]))


def _pieces(split: Call, total: int) -> list[int]:
    given: Any = next(
        (
            split.arguments[n]
            for n in ("split_sizes", "split_size", "sections", "chunks")
            if n in split.arguments
        ),
        1,
    )
    if isinstance(given, list | tuple):
        return [int(n) for n in given]
    each = (
        -(-total // int(given))
        if split.op in ("chunk", "unsafe_chunk", "tensor_split")
        else int(given)
    )
    return [min(each, total - start) for start in range(0, total, each)]


def _between(state: Tokens, start: int, stop: int) -> Tokens:
    out, at = [], 0
    for kind, size in state:
        if min(stop, at + size) > max(start, at):
            out.append((kind, min(stop, at + size) - max(start, at)))
        at += size
    return tuple(out) or state
