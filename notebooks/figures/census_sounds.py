"""Tiny pipelines of the census that make sound: ACE-Step, AudioLDM 2, Stable Audio 3, LongCat."""

from __future__ import annotations

import string
from typing import Any

from census_inputs import ONE, Entry, entries, made, same
from census_transformers import flow

from qsearch.zoo.painters import new_tokenizer
from tests import tiny_parts as tiny
from tests.tiny_parts import WIDTH

SOUND = "sound.wav"


def _ace() -> dict[str, Any]:
    from diffusers.pipelines.ace_step import (
        AceStepAudioTokenDetokenizer,
        AceStepAudioTokenizer,
        AceStepConditionEncoder,
    )

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "sliding_window": 16, **heads}
    pooled = {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2}
    return {
        "transformer": made(
            "AceStepTransformer1DModel",
            num_hidden_layers=2,
            in_channels=24,
            audio_acoustic_hidden_dim=8,
            patch_size=2,
            **sizes,
        ),
        "condition_encoder": AceStepConditionEncoder(
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            **sizes,
        ),
        "audio_tokenizer": AceStepAudioTokenizer(
            fsq_dim=32,
            fsq_input_levels=[4, 4, 4],
            fsq_input_num_quantizers=1,
            num_attention_pooler_hidden_layers=1,
            **pooled,
            **sizes,
        ),
        "audio_token_detokenizer": AceStepAudioTokenDetokenizer(
            num_attention_pooler_hidden_layers=1, **pooled, **sizes
        ),
        "vae": made(
            "AutoencoderOobleck",
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=8,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        "text_encoder": tiny.language_model("Qwen3Model"),
        "tokenizer": new_tokenizer(causal=True),
        "scheduler": flow(num_train_timesteps=1, shift=1.0),
    }


def _audioldm2() -> dict[str, Any]:
    from diffusers import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        GPT2Config,
        GPT2LMHeadModel,
        RobertaTokenizer,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        T5Tokenizer,
    )

    special = ["<pad>", "</s>", "<s>", "<unk>", "<mask>"]
    pieces = {p: i for i, p in enumerate([*special, *string.ascii_lowercase, "\u0120", "\u2581"])}
    words = len(pieces)
    text = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "projection_dim": 8,
        "vocab_size": words,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    speaks = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=1, n_layer=1, vocab_size=words, n_positions=99)
    )
    speaks.config.max_new_tokens = 8
    speaks.generation_config.max_new_tokens = 8
    return {
        "unet": AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=32,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=(8, 16),
        ),
        "vae": tiny.vae(in_channels=1, out_channels=1),
        "scheduler": made("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        "text_encoder": ClapModel(
            ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
        ),
        "text_encoder_2": tiny.t5(32),
        "tokenizer": RobertaTokenizer(vocab=pieces, merges=[], model_max_length=77),
        "tokenizer_2": T5Tokenizer(
            vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=77
        ),
        "feature_extractor": ClapFeatureExtractor(feature_size=8, hop_length=7900),
        "language_model": speaks,
        "projection_model": AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ),
        "vocoder": SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=8,
                upsample_initial_channel=16,
                upsample_rates=[2, 2],
                upsample_kernel_sizes=[4, 4],
                resblock_kernel_sizes=[3, 7],
                resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
                normalize_before=False,
            )
        ),
    }


def _stable_audio3() -> dict[str, Any]:
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    return {
        "transformer": made(
            "StableAudio3DiTModel",
            io_channels=8,
            patch_size=1,
            embed_dim=32,
            depth=2,
            num_heads=4,
            cond_token_dim=WIDTH,
            global_cond_dim=WIDTH,
            local_add_cond_dim=9,
            timestep_features_dim=16,
            ff_mult=2,
            num_memory_tokens=3,
            use_differential_attention=False,
        ),
        "vae": made(
            "AutoencoderSAME",
            audio_channels=2,
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=8,
            use_differential_attention=False,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        ),
        "text_encoder": tiny.t5gemma(),
        "tokenizer": new_tokenizer(causal=True),
        "duration_embedder": StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        "scheduler": flow(num_train_timesteps=1, shift=1.0, stochastic_sampling=False),
    }


def _longcat() -> dict[str, Any]:
    from diffusers.models.autoencoders.autoencoder_longcat_audio_dit import LongCatAudioDiTVae
    from diffusers.models.transformers.transformer_longcat_audio_dit import (
        LongCatAudioDiTTransformer,
    )

    return {
        "transformer": LongCatAudioDiTTransformer(
            dit_dim=64, dit_depth=2, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
        ),
        "vae": LongCatAudioDiTVae(
            in_channels=1,
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=24000,
        ),
        "text_encoder": tiny.umt5(),
        "tokenizer": new_tokenizer(causal=False),
        "scheduler": flow(),
    }


PIPELINES: dict[str, Entry] = {
    **entries(
        _ace,
        {"AceStepPipeline": (same, {"lyrics": "a red circle", "audio_duration": 0.4, **ONE})},
    ),
    **entries(_audioldm2, {"AudioLDM2Pipeline": (same, {"audio_length_in_s": 0.03})}),
    **entries(
        _stable_audio3,
        {
            "StableAudio3Pipeline": (same, {"duration": 1.0}),
            "StableAudio3AudioToAudioPipeline": (same, {"duration": 1.0, "audio": SOUND}),
            "StableAudio3InpaintPipeline": (
                same,
                {
                    "duration": 1.0,
                    "audio": SOUND,
                    "mask_start_seconds": 0.2,
                    "mask_end_seconds": 0.7,
                },
            ),
        },
    ),
    **entries(_longcat, {"LongCatAudioDiTPipeline": (same, {"audio_duration_s": 0.1})}),
}
