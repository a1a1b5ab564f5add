"""Any diffusers pipeline as a denoiser with recorded inputs: load, call with common noise, record,
without code per pipeline.

What pipelines differ in (which module denoises, which call arguments exist) is asked of the
pipeline itself. Here are the names that everything else takes; each comes from the file of its
part.
"""

from __future__ import annotations

from ..core.components import DENOISERS
from .calling import arguments, sample
from .calls import Call, example_inputs, forward, run
from .components import denoiser_of, denoisers_of, frozen, model_of, ticking
from .decoding import (
    check_metrics,
    decodable,
    decode,
    decode_batch,
    decoder_of,
    latent_channels,
    needs,
)
from .loading import load_pipeline
from .prompts import Prompts, read_prompts, scene_prompts
from .recording import record, record_sampling
from .sampling import Sampling

__all__ = [
    "DENOISERS",
    "Call",
    "Prompts",
    "Sampling",
    "arguments",
    "check_metrics",
    "decodable",
    "decode",
    "decode_batch",
    "decoder_of",
    "denoiser_of",
    "denoisers_of",
    "example_inputs",
    "forward",
    "frozen",
    "latent_channels",
    "load_pipeline",
    "model_of",
    "needs",
    "read_prompts",
    "record",
    "record_sampling",
    "run",
    "sample",
    "scene_prompts",
    "ticking",
]
