"""Graphs of any denoiser: every card against torch's FlopCounterMode, what others counted, and
classes that qsearch has never heard of.

    python notebooks/figures/graphs.py [NAME ...] [--once] [--reference ../shared/reference] [--wait
    900]

Each model is read in a process of its own, twice with different hash seeds, so that seconds and
memory are its own and graph ids are compared over runs. Without names: all cards, the classes of
tiny_denoisers.yaml, and a denoiser in plain torch. Writes graphs.json beside this file; ends with
status 1 where a check does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from qsearch.core.graph import OpGraph

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("tiny_denoisers.yaml").read_text(encoding="utf-8")
)
PLAIN = "plain torch"
TOLERANCE = 1e-3  # of multiply-accumulates
SECONDS, MEGABYTES = 15.0, 2000.0
SHORT = {
    "self-attention": "self",
    "cross-attention": "cross",
    "joint-attention": "joint",
    "parallel": "parallel",
    "feed-forward": "ff",
    "resnet": "resnet",
}


def plain() -> tuple[Any, dict[str, Any]]:
    """A denoiser with no diffusers in it: convolutions down and up with a skip, attention to itself
    and to words, a timestep.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Denoiser(nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.width = width
            self.enter, self.down = (
                nn.Conv2d(3, width, 3, padding=1),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
            )
            self.clock = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 2 * width))
            self.norm = nn.GroupNorm(4, width)
            self.mix, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.ask, self.words, self.told = (
                nn.Linear(width, width),
                nn.Linear(20, 2 * width),
                nn.Linear(width, width),
            )
            self.up, self.join, self.leave = (
                nn.ConvTranspose2d(width, width, 4, 2, 1),
                nn.Conv2d(2 * width, width, 1),
                nn.Conv2d(width, 3, 3, padding=1),
            )

        def forward(self, noisy_image: Any, timestep: Any, text: Any) -> Any:
            angles = timestep[:, None] * torch.arange(8, device=timestep.device)
            scale, shift = self.clock(torch.cat([angles.sin(), angles.cos()], 1)).chunk(2, 1)
            first = self.enter(noisy_image)
            x = (
                self.norm(self.down(first)) * (1 + scale[:, :, None, None])
                + shift[:, :, None, None]
            )
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.mix(tokens).chunk(3, 2)
            weights = (q @ k.transpose(1, 2) / self.width**0.5).softmax(
                -1
            )  # by hand, as older code does
            tokens = tokens + self.back(weights @ v)
            k, v = self.words(text).chunk(2, 2)
            tokens = tokens + self.told(F.scaled_dot_product_attention(self.ask(tokens), k, v))
            x = self.up(tokens.transpose(1, 2).reshape(x.shape))
            return self.leave(F.silu(self.join(torch.cat([x, first], 1))))

    return Denoiser().eval(), {
        "noisy_image": torch.rand(1, 3, 32, 32),
        "timestep": torch.rand(1),
        "text": torch.rand(1, 7, 20),
    }


def load(name: str) -> tuple[Any, dict[str, Any]]:
    """A card on the meta device; a tiny class or the plain denoiser on the CPU, since some look at
    their inputs' values.
    """
    import torch

    from qsearch.graphs.families import cards

    if name in cards.names():
        return cards.load(name)
    torch.manual_seed(0)
    if name == PLAIN:
        return plain()
    import diffusers

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                torch.rand(value.shape)
                if value.is_floating_point()
                else torch.ones(value.shape, dtype=value.dtype)
            )
        if isinstance(value, dict | list):
            return (
                {k: real(v) for k, v in value.items()}
                if isinstance(value, dict)
                else [real(v) for v in value]
            )
        return value

    return getattr(diffusers, name)(**TINY[name]["config"]).eval(), real(
        cards.build(TINY[name]["inputs"], {})
    )


