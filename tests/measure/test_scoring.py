"""Which metric scores which layers: by a rule on roles; CLIP for pictures of any world; how frames
differ, for videos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.table import SCORED, SensitivityTable
from qsearch.decide.allocation import allocate
from qsearch.graphs.extraction import extract
from qsearch.measure.evaluation import Outcome
from qsearch.measure.metrics import alignment, temporal
from qsearch.measure.pipelines import Prompts, Sampling, example_inputs, record
from qsearch.measure.predicted_x0 import PredictedX0
from qsearch.measure.profiling import profile
from tests.models import tiny_pipeline

RULE = {"*attn2*": "sqnr", "*": "noise"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def calls(pipe: Any) -> list[Any]:
    return record(pipe, Prompts(("a red circle", "two blue squares")), Sampling(steps=2), 1, 1)


@pytest.fixture(scope="module")
def graph(pipe: Any, calls: list[Any]) -> OpGraph:
    return extract(pipe.unet, example_inputs(calls[0], pipe.unet))


def test_every_layer_is_scored_by_the_metric_of_its_group_and_plans_minimise_that(
    pipe: Any, graph: OpGraph, calls: list[Any], tmp_path: Path
) -> None:
    table = profile(
        pipe.unet,
        graph,
        ["uint4-c", "uint8-c"],
        calls,
        estimator="probe",
        probes=2,
        metrics=["noise", "sqnr"],
        score=RULE,
    )

    table.save(tmp_path / "s.parquet")
    again = SensitivityTable.load(tmp_path / "s.parquet", graph.id)
    scored, noise, sqnr = (again.values(metric) for metric in (SCORED, "noise", "sqnr"))
    text = {n for n in noise if "attn2" in n}
    assert len(text) >= 4
    assert {n for n in scored if scored[n] == sqnr[n] != noise[n]} == text
    assert {n for n in scored if scored[n] == noise[n]} == set(noise) - text
    assert again.responses is not None
    assert {metric for metric, _ in again.responses.values} == {"noise", "sqnr"}
    assert (
        allocate(graph, again, Budget(average_bits=7.0), metric=SCORED).achieved.average_bits <= 7.0
    )
    with pytest.raises(
        QSearchError,
        match="which probes leave in the table; of scored by probe there are none",
    ):
        again.predict({"conv_in": "uint4-c"}, SCORED)
    assert again.predict({"conv_in": "uint4-c"}, SCORED, interactions=False)[0] == pytest.approx(
        noise["conv_in"]["uint4-c"]
    )


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"*": "ssim"}, "scored by metrics that are measured; 'ssim' is not"),
        (
            {"*attention-of-cats*": "noise", "*": "noise"},
            "'\\*attention-of-cats\\*' matches nothing",
        ),
        ({"*attn2*": "noise"}, "no pattern of \\*attn2\\* matches .*: add '\\*' at the end"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(
    pipe: Any, graph: OpGraph, calls: list[Any], rule: dict[str, str], words: str
) -> None:
    with pytest.raises(QSearchError, match=words):
        profile(pipe.unet, graph, ["uint4-c"], calls, metrics=["noise"], score=rule)


def test_alignment_of_other_worlds_goes_by_clip(
    pipe: Any, graph: OpGraph, calls: list[Any], clip: Path
) -> None:
    table = profile(
        pipe.unet,
        graph,
        ["uint2-c"],
        calls,
        estimator="probe",
        probes=2,
        metrics=["alignment"],
        pipe=pipe,
    )

    assert max(row["uint2-c"] for row in table.values("alignment").values()) > 0
    assert (table.frame["floor"] < 1e-8).all()
    pictures = torch.rand(2, 3, 20, 30) * 2 - 1
    outcome = Outcome(
        Prompts(("a red circle", "two blue squares")), torch.zeros(2, 4, 2, 2), pictures, ()
    )
    score = alignment.measure(outcome, outcome)
    assert score.shape == (2,)
    assert ((score >= 0) & (score <= 1)).tolist() == [True, True]
    made, scale = alignment.features(
        PredictedX0(pictures, lambda x: x), PredictedX0(pictures, lambda x: x)
    )
    torch.testing.assert_close(made.norm(dim=1), torch.ones(2))
    assert scale.tolist() == [2.0, 2.0]


def test_clip_sees_pictures_as_its_own_preprocessor_does(clip: Path) -> None:
    from qsearch.measure.clip import load_clip

    ours = load_clip(torch.device("cpu"))
    pictures = torch.rand(2, 3, 12, 24)
    theirs = CLIPImageProcessor.from_pretrained(clip)(
        images=list((pictures * 255).round().byte()), return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(
            ours.model.get_image_features(pixel_values=theirs).pooler_output, dim=-1
        )

    torch.testing.assert_close(
        ours.pictures((pictures * 255).round() / 255 * 2 - 1), expected, atol=1e-4, rtol=1e-3
    )


def test_pictures_of_another_world_without_clip_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = Outcome(Prompts(("a",)), torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 20, 20), ())
    monkeypatch.delenv("QSEARCH_CLIP", raising=False)
    with pytest.raises(
        QSearchError,
        match=r"name a local folder of a CLIPModel in QSEARCH_CLIP .*or leave alignment out",
    ):
        alignment.measure(outcome, outcome)
    monkeypatch.setenv("QSEARCH_CLIP", str(tmp_path / "nothing"))
    with pytest.raises(QSearchError, match="QSEARCH_CLIP must name a folder with a CLIPModel"):
        alignment.measure(outcome, outcome)


@pytest.mark.parametrize("frames", [1, 2])
def test_temporal_sees_frames_on_whichever_axis_they_lie_and_nothing_that_stands_still(
    frames: int,
) -> None:
    still, moving = torch.randn(2, 4, 1, 3, 3).expand(2, 4, 5, 3, 3), torch.randn(2, 4, 5, 3, 3)
    video, shifted = (x.transpose(1, 2) if frames == 1 else x for x in (moving, moving + still))

    own, scale = temporal.features(PredictedX0(video, channels=4), PredictedX0(video, channels=4))
    made, _ = temporal.features(PredictedX0(shifted, channels=4), PredictedX0(video, channels=4))

    torch.testing.assert_close(made, own)
    expected = (moving[:, :, 1:] - moving[:, :, :-1]).double().square().flatten(1).sum(1)
    torch.testing.assert_close(scale, expected)


def test_temporal_refuses_pictures_and_videos_that_stand_still() -> None:
    picture = PredictedX0(torch.randn(1, 4, 8, 8), channels=4)
    with pytest.raises(
        QSearchError,
        match=r"temporal needs a video's latents.* given 1 x 4 x 8 x 8: leave temporal out",
    ):
        temporal.features(picture, picture)
    still = PredictedX0(torch.ones(1, 4, 3, 8, 8), channels=4)
    with pytest.raises(QSearchError, match="this video stands still"):
        temporal.features(still, still)
