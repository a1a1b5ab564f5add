"""Models as people have them, from the shell: a checkpoint in one file with its original names,
files of a variant, shards.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qsearch.core.errors import ArtifactError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.measure.shards import Weights
from tests import tiny_checkpoint
from tests.conftest import Command
from tests.tiny_pipelines import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd"
    build("stable_diffusion").save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint beside the pipeline's configuration, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "models"
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(saved, home, ignore=ignore)
    return tiny_checkpoint.save(build("stable_diffusion"), home / "tiny v1.safetensors")


def run_of(folder: Path, model: Path, **more: Any) -> Path:
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(f"a red circle {i}" for i in range(8)))
    content = {
        "model": str(model),
        "prompts": "prompts.txt",
        "sampling": {"steps": 2, "guidance": 3.0},
        "profile": {"schemes": ["int4-c", "int8-c"], "bins": 1, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 6.5},
        "evaluate": {"samples": 3, "metrics": ["sqnr"], "uniform": None, "random": 0},
        **more,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def walked(run: Path, command: Command) -> tuple[OpGraph, Plan]:
    for arguments in (
        ("profile", run),
        ("allocate", run),
        ("evaluate", run),
        ("apply", run),
        ("export", run, "--to", "gguf", "--nearest"),
    ):
        code, out, err = command(*arguments)
        assert code == 0, f"{arguments[0]}: {out} {err}"
    graph = OpGraph.load(run / "graph.json")
    return graph, Plan.load(run / "plan.json", graph)


def test_a_checkpoint_in_one_file_goes_through_every_verb(
    saved: Path, checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    graph, plan = walked(run_of(tmp_path / "one", checkpoint), command)
    same, as_folder = walked(run_of(tmp_path / "folder", saved), command)

    assert graph.id == same.id
    assert plan.choices == as_folder.choices
    rows = [
        json.loads((tmp_path / name / "results.json").read_text())["rows"]
        for name in ("one", "folder")
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["metrics"]["sqnr"][0] == pytest.approx(theirs["metrics"]["sqnr"][0], abs=1e-3)


def test_it_is_unpacked_once_in_the_type_that_it_is_stored_in(
    checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    half = {name: t.half() for name, t in load_file(checkpoint).items()}
    save_file(half, checkpoint)

    code, _, err = command("extract", checkpoint, "-o", tmp_path / "run")

    assert code == 0, err
    (made,) = (tmp_path / "cache" / "qsearch" / "checkpoints").iterdir()
    (weights,) = (made / "unet").glob("*.safetensors")
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16}
    stamp = weights.stat().st_mtime_ns
    code, _, err = command("extract", checkpoint, "-o", tmp_path / "again")
    assert code == 0, err
    assert weights.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("data", [b"no tensors", b""])
def test_a_broken_checkpoint_is_one_line(
    data: bytes, checkpoint: Path, tmp_path: Path, command: Command
) -> None:
    checkpoint.write_bytes(data)

    code, _, err = command("extract", checkpoint, "-o", tmp_path / "run")

    assert code == 2
    (line,) = err.strip().splitlines()
    assert "not readable as safetensors" in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_something_else_is_one_line(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_file({"a": torch.zeros(2)}, tmp_path / "lora.safetensors")

    code, _, err = command("extract", tmp_path / "lora.safetensors", "-o", tmp_path / "run")

    assert code == 2
    (line,) = err.strip().splitlines()
    assert str(tmp_path / "lora.safetensors") in line
    assert "from_single_file" in line
    assert not (tmp_path / "run").exists()


def test_weights_of_one_component_are_answered_with_the_folder_of_the_pipeline(
    saved: Path, tmp_path: Path, command: Command
) -> None:
    for component in ("unet", "vae", "text_encoder"):
        (weights,) = (saved / component).glob("*.safetensors")

        code, _, err = command("extract", weights, "-o", tmp_path / "run")

        assert code == 2
        (line,) = err.strip().splitlines()
        assert f"{weights} holds one component, give the folder of the pipeline, {saved}" in line
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_variant_alone_in_shards_goes_through_every_verb(
    saved: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    unet = build("stable_diffusion").unet
    unet.save_pretrained(tmp_path / "model" / "unet", variant="bf16", max_shard_size="20KB")
    names = [path.name for path in (tmp_path / "model" / "unet").iterdir()]
    assert sum(name.endswith(".safetensors") for name in names) > 1

    graph, _ = walked(run_of(tmp_path / "run", tmp_path / "model"), command)

    assert graph.quantizable


def with_bin(source: Path, folder: Path) -> Path:
    """A copy of a pipeline whose weights are files of torch.save."""
    shutil.copytree(source, folder)
    for path in folder.rglob("*.safetensors"):
        name = {"model.safetensors": "pytorch_model.bin"}.get(path.name, f"{path.stem}.bin")
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder


@pytest.mark.slow
def test_weights_of_torch_save_go_through_every_verb(
    saved: Path, tmp_path: Path, command: Command
) -> None:
    model = with_bin(saved, tmp_path / "model")

    graph, plan = walked(run_of(tmp_path / "run", model), command)
    same, other = walked(run_of(tmp_path / "safe", saved), command)

    assert graph.id == same.id
    assert plan.choices == other.choices
    ours, theirs = (next((tmp_path / n / "export-gguf").glob("*.gguf")) for n in ("run", "safe"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_weights_of_torch_save_have_the_shapes_and_types_of_safetensors(tmp_path: Path) -> None:
    kinds = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "uint8", "bool")
    tensors = {kind: torch.zeros(2, 3).to(getattr(torch, kind)) for kind in kinds}
    for name in ("safe", "bin", "old", "shards"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "safe" / "model.safetensors")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    old = tmp_path / "old" / "pytorch_model.bin"
    before = {"state_dict": {kind: tensors[kind] for kind in ("float32", "float16")}}
    torch.save(before, old, _use_new_zipfile_serialization=False)
    placed = {kind: f"pytorch_model-{i}-of-{len(kinds)}.bin" for i, kind in enumerate(kinds, 1)}
    for kind, shard in placed.items():
        torch.save({kind: tensors[kind]}, tmp_path / "shards" / shard)
    index = tmp_path / "shards" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": placed}))

    safe, *others = (Weights(tmp_path / name) for name in ("safe", "bin", "old", "shards"))

    assert [len(weights.files) for weights in others] == [len(kinds), 2, len(kinds)]
    for weights in others:
        assert weights.stem == safe.stem
        for kind in weights.files:
            assert weights.shape(kind) == safe.shape(kind)
            assert weights.dtype(kind) == safe.dtype(kind)
            assert torch.equal(weights.tensor(kind).float(), safe.tensor(kind).float())


@pytest.mark.parametrize("data", [b"no tensors", b"", b"PK\x03\x04"])
def test_broken_weights_of_torch_save_are_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)

    with pytest.raises(ArtifactError, match=r"not readable as weights of torch\.save") as refused:
        Weights(tmp_path)

    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_of_several_variants_the_config_says_which(
    saved: Path, tmp_path: Path, command: Command
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved, model)
    unet = build("stable_diffusion").unet
    own = next((model / "unet").glob("*.safetensors"))
    for factor, variant in ((2.0, "ema"), (3.0, "other")):
        with torch.no_grad():
            unet.conv_out.weight.mul_(factor)
        unet.save_pretrained(model / "unet", variant=variant)
    own.unlink()

    run = run_of(tmp_path / "run", model)
    code, _, err = command("extract", run)
    assert code == 2
    assert "the variants ema, other: say which" in err
    code, _, err = command("set", run, "variant=ema")
    assert code == 0, err
    walked(run, command)

    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(run / "export-gguf" / "model.gguf").tensors}
    wanted = load_file(model / "unet" / "diffusion_pytorch_model.ema.safetensors")
    assert torch.equal(
        torch.from_numpy(tensors["conv_out.bias"].data.copy()), wanted["conv_out.bias"]
    )
