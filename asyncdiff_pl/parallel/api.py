"""Runs a pipeline's denoiser on several ranks, without Lightning: `parallelize`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn

from asyncdiff_pl.parallel.agreement import Agreement
from asyncdiff_pl.parallel.capture import may_capture
from asyncdiff_pl.parallel.encoders import SharedEncoding
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.handle import Parallel
from asyncdiff_pl.parallel.hooks import is_installed
from asyncdiff_pl.parallel.host_side import HostSide
from asyncdiff_pl.parallel.layout import Groups, Layout
from asyncdiff_pl.parallel.patches.pipeline import PatchPipeline
from asyncdiff_pl.parallel.patches.settings import PatchMode, PatchSettings
from asyncdiff_pl.parallel.sharing import SharedFrames, SharedPictures, shared_decoding
from asyncdiff_pl.parallel.stages.pipeline import StagePipeline
from asyncdiff_pl.parallel.stages.settings import BalanceMode, CompileMode, Settings, WarmUpMode
from asyncdiff_pl.parallel.steps.pipeline import StepPipeline
from asyncdiff_pl.parallel.steps.settings import StepSettings
from asyncdiff_pl.parallel.time.pipeline import TimePipeline
from asyncdiff_pl.parallel.time.settings import TimeParallel
from asyncdiff_pl.parallel.trajectory import Trajectory
from asyncdiff_pl.parallel.warm_up import WarmUp, noise_levels


def parallelize(
    pipe: Any,
    *,
    stages: int = 1,
    stride: int = 1,
    warm_up: int | WarmUp = 3,
    refresh_every: int | None = None,
    time_shift: bool = False,
    cfg: int = 1,
    patches: int = 1,
    mode: PatchMode = "full_sync",
    portion: float = 1.0,
    steps: int = 1,
    time: TimeParallel | None = None,
    cut: Sequence[Sequence[str]] | None = None,
    capture: bool | None = None,
    compile: CompileMode = "none",
    balance: BalanceMode = "operations",
    warm_up_mode: WarmUpMode = "replicated",
    folded: bool = False,
    share_decoding: bool = False,
    share_encoding: bool = False,
    simulate: bool = False,
    scheduler: Any = None,
    timeout: timedelta | None = None,
    trajectory: Trajectory | None = None,
    groups: Groups | None = None,
) -> Parallel:
    """Runs a pipeline's denoiser on several ranks: in stages, in patches, several steps at a time, or solving all.

    Every rank of an initialised process group calls this once with the same arguments, then runs the pipeline as
    always, with the same inputs and seed. Ranks beyond one pipeline's form further groups, which may run other samples.

    Args:
        pipe: A diffusers pipeline, or a bare denoiser with `scheduler` given.
        stages: Stages that the denoiser is cut into, 1 to 8.
        stride: Steps that one round of the stages covers, 1 or 2; 2 takes one rank more.
        warm_up: Exact steps at the start of each sample: their number, 1 or more, or `WarmUp(until_noise=0.97)` or
            `WarmUp(until_drift=0.1)`, for as many as the sample needs.
        refresh_every: After warm-up each how many-th step is exact again, 2 or more; None for none.
        time_shift: Whether asynchronous steps give the denoiser the timestep of the step before.
        cfg: 2 gives each half of the guidance batch its own ranks.
        patches: Patches that the rows of the latents are split into, in place of stages; UNets only.
        mode: What patches see of one another after warm-up: "full_sync" is exact; "corrected_async_gn", "stale_gn",
            "sync_gn" and "separate_gn" use rows of the step before and differ in GroupNorm; "no_sync" uses rows of the
            last synchronous step; "naive" sees none.
        portion: Share of the neighbours' rows, 0 to 1, that self-attention sees after warm-up, and that is sent; 1 is
            all rows of all patches.
        steps: Steps that are computed at a time after warm-up, each by a rank, from latents that the rank foresees; in
            place of stages and patches.
        time: How all steps but the first are solved together, each iteration's evaluations on all ranks, in place of
            stages, patches and steps; None takes one step after the other. Schedulers: DDIM, DDPM, Euler.
        cut: For each stage the names of its modules (a name covers all below it); None finds a cut.
        capture: Whether the denoiser's steps are recorded as CUDA graphs, a few for each rank, and replayed: the CPU
            then launches a step at once. Needs an NVIDIA GPU; None for where there is one. What changes in the network
            (adapters, their scales) counts from the next sample on. `remove` the handle before the process group is
            destroyed.
        compile: What torch compiles: "none", "blocks" (the repeated blocks, each kind once) or "full" (the whole
            denoiser; 1 stage and 1 patch only).
        balance: What a found cut balances: "operations", counted, or "measured" times of the denoiser's units on this
            device, which are kept on disk.
        warm_up_mode: "replicated": every rank computes exact steps whole; "relay": each rank computes its own stage,
            one after the other, and holds the weights of its stage alone. The others' never get onto a GPU if the
            denoiser is brought there after this call, not before.
        folded: Whether a found cut's last stage may own both ends of the denoiser: a UNet's large outer skip
            connections then stay at home, for slow links, and what the stages see is a step older.
        share_decoding: Whether the ranks share out the decoding of a video's frames, in chunks of `decode_chunk_size`
            (Stable Video Diffusion, AnimateDiff), and that of a batch's pictures, which then are decoded one by one,
            whatever the number of ranks. All ranks must call `pipe.decode_latents` and `pipe.vae.decode`, where these
            are called outside of the pipeline.
        share_encoding: Whether each text and image encoder is run by one rank, which alone holds its weights, and sends
            what comes out to the others: less memory on each rank, in the same time. All ranks must call the encoders,
            where these are called outside of the pipeline.
        simulate: Plays all ranks in this process, to see a layout's quality without its speed.
        scheduler: The scheduler that steps the latents, for a bare denoiser.
        timeout: How long to wait for another rank's message; None leaves it to the process group.
        trajectory: Shares one that follows the same denoiser already.
        groups: The process groups, where they exist already.

    Returns:
        A handle that resets and removes what was installed.

    Raises:
        ValueError: A setting is out of range, the ranks do not fit the layout, or the denoiser is in use already.
    """
    layout = Layout(stages, stride, cfg, patches=patches, steps=steps, time=1 if time is None else time.ranks)
    patch_settings = None
    if time is not None:
        _check_time(layout, warm_up)
    if patches > 1 or steps > 1 or time is not None:
        check_without_stages(
            "patches" if patches > 1 else "steps" if steps > 1 else "steps that are solved together",
            warm_up=warm_up,
            refresh_every=refresh_every,
            time_shift=time_shift,
            cut=cut,
            balance=balance,
            warm_up_mode=warm_up_mode,
            folded=folded,
        )
    if patches > 1:
        assert isinstance(warm_up, int)
        patch_settings = PatchSettings(layout, mode, warm_up, portion, capture, compile)
    elif (mode, portion) != ("full_sync", 1.0):
        raise ValueError(f"mode {mode} and portion {portion} are for patches, and patches is 1; give 2 or more.")
    check_settings(layout, warm_up, cut, refresh_every)
    check_modes(layout, warm_up, compile, warm_up_mode, simulate)
    denoiser, scheduler_in_use = _denoiser_and_scheduler(pipe, scheduler)
    asks_for_noise = isinstance(warm_up, WarmUp) and warm_up.until_noise is not None
    timesteps = getattr(scheduler_in_use(), "timesteps", None)
    if asks_for_noise and timesteps is not None and len(timesteps):
        # those that have no timesteps yet are asked in the first sample
        noise_levels(scheduler_in_use())
    if is_installed(denoiser):
        raise ValueError(
            f"This {type(denoiser).__name__} is run in parallel already; call `remove()` of its handle first."
        )
    exchange, coordinates = None, (0, 0)
    if not simulate and layout.pipeline_ranks > 1:
        if not dist.is_initialized():
            raise ValueError(
                f"The layout needs {layout.pipeline_ranks} ranks, but no process group is initialised: start under "
                "torchrun and call `torch.distributed.init_process_group`, or set simulate."
            )
        local_size = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
        layout = layout.over(dist.get_world_size(), local_size)
        groups = groups or Groups.build(layout)
        exchange = Exchange(groups, timeout)
        coordinates = layout.coordinates(dist.get_rank())[1:]
    host_side = None
    if trajectory is None:
        trajectory = Trajectory(denoiser, scheduler_in_use)
        host_side = HostSide(pipe, denoiser, trajectory)
    pipeline: StagePipeline | PatchPipeline | StepPipeline | TimePipeline | None = None
    agreement = None
    if patch_settings is not None:
        try:
            pipeline = PatchPipeline(denoiser, trajectory, patch_settings, exchange, coordinates)
        except ValueError:
            if host_side is not None:
                host_side.remove()
                trajectory.remove()
            raise
    elif time is not None:
        pipeline = TimePipeline(denoiser, trajectory, time, capture, compile, exchange, coordinates[1])
    elif steps > 1:
        assert isinstance(warm_up, int)
        step_settings = StepSettings(layout, warm_up, capture, compile)
        pipeline = StepPipeline(denoiser, trajectory, step_settings, exchange, coordinates)
    # one rank alone is captured and compiled as well
    elif layout.pipeline_ranks > 1 or may_capture(capture) or compile != "none":
        settings = Settings(
            layout, warm_up, time_shift, cut, refresh_every, capture, compile, balance, warm_up_mode, folded
        )
        pipeline = StagePipeline(denoiser, trajectory, settings, exchange, coordinates)
    if pipeline and exchange:
        agreement = Agreement(denoiser, trajectory, exchange, lambda: pipeline.turns_asynchronous)
    half, within = coordinates
    rank, num_ranks = half * layout.ranks_per_half + within, layout.pipeline_ranks if exchange else 1
    sharing: list[SharedFrames | SharedPictures | SharedEncoding] = []
    if share_decoding:
        sharing += shared_decoding(pipe, exchange, rank, num_ranks)
    if share_encoding and exchange:
        sharing.append(SharedEncoding(pipe, exchange, rank, num_ranks))
    return Parallel(pipeline, agreement, trajectory, host_side, layout, sharing)


def check_settings(
    layout: Layout, warm_up: int | WarmUp, cut: Sequence[Sequence[str]] | None, refresh_every: int | None = None
) -> None:
    """Checks what can be known of the settings before there is a denoiser.

    Raises:
        ValueError: A setting is out of range.
    """
    if isinstance(warm_up, int) and warm_up < 1:
        raise ValueError(f"warm_up is {warm_up}; at least 1 exact step has to fill the stages' inputs.")
    if refresh_every is not None and refresh_every < 2:
        raise ValueError(
            f"refresh_every is {refresh_every}; give 2 or more (2: each second step is exact), or null for none."
        )
    if cut is not None and len(cut) != layout.stages:
        raise ValueError(f"The cut has {len(cut)} stages, but stages is {layout.stages}; make them equal.")


def _check_time(layout: Layout, warm_up: int | WarmUp) -> None:
    """Checks that nothing else is to be shared out where steps are solved together."""
    # one rank that solves has a layout that tells nothing
    Layout(layout.stages, layout.stride, layout.cfg, 1, layout.patches, layout.steps, time=max(2, layout.time))
    if warm_up != inspect.signature(parallelize).parameters["warm_up"].default:
        raise ValueError(
            f"warm_up is {warm_up}, and steps that are solved together have none; leave warm_up at its default."
        )


def check_without_stages(asked_for: str, **settings: Any) -> None:
    """Checks that patches, steps or solvers are not given what belongs to stages.

    Args:
        asked_for: What the ranks share out.
        **settings: What may be for stages.

    Raises:
        ValueError: They are.
    """
    if not isinstance(settings["warm_up"], int):
        raise ValueError(f"{asked_for} take a number of synchronous steps as warm_up, and it is {settings['warm_up']}.")
    defaults = inspect.signature(parallelize).parameters
    for name, value in settings.items():
        if name != "warm_up" and value != defaults[name].default:
            raise ValueError(f"{name} is for stages, and {asked_for} are asked for; leave {name} at its default.")


def check_modes(
    layout: Layout, warm_up: int | WarmUp, compile: CompileMode, warm_up_mode: WarmUpMode, simulate: bool
) -> None:
    """Checks which ways of running the stages go together.

    Raises:
        ValueError: Two of them do not.
    """
    if compile == "full" and layout.stages > 1:
        raise ValueError(
            f"compile full takes a denoiser that is whole, and stages is {layout.stages}; take compile blocks."
        )
    if warm_up_mode != "relay":
        return
    if simulate:
        raise ValueError(
            "warm_up_mode relay gives each rank the weights of its stage alone, and simulate plays all ranks in one "
            "process; take warm_up_mode replicated, which computes the same."
        )
    if layout.stages == 1:
        raise ValueError("warm_up_mode relay passes exact steps from stage to stage, and stages is 1; take 2 or more.")
    if isinstance(warm_up, WarmUp) and warm_up.until_drift is not None:
        raise ValueError(
            "warm_up_mode relay shows a rank its own boundary tensors alone, and until_drift compares all of them; "
            "take a number of steps or until_noise."
        )


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network that a diffusers pipeline calls once a step: its `unet` or its `transformer`.

    Raises:
        ValueError: It has neither.
    """
    for name in ("unet", "transformer"):
        part = getattr(pipeline, name, None)
        if isinstance(part, nn.Module):
            return part
    raise ValueError(f"{type(pipeline).__name__} has neither a `unet` nor a `transformer` to run in parallel.")


def _denoiser_and_scheduler(pipe: Any, scheduler: Any) -> tuple[nn.Module, Callable[[], Any]]:
    if not isinstance(pipe, nn.Module):
        return denoiser_of(pipe), lambda: pipe.scheduler
    if scheduler is None:
        raise ValueError("A bare denoiser needs `scheduler=`: the scheduler that steps its latents.")
    return pipe, lambda: scheduler
