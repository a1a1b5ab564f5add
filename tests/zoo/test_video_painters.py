"""What the video denoiser's training is told about clips, and what WanPipeline does alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qsearch import zoo
from qsearch.zoo import painters, train, video_painters, video_reader, video_vae
from qsearch.zoo.moving_scenes import (
    FRAMES,
    SPEEDS,
    Clips,
    describe,
    draw_clips,
    render,
    tracks,
    vocabulary,
)

#: largest difference of velocities of size one that sums in another order explain (fp32)
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def clips() -> Clips:
    return draw_clips(64, torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def painter() -> video_painters.VideoPainter:
    """An untrained painter none of whose layers is zero."""
    torch.manual_seed(0)
    made = video_painters.VideoPainter().eval().requires_grad_(False)
    video_painters.train_attention(made.denoiser)
    torch.nn.init.normal_(made.denoiser.proj_out.weight, std=0.1)
    for block in made.denoiser.blocks:
        torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.1)
    return made


def test_a_clip_has_512_tokens_in_eight_blocks_of_full_attention(
    painter: video_painters.VideoPainter,
) -> None:
    config = painter.denoiser.config
    patches = video_vae.LATENT_FRAMES * (16 // config.patch_size[1]) * (16 // config.patch_size[2])

    assert patches // config.patch_size[0] == 512
    assert len(painter.denoiser.blocks) == 8


@pytest.mark.parametrize("length", [14, 60, 512])
def test_one_weighted_pad_in_training_is_as_many_zeros_in_the_pipeline(
    painter: video_painters.VideoPainter, length: int
) -> None:
    tokenizer = painters.new_tokenizer(False, vocabulary())
    tokens = tokenizer(
        ["a red ring moving left , fast", "a still blue star"],
        padding="max_length",
        max_length=12,
        return_tensors="pt",
    )
    words, mask = tokens.input_ids, tokens.attention_mask
    noisy, sigma = (
        torch.randn(2, 8, 2, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.5, 0.9]),
    )
    ours, _ = painter.paint_clips(noisy, sigma, words, mask, torch.full((2,), float(length)))

    plain = video_painters.new_video_denoiser()
    plain.load_state_dict(painter.denoiser.state_dict())
    text = painter.text_encoder(words, attention_mask=mask)[0] * mask[..., None]
    padded = torch.cat([text, torch.zeros(2, length - 12, text.shape[-1])], 1)
    with torch.no_grad():
        theirs = plain(noisy, sigma * 1000, padded, return_dict=False)[0]

    assert float(theirs.abs().mean()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_each_place_shows_the_object_whose_centre_lies_in_it_and_how_it_moves(clips: Clips) -> None:
    index = torch.arange(0, FRAMES, 2).expand(len(clips), -1)
    seen = {
        k: v.unflatten(1, (8, 8, 8)) for k, v in video_painters.visible_motion(clips, index).items()
    }
    place = tracks(clips)[:, ::2]
    checked = 0
    for i in range(len(clips)):
        k = 1 if int(clips.shape[i, 1]) >= 0 else 0  # none is in front of it
        for frame in range(8):
            x, y = (place[i, frame, k] // 8).long().tolist()
            if 0 <= x < 8 and 0 <= y < 8:
                checked += 1
                for attribute in ("shape", "colour", "size", "motion"):
                    assert int(seen[attribute][i, frame, y, x]) == int(
                        getattr(clips, attribute)[i, k]
                    )
                speed = int(clips.speed[i, k])
                assert int(seen["speed"][i, frame, y, x]) == (speed if speed >= 0 else len(SPEEDS))
    assert checked > 300


def test_the_loss_weighs_objects_five_times_as_much_as_the_background(clips: Clips) -> None:
    weights = video_painters.object_weights(clips, torch.arange(8).expand(len(clips), -1))
    levels = weights.unique()

    assert weights.shape == (64, 1, 8, 16, 16)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)
    assert len(levels) == 2
    assert float(levels[1] / levels[0]) == pytest.approx(5, rel=1e-4)


def test_the_vae_gives_eight_latents_of_a_clip_that_later_frames_do_not_change(
    clips: Clips,
) -> None:
    torch.manual_seed(0)
    vae = video_vae.new_video_vae().eval()
    latents = video_vae.encode(vae, clips[:2])
    frames = render(clips[:2], video_vae.ENCODED_FRAMES)
    frames[:, :, FRAMES:] = 0
    with torch.no_grad():
        again = vae.encode(frames).latent_dist.mean[:, :, : video_vae.LATENT_FRAMES]
        back = vae.decode(latents).sample

    assert latents.shape == (2, video_vae.CHANNELS, 8, 16, 16)
    assert back.shape == (2, 3, FRAMES, 64, 64)
    torch.testing.assert_close(
        latents, again, rtol=0, atol=ROUNDING
    )  # mean 0 and deviation 1 in an untrained config


def test_the_reader_s_loss_sees_each_object_at_its_shape_s_word() -> None:
    generator = torch.Generator().manual_seed(4)
    captions = describe(draw_clips(16, generator), generator)
    tokenizer = painters.new_tokenizer(False, vocabulary())
    tokens = tokenizer([c.text for c in captions], padding="longest", return_tensors="pt")
    reader = video_reader.VideoReader(tokenizer)
    text = torch.randn(*tokens.input_ids.shape, 128, requires_grad=True)

    reader.loss(text, tokens.input_ids, tokens.attention_mask, captions).backward()
    assert text.grad is not None
    touched = text.grad.norm(dim=-1)
    objects = torch.isin(tokens.input_ids, reader.shapes)
    assert [int(n) for n in objects.sum(1)] == [
        sum(w == "shape" for w, _, _ in c.named) for c in captions
    ]
    # All words bear the clip's heads, the objects' words also their own.
    assert float(touched[objects].min()) > 3 * float(touched[~objects].max())


def test_a_denoiser_s_training_leaves_the_text_encoder_alone(tmp_path: Path) -> None:
    painter = video_painters.VideoPainter()
    video_painters.train_attention(painter.denoiser)
    before = {k: v.clone() for k, v in painter.state_dict().items()}
    words, mask = torch.randint(4, 20, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[:, 6:] = 0

    def loss(generator: torch.Generator) -> torch.Tensor:
        noisy = torch.randn(2, 8, 1, 16, 16, generator=generator)
        velocity, logits = painter.paint_clips(
            noisy, torch.full((2,), 0.7), words, mask, torch.full((2,), 20.0)
        )
        return velocity.square().mean() + sum(x.square().mean() for x in logits.values())

    train.fit(
        painter, loss, train.Run(tmp_path, torch.device("cpu"), steps=2, rate=1e-3, autocast=True)
    )

    moved = {k for k, v in painter.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith("text_encoder") for k in moved)
    assert {"head.weight", "denoiser.proj_out.weight", "denoiser.patch_embedding.weight"} <= moved


def test_clips_go_on_from_a_saved_pipeline_without_its_runs(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline

    shipped = WanPipeline.from_pretrained(zoo.folder("scenes-video"))
    video_painters.begin_from(tmp_path, zoo.folder("scenes-video"))

    vae = AutoencoderKLWan.from_pretrained(tmp_path / "video-vae" / "vae")
    torch.testing.assert_close(vae.state_dict(), shipped.vae.state_dict())
    painter = video_painters.VideoPainter()
    held = torch.load(tmp_path / "scenes-video-text" / "text_encoder.pt", weights_only=True)
    painter.text_encoder.load_state_dict(held)
    painters.warm_start(painter, zoo.folder("scenes-video"))
    wanted = shipped.transformer.state_dict()
    torch.testing.assert_close(painter.denoiser.state_dict(), wanted)
    text = torch.tensor([[3, 5, 1]])
    same = painter.text_encoder.float().eval()(text)[0]
    torch.testing.assert_close(same, shipped.text_encoder.float().eval()(text)[0])


def test_no_file_of_the_zoo_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in Path(zoo.__file__).parent.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(/home|/root|/tmp|/work|/Users)/', text), path
