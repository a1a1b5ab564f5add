"""Exports in the tools that read them, on a CPU: a row for each tool, format and denoiser of the
zoo, with what was loaded, what ran, and how far the tool's output is from `simulate`'s.

    pip install -e '.[dev]' -r notebooks/figures/tools.txt -c constraints.txt
    python notebooks/figures/tools.py [--tools ONNX torchao …] [--models scenes-dit scenes-unet]

tools.txt has the tools that `.[dev]` lacks, in the versions of the rows.

Each denoiser is exported in fp32, so that a tool's own arithmetic shows and not that of stored
weights, and called once with a recorded call. A format's plan gives it to every layer that can take
it exactly and keeps the others; `mixed` gives the tool's formats to the layers by turns.

`read back`: layers whose scheme is the plan's, by the tool's loaded objects or, where `by` says
file, by the exporter's own reader. `off`: the distance of the tool's output from that of
`simulate`, as a share of the distance between `simulate` and full precision, which is what
quantization changes. `tolerance` is what this may be: a constant a tool, for the reason beside it.
Where the tool computes in 16 bits, twice the distance by which the same 16 bits move the output of
the denoiser without any quantization is added, as the same share; where inputs are rounded, twice
the distance by which `simulate`'s own error moves when the call's input moves by 2^-12 of itself, a
last bit of fp16: rounding carries that on. No tolerance is above 1.5, since two errors of one size
that know nothing of each other lie the root of 2 of it apart. `error` is the tool's distance from
full precision over `simulate`'s. `within`: `off` is within its tolerance, and `error` between 1 /
1.5 and 1.5. `MB`: the files, in which layers that are kept have 32 bits. A cell without a number
was not measured: `loads` and `runs` say why. Tools run in processes of their own, one a tool and
denoiser. Rows are kept in `--work` (runs/tools), by commit, so that what was interrupted goes on;
tools.json is written once all of a commit's are there. `by tool` sums up.
"""

from __future__ import annotations

import argparse
import atexit
import fnmatch
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # it changes nothing here, and takes minutes

import torch
from figure import commit, publish

from qsearch.core import plugins
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporting import formats
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import run
from qsearch.measure.quantized_weights import QuantizedWeights
from tests.execute import layout_loaders as layouts
from tests.execute import tool_loaders as loaders
from tests.execute.tool_loaders import CannotRunError, Loaded
from tests.execute.tool_models import Known, known, mixed, off

SECONDS = 600
MODELS = ("scenes-dit", "scenes-unet")
#: column -> what stands there where nothing was measured
COLUMNS: dict[str, Any] = {
    "tool": "",
    "format": "",
    "model": "",
    "loads": "",
    "runs": "",
    "read back": "",
    "by": "",
    "off": None,
    "tolerance": None,
    "error": None,
    "within": None,
    "why this tolerance": "",
    "inputs rounded": "",
    "MB": None,
    "note": "",
    "version": "",
}
AS_PLANNED = "as the plan says"
SAME = (1e-3, "the same codes, multiplied in fp32")
#: how many times larger or smaller than `simulate`'s error a tool's may be, and how far from it:
#: two errors of one size that know nothing of each other lie the root of 2 of it apart
RATIO = 1.5


@dataclass(frozen=True)
class Tool:
    """A reader of exports.

    Attributes:
        exporter: of qsearch; "" for qsearch's own files.
        formats: of the uniform plans, in words; all of them by turns are the mixed one.
        load: takes a denoiser, a folder, and what was calibrated.
        package: whose version stands in the rows; "" for qsearch.
        runs: what computes, where it is not the tool itself.
        inputs: pattern of a format -> what the tool does to inputs, where more is to say than that
            it rounds those that the plan rounds.
        bounds: pattern of a format -> the tolerance and its reason; the first that matches holds,
            and the mixed plan has the widest.
        half: pattern of a format -> which 16 bits the tool goes through, of `HALVES`.
        notes: pattern of a format -> a note.
        mix: formats of the mixed plan where these are not all; empty where a file has one format.
        sizes: whether a format's group is the tool's own and differs by layer.
    """

    exporter: str
    formats: str
    load: Callable[[Known, Path, Any], Loaded]
    package: str = ""
    runs: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    bounds: dict[str, tuple[float, str]] = field(default_factory=dict)
    half: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    mix: str | None = None
    sizes: bool = False


def plain(load: Callable[[Known, Path], Loaded]) -> Callable[[Known, Path, Any], Loaded]:
    """A loader that needs no calibration."""
    return lambda there, folder, _: load(there, folder)


