"""The folder keeps the layout by which Hugging Face's `kernels` loads a package: relative imports,
no code that needs a device, one public name a file.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "kernels" / "qsearch_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
#: what bench.py compares with, and what compiles for a CPU: modules that are imported where it is
#: there
OPTIONAL = {"bench.py": {"gemlite", "torchao"}, "jit.py": {"numba"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_kernel_imports_torch_triton_and_its_own_package_by_relative_names(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = {str(node.module).partition(".")[0]}
        else:
            continue
        compiled = {"llvmlite", "numba", "numpy"} if path.stem.endswith("_numba") else set()
        assert found <= ALLOWED | OPTIONAL.get(path.name, compiled), f"{path.name} imports {found}"


def test_the_package_is_loaded_under_another_name_from_where_it_lies(tmp_path: Path) -> None:
    import subprocess

    variant = tmp_path / "build" / "torch-cpu" / "renamed"
    variant.parent.mkdir(parents=True)
    variant.symlink_to(PACKAGE)
    script = (
        f"import sys; sys.path.insert(0, {str(variant.parent)!r}); import renamed.layout, "
        "renamed.reference, renamed.ops, torch; print(renamed.ops.__name__)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "renamed.ops"


def test_a_plan_runs_on_a_cpu_without_triton() -> None:
    import subprocess

    script = """
import sys
sys.modules["triton"] = None
import torch
from torch import nn
from qsearch import Plan, apply, extract
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
x = torch.randn(5, 64)
graph = extract(model, {"input": x})
with torch.no_grad():
    full = model(x)
    for scheme in ("int8-c+a8", "uint4-c", "tcq3-c"):
        packed = apply(nn.Sequential(*model), Plan.uniform(graph, scheme), graph)
        assert (packed(x) - full).abs().max() < 0.6, scheme
"""

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
