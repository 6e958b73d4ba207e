"""Scenarios of test_ranks.py with whole pipelines: every kind, and what users do to them."""

import torch
from tiny_pipelines import CASES, Sample

from asyncdiff_pl.parallel import parallelize


def of_pipelines(names: list[str], simulate: bool, **settings) -> list[torch.Tensor]:
    """A sample of each pipeline."""
    found = []
    for name in names:
        sample = Sample(name)
        handle = parallelize(sample.pipe, simulate=simulate, **settings)
        found.append(sample())
        handle.remove()
    return found


# a case stands for its kind as well
IN_TWO = ["sd21", "img2img", "upscale", "controlnets", "sdxl_inpaint", "sd3", "flux", "animatediff"]
IN_TWO += ["dit_of_three", "sdxl_guidance_ends", "sdxl_ip_adapter", "flux_ip_adapter"]
# none of them where peft is not installed
IN_TWO += [name for name in CASES if name.endswith("_lora")]
WITH_STRIDE = ["sdxl", "sd3", "dit", "sd15_pndm", "img2img_heun", "flux_true_cfg_of_three"]
IN_HALVES = ["sdxl_inpaint", "sdxl_controlnet", "sd3_skips_layers", "dit", "animatediff"]
IN_HALVES += ["controlnet_guesses", "sd15_guidance_ends", "sd15_ip_adapter"]
IN_FOUR = ["sd3", "flux_true_cfg", "animatediff"]


def pipelines(simulate):
    return of_pipelines(IN_TWO, simulate, stages=2, warm_up=2)


def pipelines_with_stride(simulate):
    return of_pipelines(WITH_STRIDE, simulate, stages=2, stride=2, warm_up=1, time_shift=True)


def pipelines_in_halves(simulate):
    return of_pipelines(IN_HALVES, simulate, cfg=2, stages=2, warm_up=1)


def pipelines_in_four(simulate):
    return of_pipelines(IN_FOUR, simulate, stages=4, warm_up=2)


PIPELINES = {2: [pipelines], 3: [pipelines_with_stride], 4: [pipelines_in_halves, pipelines_in_four]}