QDQ = "int4-c uint4-g32 int8-c uint8-g64 e4m3-c int8-c+a8t"
OWN = "uint4-c int8-c e4m3-c km3-c uint4-g32@hqq nvfp4 mxfp8 int8-c+a8"
GGUF = "int4-g32 uint4-g32 int5-g32 uint5-g32 int8-g32"
_TIME = "it keeps time_embedding, whatever a rule says, which model.gguf has as planned"
_PRODUCT = (
    "scale times zero point is fp16: half a last bit of 2^(b-1) steps, over the rms of rounding"
)
_GGUF_BOUND = {
    f"uint{bits}*": (2 ** (bits - 1) * 2**-11 * math.sqrt(12), _PRODUCT) for bits in (4, 5)
} | {"*": SAME}
_SCALES = "its scales are fp32, qsearch's fp16: a few weights round to the next level"
#: by how much of a level the last half bit of a scale in fp16 moves the largest weight, which is
#: the share of weights that another level is nearest to at most
_FALLS = {"int8": 2**-5, "int4": 2**-9, "int3": 2**-10, "e4m3": 2**-8}
_HALF_WEIGHTS = "it widens weights to fp16: half a last bit of 2^(b-1) levels, over that rms"
_WIDENED = {
    f"{sign}{bits}*": (
        2 ** (bits - 1) * (2**-12 + extra) * math.sqrt(12),
        _HALF_WEIGHTS if sign == "int" else f"{_PRODUCT}; {_HALF_WEIGHTS}",
    )
    for sign, extra in (("int", 0), ("uint", 2**-11))
    for bits in (4, 5, 8)
}
_SHARED = "queries, keys and values share a tensor's scale"
TOOLS: dict[str, Tool] = {
    "compressed-tensors": Tool(
        "compressed_tensors",
        ("int4-c uint4-g32 uint3-c int8-c int8-c+a8 e4m3-c e4m3-c+ae4m3 nvfp4 mxfp4 mxfp8"),
        plain(loaders.with_compressed_tensors),
        "compressed-tensors",
        bounds={"*": SAME},
        half={"nvfp4": "bf16", "mixed": "bf16"},
    ),
    "AutoRound": Tool(
        "autoround",
        "int4-c uint4-g32 int8-c uint8-c int2-g16 uint2-g16",
        plain(loaders.with_autoround),
        "auto-round",
        bounds={"*": SAME},
        half={"*": "fp16"},
    ),
    "ONNX Runtime": Tool(
        "onnx",
        QDQ,
        plain(loaders.with_onnx),
        "onnxruntime",
        bounds={"*": SAME},
        inputs={"*-g*": "no, with session.qdq_matmulnbits_accuracy_level = 1; else to 8 bits"},
    ),
    "OpenVINO": Tool(
        "openvino",
        QDQ,
        plain(loaders.with_openvino),
        "openvino",
        bounds={"*": SAME},
        inputs={
            "*+a*": AS_PLANNED,
            "mixed": AS_PLANNED,
            "*": "no: the file sets DYNAMIC_QUANTIZATION_GROUP_SIZE to 0; else to 8 bits",
        },
    ),
    "ModelOpt": Tool(
        "modelopt",
        "int4-c int4-g32 int8-c e4m3-c e4m3-t int3-c nvfp4 mxfp8",
        plain(loaders.with_modelopt),
        "nvidia-modelopt",
        bounds={f"{form}*": (math.sqrt(12 * p), _SCALES) for form, p in _FALLS.items()},
        mix="int4-c int4-g32 int8-c e4m3-c e4m3-t int3-c keep",
    ),
    "ModelOpt's checkpoint": Tool(
        "modelopt_weights",
        "e4m3-t+ae4m3t e4m3-c+ae4m3 nvfp4 nvfp4+anvfp4 nvfp4+anvfp4~balance30~lowrank32",
        layouts.with_modelopt_weights,
        runs="no: servers' kernels want a GPU; unpacked in plain torch, inputs by simulate",
        bounds={
            "e4m3-c*": SAME,
            "nvfp4": (0.4, f"{_SHARED}: e4m3's half last bit over nvfp4's own rounding"),
            "*": (RATIO, f"{_SHARED}, and a branch"),
        },
    ),
    "GGUF in diffusers": Tool(
        "gguf",
        GGUF,
        plain(loaders.with_gguf),
        "gguf",
        bounds=_WIDENED,
    ),
    "GGUF by gguf-py": Tool("gguf", GGUF, plain(loaders.with_gguf_py), "gguf", bounds=_GGUF_BOUND),
    "stable-diffusion.cpp": Tool(
        "gguf",
        GGUF,
        plain(layouts.with_sd_cpp),
        "stable-diffusion-cpp-python",
        runs="no: it builds models that it knows by name; its reader widens, diffusers multiplies",
        bounds=_GGUF_BOUND,
        inputs={"*": "to 8 bits in blocks of 32, on a CPU, by ggml's products"},
        notes={"*": f"read back: types that its own conversion makes by the rules; {_TIME}"},
    ),
    "SDNQ": Tool(
        "sdnq",
        (
            "int4-g32 uint4-c int8-c e4m3-c int3-g16 uint2-g16 e2m1-g32 int4-c~rotate "
            "uint4-g32~lowrank16"
        ),
        plain(loaders.with_sdnq),
        "sdnq",
        bounds={"*": SAME},
    ),
    "torchao": Tool(
        "torchao",
        "int4-g32 uint4-c int8-c e4m3-c uint5-g32 int3-c int8-c+a8",
        plain(loaders.with_torchao),
        "torchao",
        bounds={"*": SAME},
    ),
    "optimum-quanto": Tool(
        "quanto",
        "uint4-g128 uint2-g128 int8-c e4m3-c e5m2-c",
        plain(loaders.with_quanto),
        "optimum-quanto",
        bounds={"*": SAME},
        sizes=True,
    ),
    "bitsandbytes": Tool(
        "bitsandbytes",
        "int8-c+a8 e2m1-g64",
        plain(loaders.with_bitsandbytes),
        "bitsandbytes",
        bounds={"*": (RATIO, "the tool chooses codes, and rounds inputs, by rules of its own")},
        inputs={"int8*": "to 8 bits a row about 0, outlier channels apart"},
        notes={"*": "diffusers puts its layers in place; they are filled here, on a CPU"},
        mix="",
    ),
    "ComfyUI": Tool(
        "comfyui",
        (
            "e4m3-t int8-c int8-t nvfp4 mxfp8 uint4-g64 int8-c+a8 int8-t+a8 int8-c~rotate "
            "int8-c+a8~rotate int4-c+a4~rotate cb4~rotate cb4+a8~rotate"
        ),
        plain(layouts.with_comfyui),
        "comfy-kitchen",
        runs="yes, by comfy-kitchen's eager kernels; ComfyUI itself is in no registry",
        bounds={
            "*+a*": (
                RATIO,
                "inputs about 0 there, between the smallest and the largest in simulate",
            ),
            "*": SAME,
        },
        inputs={
            "*+a*": "as the plan says, but about 0",
            "mixed": "as the plan says, but about 0",
            "uint4*": "no",
            "*": "no: the marker says full_precision_matrix_mult",
        },
    ),
    "Nunchaku Lite": Tool(
        "nunchaku_lite",
        (
            "int4-g64+aint4g64 int4-g64+aint4g64~balance30~lowrank32 nvfp4+anvfp4 "
            "nvfp4+anvfp4~balance30~lowrank32 uint4-g64"
        ),
        plain(layouts.with_nunchaku_lite),
        runs="no: its kernels want a GPU; the same arithmetic on the tensors as they lie",
        bounds={"*": (0.1, "scales, branches and biases are fp16, and inputs are rounded")},
        mix="int4-g64+aint4g64~balance30~lowrank32 uint4-g64 int4-g64+aint4g64 keep",
    ),
    "AIMET": Tool(
        "aimet",
        "int8-c uint8-c int4-c uint4-c int3-c int8-c+a8t",
        plain(loaders.with_aimet),
        "aimet-torch",
        bounds={"*": (0.1, "the same grid; ties fall to either side")},
    ),
    "diffusers with QSearchConfig": Tool(
        "", OWN, plain(layouts.with_qsearch_diffusers), bounds={"*": SAME}
    ),
    "qsearch's packed file": Tool(
        "",
        f"{OWN} int8-c+a8t int8-c+a8~balance",
        plain(layouts.with_packed_file),
        bounds={"*": SAME},
    ),
    "cache-dit": Tool(
        "cache_dit",
        "int8-c e4m3-c nvfp4 uint4-g32 int8-c+aint8 e4m3-c+ae4m3",
        plain(loaders.with_cache_dit),
        "cache-dit",
        runs="yes, told that there is a GPU: it asks for one, and torchao computes on a CPU",
        bounds={
            "int8*": (RATIO, "torchao's integers have 255 steps, qsearch's 254: other codes"),
            "e4m3*": (math.sqrt(12 * _FALLS["e4m3"]), _SCALES),
            "*": (0.1, "the same grid; ties fall to either side"),
        },
        mix="int8-c e4m3-c nvfp4 int8-c+aint8 keep",
    ),
    "step policy": Tool(
        "step_policy",
        "e4m3-t+ae4m3t nvfp4+anvfp4",
        plain(layouts.with_step_policy),
        runs="no",
        mix="",
        notes={"*": "loads: diffusers' own resolver of such policies, of Cosmos 3"},
    ),
}
_GPU = "no: it wants a GPU"
#: tool -> what it reads of ours, and why nothing of it was tried
NOT_TRIED = {
    "vLLM-Omni": ("ModelOpt's checkpoint, compressed-tensors, step policy", _GPU),
    "SGLang": ("ModelOpt's checkpoint, ComfyUI's files, step policy", _GPU),
    "TensorRT-LLM": ("quant_config, step policy", _GPU),
}


