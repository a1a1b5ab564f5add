"""A census: every pipeline of the installed diffusers that can be built tiny, through every verb of
the command.

    PYTHONPATH=. python notebooks/figures/census.py [--pipelines FluxPipeline ...]

A class has its own folder: a saved pipeline in its true class with random weights, a run's config
with what its call wants. Each command is `qsearch` with its arguments, in a process that is forked
of one that has torch and diffusers loaded. A command is right where it exits with 0 and its file
holds what it should; refused where it exits with 2 and one line; all else is a fault. A run that
was stopped goes on: what is done is kept in runs/census, and done again on another commit unless
--earlier names the one it was done on; each row says its own. About 6 seconds of a core a class.
Writes census.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import census_inputs
from figure import commit, publish

import qsearch
from qsearch.cli import commands

KEPT = Path("runs/census")
VERBS: dict[str, list[str]] = {
    "extract": ["extract", "RUN"],
    "profile": ["profile", "RUN", "--schemes", "int4-c,int8-c", "--probes", "2"],
    "allocate": ["allocate", "RUN", "--average-bits", "BITS"],
    "evaluate": ["evaluate", "RUN", "--samples", "3"],
    "apply": ["apply", "RUN"],
    "gguf": ["export", "RUN", "--to", "gguf", "--nearest"],
    "sdnq": ["export", "RUN", "--to", "sdnq", "--nearest"],
}
MADE = {
    "extract": "graph.json",
    "profile": "sensitivity.parquet",
    "allocate": "plan.json",
    "evaluate": "results.json",
    "apply": "model.safetensors",
    "gguf": "export-gguf",
    "sdnq": "export-sdnq",
}
_VIDEO = "its processor's part for videos needs torchvision, which is not installed"
_COSMOS = "its transformer resizes masks with torchvision, which is not installed"
_NONE = "nothing samples in it: one call of a model"
_TEXT = "makes text"
#: class -> why it is not here
CANNOT = {
    "ChromaInpaintPipeline": "its call reads a configuration key that its own transformer lacks",
    "StableCascadeDecoderPipeline": "diffusers can't load the folder it saves (PaellaVQModel)",
    "StableCascadeCombinedPipeline": "diffusers can't load the folder it saves (PaellaVQModel)",
    "EasyAnimateControlPipeline": "its call gives encode_prompt an argument that this lacks",
    "BriaFibo2Pipeline": _VIDEO,
    "DreamLitePipeline": _VIDEO,
    "DreamLiteMobilePipeline": _VIDEO,
    "JoyImageEditPipeline": _VIDEO,
    "JoyImageEditPlusPipeline": _VIDEO,
    "Kandinsky5I2IPipeline": _VIDEO,
    "Kandinsky6TI2VAPipeline": _VIDEO,
    "LongCatImagePipeline": _VIDEO,
    "LongCatImageEditPipeline": _VIDEO,
    "NucleusMoEImagePipeline": _VIDEO,
    "QwenImage21Pipeline": _VIDEO,
    "QwenImageEditPipeline": _VIDEO,
    "QwenImageEditInpaintPipeline": _VIDEO,
    "QwenImageEditPlusPipeline": _VIDEO,
    "QwenImageLayeredPipeline": _VIDEO,
    "OmniGenPipeline": "its processor uses torchvision, which is not installed",
    "CosmosTextToWorldPipeline": _COSMOS,
    "CosmosVideoToWorldPipeline": _COSMOS,
    "Cosmos2TextToImagePipeline": _COSMOS,
    "Cosmos2VideoToWorldPipeline": _COSMOS,
    "Cosmos2_5_PredictBasePipeline": _COSMOS,
    "Cosmos2_5_TransferPipeline": _COSMOS,
    "FluxPriorReduxPipeline": _NONE,
    "LTXLatentUpsamplePipeline": _NONE,
    "LTX2LatentUpsamplePipeline": _NONE,
    "DiffusionGemmaPipeline": _TEXT,
    "LLaDA2Pipeline": _TEXT,
    "RFD4ProteinaPipeline": "makes proteins",
}
#: what the commands load, loaded once
LOADED = (
    "qsearch.graphs.extraction",
    "qsearch.measure.evaluation",
    "qsearch.measure.metrics.sqnr",
    "qsearch.measure.estimators.probe",
    "qsearch.measure.profiling",
    "qsearch.execute.runtime",
    "qsearch.execute.packed_file",
    "qsearch.execute.slower",
    "qsearch.core.trials",
    "qsearch.decide.allocation",
    "qsearch.decide.solvers.ilp",
    "qsearch.report.pictures",
    "qsearch.report.text",
    "torch.export",
    "torch._dynamo",
    "torch._inductor",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "scipy.stats",
    "scipy.optimize",
    "optuna.storages._rdb.storage",
    "PIL.GifImagePlugin",
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "qsearch.report.page_plots",
    "gguf",
    "sdnq",
)
#: a command that takes longer is a fault
SECONDS = 400
COLUMNS = ("pipeline", "verdict", "command", "said", "commit", "figures", "CPU seconds")
#: every so many classes the report's figures are drawn, which takes as long as all else
FIGURES = 8


def table() -> dict[str, tuple[Callable[[], Any], dict[str, Any]]]:
    """Class -> how it is built, and more arguments of its call; a class of each family in turn."""
    import census_pictures
    import census_priors
    import census_sounds
    import census_transformers
    import census_unets
    import census_videos
    import census_worlds

    families = (
        census_unets,
        census_transformers,
        census_pictures,
        census_videos,
        census_worlds,
        census_sounds,
        census_priors,
    )
    rows = itertools.zip_longest(*(family.PIPELINES.items() for family in families))
    return {name: entry for row in rows for name, entry in filter(None, row)}


def others() -> dict[str, str]:
    """Every further class of a pipeline that the installed diffusers names -> why it is not in the
    table.
    """
    import diffusers

    known, found = table(), dict(CANNOT)
    for name in dir(diffusers):
        if not name.endswith("Pipeline") or name in known or name in found:
            continue
        place = getattr(diffusers, name).__module__
        if "dummy" in place:
            found[name] = "needs a package that is not installed"
        elif "deprecated" in place:
            found[name] = "deprecated by diffusers"
        elif "Modular" in name or name in ("DiffusionPipeline", "ModularPipeline"):
            found[name] = "no pipeline of its own: blocks for others, or their base"
        else:
            found[name] = "no tiny builder was written"
    return found


def forked(work: Callable[[], None], log: Path) -> tuple[int, float]:
    """(exit code, CPU seconds) of `work` in a process of its own, its output in `log`.out and
    `log`.err; 124 where it took too long.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream, number in (("out", 1), ("err", 2)):
                file = os.open(f"{log}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    began = time.monotonic()
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() - began > SECONDS:
            os.kill(child, 9)
            _, _, used = os.wait4(child, 0)
            return 124, used.ru_utime + used.ru_stime
        time.sleep(0.01)


def build(name: str, folder: Path) -> None:
    """The saved pipeline and the run's config."""
    import torch
    import yaml

    from tests.tiny_parts import prepared

    torch.manual_seed(4)
    made, call = table()[name]
    prepared(made()).save_pretrained(folder / "model")
    inputs, run = folder / "inputs", folder / "run"
    inputs.mkdir()
    run.mkdir()
    census_inputs.write(inputs)
    call = census_inputs.placed(call, inputs)
    prompts = call.pop("prompts", census_inputs.PROMPTS)
    (run / "prompts.txt").write_text("".join(f"{p}\n" for p in prompts))
    sampling = {"steps": 2, "guidance": 3.0, "call": call} | call.pop("sampling", {})
    profile = {"bins": 1, "samples": 2} | call.pop("profile", {})
    content = {
        "model": str(folder / "model"),
        "prompts": "prompts.txt",
        "sampling": sampling,
        "profile": profile,
        "evaluate": {"metrics": ["sqnr"], "uniform": None, "random": 0},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def command(*arguments: str, figures: bool = True) -> None:
    """`qsearch ARGUMENTS` in this process; without `figures`, those of the report stay empty."""
    sys.argv = ["qsearch", *arguments]
    if not figures:
        from markupsafe import Markup

        from qsearch.report import page_plots

        empty = page_plots.Plot(Markup(), Markup())
        page_plots._drawn = lambda *_: empty
    commands.main()


def verdict(verb: str, run: Path, code: int, log: Path) -> tuple[str, str]:
    """("right", ""), ("refused", the line) or ("fault", what there is to say)."""
    lines = [x for x in Path(f"{log}.err").read_text().splitlines() if x.strip()]
    last = lines[-1] if lines else ""
    if code == 2 and last.startswith("qsearch: ") and "Traceback" not in "".join(lines):
        return "refused", last.removeprefix("qsearch: ")
    if code:
        return "fault", f"exit {code}: {last}"
    try:
        wrong = amiss(verb, run)
    except Exception as error:  # a file that does not load is a fault, whatever says so
        wrong = f"{MADE[verb]}: {type(error).__name__}: {error}"
    return ("fault", wrong) if wrong else ("right", "")


def amiss(verb: str, run: Path) -> str:
    """What is wrong with the file that a command left; "" where nothing is."""
    path = run / MADE[verb]
    graph = qsearch.OpGraph.load(run / "graph.json")
    if verb == "extract":
        return "" if graph.quantizable else "no layers"
    if verb == "profile":
        frame = qsearch.SensitivityTable.load(path, graph.id).frame
        if not frame["estimate"].map(lambda x: 0 <= x < float("inf")).all():
            return "estimates that are negative or not finite"
        worst = frame.groupby("site")["estimate"].max()
        # a few may: an attention of one token, a layer whose input is zeros
        silent = sorted(worst[worst == 0].index)
        return f"{len(silent)} layers cost nothing" if 5 * len(silent) > len(worst) else ""
    if verb == "allocate":
        plan = qsearch.Plan.load(path, graph)
        asked = float(between(run))
        return "" if plan.achieved.average_bits <= asked else "more bits than asked for"
    if verb == "evaluate":
        rows = json.loads(path.read_text())["rows"]
        sqnr = [row["metrics"]["sqnr"][0] for row in rows if row["plan"] == "plan"]
        return "" if len(sqnr) == 1 and 0 < sqnr[0] < 200 else f"sqnr of the plan {sqnr}"
    return "" if path.exists() else f"no {path.name}"


def between(run: Path) -> str:
    """Average bits halfway between uniform 4 and 8 bits: what is not quantizable counts too."""
    graph = qsearch.OpGraph.load(run / "graph.json")
    sizes = [qsearch.Plan.uniform(graph, s).achieved.average_bits for s in ("int4-c", "int8-c")]
    return f"{sum(sizes) / 2:.3f}"


def walk(name: str, figures: bool) -> dict[str, Any]:
    """A class through every verb; `figures`: the report's are drawn."""
    folder = KEPT.resolve() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, Any] = {"pipeline": name, "verdict": "right", "command": "", "said": ""}
    code, used = forked(lambda: build(name, folder), folder / "build")
    took = {"build": used}
    if code:
        said = (folder / "build.err").read_text().strip().splitlines()
        row |= {"verdict": "not built", "said": said[-1] if said else f"exit {code}"}
    else:
        for verb, arguments in VERBS.items():
            bits = between(folder / "run") if "BITS" in arguments else ""
            given = [a.replace("RUN", str(folder / "run")).replace("BITS", bits) for a in arguments]
            code, took[verb] = forked(partial(command, *given, figures=figures), folder / verb)
            found, words = verdict(verb, folder / "run", code, folder / verb)
            if found != "right":
                row |= {"verdict": found, "command": verb, "said": words.replace(str(folder), ".")}
                break
    if row["verdict"] == "right":
        for path in ("model", "run"):
            shutil.rmtree(folder / path)
    row |= {"commit": commit(), "figures": figures, "CPU seconds": round(sum(took.values()), 1)}
    (folder / "took.json").write_text(json.dumps(took))
    return row


def load(names: list[str]) -> None:
    """Import what the commands and these pipelines import, and export a model once, so that
    children need not.
    """
    import diffusers
    import torch

    for module in LOADED:
        importlib.import_module(module)
    for name in names:
        getattr(diffusers, name)
    torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),), strict=False)
    gc.collect()
    gc.freeze()  # what was loaded is not walked over in every child


