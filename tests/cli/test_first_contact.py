"""First contact: three commands for a model of one's own, options for one call, Ctrl-C, a terminal
of any kind.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import qsearch
from qsearch.cli.examples import EXAMPLES
from qsearch.core.errors import QSearchError
from qsearch.execute.offers import ladder, offers
from qsearch.stages import checks, config
from qsearch.stages.folder import Run
from tests.conftest import Command
from tests.tiny_pipelines import build


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SDXL-shaped pipeline of one's own."""
    place = tmp_path_factory.mktemp("contact")
    build("stable_diffusion_xl").save_pretrained(place / "my-sdxl")
    return place


def process(*arguments: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """`qsearch ARGUMENTS` as a process of its own, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-m", "qsearch.cli", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env},
    )


def test_three_commands_bring_a_model_of_one_s_own_to_a_report_and_a_file(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)

    code, _, said = command("init", "my-sdxl", "--for", "torchao")
    assert code == 0, said
    assert "next: qsearch run my-sdxl.yaml" in said
    for verb in ("profile: about", "evaluate: about", "passes", "of memory"):
        assert verb in said
    promised = re.findall(r"profile: about .*?, ([\d,]+) passes", said)
    made = config.load(place / "my-sdxl.yaml")
    assert (made.sampling.steps, made.sampling.guidance) == (50, 5.0)
    assert made.evaluate.metrics == ("sqnr", "ssim")

    few = ("--steps", 3, "--samples", 3)
    code, shown, said = command("run", "my-sdxl.yaml", *few)
    assert code == 0, said
    assert "plan" in shown
    assert re.findall(r"probe takes ([\d,]+) denoiser passes", said) == promised != []
    run = place / "runs" / "my-sdxl"
    assert (run / "report.html").is_file()
    assert config.load(run).sampling.steps == 50  # options hold for one call

    code, _, said = command("export", run, "--to", "torchao", "--nearest")
    assert code == 0, said
    words = " ".join(said.split())
    assert "before" in words
    assert "planned" in words
    assert "written" in words
    assert "the difference: " in words


def test_after_the_plan_has_changed_the_page_says_that_it_is_old_until_it_is_made_anew(
    place: Path, command: Command
) -> None:
    run = place / "runs" / "my-sdxl"
    if not (run / "report.html").is_file():
        pytest.skip("the walk above did not run")
    assert '<p class="old" hidden>' in (run / "report.html").read_text()

    code, _, said = command("allocate", run, "--average-bits", 12)
    assert code == 0, said
    assert "report.html is of the plan before" in " ".join(said.split())
    assert '<p class="old">' in (run / "report.html").read_text()
    code, _, said = command("report", run)
    assert code == 2
    assert "is of another plan" in said


def test_init_never_takes_the_place_of_a_config(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init", place / "my-sdxl")[0] == 0
    before = (tmp_path / "my-sdxl.yaml").read_bytes()

    code, _, said = command("init", place / "my-sdxl")

    assert code == 2
    assert "exists and would be overwritten; give --force" in said
    assert (tmp_path / "my-sdxl.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("EMPTY",), "a whole diffusers pipeline with a model_index.json"),
        (("PART",), "it looks like one component, give the folder that it lies in"),
        (("MODEL", "--for", "gguff"), "did you mean 'gguf'"),
        (("MODEL", "--prompts", "PICTURE"), "must be a text file in UTF-8"),
        (("MODEL", "-o", "a.txt"), "a config is a YAML file"),
        (("MODEL", "--dtype", "float31"), "did you mean 'float32'"),
        (("MODEL", "--device", "gpu"), "device: this machine has auto, cpu"),
    ],
    ids=str,
)
def test_a_mistake_to_begin_with_is_one_line_and_nothing_is_written(
    place: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    names = {"EMPTY": "empty", "MODEL": str(place / "my-sdxl"), "PICTURE": "picture.txt"}
    names["PART"] = str(place / "my-sdxl" / "unet")

    code, out, said = command("init", *(names.get(a, a) for a in arguments))

    assert (code, out, said.count("\n")) == (2, "", 1), said
    assert message in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "picture.txt"]


def test_a_scheduler_that_nobody_knows_has_settings_all_the_same(
    place: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(place / "my-sdxl", tmp_path / "odd"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["my_module", "MyScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)

    code, _, said = command("init", "odd")

    assert code == 0, said
    assert config.load(tmp_path / "odd.yaml").sampling.steps == 50


def test_a_file_of_a_run_is_answered_with_its_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("model: scenes-dit")

    for verb in ("allocate", "evaluate", "report", "run"):
        code, _, said = command(verb, tmp_path / "plan.json")
        assert (code, said.count("\n")) == (2, 1)
        assert f"give the run's folder, such as {tmp_path}" in said


@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_a_short_file_of_prompts_is_told_with_a_number_of_samples_that_it_has(
    place: Path, tmp_path: Path, count: int
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"a cat, number {i}\n" for i in range(count)))

    def asked(samples: int) -> Run:
        evaluate = {"samples": samples}
        model = str(place / "my-sdxl")
        return Run(config.Config(model=model, folder=tmp_path, prompts=file, evaluate=evaluate))

    with pytest.raises(QSearchError) as refused:
        checks.check_run(asked(40))

    said = str(refused.value)
    assert f"holds {count} prompt{'s' if count > 1 else ''};" in said
    fewer = re.findall(r"or fewer \(--samples (\d+)\)", said)
    assert bool(fewer) == (count > 4)
    for samples in map(int, fewer):
        checks.check_run(asked(samples))


def test_a_value_that_is_a_whole_file_is_quoted_in_part(command: Command, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("layers: {b: " + "x" * 5000 + "}")

    code, _, said = command("run", tmp_path / "other.yaml")

    assert (code, said.count("\n")) == (2, 1)
    assert len(said) < 400


def test_a_surrogate_is_refused_what_it_can_t_learn_from(place: Path, command: Command) -> None:
    run = place / "runs" / "my-sdxl"
    if not run.is_dir():
        pytest.skip("the walk above did not run")

    code, _, said = command("fit", run)

    assert code == 2
    assert "5 folds need 10 measured plans" in said
    assert "--plans" in said


def test_schemes_of_a_tool_are_listed_with_their_bits(command: Command) -> None:
    code, out, said = command("list", "schemes", "--for", "gguf")

    assert code == 0, said
    assert "int8-g32" in out
    assert "uint2-c" not in out
    assert {str(o.scheme) for o in ladder(offers("gguf"))} <= {
        str(o.scheme) for o in offers("gguf")
    }


@pytest.mark.parametrize(
    ("tool", "schemes", "transforms"),
    [
        ("comfyui", {"int4-c+a4~rotate", "cb4~rotate", "cb4+a8~rotate"}, {"int8-c": "~rotate"}),
        ("cache_dit", {"int8-c+aint8", "e4m3-c+ae4m3"}, {}),
        (
            "nunchaku_lite",
            {"int4-g64+aint4g64", "nvfp4+anvfp4"},
            {"nvfp4+anvfp4": "~balance~lowrank32"},
        ),
        ("modelopt_weights", {"nvfp4+anvfp4"}, {"nvfp4+anvfp4": "~lowrank32"}),
        ("tensorrt_llm", {"nvfp4+anvfp4", "e4m3-t+ae4m3t"}, {}),
    ],
)
def test_schemes_with_symmetric_inputs_and_transforms_are_listed(
    tool: str, schemes: set[str], transforms: dict[str, str]
) -> None:
    found = {str(o.scheme): o.transforms for o in offers(tool)}

    assert schemes <= found.keys()
    for scheme, words in transforms.items():
        assert words in found[scheme]


def test_every_command_ends_its_help_with_two_examples(command: Command) -> None:
    for name, examples in EXAMPLES.items():
        code, out, _ = command(*([name] if name else []), "--help")
        assert code == 0
        for example in examples:
            assert " ".join(example.split()) in " ".join(out.split()), name


def test_commands_are_listed_in_the_order_of_work(command: Command) -> None:
    listed = re.findall(r"^│ ([a-z]+) ", command("--help")[1], re.MULTILINE)

    assert listed == [name for name in EXAMPLES if name]


def test_the_version_is_said(command: Command) -> None:
    code, out, _ = command("--version")

    assert (code, out) == (0, f"qsearch {qsearch.__version__}\n")


@pytest.mark.slow
def test_a_narrow_pipe_in_a_c_locale_has_neither_colours_nor_bars(
    place: Path, tmp_path: Path
) -> None:
    done = process(
        "init",
        place / "my-sdxl",
        cwd=tmp_path,
        LC_ALL="C",
        PYTHONIOENCODING="ascii",
        COLUMNS="40",
    )
    out, err = done.communicate(timeout=600)

    assert done.returncode == 0, err
    assert "\x1b" not in out + err
    assert "Warning" not in err
    assert (tmp_path / "my-sdxl.yaml").is_file()


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(place / "my-sdxl"),
                "folder": "run",
                "sampling": {"steps": 2000},
                "evaluate": {"samples": 3},
            }
        )
    )
    done = process("run", "mine.yaml", cwd=tmp_path)
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "graph.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)

    began = time.monotonic()
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=600)

    assert done.returncode == 130, err
    assert time.monotonic() - began < 60  # 5 s, on a machine that does nothing else
    assert "what was finished is kept in run" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_what_libraries_warn_of_is_in_the_log_of_the_run(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "runs" / "my-sdxl"
    if not run.is_dir():
        pytest.skip("the walk above did not run")

    def warned(*_: Any, **__: Any) -> None:
        import warnings

        warnings.showwarning(UserWarning("somebody else's advice"), UserWarning, "theirs.py", 1)
        sys.stderr.write("and a line of a library\n")

    monkeypatch.setattr("qsearch.stages.report.report_run", warned)
    code, _, said = command("report", run)

    assert code == 0
    assert "advice" not in said
    assert "of a library" not in said
    log = (run / "log.txt").read_text()
    assert "somebody else's advice" in log
    assert "and a line of a library" in log
