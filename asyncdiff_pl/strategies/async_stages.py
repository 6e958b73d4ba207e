"""AsyncDiff as a Lightning strategy: the denoiser's stages on the ranks of a group (arXiv 2406.06911)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from asyncdiff_pl.parallel import Layout, Parallel, WarmUp
from asyncdiff_pl.parallel.api import check_modes, check_settings, denoiser_of
from asyncdiff_pl.parallel.search import name_of
from asyncdiff_pl.parallel.warm_up import count_exact, span_of
from asyncdiff_pl.strategies.base import FEW_STEPS, GroupStrategy, either, picture_size
from asyncdiff_pl.strategies.layout_choice import Choice, choose_layout, kept_layout, possible_layouts


class AsyncDiffStrategy(GroupStrategy):
    """Cuts the denoiser into stages that compute at the same time, each from what the others made a step before.

    One sample takes cfg x (stages + stride - 1) ranks; more ranks form further groups, which run other samples.

    Args:
        stages: Number of stages that the denoiser is cut into, 1 to 8; 1 leaves it whole.
        stride: Steps that one round of the stages covers, 1 or 2; 2 is faster, needs one rank more, and uses inputs
            twice as old.
        warm_up: Exact steps at the start of each sample, 1 or more; more are slower and nearer to one GPU's result. In
            place of a number, {until_noise: 0.97} takes as many as leave that share of noise (0 to 1) in the latents,
            and {until_drift: 0.1} as many as it takes for boundary tensors to change by less than that share of their
            norm from step to step; at_least and at_most bound either: {until_drift: 0.1, at_least: 2, at_most: 10}.
        refresh_every: After warm-up each how many-th step is exact again, 2 or more, so that what the stages see does
            not stray; null for none.
        time_shift: Whether asynchronous steps give the denoiser the timestep of the step before.
        cfg: 2 gives each half of the guidance batch its own ranks, which is exact; 1 keeps the batch whole.
        cut: For each stage the list of its module names in the denoiser (a name covers all below it); null finds a
            balanced cut.
        capture: Whether the denoiser's steps are recorded as CUDA graphs, a few for each rank, and replayed, so that
            the CPU launches a step at once; needs an NVIDIA GPU, and by default they are where there is one.
        compile: What torch compiles, in minutes at the first sample: none, blocks (the repeated blocks, each kind once)
            or full (the whole denoiser; 1 stage only).
        balance: What a found cut balances: operations, which are counted, or measured, the times of the denoiser's
            units on this device, kept on disk.
        warm_up_mode: replicated has every rank compute exact steps whole; relay has each compute its own stage, one
            after the other, and holds the weights of its stage alone: slower, with less memory.
        folded: Whether a found cut's last stage may own both ends of the denoiser: a UNet's large outer skip
            connections then stay at home, which suits slow links, and what the stages see is a step older.
        layout: fixed takes stages, stride and cfg as given; auto chooses stages and cfg for the number of devices by
            what the denoiser's units cost (see balance) and how old what the stages see would be, and says why.
        share_encoding: Whether each text and image encoder is run by one rank of a group, which alone holds its weights
            and sends what comes out to the others: less memory on each, in the same time.
        simulate: Plays all ranks in one process, to see a layout's quality on one device without its speed.
        timeout: Seconds after which a message between ranks counts as lost and the run ends.
    """

    def __init__(
        self,
        stages: int = 1,
        stride: int = 1,
        warm_up: int | WarmUp = 3,
        refresh_every: int | None = None,
        time_shift: bool = False,
        cfg: int = 1,
        cut: list[list[str]] | None = None,
        capture: bool | None = None,
        compile: Literal["none", "blocks", "full"] = "none",
        balance: Literal["operations", "measured"] = "operations",
        warm_up_mode: Literal["replicated", "relay"] = "replicated",
        folded: bool = False,
        layout: Literal["fixed", "auto"] = "fixed",
        share_encoding: bool = False,
        simulate: bool = False,
        timeout: float = 600.0,
    ) -> None:
        given = Layout(stages, stride, cfg)
        check_settings(given, warm_up, cut, refresh_every)
        if layout == "auto":
            _refuse_beside_auto(stages=stages, stride=stride, cfg=cfg, cut=cut, simulate=simulate)
            # relay, say, does not go with a warm-up until drift whatever the layout
            check_modes(Layout(2), warm_up, "none", warm_up_mode, simulate)
            super().__init__(None, None, timeout, share_encoding)
        else:
            check_modes(given, warm_up, compile, warm_up_mode, simulate)
            _check_balance(balance, stages, cut)
            super().__init__(given, 1 if simulate else given.pipeline_ranks, timeout, share_encoding)
        self.stages = stages
        self.stride = stride
        self.warm_up = warm_up
        self.refresh_every = refresh_every
        self.time_shift = time_shift
        self.cfg = cfg
        self.cut = cut
        self.capture = capture
        self.compile = compile
        self.balance = balance
        self.warm_up_mode = warm_up_mode
        self.folded = folded
        self.layout = layout
        self.simulate = simulate
        self.choice: Choice | None = None
        """What was chosen, with layout auto; None before."""
        self._kept_layout: Layout | None = None

    @override
    def check_module(self, module: pl.LightningModule, size: tuple[int | None, int | None] = (None, None)) -> None:
        super().check_module(module, size)
        if self.layout == "auto":
            possible_layouts(self.ranks_per_group, getattr(module, "is_guided", None), self._allows)

    @override
    def advice(self, module: pl.LightningModule) -> str | None:
        if self.stages == 1:
            return None
        fewest = span_of(self.warm_up, None).fewest
        counts = getattr(module, "num_inference_steps", [])
        none_left = [steps for steps in counts if steps <= fewest]
        if none_left:
            return (
                f"With {either(none_left)} denoising steps, warm_up {self.warm_up} leaves none for {self.stages} "
                f"stages to gain time in: take a smaller warm_up, or {self._instead(module)}."
            )
        few = [steps for steps in counts if steps <= FEW_STEPS]
        if not few:
            return None
        left = [steps - count_exact(fewest, self.refresh_every, steps) for steps in few]
        # a stage takes one of `stages` parts of the time, and with stride 2 serves two steps
        gains = [n / (n - fast + fast / (self.stages * self.stride)) for n, fast in zip(few, left, strict=True)]
        return (
            f"With {either(few)} denoising steps, warm_up {self.warm_up} leaves at most {either(left)} for "
            f"{self.stages} stages to gain time in, a speed-up of {either([f'{gain:.2g}' for gain in gains])} at "
            "best, and in so few steps what the stages see is old and shows in the pictures: consider "
            f"{self._instead(module)}."
        )

    def _instead(self, module: pl.LightningModule) -> str:
        """What to do in place of stages where there are few steps."""
        is_guided = getattr(module, "is_guided", None)
        if is_guided is False:
            return "a sample for each rank (stages 1) in place of stages"
        return "cfg 2 in place of stages, which is exact" + ("" if is_guided else ", if there is guidance")

    def keep(self, layout: Mapping[str, Any] | None, cut: list[list[str]] | None) -> None:
        """Takes over what a run chose that this one goes on with: another choice would make other pictures.

        Args:
            layout: The layout, as `Choice.as_json` has it; None if it was not chosen.
            cut: The cut; None if there was none.
        """
        if self.layout == "auto" and layout is not None:
            self._kept_layout = kept_layout(layout)
        if self.balance == "measured" and self.cut is None:
            self.cut = cut

    def choose(self, module: pl.LightningModule, size: tuple[int | None, int | None], measures: bool) -> Choice:
        """Chooses a layout for all ranks of a node, with layout auto.

        Args:
            module: What runs; its denoiser is on the device if it is to be measured.
            size: Height and width of the data's pictures in pixels, None where they are not known.
            measures: Whether the denoiser's units are measured; otherwise their operations are counted.

        Raises:
            ValueError: No layout fits.
        """
        kept = self._kept_layout
        if kept is not None and kept.pipeline_ranks == self.ranks_per_group:
            return Choice(kept, f"{name_of(kept)} is what the run had that this one goes on with.", "the log folder")
        fewest = span_of(self.warm_up, None).fewest
        steps = [(n, count_exact(min(fewest, n), self.refresh_every, n)) for n in module.num_inference_steps]
        height, width = module.picture_size(*size)

        def example_call() -> Any:
            return None if height is None or width is None else module.example_call(height, width)

        denoiser = module.denoiser if measures else None
        return choose_layout(
            *(self.ranks_per_group, module.is_guided, self._allows, example_call, steps, self.root_device, denoiser),
            folded=self.folded,
        )

    def _allows(self, layout: Layout) -> bool:
        try:
            check_modes(layout, self.warm_up, self.compile, self.warm_up_mode, self.simulate)
        except ValueError:
            return False
        return True

    def settle(self, choice: Choice) -> None:
        """Takes a layout that was chosen."""
        self.choice = choice
        self.stages, self.stride, self.cfg = choice.layout.stages, choice.layout.stride, choice.layout.cfg

    def _choose_together(self, module: pl.LightningModule) -> None:
        """Chooses on rank 0, for all ranks."""
        size = picture_size(getattr(module.trainer, "datamodule", None))
        choice = None
        if self.is_global_zero:
            choice = self.choose(module, size, self.balance == "measured")
        choice = self.broadcast(choice)
        self.settle(choice)
        rank_zero_info(choice.describe())
        advice = self.advice(module)
        if advice:
            rank_zero_warn(advice)
        self.build_groups(choice.layout)

    @override
    def placed_later(self) -> list[nn.Module]:
        # of the denoiser, the weights of this rank's stage follow when the cut is known
        is_cut = self.warm_up_mode == "relay"
        return super().placed_later() + ([denoiser_of(self.lightning_module.pipeline)] if is_cut else [])

    @override
    def install(self, module: pl.LightningModule) -> Parallel:
        if self.layout == "auto":
            self._choose_together(module)
        return self.parallelized(
            module,
            stages=self.stages,
            stride=self.stride,
            warm_up=self.warm_up,
            refresh_every=self.refresh_every,
            time_shift=self.time_shift,
            cfg=self.cfg,
            cut=self.cut,
            capture=self.capture,
            compile=self.compile,
            balance=self.balance,
            warm_up_mode=self.warm_up_mode,
            folded=self.folded,
        )

    @override
    def describe(self) -> dict[str, Any]:
        is_known = self.layout == "fixed" or self.choice is not None
        return {
            "strategy": "asyncdiff",
            "stages": self.stages if is_known else None,
            "stride": self.stride if is_known else None,
            "warm_up": self.warm_up if isinstance(self.warm_up, int) else str(self.warm_up),
            "refresh_every": self.refresh_every,
            "time_shift": self.time_shift,
            "cfg": self.cfg if is_known else None,
            "layout": self.layout,
            "capture": self.capture,
            "compile": self.compile,
            "balance": self.balance,
            "warm_up_mode": self.warm_up_mode,
            "folded": self.folded,
            "share_encoding": self.share_encoding,
            "simulate": self.simulate,
            "cut": self._handle.cut_hash if self._handle and self._handle.cut else None,
        }


def _check_balance(balance: str, stages: int, cut: list[list[str]] | None) -> None:
    if balance == "measured" and (stages == 1 or cut is not None):
        why = "stages is 1, so that nothing is cut" if stages == 1 else "a cut is given"
        raise ValueError(f"balance measured finds a cut by measured times, and {why}; take balance operations.")


def _refuse_beside_auto(**settings: Any) -> None:
    defaults = inspect.signature(AsyncDiffStrategy).parameters
    for name, value in settings.items():
        default = defaults[name].default
        if value != default:
            # a config that is extended on the command line may have set it
            back = {None: "null", False: "false"}.get(default, default)
            raise ValueError(
                f"layout auto chooses stages and cfg for the ranks of the run, but {name} is {value}; set {name} to "
                f"{back}, or take layout fixed."
            )


StrategyRegistry.register("asyncdiff", AsyncDiffStrategy, description="AsyncDiff's stages, 2 of them", stages=2)
