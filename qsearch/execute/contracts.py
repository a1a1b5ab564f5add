"""What every exporter must keep: what it calls nearest stays, and what it writes reads back as the
plan.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch

from ..choices.statistics import LayerInputs
from ..core.contract import Contract
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..measure.shards import Weights
from .exporting import Export, formats
from .exports import difference
from .weights import component

#: what plans ask for; an exporter rounds what it lacks
SCHEMES = (
    "keep",
    "int8-c",
    "uint4-g32",
    "int4-g32",
    "e4m3-c",
    "int8-c+a8",
    "uint3-c",
    "uint5-g32@hqq",
    "nvfp4",
    "mxfp8",
    "km3-c",
    "keep+a8",
    "int4-c+a8~balance",
)


def graph_of(source: Path) -> OpGraph:
    """The layers of a saved pipeline's denoiser, from the names and shapes in its files alone:
    enough to export by, in no time.
    """
    weights = Weights(source / component(source))
    kinds = {2: "linear", 4: "conv2d"}
    named = {
        name.removesuffix(".weight"): weights.shape(name)
        for name in weights.files
        if name.endswith(".weight")
    }
    layers = [
        LayerSpec(name, "feed-forward-in", kinds[len(shape)], shape, 1)
        for name, shape in named.items()
        if len(shape) in kinds
    ]
    return OpGraph(source.name, tuple(layers))


@cache
def small() -> Path:
    """The zoo's pipeline with a transformer of one block, in a folder of its own that goes when the
    process ends.
    """
    from safetensors.torch import save_file

    from .. import zoo

    place = Path(tempfile.mkdtemp()) / "small"
    atexit.register(shutil.rmtree, place.parent, ignore_errors=True)
    shutil.copytree(zoo.folder("scenes-dit"), place)
    weights = Weights(place / "transformer")
    kept = {
        name: weights.tensor(name)
        for name in weights.files
        if not name.startswith("transformer_blocks.") or name.startswith("transformer_blocks.0.")
    }
    [path] = set(weights.files.values())
    config = place / "transformer" / "config.json"
    config.write_text(json.dumps({**weights.config, "num_layers": 1}), encoding="utf-8")
    save_file(kept, path, {"format": "pt"})
    return place


class ExporterContract(Contract):
    """What holds for every file in `exporters/`, tried on the zoo's transformer with one block. Its
    packages must be installed.
    """

    kind = "exporters"
    source: ClassVar[Path | None] = None

    def job(self, schemes: Sequence[str | Scheme]) -> Export:
        """A plan whose layers get `schemes` in turn, each as the tool has it."""
        source = self.source or small()
        graph = graph_of(source)
        given = {
            x.name: self.module.nearest(Scheme.parse(schemes[i % len(schemes)]), x)
            for i, x in enumerate(graph)
        }
        ends = {x.name: torch.linspace(-1, 2, x.weight_shape[1 - x.channel_axis]) for x in graph}
        seen = {
            name: LayerInputs(-x.abs() - 1, x.abs() + 1, x, x, x[None]) for name, x in ends.items()
        }
        return Export(Plan.make(graph, given), graph, source, component(source), seen)

    @contextmanager
    def written(self, job: Export) -> Iterator[Path]:
        """A folder with the files of `job`."""
        folder = Path(tempfile.mkdtemp())
        try:
            files = self.module.write(job, folder)
            assert files, "write returns the files that it made; it returned none"
            assert [p for p in files if not p.is_file() or folder not in p.parents] == [], (
                f"files lie in the folder that is given: {files}"
            )
            yield folder
        finally:
            shutil.rmtree(folder)

    def plans(self) -> list[Export]:
        """A plan with everything in it, where the tool has more than one format at a time; uniform
        ones; and one that keeps all layers.
        """
        mixed = self.job(SCHEMES)
        folder = Path(tempfile.mkdtemp())
        try:
            self.module.write(mixed, folder)
            several = [mixed]
        except QSearchError as error:
            assert len(set(mixed.plan.layers.values())) > 2, (
                f"a plan of schemes that are nearest to themselves was refused: {error}"
            )
            several = []
        finally:
            shutil.rmtree(folder)
        return [*several, self.job(["int8-c+a8"]), self.job(["int4-g32"]), self.job(["keep"])]

    def test_what_is_nearest_stays(self) -> None:
        """The nearest of the nearest is itself, keep is kept, and what can't be quantized is
        kept.
        """
        graph = self.job(["keep"]).graph
        for layer in graph:
            for text in SCHEMES:
                found = self.module.nearest(Scheme.parse(text), layer)
                again = self.module.nearest(found, layer)
                assert again == found, (
                    f"{layer.name}: the nearest to {text} is {found}, and the nearest to "
                    f"that is {again}"
                )
                assert self.module.nearest(found, replace(layer, quantizable=False)) == KEEP, (
                    f"{layer.name} can't be quantized and got {found}"
                )
            assert self.module.nearest(KEEP, layer) == KEEP, layer.name

    def test_files_read_back_as_the_plan(self) -> None:
        """Every layer's scheme, methods aside, for plans that differ."""
        seen: list[Mapping[str, Scheme]] = []
        for job in self.plans():
            with self.written(job) as folder:
                found = self.module.read(folder, job.graph)
            try:
                difference(found, job.plan.layers, str(self.plugin))
            except QSearchError as error:
                raise AssertionError(str(error)) from None
            seen.append(formats(job.plan.layers))
        assert any(a != b for a in seen for b in seen), (
            "every plan became the same: nothing was quantized"
        )

    def test_names_of_another_model_are_refused(self) -> None:
        """Files whose names the graph lacks (or that lack the graph's) raise `QSearchError`; they
        are never passed over.
        """
        job = self.job(["int8-c+a8", "keep"])
        other = OpGraph(
            "renamed", tuple(replace(layer, name=f"other.{layer.name}") for layer in job.graph)
        )
        with self.written(job) as folder:
            try:
                found = self.module.read(folder, other)
            except QSearchError:
                return
        raise AssertionError(f"files of one model were read as another's: {len(found)} layers")

    def test_no_files_are_an_error_that_teaches(self) -> None:
        """An empty folder raises `QSearchError`."""
        folder = Path(tempfile.mkdtemp())
        try:
            found = self.module.read(folder, self.job(["keep"]).graph)
        except QSearchError:
            return
        finally:
            shutil.rmtree(folder)
        raise AssertionError(f"an empty folder was read as a plan of {len(found)} layers")