def matching(table: dict[str, Any], form: str, default: Any) -> Any:
    """The entry of the first pattern that a format matches."""
    return next((v for pattern, v in table.items() if fnmatch.fnmatchcase(form, pattern)), default)


def planned(tool: Tool, form: str, there: Known) -> Plan:
    """The format wherever a layer can take it, or all formats of the tool by turns."""
    if form == "mixed":
        given = (f"{tool.formats} keep" if tool.mix is None else tool.mix).split()
        if tool.exporter:
            return mixed(there.graph, tool.exporter, given)
        return Plan.make(
            there.graph, {x.name: given[i % len(given)] for i, x in enumerate(there.graph)}
        )
    asked = Scheme.parse(form)
    if not tool.exporter:
        return Plan.uniform(there.graph, form)
    exporter: Any = plugins.load("exporters", tool.exporter)
    layers = {}
    for layer in there.graph:
        found = exporter.nearest(asked, layer)
        same = replace(found, group=asked.group) == asked if tool.sizes else found == asked
        layers[layer.name] = found if same else KEEP
    return Plan.make(there.graph, layers)


def written(tool: Tool, there: Known, plan: Plan, calibration: Any, folder: Path) -> list[Path]:
    """The plan's files."""
    weights = QuantizedWeights(there.model, there.graph, calibration)
    if tool.load is TOOLS["qsearch's packed file"].load:
        import copy

        from qsearch.execute import packed_file
        from qsearch.execute.runtime import apply

        model = copy.deepcopy(there.model)
        weights = QuantizedWeights(model, there.graph, calibration)
        apply(model, plan, there.graph, weights)
        packed_file.save(model, folder / "model.safetensors", there.graph, plan)
    elif not tool.exporter:
        from qsearch.diffusers import QSearchConfig

        kind: Any = type(there.model)
        kind.from_pretrained(
            there.folder,
            subfolder=there.component,
            quantization_config=QSearchConfig(plan, there.graph),
            torch_dtype=torch.float32,
        ).save_pretrained(folder)
    else:
        plugins.load("exporters", tool.exporter).write(there.job(plan, calibration), folder)
    return [path for path in folder.rglob("*") if path.is_file()]