def child(name: str, folder: Path, count: bool) -> None:
    """Read one model: graph.json into `folder`, seconds and memory of it, then torch's own count of
    operations, as a line of JSON.
    """
    import diffusers
    import torch
    import torch._dynamo  # export's
    from torch import nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from qsearch.graphs.extraction import extract
    from qsearch.graphs.families import cards

    # What is imported once, whatever is read, is not this graph's time.
    _ = (
        None
        if name == PLAIN
        else getattr(diffusers, cards.card(name).class_name if name in cards.names() else name)
    )
    began, worked = time.perf_counter(), time.process_time()
    model, inputs = load(name)
    graph = extract(model, inputs, name=name)
    found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - worked}
    found["megabytes"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (2**20 if sys.platform == "darwin" else 1024)
        * 1.048576
    )
    graph.save(folder / "graph.json")
    if count:
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            model(**inputs)
        found["counted"] = counter.get_total_flops() / 2
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
        known = {layer.name for layer in graph} | {
            alias for layer in graph for alias in layer.aliases
        }
        missing = [
            n for n, module in model.named_modules() if isinstance(module, kinds) and n not in known
        ]
    print(json.dumps(found | {"missing": missing}))


def read(name: str, once: bool, patience: float) -> tuple[dict[str, Any], OpGraph | None]:
    """The row of one model, and its graph; a failure is a row that says so."""
    runs, ids = [], []
    graph = None
    for seed in range(1 if once else 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                __file__,
                "--child",
                name,
                "--folder",
                folder,
                *(["--count"] if seed == 0 else []),
            ]
            path = os.pathsep.join(
                [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            )
            environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": path}
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=patience,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return {"model": name, "error": f"took more than {patience:.0f} s"}, None
            if done.returncode:
                return {
                    "model": name,
                    "error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300],
                }, None
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            graph = OpGraph.load(Path(folder) / "graph.json")
            ids.append(graph.id)
    assert graph is not None
    first, macs = runs[0], graph.total_macs
    kinds = Counter(block.kind for block in graph.blocks)
    row = {
        "model": name,
        "layers": len(graph.layers),
        "weights": graph.weights,
        "GMACs": macs / 1e9,
        "FlopCounterMode": first["counted"] / 1e9,
        "off by": abs(macs - first["counted"]) / max(1.0, first["counted"]),
        "blocks": ", ".join(
            f"{count} {short}" for kind, short in SHORT.items() if (count := kinds[kind])
        ),
        "read by": graph.source,
        "seconds": min(run["seconds"] for run in runs),
        "CPU s": min(run["cpu"] for run in runs),
        "MB": round(max(run["megabytes"] for run in runs)),
        "graph.id": ids[0],
        "ids": len(set(ids)),
        "missing": first["missing"],
    }
    return row, graph


class Checks:
    """What must hold, what was found, and whether it does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def equal(self, what: str, found: Any, expected: Any) -> None:
        self.rows.append(
            {
                "check": what,
                "expected": str(expected),
                "found": str(found),
                "holds": found == expected,
            }
        )

    def below(self, what: str, found: float, limit: float) -> None:
        self.rows.append(
            {
                "check": what,
                "expected": f"at most {limit:g}",
                "found": f"{found:.4g}",
                "holds": found <= limit,
            }
        )


def check_row(checks: Checks, row: dict[str, Any], graph: OpGraph) -> None:
    name = row["model"]
    checks.below(f"{name}: MACs off FlopCounterMode", row["off by"], TOLERANCE)
    checks.equal(f"{name}: layers that the graph lacks", row.pop("missing"), [])
    checks.equal(f"{name}: graph ids over the runs", row.pop("ids"), 1)
    checks.equal(
        f"{name}: layers with no role",
        [layer.name for layer in graph if layer.role in ("", "other")],
        [],
    )
    checks.equal(
        f"{name}: layers that see nothing known",
        sum(layer.sees == "" for layer in graph if layer.calls),
        0,
    )
    order = {block.name: block.position for block in graph.blocks}
    checks.equal(
        f"{name}: edges of the block graph that go backwards",
        sum(order[a] > order[b] for a, b in graph.block_edges),
        0,
    )
    checks.below(f"{name}: seconds of CPU", row["CPU s"], SECONDS)
    checks.below(f"{name}: MB of memory", row["MB"], MEGABYTES)


def check_sdxl(checks: Checks, graph: OpGraph, reference: Path) -> None:
    text = [layer.name for layer in graph if layer.sees == "text-only"]
    sees = Counter(layer.sees for layer in graph)
    checks.equal(
        "sdxl: text-only layers are the keys and values of cross-attention",
        set(text),
        {n.name for n in graph if ".attn2.to_k" in n.name or ".attn2.to_v" in n.name},
    )
    checks.equal(
        "sdxl: layers by what they see",
        dict(sees),
        {"image": 794 - 161, "text-only": 140, "step-only": 2, "pooled-only": 2, "mixed": 17},
    )
    checks.equal("sdxl: weights", graph.weights, 2_565_880_320)
    checks.equal(
        "sdxl: long skips, as Qua²SeDiMo splits them",
        sum(len(layer.splits) == 2 and layer.name.endswith("conv1") for layer in graph),
        9,
    )
    path = reference / "mixdq" / "weight_ratio.yaml"
    if not path.exists():
        print(f"no {path}: the comparison with MixDQ's layers is left out")
        return
    published = {
        name.removeprefix("model."): round(ratio * 11520)
        for name, ratio in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }
    checks.equal(
        "sdxl: names and weights of MixDQ's 794 layers that differ",
        len(set(published.items()) ^ {(n.name, n.weights) for n in graph}),
        0,
    )


def check_pixart(checks: Checks, graph: OpGraph) -> None:
    checks.equal(
        "pixart-alpha: layers, weights", (len(graph.layers), graph.weights), (287, 610_228_224)
    )
    held = Counter(layer.block for layer in graph if layer.block.startswith("transformer_blocks."))
    checks.equal("pixart-alpha: weight layers a block", set(held.values()), {10})
    kinds = Counter(block.kind for block in graph.blocks)
    checks.equal(
        "pixart-alpha: self-, cross-attentions, feed-forwards",
        tuple(kinds[k] for k in ("self-attention", "cross-attention", "feed-forward")),
        (28, 28, 28),
    )


def check_hunyuan(checks: Checks, graph: OpGraph) -> None:
    name = graph.model
    blocks = {layer.block for layer in graph if layer.block.startswith("blocks.")}
    checks.equal(f"{name}: blocks, 39 included", blocks, {f"blocks.{i}" for i in range(40)})
    skips = {
        layer.name: layer.splits
        for layer in graph
        if len(layer.splits) == 2 and layer.sees == "image"
    }
    checks.equal(
        f"{name}: long skips that are concatenated",
        skips,
        {f"blocks.{i}.skip_linear": (1408, 1408) for i in range(21, 40)},
    )
    counted = [
        layer for layer in graph if ".pooler." not in layer.name and layer.kind != "embedding"
    ]
    checks.equal(
        f"{name}: layers as Qua²SeDiMo counts: without the pooler's "
        f"{len(graph.layers) - len(counted)}, skips as two",
        len(counted) + len(skips),
        487,
    )
    if name == "hunyuan-dit-1.1":
        checks.equal(
            f"{name}: their weights", sum(layer.weights for layer in counted), 1_499_645_952
        )


def main() -> None:
    """Read, check and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--once", action="store_true", help="one run a model, no comparison of ids")
    parser.add_argument("--wait", type=float, default=900.0, help="seconds a model may take")
    parser.add_argument(
        "--reference",
        type=Path,
        default=Path(os.environ.get("QSEARCH_REFERENCE", ROOT.parent / "shared" / "reference")),
    )
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.count)
        return
    from figure import publish

    from qsearch.graphs.families import cards

    rows, failed, checks = [], [], Checks()
    for name in options.models or [*cards.names(), *TINY, PLAIN]:
        row, graph = read(name, options.once, options.wait)
        print(
            name,
            row.get("error")
            or f"{row['seconds']:.1f} s, {row['CPU s']:.1f} s of CPU, {row['MB']:.0f} MB",
            flush=True,
        )
        if graph is None:
            failed.append(row)
            checks.equal(f"{name}: is read", row["error"], "no error")
            continue
        rows.append(row)
        check_row(checks, row, graph)
        if name == "sdxl":
            check_sdxl(checks, graph, options.reference)
        elif name == "pixart-alpha":
            check_pixart(checks, graph)
        elif name.startswith("hunyuan-dit"):
            check_hunyuan(checks, graph)
    broken = [row for row in checks.rows if not row["holds"]]
    table = Table(
        title=f"{len(checks.rows)} checks, {len(broken)} do not hold", title_justify="left"
    )
    for column in ("check", "expected", "found"):
        table.add_column(column)
    for row in broken:
        table.add_row(row["check"], row["expected"][:80], row["found"][:80])
    Console(width=200).print(table)
    publish(
        __file__,
        rows,
        title="graphs: one call on the example inputs",
        seed=0,
        extra={"checks": checks.rows, "failed": failed},
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
