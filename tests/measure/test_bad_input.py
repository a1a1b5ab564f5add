"""What goes wrong while measuring is said in clear words, and nothing that was measured is lost."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import hub
from qsearch.measure import profiling
from qsearch.measure.estimation import EstimationTask
from qsearch.measure.gradients import Contraction
from qsearch.measure.memory import saved_activation_bytes, weight_bytes
from qsearch.measure.observation import observations
from qsearch.measure.pipelines import Call, Prompts, Sampling, example_inputs, record
from qsearch.measure.profiling import profile, profile_pipeline
from qsearch.measure.trajectory import trajectories
from tests.models import PlainDenoiser, plain, plain_calls, tiny_pipeline

Case = tuple[PlainDenoiser, OpGraph]
PROMPTS, SAMPLING = (
    Prompts(("a red circle", "two blue squares", "a star", "a ring")),
    Sampling(steps=2),
)


@pytest.fixture(scope="module")
def case() -> Case:
    return plain()


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 2 KiB: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_leaves_what_was_saved_before(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(profiling, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(profiling, "_SAVE_SHARE", 1e9)
    partial = tmp_path / "partial.parquet"
    asked: dict[str, Any] = {"partial": partial, "key": "k", "estimator": "sweep"}

    def fill_the_disk(done: int, total: int) -> None:
        if done == 3:
            request.getfixturevalue("small_files")

    with pytest.raises(
        QSearchError,
        match=r"cannot write .*partial\.parquet: .*; give a folder with room and write permission",
    ):
        profile(*case, ["uint4-c"], plain_calls(1), progress=fill_the_disk, **asked)
    resource.setrlimit(
        resource.RLIMIT_FSIZE,
        (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]),
    )

    assert [p.name for p in tmp_path.iterdir()] == ["partial.parquet"]
    told: list[int] = []
    profile(
        *case, ["uint4-c"], plain_calls(1), progress=lambda done, total: told.append(done), **asked
    )
    assert told[0] == 3  # two choices were saved before the disk was full


def test_out_of_memory_halves_the_batch_and_says_so(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = record(pipe, PROMPTS[:1], SAMPLING, 1)
    graph = extract(pipe.unet, example_inputs(call, pipe.unet))
    most, said, own = 2, [], pipe.unet.forward  # samples with guidance that fit

    def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and len(sample) > most:
            raise torch.OutOfMemoryError("no memory")
        return own(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    settings: dict[str, Any] = {
        "bins": 1,
        "batch": 4,
        "estimator": "probe",
        "probes": 2,
        "say": said.append,
    }

    table = profile_pipeline(pipe, graph, PROMPTS, SAMPLING, schemes=["uint8-c"], **settings)

    assert [line for line in said if "memory;" in line] == [
        f"profile: out of memory; going on with {n} samples at once" for n in (2, 1)
    ]
    assert table.responses is not None
    assert table.responses.power["noise", 0].shape == (4,)  # every sample is there, each a part
    most = 1
    with pytest.raises(QSearchError, match="one sample at a time does not fit the memory"):
        profile_pipeline(pipe, graph, PROMPTS, SAMPLING, schemes=["uint8-c"], **settings)


def test_latents_that_are_not_finite_name_the_first_layer(pipe: Any) -> None:
    (call,) = record(pipe, PROMPTS[:1], SAMPLING, 1)
    graph = extract(pipe.unet, example_inputs(call, pipe.unet))
    pipe.unet.mid_block.resnets[0].conv1.weight.data[0] = torch.inf

    with pytest.raises(
        QSearchError,
        match=(
            r"latents that are not finite; the first layer to make such numbers is "
            r"mid_block\.resnets\.0\.conv1 \(Conv2d\)"
        ),
    ):
        profile(
            pipe.unet,
            graph,
            ["uint8-c"],
            trajectories(pipe, PROMPTS[:1], SAMPLING),
            metrics=["sqnr"],
        )


def test_sites_need_a_scheme_that_rounds_inputs_alone(case: Case) -> None:
    with pytest.raises(
        QSearchError,
        match=(
            r"sites of attention are rounded and store nothing: give a scheme such as keep\+a8 "
            r"beside uint4-c"
        ),
    ):
        profile(*case, ["uint4-c"], plain_calls(1), sites=["*:softmax"])


def test_autocast_computes_in_another_type_and_leaves_the_model_as_it_was(case: Case) -> None:
    model, graph = case
    kinds: list[torch.dtype] = []
    handle = model.conv_out.register_forward_hook(
        lambda module, args, output: kinds.append(output.dtype)
    )
    whole = profile(model, graph, ["uint4-c"], plain_calls(1), estimator="probe", probes=8).values()
    kinds.clear()

    cast = profile(
        model, graph, ["uint4-c"], plain_calls(1), estimator="probe", probes=8, autocast="bfloat16"
    ).values()
    handle.remove()

    assert set(kinds) == {torch.bfloat16}
    assert "forward" not in vars(model)
    assert {n: row["uint4-c"] for n, row in cast.items()} == pytest.approx(
        {n: row["uint4-c"] for n, row in whole.items()}, rel=0.2, abs=1e-9
    )
    with pytest.raises(
        QSearchError,
        match="autocast: input should be '', 'bfloat16' or 'float16'; given 'bfloat'",
    ):
        profile(model, graph, ["uint4-c"], plain_calls(1), autocast="bfloat")


def test_the_memory_that_is_stated_is_what_a_pass_keeps(case: Case) -> None:
    model, graph = case
    small, large = (
        saved_activation_bytes(model, call)
        for call in (plain_calls(1, samples=2)[0], plain_calls(1, samples=4)[0])
    )
    rows = 2 * 16 * 8 * 4  # one map of 16 tokens and 8 channels for two samples, in bytes

    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    assert large == pytest.approx(2 * small, rel=0.1)
    assert (
        10 * rows < small < 40 * rows
    )  # inputs of thirteen layers, and what two attentions and a GELU keep
    task = EstimationTask(
        model,
        graph,
        (profiling.Scheme.parse("uint4-c"),),
        tuple(observations(model, plain_calls(1), ["noise"])),
        ("noise",),
        probes=24,
    )
    assert (
        "GiB of weights, 0.00 GiB of activations and 0.00 GiB of quantized weights"
        in Contraction(task).memory
    )
    assert all(p.requires_grad for p in model.parameters())


def test_a_trajectory_s_memory_is_counted_on_its_first_call(pipe: Any) -> None:
    (parts,) = trajectories(pipe, PROMPTS[:2], SAMPLING, batch=2)
    observation = parts.observed(pipe.unet, ["sqnr"])

    call = observation.example()

    assert saved_activation_bytes(pipe.unet, call) > 0
    assert (
        len(example_inputs(call, pipe.unet)["sample"]) == 4
    )  # two samples, each with and without its caption
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize(
    "name", ["scenes-dit", "models/mine.yaml", "a b/c", "/root/model", "no/such/thing"]
)
def test_what_looks_like_no_hub_id_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()

    assert hub.folder(name) is None


def test_a_hub_id_goes_to_diffusers_and_offline_gives_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "download", lambda model: str(tmp_path / model))
    assert hub.folder("someone/sd-tiny") == tmp_path / "someone/sd-tiny"

    def offline(model: str) -> str:
        raise OSError("\nno network\nand many more lines")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(
        QSearchError,
        match=(
            r"^'someone/sd-tiny' is no folder here, and as an id of the hub it can't be fetched: "
            r"no network$"
        ),
    ):
        hub.folder("someone/sd-tiny")


def test_counting_memory_leaves_none_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())  # a sigmoid keeps what it gives out
    alive: list[weakref.ref[torch.Tensor]] = []
    model[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))

    assert saved_activation_bytes(model, Call((torch.ones(2, 4),), {}, 0)) > 0

    assert [made() for made in alive] == [None]


def test_an_estimator_that_prices_weights_alone_says_so_where_sites_are_asked_for(
    case: Case,
) -> None:
    with pytest.raises(QSearchError, match=r"weight_error prices \d+ of the \d+ choices .* sites"):
        profile(
            *case,
            ["uint4-c", "keep+a8"],
            plain_calls(1),
            estimator="weight_error",
            sites=["*:softmax"],
        )
