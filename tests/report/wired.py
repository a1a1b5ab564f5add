"""Graphs with operations and blocks written down, to look at without a model: a transformer and a
U-Net.
"""

from __future__ import annotations

import math

from qsearch.core.graph import Block, LayerSpec, Op, OpGraph


class Writer:
    """Adds operations in order; `block` closes those since the last one into a block."""

    def __init__(self) -> None:
        self.layers: list[LayerSpec] = []
        self.ops: list[Op] = []
        self.edges: list[tuple[str, str]] = []
        self.blocks: list[Block] = []
        self._done = 0

    def op(
        self,
        name: str,
        kind: str,
        reads: list[str],
        shape: tuple[int, ...],
        *,
        module: str = "",
        layer: LayerSpec | None = None,
        macs: int = 0,
    ) -> str:
        if layer is not None:
            self.layers.append(layer)
        sizes = {op.name: math.prod(op.shape) for op in self.ops}
        self.ops.append(
            Op(
                name,
                kind,
                layer.name if layer else "",
                module,
                shape,
                macs,
                sum(sizes[r] for r in reads),
                math.prod(shape),
            )
        )
        self.edges += [(r, name) for r in reads]
        return name

    def linear(
        self,
        name: str,
        role: str,
        read: str,
        tokens: int,
        into: int,
        out: int,
        *,
        module: str = "",
        sees: str = "image",
    ) -> str:
        macs = tokens * into * out
        layer = LayerSpec(
            name,
            role,
            "linear",
            (out, into),
            macs,
            module,
            inputs=tokens * into,
            outputs=tokens * out,
            bias=True,
            sees=sees,
        )
        return self.op(
            name, "linear", [read], (1, tokens, out), module=module, layer=layer, macs=macs
        )

    def block(self, name: str, kind: str) -> None:
        held = self.ops[self._done :]
        self._done = len(self.ops)
        layers = tuple(op.layer for op in held if op.layer)
        self.blocks.append(
            Block(
                name,
                kind,
                layers,
                len(self.blocks),
                len(self.blocks),
                tuple(op.name for op in held),
            )
        )

    def graph(self, model: str) -> OpGraph:
        return OpGraph(
            model,
            tuple(self.layers),
            tuple(self.ops),
            tuple(self.edges),
            tuple(self.blocks),
            "written",
        )


def transformer(blocks: int = 4, tokens: int = 64, width: int = 32) -> OpGraph:
    """Patches, a timestep and a text; blocks of self-attention, cross-attention and feed-forward;
    an output.
    """
    w = Writer()
    noise, step, text = (
        w.op(n, "input", [], shape)
        for n, shape in (("sample", (1, 4, 16, 16)), ("timestep", (1,)), ("text", (1, 8, 24)))
    )
    w.linear("time.linear_1", "time-embedding", step, 1, 1, width, sees="step-only")
    condition = w.linear(
        "time.linear_2", "time-embedding", "time.linear_1", 1, width, width, sees="step-only"
    )
    w._done = 3
    w.block("time", "time-embedding")
    words = w.linear("caption", "text-embedding", text, 8, 24, width, sees="text-only")
    w.block("caption", "text-embedding")
    x = w.linear("patch", "input", noise, tokens, 16, width)
    w.block("patch", "patchify")
    for i in range(blocks):
        m = f"blocks.{i}"
        for name, kind, keys in ((f"{m}.attn1", "self", ""), (f"{m}.attn2", "cross", words)):
            norm = w.op(f"{name}.norm", "norm", [x, condition], (1, tokens, width), module=m)
            read = keys or norm
            count = 8 if keys else tokens
            q = w.linear(
                f"{name}.to_q", f"{kind}-attention-q", norm, tokens, width, width, module=m
            )
            k = w.linear(
                f"{name}.to_k",
                f"{kind}-attention-k",
                read,
                count,
                width,
                width,
                module=m,
                sees="text-only" if keys else "image",
            )
            v = w.linear(
                f"{name}.to_v",
                f"{kind}-attention-v",
                read,
                count,
                width,
                width,
                module=m,
                sees="text-only" if keys else "image",
            )
            mixed = w.op(
                f"{name}.sdpa",
                "attention",
                [q, k, v],
                (1, tokens, width),
                module=m,
                macs=2 * tokens * count * width,
            )
            out = w.linear(
                f"{name}.to_out", f"{kind}-attention-out", mixed, tokens, width, width, module=m
            )
            x = w.op(f"{name}.add", "add", [x, out], (1, tokens, width), module=m)
            w.block(name, f"{kind}-attention")
        norm = w.op(f"{m}.norm", "norm", [x, condition], (1, tokens, width), module=m)
        up = w.linear(f"{m}.ff.up", "feed-forward-in", norm, tokens, width, 4 * width, module=m)
        gelu = w.op(f"{m}.gelu", "activation", [up], (1, tokens, 4 * width), module=m)
        down = w.linear(
            f"{m}.ff.down", "feed-forward-out", gelu, tokens, 4 * width, width, module=m
        )
        x = w.op(f"{m}.add", "add", [x, down], (1, tokens, width), module=m)
        w.block(f"{m}.ff", "feed-forward")
    made = w.linear("proj_out", "output", x, tokens, width, 16)
    w.block("out", "output")
    w.op("result", "output", [made], (1, 4, 16, 16))
    return w.graph("written transformer")


def unet(depth: int = 4, tokens: int = 256) -> OpGraph:
    """Down, through the middle, up again, each step up beside the step down of its size."""
    w = Writer()
    x = w.op("sample", "input", [], (1, tokens, 8))
    w._done = 1
    x = w.linear("conv_in", "input", x, tokens, 8, 16)
    w.block("conv_in", "input")
    kept = []
    for i in range(depth):
        x = w.linear(f"down.{i}", "resnet-conv", x, tokens, 16 + 16 * i, 32 + 16 * i)
        kept.append(x)
        w.block(f"down.{i}", "resnet")
    x = w.linear("mid", "resnet-conv", x, tokens, 16 + 16 * depth, 16 + 16 * depth)
    w.block("mid", "resnet")
    for i in reversed(range(depth)):
        joined = w.op(f"cat.{i}", "concat", [x, kept[i]], (1, tokens, 2 * (32 + 16 * i)))
        x = w.linear(f"up.{i}", "resnet-conv", joined, tokens, 2 * (32 + 16 * i), 16 + 16 * i)
        w.block(f"up.{i}", "resnet")
    w.linear("conv_out", "output", x, tokens, 16, 8)
    w.block("conv_out", "output")
    return w.graph("written unet")
