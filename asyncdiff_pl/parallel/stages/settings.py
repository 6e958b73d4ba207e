"""How a denoiser is run in stages: the settings, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.warm_up import WarmUp

CompileMode = Literal["none", "blocks", "full"]
BalanceMode = Literal["operations", "measured"]
WarmUpMode = Literal["replicated", "relay"]


@dataclass(frozen=True)
class Settings:
    """How a denoiser is run in stages.

    Args:
        layout: Stages, stride and guidance axis.
        warm_up: Exact steps at the start of each sample, or until when steps are exact.
        time_shift: Whether asynchronous steps use the timestep of the step before.
        cut: For each stage the names of its modules; None finds a cut.
        refresh_every: Each how many-th step after warm-up is exact again; None for none.
        capture: Whether the steps are recorded as CUDA graphs and replayed; None for where there is an NVIDIA GPU.
        compile: What torch compiles: nothing, the repeated blocks, or the whole denoiser.
        balance: What a cut balances: counted operations, or times measured on the device.
        warm_up_mode: Whether exact steps are computed by every rank, or from stage to stage.
        folded: Whether a found cut's last stage may own both ends of the denoiser.
    """

    layout: Layout
    warm_up: int | WarmUp = 3
    time_shift: bool = False
    cut: Sequence[Sequence[str]] | None = None
    refresh_every: int | None = None
    capture: bool | None = None
    compile: CompileMode = "none"
    balance: BalanceMode = "operations"
    warm_up_mode: WarmUpMode = "replicated"
    folded: bool = False