def floor(there: Known, kind: str) -> float:
    """How far 16 bits alone move the denoiser's output."""
    import copy

    model = copy.deepcopy(there.model)
    if kind == "fp16":
        made = loaders.in_half(model.half(), there)
    else:
        made = run(model.bfloat16().float(), there.call)
    return float((made - there.output).norm())


def base(name: str, form: str, model: str) -> dict[str, Any]:
    """A row in which nothing was measured."""
    tool = TOOLS[name]
    found = {**COLUMNS, "tool": name, "format": form, "model": model}
    found["note"] = matching(tool.notes, form, "")
    rounds = AS_PLANNED if "+a" in form or form == "mixed" else "no"
    found["inputs rounded"] = matching(tool.inputs, form, rounds)
    if tool.package and importlib.util.find_spec(module_of(tool.package)):
        found["version"] = metadata.version(tool.package)
    return found


def module_of(package: str) -> str:
    """What a distribution is imported as."""
    named = {"optimum-quanto": "optimum", "nvidia-modelopt": "modelopt"}
    named["stable-diffusion-cpp-python"] = "stable_diffusion_cpp"
    return named.get(package, package.replace("-", "_"))


def row(name: str, form: str, model: str, there: Known, calibration: Any) -> dict[str, Any]:
    """Export, load, read back, run and compare."""
    tool, found = TOOLS[name], base(name, form, model)
    plan = planned(tool, form, there)
    if all(scheme == KEEP for scheme in plan.layers.values()):
        return found | {"loads": "no", "runs": "no", "note": "no layer can take this format"}
    if tool.package and not found["version"]:
        return found | {"loads": f"no: pip install {tool.package}", "runs": "no"}
    folder = Path(tempfile.mkdtemp())
    try:
        files = written(tool, there, plan, calibration, folder)
        found["MB"] = sum(path.stat().st_size for path in files) / 1e6
        wanted, read = formats(plan.layers), {}
        if tool.exporter:
            read = plugins.load("exporters", tool.exporter).read(folder, there.graph)
        found |= {"read back": count(read, wanted), "by": "file" if tool.exporter else ""}
        try:
            loaded = tool.load(there, folder, calibration)
        except Exception as error:
            return found | {"loads": said(error), "runs": "no"}
        found["loads"] = "yes"
        if loaded.formats is not None:
            found |= {"read back": count(loaded.formats, wanted), "by": "tool"}
        try:
            made = loaded.output()
        except Exception as error:
            return found | {"runs": said(error)}
        found["runs"] = tool.runs or "yes"
        return found | compared(tool, form, there, made, plan, calibration)
    finally:
        shutil.rmtree(folder)


