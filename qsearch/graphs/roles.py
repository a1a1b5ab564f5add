"""Roles: what a layer is for (query, feed-forward input, ResNet convolution, …), from how it is wired.

The wiring decides where it can: an attention is cross-attention when its keys are made from another tensor than its queries,
an embedding is one because of what flows in. Names only tell apart what the wiring can't (query from key), by the
conventions that diffusers, transformers and the original checkpoints share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: last parts of a projection's name -> which projection of an attention it is
_PROJECTIONS = (
    ("q", re.compile(r"(^|\.)(to_q|q_proj|wq|q|query)$")),
    ("k", re.compile(r"(^|\.)(to_k|k_proj|wk|k|key)$")),
    ("v", re.compile(r"(^|\.)(to_v|v_proj|wv|v|value)$")),
    ("qkv", re.compile(r"(^|\.)(to_qkv|qkv|in_proj|wqkv|qkv_proj)$")),
    ("out", re.compile(r"(^|\.)(to_out(\.0)?|out_proj|o_proj|wo)$")),
    ("add-q", re.compile(r"(^|\.)add_q_proj$")),
    ("add-k", re.compile(r"(^|\.)add_k_proj$")),
    ("add-v", re.compile(r"(^|\.)add_v_proj$")),
    ("add-out", re.compile(r"(^|\.)to_add_out$")),
)
#: patterns over the whole name -> role; the first that fits wins
_NAMED = (
    ("time-embedding", re.compile(r"(time_embedding|timestep_embedder|time_embedder|t_embedder|time_embed|time_mlp)")),
    ("text-embedding", re.compile(r"(caption_projection|text_embedder|y_embedder|context_embedder|text_proj|add_embedding|label_emb)")),
    ("modulation", re.compile(r"(adaln_single|norm1\.linear|norm_out\.linear|norm1_context\.linear|modulation|adaLN_modulation|time_emb_proj|emb_layers)")),
    ("skip", re.compile(r"(conv_shortcut|skip_connection|skip_linear|nin_shortcut)")),
    ("resnet-conv", re.compile(r"(resnets\.\d+\.conv\d|in_layers\.\d|out_layers\.\d)")),
    ("resample", re.compile(r"(downsamplers|upsamplers|\.downsample|\.upsample)")),
    ("feed-forward-in", re.compile(r"(ff|mlp|feed_forward|ff_context)\.(net\.0\.proj|fc1|linear_1|w1|0)$")),
    ("feed-forward-out", re.compile(r"(ff|mlp|feed_forward|ff_context)\.(net\.2|fc2|linear_2|w2|2)$")),
    ("projection-in", re.compile(r"\.proj_in$")),
    ("projection-out", re.compile(r"\.proj_out$")),
)


@dataclass(frozen=True)
class Wiring:
    """What tracing saw of one layer: `source` identifies the tensor that flowed in, `order` the place in execution."""

    source: int
    order: int


def projection(name: str) -> str:
    """Which projection of an attention the name means (q, k, v, qkv, out, add-…), or ""."""
    return next((which for which, pattern in _PROJECTIONS if pattern.search(name)), "")


def attention(name: str) -> str:
    """Name of the attention module that a projection belongs to."""
    for _, pattern in _PROJECTIONS:
        if match := pattern.search(name):
            return name[: match.start()]
    return ""


def assign(wired: dict[str, Wiring], kinds: dict[str, str]) -> dict[str, str]:
    """Role of every layer in `kinds` (name -> linear, conv2d, …); never empty. Layers that did not run have no `Wiring`."""
    queries = {attention(n): w.source for n, w in wired.items() if projection(n) == "q"}
    cross = {attention(n) for n, w in wired.items() if projection(n) == "k" and queries.get(attention(n), w.source) != w.source}
    ran = sorted(wired, key=lambda n: wired[n].order)
    roles = {}
    for name, kind in kinds.items():
        which = projection(name)
        if which:
            roles[name] = f"{'cross' if attention(name) in cross else 'self'}-attention-{which}"
            continue
        found = next((role for role, pattern in _NAMED if pattern.search(name)), "")
        roles[name] = found or (f"embedding-{kind}" if kind == "embedding" else kind)
    # What comes first and last in the image path: the patch embedding or first convolution, and the layer that makes the output.
    plain = [n for n in ran if roles[n] == kinds[n] or roles[n].startswith("projection")]
    firsts = [n for n in plain if kinds[n].startswith("conv")]
    if firsts and firsts[0] in ran[: len(ran) // 4 + 6] and roles[firsts[0]] == kinds[firsts[0]]:
        roles[firsts[0]] = "input"
    if ran and (roles[ran[-1]] == kinds[ran[-1]] or roles[ran[-1]] == "projection-out"):
        roles[ran[-1]] = "output"
    return roles
