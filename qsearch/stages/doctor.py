"""doctor: what this machine has for qsearch: versions, devices, the products of its CPU, memory,
disk.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import versions
from ..core.units import duration, size_of
from ..measure.offloading import KINDS
from .estimates import estimates

if TYPE_CHECKING:
    from .folder import Run

#: optional distribution -> what it is for
_OPTIONAL = {
    "ray": "--executor ray",
    "psycopg": "--storage postgresql+psycopg://",
    "pymysql": "--storage mysql+pymysql://",
    "torchao": "export --to torchao",
    "gguf": "export --to gguf",
    "optimum-quanto": "export --to quanto",
    "sdnq": "export --to sdnq",
    "compressed-tensors": "export --to compressed_tensors",
    "onnx": "export --to onnx",
    "openvino": "export --to openvino",
    "bitsandbytes": "loading what bitsandbytes exports",
}
#: compute capability of CUDA -> what its tensor cores multiply from there on
_TENSOR_CORES = (
    ((7, 5), "int8"),
    ((8, 0), "bf16"),
    ((8, 9), "fp8"),
    ((10, 0), "block formats (mxfp4, nvfp4)"),
)
_MIB = 2**20


@dataclass(frozen=True)
class Diagnosis:
    """What was found here, as rows for tables.

    Attributes:
        facts: "what" and "here": versions, devices, memory, disk, optional packages.
        products: as `execute.slower.products_here`.
        verbs: of what reads a model, where one was given: "verb", "passes", the memory at its peak
            with each offload ("none", "block", "disk"), the first that fits, and "time".
        offload: where that model's weights would stay, and why, in words.
    """

    facts: list[dict[str, Any]]
    products: list[dict[str, Any]]
    verbs: list[dict[str, Any]] = field(default_factory=list)
    offload: str = ""


def doctor(folder: Path = Path(), run: Run | None = None) -> Diagnosis:
    """Look at this machine, and at what a model would take on it.

    Args:
        folder: where runs are to lie; the disk is looked at there.
        run: of a model.

    Returns:
        Versions, devices, the CPU's products, free memory and disk; passes, memory and time of each
        verb.

    Raises:
        QSearchError: `QSEARCH_PRODUCTS` names no product; the model can't be read, or one block of
            it at a time takes more memory than is free.
    """
    from ..execute.slower import products_here

    found = {name: version for name, version in versions().items() if name != "python"}
    facts = {
        "python": platform.python_version(),
        "qsearch": found.pop("qsearch-diffusion", "not installed as a distribution"),
        **found,
        **_devices(),
        **_memory(),
        "disk": f"{_mib(shutil.disk_usage(folder).free)} free in {folder.resolve()}",
    }
    for name, purpose in _OPTIONAL.items():
        facts[name] = _installed(name, purpose)
    rows = [{"what": name, "here": text} for name, text in facts.items()]
    if run is None:
        return Diagnosis(rows, products_here())
    chosen = run.offload
    verbs = [
        {
            "verb": e.verb,
            "passes": e.passes,
            **{kind: size_of(e.memory[kind]) if kind in e.memory else "-" for kind in KINDS},
            "fits with": e.fits or "none of them: a narrower --dtype, or more memory",
            "time": f"about {duration(e.seconds)}",
        }
        for e in estimates(run)
    ]
    words = f"{run.model_name} in {run.dtype} on {run.device}, offload {chosen.kind}: {chosen.why}"
    return Diagnosis(rows, products_here(), verbs, words)


def _devices() -> dict[str, str]:
    import torch

    known = torch.cpu.get_capabilities()
    units = sorted(key for key, value in known.items() if value is True)
    name = known.get("cpu_name") or platform.processor() or platform.machine() or "unknown"
    found = {
        "cpu": f"{name}, {torch.get_num_threads()} threads; {' '.join(units) or 'no units known'}"
    }
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        able = torch.cuda.get_device_capability(i)
        cores = [text for least, text in _TENSOR_CORES if able >= least]
        lacks = [text for least, text in _TENSOR_CORES if able < least]
        text = (
            f"{torch.cuda.get_device_name(i)}, sm_{able[0]}{able[1]}, {_mib(free)} of "
            f"{_mib(total)} free"
        )
        text += f"; multiplies {', '.join(cores) or 'floats'}"
        found[f"cuda:{i}"] = text + (f"; widens {', '.join(lacks)}" if lacks else "")
    if "cuda:0" not in found:
        found["cuda"] = "none"
    return found


def _memory() -> dict[str, str]:
    """Free and total memory, where the system says so as Linux does."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {
            key: int(rest.split()[0]) * 1024 for key, _, rest in (x.partition(":") for x in lines)
        }
        return {"memory": f"{_mib(sizes['MemAvailable'])} of {_mib(sizes['MemTotal'])} free"}
    except (OSError, KeyError, ValueError, IndexError):
        return {"memory": "not known on this system"}


def _installed(name: str, purpose: str) -> str:
    try:
        return f"{metadata.version(name)}, for {purpose}"
    except metadata.PackageNotFoundError:
        return f"not here; `pip install {name}` for {purpose}"


def _mib(size: float) -> str:
    return f"{size / _MIB:,.0f} MiB"
