"""Cards: true shapes without weights, at any size the model takes, and errors that name the nearest
right thing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.core import plugins, shipped
from qsearch.core.errors import QSearchError
from qsearch.graphs.families import cards

ISSUE = """dit-xl-2-256 dit-xl-2-512 pixart-alpha pixart-sigma hunyuan-dit sd15 sdxl sdxl-turbo
sd3-medium sd35-large flux-dev flux2 sana-1.6b cogvideox-2b wan-1.3b wan-14b ltx
qwen-image z-image""".split()
#: parameters in billions, as the models' papers and pages say
PUBLISHED = {
    "pixart-alpha": 0.6,
    "hunyuan-dit": 1.5,
    "sd15": 0.86,
    "sdxl": 2.6,
    "sd3-medium": 2.0,
    "sd35-large": 8.1,
    "flux-dev": 12,
    "flux2": 32,
}
PUBLISHED |= {"sana-1.6b": 1.6, "wan-14b": 14, "ltx": 1.9, "qwen-image": 20, "z-image": 6}


def weights(model: nn.Module) -> dict[str, int]:
    """name -> weight elements of every linear layer, convolution and embedding."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def test_every_model_of_the_issue_has_a_card() -> None:
    assert set(ISSUE) - set(cards.names()) == set()


@pytest.mark.parametrize("name", cards.names())
def test_a_card_says_where_its_configuration_was_learnt(name: str) -> None:
    card = cards.card(name)

    assert len(card.source) > 40
    assert card.title != ""


@pytest.mark.parametrize("name", cards.names())
def test_a_card_builds_the_number_of_parameters_it_states(name: str) -> None:
    model, inputs = cards.load(name)

    assert sum(p.numel() for p in model.parameters()) == cards.card(name).parameters
    assert {str(t.device) for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert not model.training
    assert inputs


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_a_card_has_about_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert cards.card(name).parameters == pytest.approx(billions * 1e9, rel=0.03)


@pytest.mark.parametrize(
    ("name", "layers", "total"),
    [
        ("sdxl", 794, 2_565_880_320),
        ("sdxl-turbo", 794, 2_565_880_320),
        ("pixart-alpha", 287, 610_228_224),
    ],
)
def test_counts_published_by_others_are_met_exactly(name: str, layers: int, total: int) -> None:
    found = weights(cards.load(name)[0])

    assert len(found) == layers
    assert sum(found.values()) == total


def test_hunyuan_1_1_has_the_weights_that_qua2sedimo_counts() -> None:
    found = weights(cards.load("hunyuan-dit-1.1")[0])
    pooler, style = (
        "time_extra_emb.pooler.",
        "time_extra_emb.style_embedder",
    )  # they leave the pooler out, and an embedding is no layer of theirs

    assert (
        sum(n for name, n in found.items() if not name.startswith((pooler, style))) == 1_499_645_952
    )
    skips = [name for name in found if name.endswith("skip_linear")]
    assert skips == [f"blocks.{i}.skip_linear" for i in range(21, 40)]
    assert (
        len([name for name in found if not name.startswith((pooler, style))]) + len(skips) == 487
    )  # each skip layer is two to them


@pytest.mark.parametrize("name", ["sd15", "pixart-alpha", "sana-1.6b"])
def test_a_small_card_runs_on_the_meta_device_at_another_size(name: str) -> None:
    model, inputs = cards.load(name, resolution=256, batch=2)

    with torch.no_grad():
        made = model(**inputs, return_dict=False)[0]

    noise = inputs.get("sample", inputs.get("hidden_states"))
    assert made.shape[0] == 2
    assert made.shape[2:] == noise.shape[2:]


def test_the_shorter_side_is_given_and_the_other_keeps_the_ratio() -> None:
    native = cards.sizes(cards.card("wan-14b"), "wan-14b")
    half = cards.sizes(cards.card("wan-14b"), "wan-14b", resolution=352, frames=5, batch=3)

    assert native == {"batch": 1, "height": 720, "width": 1280, "frames": 81}
    assert half == {
        "batch": 3,
        "height": 352,
        "width": 624,
        "frames": 5,
    }  # 625.8 is no multiple of 16


def test_a_video_card_has_a_latent_for_every_four_frames_and_the_first() -> None:
    assert cards.load("wan-1.3b", frames=17)[1]["hidden_states"].shape == (1, 16, 5, 60, 104)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"resolution": 1000}, r"multiple of 32 pixels; given 1000, the nearest is 992"),
        ({"resolution": 0}, r"given 0, the nearest is 32"),
        ({"batch": 0}, r"at least one picture; given 0"),
        ({"frames": 9}, r"single pictures, frames are for videos; given 9"),
    ],
)
def test_a_size_the_model_does_not_take_is_refused_with_the_nearest(
    size: dict[str, int], message: str
) -> None:
    with pytest.raises(QSearchError, match=message):
        cards.load("sdxl", **size)