def count(found: dict[str, Scheme], wanted: dict[str, Scheme]) -> str:
    """Layers that are as planned, of all."""
    return f"{sum(found.get(n) == s for n, s in wanted.items())} of {len(wanted)}"


def said(error: Exception) -> str:
    """A reason, in one line."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, CannotRunError) else f"{type(error).__name__}: "
    return f"no: {kind}{text[:160]}"


def compared(
    tool: Tool, form: str, there: Known, made: torch.Tensor, plan: Plan, calibration: Any
) -> dict[str, Any]:
    """The distances, and what they may be."""
    allowed, why = matching(tool.bounds, form, SAME)
    if form == "mixed":
        allowed, why = max(tool.bounds.values())
    wanted = there.simulated(plan, calibration)
    changed = float((wanted - there.output).norm())
    if kind := matching(tool.half, form, ""):
        allowed += 2 * floor(there, kind) / changed
        why += f"; {HALVES[kind]}"
    if any(scheme.activation for scheme in plan.layers.values()):
        allowed += 2 * shaken(there, plan, calibration, wanted) / changed
        why += f"; {SIDES}"
    share = off(made, wanted, there.output)
    size = float((made - there.output).norm()) / changed
    allowed = min(allowed, RATIO)
    close = share <= allowed and 1 / RATIO <= size <= RATIO
    found = {"off": share, "tolerance": allowed, "error": size, "within": close}
    return found | {"why this tolerance": why}


def shaken(there: Known, plan: Plan, calibration: Any, wanted: torch.Tensor) -> float:
    """How far a last bit of fp16 in the call's input moves what `simulate` adds to full precision:
    rounded inputs fall to other sides, in the first layers and in all that follow.
    """
    first, *rest = there.call.args
    dice = torch.Generator().manual_seed(0)
    moved = first * (1 + 2**-12 * torch.randn(first.shape, generator=dice))
    again = replace(there, call=replace(there.call, args=(moved, *rest)))
    added = again.simulated(plan, calibration) - run(there.model, again.call)
    return float((added - (wanted - there.output)).norm())


SIDES = "inputs between two levels fall to other sides"
HALVES = {
    "fp16": "the tool computes in fp16",
    "bf16": "the tool widens these weights to bf16",
}


def in_a_child(name: str, forms: list[str], model: str) -> Iterator[dict[str, Any]]:
    """The rows of a tool and a denoiser; a format at which the process dies has the reason."""
    context, (there, calibration) = multiprocessing.get_context("fork"), prepared(model)
    left = list(forms)
    while left:
        inner, outer = context.Pipe(duplex=False)

        def work(forms: list[str] = left, pipe: Any = outer) -> None:
            torch.set_num_threads(1)
            for form in forms:
                try:
                    pipe.send(row(name, form, model, there, calibration))
                except Exception as error:
                    reason = said(error).removeprefix("no: ")
                    pipe.send(base(name, form, model) | {"loads": "no", "note": reason})

        child = context.Process(target=work)
        child.start()
        outer.close()
        ends = time.monotonic() + SECONDS
        while left and inner.poll(max(0.0, ends - time.monotonic())):
            try:
                yield inner.recv()
            except EOFError:
                break
            left, ends = left[1:], time.monotonic() + SECONDS
        if left:
            child.join(5)
            died = child.exitcode
            child.kill()
            reason = f"no: took {SECONDS} s" if died is None else f"no: died with {died}"
            yield base(name, left[0], model) | {"loads": reason, "runs": "no"}
            left = left[1:]
        child.join()


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each tool: what was measured, and the distance that is nearest its tolerance."""
    found = []
    for name in dict.fromkeys(r["tool"] for r in rows):
        own = [r for r in rows if r["tool"] == name]
        measured = [r for r in own if r["off"] is not None]
        worst = max(measured, key=lambda r: r["off"] / r["tolerance"], default=COLUMNS)
        whole = [r for r in own if r["read back"] and len(set(r["read back"].split(" of "))) == 1]
        found.append(
            {
                "tool": name,
                "version": own[-1]["version"],
                "rows": len(own),
                "loads": sum(r["loads"] == "yes" for r in own),
                "runs": sum(r["runs"].startswith("yes") for r in own),
                "all layers read back": len(whole),
                "measured": len(measured),
                "within tolerance": sum(bool(r["within"]) for r in measured),
                "nearest its tolerance": f"{worst['format']} {worst['model']}".strip(),
                "off": worst["off"],
                "tolerance": worst["tolerance"],
                "why": worst["why this tolerance"] or next(r["runs"] or r["loads"] for r in own),
            }
        )
    return found


