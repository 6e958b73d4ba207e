"""Patches as a Lightning strategy: rows of the picture on the ranks of a group.

Source: DistriFusion (arXiv 2402.19481) and PCPP (arXiv 2412.02962).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from typing_extensions import override

from asyncdiff_pl.parallel import Layout, Parallel
from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.patches.pipeline import KINDS
from asyncdiff_pl.parallel.patches.rows import ROWS, row_unit, shares
from asyncdiff_pl.parallel.patches.settings import PatchMode, PatchSettings
from asyncdiff_pl.parallel.stages.settings import CompileMode
from asyncdiff_pl.strategies.base import FEW_STEPS, GroupStrategy, either


class PatchStrategy(GroupStrategy):
    """Splits the rows of the picture into patches that ranks compute side by side, exactly or with rows a step old.

    One sample takes cfg x patches ranks; more ranks form further groups, which run other samples. Patches are for the
    UNets of Stable Diffusion, SDXL, Stable Video Diffusion and AnimateDiff.

    Args:
        patches: Number of patches that the rows of the latents are split into, in whole multiples of 2^(levels - 1)
            rows: 4 with three levels (SDXL), 8 with four (Stable Diffusion 1.5 and 2.1, Stable Video Diffusion). 1
            leaves the picture whole.
        mode: What a patch sees of the others after warm-up. full_sync is exact: their rows and GroupNorm statistics of
            the same step. The next four see rows of the step before, so that messages travel beside the computation,
            and differ in GroupNorm: corrected_async_gn takes all statistics of the step before, moved by as much as
            the own ones have changed; stale_gn the others' of the step before; sync_gn all of this step; separate_gn
            the own alone. no_sync sees rows of the last synchronous step, and no more are sent; naive sees
            nothing, in no step: pictures with seams, to compare with.
        warm_up: Synchronous steps at the start of each sample, 1 or more, which are exact and as fast as full_sync;
            with naive there are none.
        portion: Share of each neighbour's rows, 0 to 1, that self-attention sees after warm-up, and that is sent; 1 is
            all rows of all patches. Below 1 only with modes that see old rows.
        cfg: 2 gives each half of the guidance batch its own ranks, which is exact; 1 keeps the batch whole.
        capture: Whether the denoiser's steps are recorded as CUDA graphs, a few for each rank, and replayed, so that
            the CPU launches a step at once; needs an NVIDIA GPU, and by default they are where there is one.
        compile: What torch compiles: none, or blocks, the repeated blocks of the network, each kind once, with what
            they tell other patches inside; minutes at the first sample, and faster steps. full, the whole network,
            takes 1 patch.
        share_encoding: Whether each text and image encoder is run by one rank of a group, which alone holds its weights
            and sends what comes out to the others: less memory on each, in the same time.
        simulate: Plays all ranks in one process, to see a mode's quality on one device without its speed.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
    """

    def __init__(
        self,
        patches: int = 2,
        mode: PatchMode = "full_sync",
        warm_up: int = 4,
        portion: float = 1.0,
        cfg: int = 1,
        capture: bool | None = None,
        compile: CompileMode = "none",
        share_encoding: bool = False,
        simulate: bool = False,
        timeout: float = 600.0,
    ) -> None:
        layout = Layout(cfg=cfg, patches=patches)
        # it validates itself
        PatchSettings(layout, mode, warm_up, portion, capture, compile)
        super().__init__(layout, 1 if simulate else layout.pipeline_ranks, timeout, share_encoding)
        self.patches = patches
        self.mode = mode
        self.warm_up = warm_up
        self.portion = portion
        self.cfg = cfg
        self.capture = capture
        self.compile = compile
        self.simulate = simulate

    @override
    def check_module(self, module: pl.LightningModule, size: tuple[int | None, int | None] = (None, None)) -> None:
        super().check_module(module, size)
        if self.patches == 1 or not hasattr(module, "example_call"):
            return
        height, width = module.picture_size(*size)
        example = None if height is None or width is None else module.example_call(height, width)
        if example is None:
            return
        denoiser, args, kwargs = example
        if not isinstance(denoiser, KINDS):
            raise ValueError(
                "PatchStrategy is for the UNets of Stable Diffusion, SDXL, Stable Video Diffusion and AnimateDiff, and "
                f"the denoiser of {module.pretrained} is a {type(denoiser).__name__}: take AsyncDiffStrategy."
            )
        rows = find_latents(denoiser.forward, args, kwargs).shape[ROWS]
        shares(rows, self.patches, row_unit(denoiser))

    @override
    def advice(self, module: pl.LightningModule) -> str | None:
        if self.patches == 1 or self.mode in ("full_sync", "naive"):
            return None
        counts = getattr(module, "num_inference_steps", [])
        none_left = [steps for steps in counts if steps <= self.warm_up]
        if none_left:
            return (
                f"With {either(none_left)} denoising steps, warm_up {self.warm_up} makes all of them synchronous, and "
                f"mode {self.mode} does nothing: take a smaller warm_up, or mode full_sync, which computes the same."
            )
        few = [steps for steps in counts if steps <= FEW_STEPS]
        if not few:
            return None
        left = [steps - self.warm_up for steps in few]
        return (
            f"With {either(few)} denoising steps, warm_up {self.warm_up} leaves {either(left)} in which messages "
            "travel beside the computation, and in so few steps the rows that patches see are old, which shows in the "
            "pictures: consider mode full_sync, which is exact."
        )

    @override
    def install(self, module: pl.LightningModule) -> Parallel:
        # 1 is the reference of other numbers, whatever their mode
        of_patches = {"mode": self.mode, "portion": self.portion} if self.patches > 1 else {}
        return self.parallelized(
            module,
            patches=self.patches,
            warm_up=self.warm_up,
            cfg=self.cfg,
            capture=self.capture,
            compile=self.compile,
            **of_patches,
        )

    @override
    def traffic(self) -> dict[str, float]:
        """Bytes of other patches' values that this rank sends in a step of its mode: those of warm-up do not count."""
        sent = self._handle.bytes_per_step if self._handle is not None else 0
        return {"sent_bytes": sent, "steps": 1 if sent else 0}

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "strategy": "patches",
            "patches": self.patches,
            "mode": self.mode,
            "warm_up": self.warm_up,
            "portion": self.portion,
            "cfg": self.cfg,
            "capture": self.capture,
            "compile": self.compile,
            "share_encoding": self.share_encoding,
            "simulate": self.simulate,
        }


StrategyRegistry.register(
    "patches", PatchStrategy, description="DistriFusion's and PCPP's patches, 2 of them", patches=2
)
