"""Any diffusers pipeline that is called with prompts, pictures or class labels: settings say which, and how."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import nn
from typing_extensions import override

from asyncdiff_pl.data.sample import Sample
from asyncdiff_pl.models.adapters import IPAdapter, Lora, check_adapters, load_adapters, prepare_adapters
from asyncdiff_pl.models.base import DiffusionPredictor
from asyncdiff_pl.models.call import CallTemplate, refusals_told
from asyncdiff_pl.models.components import check_components, load_components
from asyncdiff_pl.models.example_calls import CALLS
from asyncdiff_pl.models.foreknown import ForeknownPipeline
from asyncdiff_pl.models.inputs import class_number, tell_cut_prompts
from asyncdiff_pl.models.loading import WeightsSource, check_pretrained, find_pipeline, init_parameters, load_pipeline
from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.sources import find_folder


class PipelinePredictor(DiffusionPredictor):
    """Runs any diffusers pipeline on each sample's prompt, pictures or class: text to image, inpainting, ControlNet.

    What the pipeline takes is filled in from the sample: its prompt, `image`, `mask_image`, `control_image`,
    `class_label` and, with an IP-Adapter, `ip_adapter_image`; further values of a sample (`negative_prompt`,
    `guidance_scale`, ...) are arguments of the call for that sample alone. A setting that is null is left to the
    pipeline's own default.

    Args:
        pretrained: Checkpoint: a hub name, a local folder, or `tiny-sd` or `tiny-dit`, which ship with the package.
        pipeline: Class of diffusers (`StableDiffusionXLControlNetPipeline`), or with its module
            (`my_package.MyPipeline`); null takes the checkpoint's own.
        num_inference_steps: Number of denoising steps; a list runs every sample with each of them.
        guidance_scale: Weight of the prompt; for most pipelines, at 1 or below nothing is guided and each step costs
            half.
        negative_prompt: What the pictures should not show.
        height: Height of the results, in pixels; null takes that of the sample's picture, if the pipeline takes one.
        width: Width of the results, in pixels; null takes that of the sample's picture, if the pipeline takes one.
        num_frames: Number of frames, for pipelines that make videos.
        fps: Frames per second that a video is shown at.
        strength: How much of the sample's picture is redrawn, from 0 to 1; 1 takes all steps, less takes fewer.
        call: Further arguments of the pipeline's call, `{eta: 0.5}` say. In a text, `{prompt}` and the names of a
            sample's other values stand for these; a text that is `{image}` alone is the sample's picture, also in lists
            and in place of what is filled in otherwise; null leaves an argument out.
        components: Parts loaded from elsewhere, each from a folder with a config.json or a hub name: `{controlnet: A}`,
            `{controlnet: [A, B]}`, `{motion_adapter: A}`, `{vae: A}`; null leaves a part out, `{text_encoder_3: null}`.
        lora: LoRAs, which are merged into the weights: `[{path: FILE, weight: 0.8}]`.
        ip_adapter: An IP-Adapter: `{path: FOLDER, subfolder: models, weight_name: ip-adapter_sd15.safetensors}`.
        vae_tiling: Whether large pictures are decoded in tiles, which takes less memory and may show seams.
        vae_slicing: Whether the pictures of a batch are decoded one by one, which takes less memory.
        offload: Only `none`: moving the networks between CPU and GPU around each call would move those that the stages
            are installed on. With too little memory take float16, vae_tiling, vae_slicing or a smaller batch.
        scheduler: The checkpoint's own if null, else a name (`euler_discrete`, `ddim`, `lcm`, ...) or a class
            (`diffusers.DPMSolverMultistepScheduler`); it is built from the checkpoint's own scheduler config.
        seed: Seed of the run; each sample's noise follows from it and from the sample's id, or from the sample's seed.
        dtype: Number format of weights and activations.
        weights: `pretrained` loads the checkpoint's weights; `random` builds the same network without them, for
            latency alone: its pictures mean nothing, and the results say so.
        variant: Variant of the checkpoint's weight files, `fp16` say; null takes the plain files.
        scheduler_config: Entries of the scheduler's config that differ from the checkpoint's, `{beta_schedule: linear}`
            say.
    """

    def __init__(
        self,
        pretrained: str,
        pipeline: str | None = None,
        num_inference_steps: int | list[int] = 50,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: int = 8,
        strength: float | None = None,
        call: dict[str, Any] | None = None,
        components: dict[str, str | list[str] | None] | None = None,
        lora: list[Lora] | None = None,
        ip_adapter: IPAdapter | None = None,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload: Literal["none", "model", "sequential"] = "none",
        scheduler: str | None = None,
        seed: int = 0,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        weights: WeightsSource = "pretrained",
        variant: str | None = None,
        scheduler_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(pretrained, num_inference_steps, scheduler, seed, dtype, weights, variant, scheduler_config)
        for name, value in (("height", height), ("width", width), ("num_frames", num_frames), ("fps", fps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more.")
        if strength is not None and not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; give a number above 0, up to 1.")
        if offload != "none":
            raise ValueError(
                f"offload is {offload}, which would move the networks that the stages are installed on; leave it none, "
                "and take float16, vae_tiling, vae_slicing or a smaller batch to save memory."
            )
        self.pipeline_name = pipeline
        if pipeline is not None:
            self.pipeline_class = find_pipeline(pipeline)
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.height = height
        self.width = width
        self.num_frames = num_frames
        self.fps = fps
        self.strength = strength
        self.call = dict(call or {})
        self.components = dict(components or {})
        self.vae_tiling = vae_tiling
        self.vae_slicing = vae_slicing
        self._loras = list(lora or [])
        self._ip_adapter = ip_adapter
        # as plain values: they belong to the settings that a run which goes on must share
        self.lora = [asdict(entry) for entry in self._loras]
        self.ip_adapter = asdict(ip_adapter) if ip_adapter else None
        settings = {
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "strength": strength,
        }
        set_twice = sorted(name for name, value in settings.items() if value is not None and name in self.call)
        if set_twice:
            raise ValueError(f"{set_twice[0]} is set twice, as a setting of its own and in `call`; set it once.")
        self._given = {name: value for name, value in settings.items() if value is not None} | self.call

    # -- what is known before anything is loaded ----------------------------------------------------------------

    @functools.cached_property
    def _foreknown(self) -> ForeknownPipeline:
        return ForeknownPipeline(
            self.pretrained, self.pipeline_class, self.components, self._given, self._ip_adapter is not None
        )

    @property
    @override
    def frames_per_sample(self) -> int:
        return self._foreknown.num_frames

    @property
    @override
    def size_multiple(self) -> int | None:
        return self._foreknown.size_multiple

    @override
    def picture_size(self, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        if self.height is not None and self.width is not None:
            return self.height, self.width
        sizes = self._foreknown.picture_size(height, width)
        return self.height or sizes[0], self.width or sizes[1]

    @property
    @override
    def is_guided(self) -> bool | None:
        return self._foreknown.is_guided

    @override
    def example_call(self, height: int, width: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None:
        return self._foreknown.example_call(height, width, self.torch_dtype)

    @property
    @override
    def why_unforeseen(self) -> str:
        denoiser = self._foreknown.denoiser
        kind = None if denoiser is None else denoiser[0]
        if kind is None or kind in CALLS:
            return super().why_unforeseen
        return (
            f"How a pipeline calls its {kind} is not known here, so that neither its time nor its layouts can be "
            f"foreseen; they are of {', '.join(CALLS)} alone. Runs need none of that."
        )

    @override
    def check(self) -> None:
        if self.components.keys() & {"unet", "transformer"}:
            raise ValueError(
                "components names the denoiser itself, which the checkpoint gives; put it into a folder with the "
                "checkpoint's other parts, and give that as `pretrained`."
            )
        super().check()
        kind, template = self._foreknown.kind, self._foreknown.template
        if kind is not None and not {"unet", "transformer"} & set(init_parameters(kind)):
            raise ValueError(f"{kind.__name__} has neither a unet nor a transformer to run; take another pipeline.")
        check_components(kind, self.components, self.weights)
        check_adapters(kind, self._loras, self._ip_adapter)
        if kind is not None:
            check_pretrained(kind, self.pretrained, self.weights, self.components)
        if template is not None:
            template.check()
            _tell_unheeded(template)
        multiple = self.size_multiple
        for name, pixels in (("height", self.height), ("width", self.width)):
            if multiple and pixels and pixels % multiple:
                raise ValueError(f"{name} is {pixels} pixels; {self.pretrained} takes multiples of {multiple}.")

    def check_inputs(self, names: Collection[str]) -> None:
        """Tells early that samples have values that the pipeline does not take.

        Args:
            names: Names in the samples' `inputs`.

        Raises:
            ValueError: In one sentence.
        """
        if self._foreknown.template is not None:
            self._foreknown.template.check_inputs(names)

    # -- the pipeline -------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        """Downloads the checkpoint and what comes with it on one rank of each node, while the others wait."""
        super().prepare_data()
        if any(find_folder(place, ()) is None for place in self._hub_places()):
            load_components(self.components, self.weights, self.torch_dtype, self.variant)
        prepare_adapters(self._loras, self._ip_adapter)

    def _hub_places(self) -> list[str]:
        if self.weights == "random":
            return []
        several = [[place] if isinstance(place, str) else place or [] for place in self.components.values()]
        return [place for places in several for place in places]

    @override
    def load(self) -> DiffusionPipeline:
        parts = load_components(self.components, self.weights, self.torch_dtype, self.variant)
        pipeline = load_pipeline(
            self.pipeline_class, self.pretrained, self.weights, self.torch_dtype, self.variant, parts
        )
        # of a hub checkpoint it is known only now
        self._foreknown.loaded(type(pipeline)).check()
        check_adapters(type(pipeline), self._loras, self._ip_adapter)
        load_adapters(pipeline, self._loras, self._ip_adapter)
        for wanted, method in ((self.vae_tiling, "enable_tiling"), (self.vae_slicing, "enable_slicing")):
            if wanted:
                vae = getattr(pipeline, "vae", None)
                if not hasattr(vae, method):
                    name = f"vae_{method.removeprefix('enable_')}"
                    raise ValueError(f"{name} is on, but {type(vae).__name__} knows no {name}; leave it off.")
                getattr(vae, method)()
        return pipeline

    # -- a batch ------------------------------------------------------------------------------------------------

    @property
    def _template(self) -> CallTemplate:
        template = self._foreknown.template
        assert template is not None
        return template

    @override
    def group(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        return self._template.group(samples)

    @override
    def generate(
        self, samples: Sequence[Sample], num_inference_steps: int, generators: list[torch.Generator]
    ) -> list[list[Image.Image]]:
        arguments = self._template.join(samples)
        if "class_labels" in arguments:
            classes = self.denoiser.config.get("num_embeds_ada_norm")
            of = functools.partial(class_number, self.pipeline, classes, self.pretrained)
            arguments["class_labels"] = [of(label) for label in arguments["class_labels"]]
        if "prompt" in self._template.defaults:
            tell_cut_prompts(self.pipeline, samples)
        # decoders and schedulers tell of what nobody can change
        with quiet_libraries(), refusals_told(type(self.pipeline).__name__, arguments):
            output = self.pipeline(
                **arguments,
                num_inference_steps=num_inference_steps,
                generator=generators if len(generators) > 1 else generators[0],
                output_type="pil",
            )
        if hasattr(output, "frames"):
            return [list(video) for video in output.frames]
        if hasattr(output, "images"):
            return [[picture] for picture in output.images]
        raise ValueError(f"{type(self.pipeline).__name__} makes neither pictures nor videos; take another pipeline.")


def _tell_unheeded(template: CallTemplate) -> None:
    """Warns of a negative prompt that nothing comes of."""
    name = "true_cfg_scale" if "true_cfg_scale" in template.defaults else "guidance_scale"
    scale = template.value(name)
    if template.value("negative_prompt") and isinstance(scale, (int, float)) and scale <= 1:
        rank_zero_warn(f"negative_prompt is set, but has no effect with {name} {scale}: set that above 1.")