@functools.cache
def prepared(name: str) -> tuple[Known, dict[str, Any]]:
    """A denoiser of the zoo, saved in fp32, and what goes into its layers."""
    there = known(name)
    folder = Path(tempfile.mkdtemp()) / name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(there.folder, folder)
    saved: Any = there.model
    saved.save_pretrained(folder / there.component)
    seen = calibrate(there.model, there.graph, [there.call])
    return replace(there, folder=folder), dict(seen)


def main() -> None:
    """A child a tool and denoiser; what was measured is kept row by row, and published whole."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", default=[*TOOLS, *NOT_TRIED])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--formats", nargs="+", help="of these tools alone; all when left out")
    parser.add_argument("--work", type=Path, default=Path("runs/tools"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    asked.work.mkdir(parents=True, exist_ok=True)
    path = asked.work / f"{commit() or 'rows'}.json"
    known = path.is_file() and not path.stem.endswith("+")  # of changed files nothing is known
    held = json.loads(path.read_text()) if known else []
    rows = {(r["tool"], r["format"], r["model"]): r for r in held}
    for model in asked.models:
        for name in asked.tools:
            forms = [
                form
                for form in forms_of(name)
                if (name, form, model) not in rows and form in (asked.formats or [form])
            ]
            for one in rows_of(name, model, forms):
                print(*one.values(), sep=" | ", flush=True)
                rows[name, one["format"], model] = one
                path.write_text(json.dumps(list(rows.values())))
    store(rows)


def rows_of(name: str, model: str, forms: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a tool and a denoiser."""
    if name not in NOT_TRIED:
        if forms:
            yield from in_a_child(name, forms, model)
        return
    for form in forms:
        one = {**COLUMNS, "tool": name, "format": form, "model": model}
        yield one | {"loads": NOT_TRIED[name][1], "runs": "no"}


def forms_of(name: str) -> list[str]:
    """What stands in a tool's rows as its format."""
    if name in NOT_TRIED:
        return [NOT_TRIED[name][0]]
    tool = TOOLS[name]
    return [*tool.formats.split(), *(["mixed"] if tool.mix != "" else [])]


def store(rows: dict[tuple[str, str, str], dict[str, Any]]) -> None:
    """Publish, tools in their order, a denoiser's rows together; nothing while some are missing."""
    order = [
        (name, form, model)
        for name in (*TOOLS, *NOT_TRIED)
        for model in MODELS
        for form in forms_of(name)
    ]
    missing = [" ".join(key) for key in order if key not in rows]
    if missing:
        print(f"{len(missing)} rows of {len(order)} are missing, such as {missing[0]}")
        return
    made = [rows[key] for key in order]
    publish(__file__, made, title="tools", seed=0, extra={"by tool": summary(made)})


if __name__ == "__main__":
    main()
