"""Text-to-image pipeline of the multistage model: one token map a stage, then steps of its flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...core.errors import QSearchError
from .flow import EcarFlow2DModel
from .scheduler import MultistageFlowScheduler
from .stages import flat
from .transformer import EcarTransformer2DModel

Generators = torch.Generator | list[torch.Generator] | None


class EcarPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Captions to pictures by autoregressive token maps and multistage flow matching.

    Args:
        transformer: Emits the token map of a stage from the caption and the stages before.
        flow: Velocity of the latents of a stage, given its token map.
        vae: Decodes the latents of the last stage.
        text_encoder: T5 encoder of the captions.
        tokenizer: Its tokenizer.
        scheduler: Noise levels, Euler steps and the jumps between stages.

    Raises:
        QSearchError: When transformer, flow and scheduler are of different stages or sizes.
    """

    denoising_components = ("transformer", "flow")
    model_cpu_offload_seq = "text_encoder->transformer->flow->vae"
    _callback_tensor_inputs = ("latents", "maps")

    def __init__(
        self,
        transformer: EcarTransformer2DModel,
        flow: EcarFlow2DModel,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: MultistageFlowScheduler,
    ) -> None:
        super().__init__()
        sizes = {
            name: (part.config.stages, part.config.sample_size)
            for name, part in (
                ("transformer", transformer),
                ("flow", flow),
                ("scheduler", scheduler),
            )
        }
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{k}: {n} stages, side {side}" for k, (n, side) in sizes.items())
            raise QSearchError(f"all parts have the same stages and size of latents; given {said}")
        self.register_modules(
            transformer=transformer,
            flow=flow,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(self, prompt: list[str], guided: bool) -> tuple[Tensor, Tensor]:
        """Text states [N, T, width] and mask [N, T]; with guidance those of no words come first."""
        texts = [""] * len(prompt) + prompt if guided else prompt
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self._execution_device)
        mask = tokens.attention_mask
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0], mask

    def prepare_latents(
        self, count: int, dtype: torch.dtype, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Noise [N, C, h, w] of the first stage, drawn or as given.

        Raises:
            QSearchError: For given latents of another shape.
        """
        side = self.scheduler.stages.sides[0]
        shape = (count, self.flow.config.in_channels, side, side)
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, dtype)  # type: ignore[no-any-return]
        if tuple(latents.shape) != shape:
            wanted, given = (" x ".join(map(str, s)) for s in (shape, latents.shape))
            raise QSearchError(
                f"latents are the first stage's noise, {wanted} for {count} prompts; given {given}"
            )
        return latents.to(self._execution_device, dtype)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return int(self.scheduler.num_inference_steps)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 12,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Paint a picture for each prompt.

        Args:
            prompt: A caption or several.
            num_inference_steps: Steps of the flow in all stages together; equal shares, the rest
                to the finest stages.
            guidance_scale: Classifier-free guidance; at most 1 means none.
            generator: Of the noise; one, or one a prompt (then a sample does not depend on the
                others of its batch).
            latents: Noise of the first stage [N, C, h, w], drawn when left out.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Whether to return an output class or a tuple.
            callback_on_step_end: Called as `(pipeline, step, timestep, tensors)`; the tensors that
                it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "maps".

        Returns:
            Pictures (`images`), or the latents of the last stage [N, C, H, W].

        Raises:
            QSearchError: For fewer steps than stages, latents of another shape, a number of
                generators other than that of prompts, or an unknown tensor for the callback.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        count = len(prompts)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise QSearchError(f"a callback may ask for {known}; given {sorted(unknown)}")
        if isinstance(generator, list) and len(generator) != count:
            raise QSearchError(
                f"a list of generators has one for each prompt; given {len(generator)} for {count}"
            )
        self.scheduler.set_timesteps(num_inference_steps, self._execution_device)
        guided = guidance_scale > 1
        text, mask = self.encode_prompt(prompts, guided)
        text = text.to(self.transformer.dtype)
        latents = self.prepare_latents(count, self.flow.dtype, generator, latents)

        finished: list[Tensor] = []
        step = 0
        with self.progress_bar(total=num_inference_steps) as bar:
            for stage, share in enumerate(self.scheduler.shares):
                if stage:
                    finished.append(latents)
                    latents = self.scheduler.jump(latents, stage, generator)
                before = flat(finished)
                if before is not None and guided:
                    before = torch.cat([before, before])
                maps = self.transformer(before, text, mask)
                for _ in range(share):
                    time = self.scheduler.timesteps[step]
                    both = torch.cat([latents, latents]) if guided else latents
                    velocity = self.flow(both, time.expand(len(both)), maps)
                    if guided:
                        free, bound = velocity.chunk(2)
                        velocity = free + guidance_scale * (bound - free)
                    latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        tensors = {"latents": latents, "maps": maps}
                        asked = {k: tensors[k] for k in callback_on_step_end_tensor_inputs}
                        given = callback_on_step_end(self, step, time, asked)
                        latents, maps = given.get("latents", latents), given.get("maps", maps)
                    step += 1
                    bar.update()

        if output_type == "latent":
            images: Any = latents
        else:
            scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            decoded = self.vae.decode(scaled, return_dict=False)[0]
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
