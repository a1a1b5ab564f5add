"""Calling: what a pipeline wants besides a prompt, from keywords, files and prompts of their own;
what it raises is one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qsearch.core.errors import QSearchError
from qsearch.measure.calling import arguments, result
from qsearch.measure.pipelines import Prompts, Sampling, read_prompts, record, sample
from qsearch.measure.prompts import read_value
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH
from tests.tiny_pipelines import build

PROMPTS = Prompts(("a cat", "a dog", "a house"))
STEPS = Sampling(steps=2)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


@pytest.fixture(scope="module")
def text() -> Any:
    return build("stable_diffusion")


@pytest.fixture(scope="module")
def image_to_image(text: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = {k: v for k, v in text.components.items() if k != "image_encoder"}
    return quiet(StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of one colour each."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red.png", folder / "blue one.jpg"]
    for path, colour in zip(paths, ((250, 0, 0), (0, 0, 250)), strict=True):
        Image.new("RGB", (16, 16), colour).save(path)
    return paths


def noisy(pipe: Any, prompts: Prompts, sampling: Sampling) -> Tensor:
    """What the denoiser is given first, without its copy for guidance."""
    heard: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(args[0].clone()), with_kwargs=True
    )
    sample(pipe, prompts, sampling)
    handle.remove()
    return heard[0].chunk(2)[0]


def test_a_picture_from_a_file_goes_to_every_sample(
    image_to_image: Any, pictures: list[Path]
) -> None:
    red, blue = ({"image": str(path), "strength": 0.5} for path in pictures)

    one = noisy(image_to_image, PROMPTS, Sampling(steps=4, call=red))
    other = noisy(image_to_image, PROMPTS, Sampling(steps=4, call=blue))

    assert one.shape == (3, 4, 8, 8)
    assert float((one - other).abs().amax((1, 2, 3)).min()) > 1e-2
    assert torch.equal(noisy(image_to_image, PROMPTS, Sampling(steps=4, call=red)), one)


def test_each_sample_may_have_a_picture_of_its_own(
    image_to_image: Any, pictures: list[Path]
) -> None:
    given = {"image": [str(p) for p in pictures], "strength": 0.5}

    made = arguments(image_to_image, PROMPTS, 1, Sampling(call=given))["image"]

    assert [p.getpixel((0, 0))[0] > 200 for p in made] == [False, True, False]  # samples 1, 2, 3


def test_recording_image_to_image_holds_the_steps_it_runs(
    image_to_image: Any, pictures: list[Path]
) -> None:
    sampling = Sampling(steps=10, call={"image": str(pictures[0]), "strength": 0.5})

    calls = record(image_to_image, PROMPTS, sampling, 5)

    assert [c.step for c in calls] == [5, 6, 7, 8, 9]
    assert {c.steps for c in calls} == {10}


def test_a_line_of_prompts_may_bring_its_own_values(
    image_to_image: Any, pictures: list[Path], tmp_path: Path
) -> None:
    Image.open(pictures[0]).save(tmp_path / "near.png")
    lines = [
        {"prompt": "a cat", "image": "near.png", "negative_prompt": "dogs"},
        {"prompt": "a dog", "image": str(pictures[1]), "negative_prompt": ""},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    prompts = read_prompts(tmp_path / "p.jsonl")
    made = arguments(image_to_image, prompts, 0, Sampling(call={"strength": 0.3}))

    assert made["prompt"] == ["a cat", "a dog"]
    assert made["negative_prompt"] == ["dogs", ""]
    assert [p.getpixel((3, 3))[0] > 200 for p in made["image"]] == [True, False]
    assert made["strength"] == 0.3
    last = arguments(image_to_image, prompts[1:], 1, STEPS)
    assert last["negative_prompt"] == [""]
    assert last["image"].getpixel((3, 3))[2] > 200


def test_a_shared_text_is_given_to_every_sample(text: Any) -> None:
    made = arguments(text, PROMPTS, 0, Sampling(call={"negative_prompt": "fog"}))

    assert made["negative_prompt"] == ["fog"] * 3
    sample(text, PROMPTS, Sampling(steps=2, call={"negative_prompt": "fog"}))


def test_tensors_from_a_file_have_a_row_a_sample(text: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rows = torch.randn(2, 5, WIDTH)
    save_file({"prompt_embeds": rows}, tmp_path / "rows.safetensors")
    np.save(tmp_path / "one.npy", rows[:1].numpy())
    sampling = Sampling(
        call={
            "prompt_embeds": str(tmp_path / "rows.safetensors"),
            "negative_prompt_embeds": str(tmp_path / "one.npy"),
        }
    )

    made = arguments(text, PROMPTS, 0, sampling)

    assert torch.equal(made["prompt_embeds"], rows[[0, 1, 0]])
    assert torch.equal(made["negative_prompt_embeds"], rows[[0, 0, 0]])


def test_a_keyword_that_the_call_does_not_have_is_refused_with_the_nearest(text: Any) -> None:
    with pytest.raises(
        QSearchError, match="negative_promt is none of them; did you mean 'negative_prompt'"
    ):
        arguments(text, PROMPTS, 0, Sampling(call={"negative_promt": "x"}))
    with pytest.raises(QSearchError, match="generator is none of them"):
        arguments(text, PROMPTS, 0, Sampling(call={"generator": 3}))


def test_what_a_pipeline_raises_is_one_line_with_what_helps(image_to_image: Any) -> None:
    with pytest.raises(QSearchError) as caught:
        record(image_to_image, PROMPTS, STEPS, 1)

    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("StableDiffusionImg2ImgPipeline was called with prompt, num_inference")
    assert "what else it takes, by `call`: image, strength" in said


def test_a_keyword_without_a_default_is_asked_for() -> None:
    class Wanting:
        def __call__(self, prompt: list[str], reference: Any, generator: Any = None) -> Any:
            return (torch.zeros(len(prompt), 1) + reference,)

    with pytest.raises(
        QSearchError, match=r"requires reference besides .*call: \{reference: FILE or value\}"
    ):
        sample(Wanting(), PROMPTS, STEPS)
    assert sample(Wanting(), PROMPTS, Sampling(call={"reference": 2.0})).tolist() == [[2.0]] * 3
    each = Sampling(batch=2, call={"reference": {"each": [1, 2]}})
    assert arguments(Wanting(), PROMPTS, 0, each)["reference"] == [1, 2, 1]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"height": 72}, "height 72;"),
        ({"resolution": 64}, "height 64, width 64;"),
        ({"frames": 5}, "num_frames 5;"),
    ],
)
def test_a_size_that_the_call_does_not_take_is_refused(asked: dict[str, int], said: str) -> None:
    class OneSize:
        def __call__(self, prompt: list[str], generator: Any = None) -> Any:
            return (torch.zeros(len(prompt), 1),)

    with pytest.raises(QSearchError, match=rf"the call of OneSize has no such argument: {said}"):
        sample(OneSize(), PROMPTS, Sampling(steps=2, **asked))


@pytest.mark.parametrize(
    ("frames", "refused"), [(13, False), (15, False), (14, True), (20, True), (1, False)]
)
def test_frames_that_the_vae_does_not_divide_are_refused(frames: int, refused: bool) -> None:
    class Video:
        vae_scale_factor_temporal = 2

        def __call__(self, prompt: list[str], num_frames: int = 81, generator: Any = None) -> Any:
            return (torch.zeros(len(prompt), num_frames),)

    asked = Sampling(steps=2, frames=frames)
    if refused:
        near = f"given {frames}, take {frames - 1} or {frames + 1}"
        with pytest.raises(QSearchError, match=rf"one frame more than a multiple of 2; {near}"):
            sample(Video(), PROMPTS, asked)
    else:
        assert sample(Video(), PROMPTS, asked).shape[1] == frames


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_a_file_that_can_t_be_read_is_named(text: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "broken":
        path.write_bytes(b"no picture")

    with pytest.raises(QSearchError, match=r"latents is read from .*a\.png, which is not readable"):
        arguments(text, PROMPTS, 0, Sampling(call={"latents": str(path)}))


def test_masks_are_gray_and_videos_lists_of_pictures(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (i * 60, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "m.png")

    assert read_value(str(tmp_path / "m.png"), "mask_image").mode == "L"
    assert len(read_value(str(tmp_path / "v.gif"), "video")) == 3


def test_a_list_of_lists_is_each_sample_s_with_its_files_read(pictures: list[Path]) -> None:
    class Rows:
        """As VisualCloze: rows of pictures, the last of them to be made."""

        def __call__(self, prompt: list[str], image: Any, generator: Any = None) -> Any:
            return (torch.zeros(len(prompt), 1),)

    files = [str(path) for path in pictures[:2]]
    rows = [files, [files[0], None]]

    made = arguments(Rows(), PROMPTS, 0, Sampling(call={"image": rows}))["image"]

    assert len(made) == len(PROMPTS)
    for (left, right), (query, empty) in made:
        pair = [Image.open(path).tobytes() for path in pictures[:2]]
        assert [left.tobytes(), right.tobytes()] == pair
        assert query.tobytes() == pair[0]
        assert empty is None


def test_one_sample_of_diffusers_has_a_generator_and_several_have_a_list(text: Any) -> None:
    alone = arguments(text, PROMPTS[1:2], 1, STEPS)["generator"]
    together = arguments(text, PROMPTS, 0, STEPS)["generator"]

    assert torch.equal(torch.rand(3, generator=alone), torch.rand(3, generator=together[1]))


def test_a_sound_is_a_tensor_between_minus_one_and_one(tmp_path: Path) -> None:
    import wave

    data = (np.array([[0, 16384], [-32768, 0]], np.int16)).tobytes()
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(data)

    assert read_value(str(tmp_path / "s.wav"), "audio").tolist() == [[[0.0, -1.0], [0.5, 0.0]]]


def unconditional() -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    net = UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, **blocks
    )
    return quiet(DDIMPipeline(unet=net, scheduler=DDIMScheduler()))


def labelled() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 1000}
    model = DiTTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, in_channels=4, out_channels=8, **sizes
    )
    return quiet(DiTPipeline(transformer=model, vae=tiny.vae(), scheduler=DDIMScheduler()))


def latent_diffusion_of_sound() -> Any:
    from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

    net = UNet1DModel(
        block_out_channels=(32, 32),
        extra_in_channels=64,
        sample_size=32,
        sample_rate=32,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    )
    return quiet(DanceDiffusionPipeline(unet=net, scheduler=IPNDMScheduler()))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (unconditional, (3, 3, 8, 8)),
        (labelled, (3, 3, 8, 8)),
        (latent_diffusion_of_sound, (3, 2, 32)),
    ],
)
def test_pipelines_without_prompts_are_sampled_and_recorded(
    make: Any, shape: tuple[int, ...]
) -> None:
    pipe = make()

    assert sample(pipe, PROMPTS, STEPS).shape == shape
    whole, single = (sample(pipe, PROMPTS, Sampling(steps=2, batch=b)) for b in (3, 1))
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-4)
    assert [c.step for c in record(pipe, PROMPTS, STEPS, 2)] == [0, 1]


def test_a_denoiser_of_nine_channels_is_painted_into(text: Any, pictures: list[Path]) -> None:
    from diffusers import StableDiffusionInpaintPipeline

    parts = {k: v for k, v in text.components.items() if k not in ("unet", "image_encoder")}
    unet = tiny.unet(cross_attention_dim=WIDTH, attention_head_dim=2, in_channels=9, out_channels=4)
    pipe = quiet(StableDiffusionInpaintPipeline(unet=unet, **parts, requires_safety_checker=False))
    given = {"image": str(pictures[0]), "mask_image": str(pictures[1]), "height": 16, "width": 16}

    (call,) = record(pipe, PROMPTS, Sampling(steps=2, call=given), 1)

    assert call.args[0].shape == (6, 9, 8, 8)


def test_a_controlnet_s_residuals_are_part_of_the_call(text: Any, pictures: list[Path]) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_unet(text.unet, conditioning_embedding_out_channels=(4, 4))
    parts = {k: v for k, v in text.components.items() if k != "image_encoder"}
    pipe = quiet(
        StableDiffusionControlNetPipeline(controlnet=net, **parts, requires_safety_checker=False)
    )

    (call,) = record(pipe, PROMPTS, Sampling(steps=2, call={"image": str(pictures[0])}), 1)

    assert len(call.kwargs["down_block_additional_residuals"]) > 2


@pytest.mark.parametrize(
    "data",
    [
        b"a cat\na dog\n",
        b"\xef\xbb\xbfa cat\r\n\r\n  a dog\r\n",
        "a cat\na dog".encode("utf-16"),
        "a cat\r\na dog\r\n".encode("utf-16-be").join([b"\xfe\xff", b""]),
        b"a cat\ra dog",
    ],
    ids=["plain", "mark and CRLF", "UTF-16", "UTF-16 big endian", "CR"],
)
def test_prompts_are_read_as_editors_leave_them(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(data)

    assert read_prompts(tmp_path / "p.txt").texts == ("a cat", "a dog")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_separators_inside_a_prompt_do_not_end_it(tmp_path: Path, mark: str) -> None:
    (tmp_path / "p.txt").write_text(f"a cat{mark}asleep\na dog", encoding="utf-8")

    assert read_prompts(tmp_path / "p.txt").texts == (f"a cat{mark}asleep", "a dog")


def test_a_file_of_prompts_that_can_t_be_opened_is_said_once_and_in_words(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "p.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(QSearchError) as refused:
            read_prompts(path)

        assert f"({why}" in str(refused.value)
        assert "Errno" not in str(refused.value)
        assert str(refused.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("data", [b"", b" \n\t\n", "caf\xe9".encode("cp1252")])
def test_files_without_readable_prompts_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.txt").write_bytes(data)

    with pytest.raises(QSearchError, match=r"p\.txt"):
        read_prompts(tmp_path / "p.txt")


def test_braces_may_be_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("{a cat}\n{oil|ink} drawing of {dogs}", encoding="utf-8")

    assert read_prompts(tmp_path / "p.txt").texts == ("{a cat}", "{oil|ink} drawing of {dogs}")


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (lambda: (torch.zeros(2, 4, 3),), (2, 4, 3)),
        (lambda: (np.zeros((2, 6, 5, 3), np.float32),), (2, 3, 6, 5)),
        (lambda: ([Image.new("RGB", (5, 6))] * 2,), (2, 3, 6, 5)),
        (lambda: (np.zeros((2, 7)),), (2, 7)),
        (lambda: ([np.zeros(7)] * 2,), (2, 7)),
        (lambda: ([torch.zeros(3, 4)] * 2,), (2, 3, 4)),
        (lambda: {"images": torch.zeros(2, 3)}, (2, 3)),
    ],
)
def test_whatever_a_pipeline_hands_over_is_a_tensor(made: Any, shape: tuple[int, ...]) -> None:
    assert result(made()).shape == shape


def test_pictures_of_arrays_lie_between_minus_one_and_one() -> None:
    black = result(([Image.new("RGB", (2, 2))],))
    white = result((np.ones((1, 2, 2, 3)),))

    assert (float(black.max()), float(white.min())) == (-1.0, 1.0)


class ByWords:
    """Takes one prompt at a time, by the words of its error."""

    scheduler = None
    components: ClassVar[dict[str, Any]] = {}

    def __call__(self, prompt: Any, generator: Any = None, negative_prompt: Any = None) -> Any:
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str):
            raise TypeError("a list of prompts is not supported")
        return (torch.randn(1, 3, generator=generator),)


class ByType:
    """Takes one prompt at a time, by the type that it declares."""

    scheduler = None
    components: ClassVar[dict[str, Any]] = {}

    def __call__(
        self, prompt: str, generator: Any = None, negative_prompt: str | None = None
    ) -> Any:
        assert ("in " + prompt + str(negative_prompt)).startswith("in ")
        return (torch.randn(1, 3, generator=generator),)


@pytest.mark.parametrize("kind", [ByWords, ByType])
def test_a_pipeline_that_takes_one_prompt_at_a_time_is_given_one_as_a_text(kind: type) -> None:
    sampling = Sampling(call={"negative_prompt": "fog"}, batch=3)
    made = sample(kind(), PROMPTS, sampling)

    assert made.shape == (3, 3)
    assert torch.equal(made[1:2], sample(kind(), PROMPTS[1:2], sampling, first=1))


def test_a_pipeline_that_takes_one_picture_at_a_time_says_how(pictures: list[Path]) -> None:
    class Single:
        scheduler = None
        components: ClassVar[dict[str, Any]] = {}

        def __call__(self, prompt: list[str], image: Any, generator: Any = None) -> Any:
            if isinstance(image, list):
                raise TypeError("one picture")
            return (torch.zeros(len(prompt), 3),)

    call = {"image": [str(path) for path in pictures]}

    with pytest.raises(QSearchError, match=r"set sampling.batch and profile.batch to 1"):
        sample(Single(), PROMPTS, Sampling(call=call))
    assert sample(Single(), PROMPTS, Sampling(call=call, batch=1)).shape == (3, 3)