def test_frames_that_do_not_fit_the_stride_are_refused() -> None:
    with pytest.raises(
        QSearchError, match=r"multiple of 4 frames, plus one; given 80, the nearest is 81"
    ):
        cards.load("wan-1.3b", frames=80)


def test_an_unknown_card_names_the_nearest() -> None:
    with pytest.raises(
        QSearchError, match=r"no 'sdxl-trubo' among the models; did you mean 'sdxl-turbo'\?"
    ):
        cards.load("sdxl-trubo")


def test_cards_are_a_family_without_weights() -> None:
    family = plugins.load("families", "cards")

    assert family.folder("sdxl") is None
    assert family.has("sdxl")
    assert not family.has("scenes-dit")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("heigth/8", r"did you mean 'height'"),
        ("height/7", r"'height/7' must come out whole; 64/7 does not"),
        ("height/0", r"64/0 does not"),
        ("height ** 2", r"whole numbers, names and \+ - \* /"),
        ("__import__('os')", r"whole numbers, names"),
        ("height/", r"whole numbers, names"),
        ("8.5", r"whole numbers, names"),
    ],
)
def test_an_expression_is_exact_arithmetic_and_nothing_else(expression: str, message: str) -> None:
    with pytest.raises(QSearchError, match=message):
        cards.evaluate(expression, {"batch": 1, "height": 64})


def test_inputs_are_built_as_declared() -> None:
    declared = {
        "x": {"each": "batch", "of": "float32[2, height/8]"},
        "n": "(height-1)*2 + 1",
        "pair": ["int64[]", 0.5],
        "flag": True,
        "none": None,
    }

    built = cards.build(declared, {"batch": 2, "height": 64})

    assert [t.shape for t in built["x"]] == [(2, 8), (2, 8)]
    assert built["n"] == 127
    assert built["pair"][0].dtype == torch.int64
    assert built["pair"][0].shape == ()
    assert built["pair"][1:] == [0.5]
    assert built["flag"] is True
    assert built["none"] is None


CARD = (
    "title: t\nsource: s\nclass: DiTTransformer2DModel\nparameters: 1\nnative: {height: 8, width: "
    "8, multiple: 8}\ninputs: {}\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CARD + "config: {}\ninput: {}\n", r"unknown key 'input'; did you mean 'inputs'"),
        (CARD, r"config: field required"),
        ("[1]", r"must hold a mapping, it holds list"),
        ("a: [", r"not readable as YAML"),
    ],
)
def test_a_card_of_ones_own_is_checked(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(QSearchError, match=message):
        cards.load(str(path))


def test_a_card_of_ones_own_with_a_wrong_key_or_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CARD + "config: {num_layer: 2}\n", encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text(
        CARD.replace("DiTTransformer2DModel", "NoSuchModel") + "config: {}\n", encoding="utf-8"
    )

    with pytest.raises(QSearchError, match=r"has no 'num_layer'; did you mean 'num_layers'"):
        cards.load(str(path))
    with pytest.raises(QSearchError, match=r"needs diffusers' NoSuchModel"):
        cards.load(str(other))


def test_the_same_files_are_found_inside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "qsearch"
    (package / "configs" / "models").mkdir(parents=True)
    (package / "configs" / "models" / "only.yaml").touch()
    monkeypatch.setattr(shipped, "_PACKAGE", package)

    assert shipped.names("models") == ["only"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_largest_card_takes_little_memory() -> None:
    # Not getrusage: its peak begins with that of the process that forked.
    script = (
        "from qsearch.graphs.families import cards; cards.load('flux2'); "
        "print(open('/proc/self/status').read())"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) * 1024 <= 1.5e9