def main() -> None:
    """Walk and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipelines", nargs="+", default=list(table()))
    parser.add_argument("--earlier", default="", help="keep what was no fault on this commit")
    parser.add_argument("--minutes", type=float, default=1e9, help="walk for so long, then publish")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    place = KEPT / commit()
    place.mkdir(parents=True, exist_ok=True)
    if any(not (place / f"{name}.json").is_file() for name in options.pipelines):
        load(options.pipelines)
    rows = []
    left = {}
    for number, name in enumerate(options.pipelines):
        kept = place / f"{name}.json"
        done = KEPT / options.earlier / kept.name
        if options.earlier and not kept.is_file() and done.is_file():
            row = {"commit": options.earlier} | json.loads(done.read_text())
            if row["verdict"] != "fault":
                kept.write_text(json.dumps({column: row[column] for column in COLUMNS}))
        if not kept.is_file() and time.monotonic() > ends:
            left[name] = "built and called; not walked, the time had ended"
            continue
        if not kept.is_file():
            kept.write_text(json.dumps(walk(name, number % FIGURES == 0)))
        rows.append(json.loads(kept.read_text()))
        with contextlib.suppress(BrokenPipeError):
            print(*rows[-1].values(), flush=True)
    count = {
        v: sum(row["verdict"] == v for row in rows)
        for v in dict.fromkeys(r["verdict"] for r in rows)
    }
    publish(
        __file__,
        rows,
        title=f"Census: {count}",
        seed=4,
        extra={"count": count, "not here": left | others()},
    )


if __name__ == "__main__":
    main()
