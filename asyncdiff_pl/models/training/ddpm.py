"""Trains a denoiser of pictures without any condition: DDPM, with samplers of timesteps and weights of losses."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn
from typing_extensions import override

from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.training.base import Batch, NetworkTraining, counted
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.unconditional_unet import build_unet
from asyncdiff_pl.models.unconditional_pipeline import UnconditionalPipeline
from asyncdiff_pl.sampling.seeded_noise import seeded_normal
from asyncdiff_pl.training.discrete_noise import DiscreteNoise, PredictionType
from asyncdiff_pl.training.loss_weights import LossWeight, UniformWeight
from asyncdiff_pl.training.noise_schedule import BetaSchedule, betas, signal_levels
from asyncdiff_pl.training.timesteps import TimestepSampler, UniformTimesteps
from asyncdiff_pl.training.variational_bound import TrainedVariance, VariationalBound

DIFFUSERS_SCHEDULES = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}
"""What diffusers calls the noise schedules that it knows."""

GOLDEN_RATIO = (1 + 5**0.5) / 2
"""The fractional parts of its first multiples are spread evenly over (0, 1), however many they are."""


class DDPM(NetworkTraining):
    """Trains a U-Net to denoise pictures, after Ho et al. (2020), "Denoising Diffusion Probabilistic Models".

    The defaults are theirs for CIFAR-10; `configs/ddpm_cifar10.yaml` has the rest. Which timesteps are trained, and how
    much each counts, is said by `timesteps` and `weight`. Noise follows from the seed and the step's number alone: a
    run that is stopped and goes on has the losses of one that was not.

    Args:
        size: Height and width of the pictures, in pixels.
        channels: Channels of the U-Net's first level.
        multipliers: Channels of each level, as multiples of the first's; each level is half as high as the one before.
        blocks: Residual blocks of a level.
        attention: Heights in pixels of the levels that have attention; the middle always has.
        dropout: Share of values that each residual block drops.
        prediction_type: What the network predicts: `epsilon` (the noise), `v_prediction` or `sample` (the clean
            picture).
        beta_schedule: How the noise's variance rises over the timesteps.
        beta_start: Variance of the first timestep's noise; the cosine schedule has its own.
        beta_end: Variance of the last timestep's noise; the cosine schedule has its own.
        num_timesteps: Number of timesteps.
        variance: Variance of the noise that the exported pipeline adds in each step: `fixed_small`, `fixed_large`, or
            `learned_range`, for which the network has an output more for each colour.
        loss: What becomes small: `mse`, the mean square error of the prediction; `kl`, the variational bound; or
            `hybrid`, the error and `bound_weight` of the bound, which then trains the learned variance alone.
        bound_weight: λ, how much the bound of all timesteps counts, in bits a dimension, in `hybrid`.
        timesteps: Which timesteps are trained, a class of `asyncdiff_pl.training.timesteps`; null draws them evenly.
        weight: How losses are weighted by timestep, a class of `asyncdiff_pl.training.loss_weights`; null leaves them
            as they are.
        sample_steps: DDIM steps of the pictures that are drawn in validation.
        num_samples: Number of pictures that are drawn in validation, shown in a square; 0 for none.
        optimizer: How the weights follow the gradients.
        channels_last: Keep weights and activations channels last: faster convolutions on a GPU, if compiled.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported (its `unet`); null draws new ones.
        capture: Record the network's forward and backward pass as CUDA graphs: faster steps of small batches on a GPU.
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        prediction_type: PredictionType = "epsilon",
        beta_schedule: BetaSchedule = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_timesteps: int = 1000,
        variance: TrainedVariance = "fixed_large",
        loss: Literal["mse", "hybrid", "kl"] = "mse",
        bound_weight: float = 1e-3,
        timesteps: TimestepSampler | None = None,
        weight: LossWeight | None = None,
        sample_steps: int = 50,
        num_samples: int = 64,
        optimizer: Optimizer = Optimizer(2e-4, 0.0, 0.999, 5000, "constant"),
        channels_last: bool = False,
        compile: bool = False,
        start_from: str | None = None,
        capture: bool = False,
    ) -> None:
        if not 1 <= sample_steps <= num_timesteps:
            raise ValueError(
                f"sample_steps is {sample_steps}, and there are {num_timesteps} timesteps; give 1 to {num_timesteps}."
            )
        _check_loss(loss, variance, weight, bound_weight)
        network = build_unet(size, channels, multipliers, blocks, attention, dropout, variance == "learned_range")
        super().__init__(network, optimizer, compile, start_from, capture)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        variances = betas(beta_schedule, num_timesteps, beta_start, beta_end)
        levels = signal_levels(variances)
        self.noise = DiscreteNoise(levels.float(), prediction_type)
        own = {"trained_betas": variances.tolist()}
        if beta_schedule in DIFFUSERS_SCHEDULES:
            own = {"beta_schedule": DIFFUSERS_SCHEDULES[beta_schedule], "beta_start": beta_start, "beta_end": beta_end}
        # by name: diffusers takes what is given by place for defaults, which other schedulers made of it do not share
        self.scheduler = DDPMScheduler(
            num_train_timesteps=num_timesteps, prediction_type=prediction_type, variance_type=variance, **own
        )
        self.timesteps = timesteps or UniformTimesteps()
        self.timesteps.build(levels, prediction_type)
        self.weight = weight or UniformWeight()
        self.weight.build(levels, prediction_type)
        self.bound = None if loss == "mse" else VariationalBound(variances, prediction_type, variance)
        self.loss_kind = loss
        self.bound_weight = bound_weight
        # what a sampler learns is not the loss's gradient, and it brings the ranks' together by itself
        states = (*self.timesteps.named_parameters(), *self.timesteps.named_buffers())
        self._ddp_params_and_buffers_to_ignore = [f"timesteps.{name}" for name, _ in states]
        self.sample_steps = sample_steps
        self.num_samples = num_samples
        self._passes = self._seed = 0
        self._looked_before = False
        self._latest: Tensor | None = None

    # -- training -----------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.noise = self.noise.to(self.device)
        if self.trainer.world_size > 1:
            self.timesteps.reduce, self.timesteps.gather = mean_of_ranks, joined_of_ranks

    @override
    def on_train_start(self) -> None:
        self._seed = torch.initial_seed()
        self._passes = self.global_step * self.trainer.accumulate_grad_batches

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # a pass draws what it draws in every run, on each rank something else
        torch.manual_seed(hash((self._seed, self.global_rank, self._passes)))
        self._passes += 1
        return super().training_step(batch, batch_idx)

    @override
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        self._latest = clean = self._clean(batch)
        timesteps, shares = self.timesteps.draw(clean)
        errors, between = self._predict(timesteps, clean, torch.randn_like(clean))
        squares = found = errors.square().flatten(1).mean(1)
        losses = self.weight.weight(squares, timesteps)
        parts = {"mse": squares.mean()}
        if self.bound is not None:
            is_hybrid = self.loss_kind == "hybrid"
            bits = self.bound(clean, errors.detach() if is_hybrid else errors, timesteps, between)
            losses = losses + self.bound_weight * len(self.noise) * bits if is_hybrid else bits
            found = squares if is_hybrid else bits
            parts["kl"] = bits.mean()
        self.timesteps.update(timesteps, found.detach())
        return {"loss": (shares * losses).mean(), **parts}

    def _clean(self, batch: Batch) -> Tensor:
        """Pictures [B, 3, H, W] from −1 to 1: the first frames of a batch."""
        pictures, size = batch["frames"][:, 0], self.network.config.sample_size
        if pictures.shape[-2:] != (size, size):
            height, width = pictures.shape[-2:]
            raise ValueError(
                f"The data has pictures of {height} x {width} pixels, and model.size is {size}; make them equal."
            )
        return pictures * 2 - 1

    def _predict(self, timesteps: Tensor, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction less what it should be [B, 3, H, W], float32, and where variances lie, if they are learned."""
        noisy = self.noise.add(clean, noise, timesteps)
        output = self.call_network(sample=noisy, timestep=timesteps).float()
        # what is beyond the colours is the variances'
        prediction, between = output[:, : clean.shape[1]], output[:, clean.shape[1] :]
        return prediction - self.noise.target(clean, noise, timesteps), between if between.shape[1] else None

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._looked_before = self.timesteps.is_due(self.global_step)
        if self._looked_before:
            assert self._latest is not None
            self.timesteps.before_step(self._probe, self._latest)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._looked_before = False
        super().optimizer_step(*args, **kwargs)
        # here, not at the end of the batch: what is learned belongs to the state that callbacks save there
        if self._looked_before:
            assert self._latest is not None
            self.timesteps.after_step(self._probe, self._latest)

    @torch.no_grad()
    def _probe(self, timesteps: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        """The network's loss of given pictures [N], as it is now, without dropout; see timesteps/base.py."""
        with ExitStack() as stack:
            stack.enter_context(self.trainer.precision_plugin.forward_context())
            stack.enter_context(self._as_called_by_pipelines())
            stack.callback(self.network.train)
            self.network.eval()
            errors, _ = self._predict(timesteps, clean, noise)
            return errors.square().flatten(1).mean(1)

    @override
    def configure_optimizers(self) -> Any:
        return self.build_optimizer(nn.ModuleList([self.network, self.weight]))

    # -- looking at it ------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.noise = self.noise.to(self.device)

    @override
    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        clean, index, number = self._clean(batch), batch["index"], counted(batch)
        # each picture's own, whatever batch and rank it is in, and whatever the training's timesteps are
        share = (index.double() * GOLDEN_RATIO) % 1
        timesteps = (share * len(self.noise)).long().clamp(max=len(self.noise) - 1)
        errors, between = self._predict(timesteps, clean, seeded_normal(index, 0, clean.shape[1:]))
        found = {"loss": errors.square().flatten(1).mean(1)}
        if self.bound is not None:
            # of all timesteps: each picture stands for one of them
            found["bits_per_dim"] = len(self.noise) * self.bound(clean, errors, timesteps, between)
        return {name: losses[:number].sum() / max(1, number) for name, losses in found.items()}

    def pipeline(self) -> UnconditionalPipeline:
        """The pipeline of the network as it is now: DDIM's steps."""
        pipeline = UnconditionalPipeline(self.network, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @override
    def pictures(self, batch: Batch) -> Tensor | None:
        side = int(self.num_samples**0.5)
        if not side:
            return None
        made = self.pipeline()(list(range(side**2)), num_inference_steps=self.sample_steps, output_type="pt").images
        return made.unflatten(0, (side, side))

    @override
    def export(self, folder: Path) -> None:
        """Writes a `DDPMPipeline` with the network's weights in float32.

        Args:
            folder: Is made if it is not there.
        """
        network = copy.deepcopy(self.network).float().cpu().to(memory_format=torch.contiguous_format)
        with quiet_libraries():
            DDPMPipeline(unet=network.eval().requires_grad_(False), scheduler=self.scheduler).save_pretrained(folder)


def mean_of_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over ranks, in its place; no rank waits for its GPU, as all do in Lightning's `reduce`."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def joined_of_ranks(values: Tensor) -> Tensor:
    """All ranks' tensors [N, ...], one after the other."""
    found = values.new_empty(dist.get_world_size() * len(values), *values.shape[1:])
    dist.all_gather_into_tensor(found, values.contiguous())
    return found


def _check_loss(loss: str, variance: str, weight: LossWeight | None, bound_weight: float) -> None:
    """Tells that a loss does not go with the variance or with the weights.

    Raises:
        ValueError: In one sentence.
    """
    is_learned = variance == "learned_range"
    if is_learned and loss == "mse":
        raise ValueError(
            "variance is learned_range and loss mse, which trains no variance; give loss hybrid or kl, or a fixed "
            "variance."
        )
    if loss == "hybrid" and not is_learned:
        raise ValueError(
            f"loss is hybrid and variance {variance}: the bound would train nothing; give variance learned_range, or "
            "loss mse or kl."
        )
    if loss == "kl" and not isinstance(weight, UniformWeight | None):
        raise ValueError(
            f"loss is kl, which weighs the timesteps itself, and weight {type(weight).__name__}; give loss mse or "
            "hybrid, or no weight."
        )
    if bound_weight <= 0:
        raise ValueError(f"bound_weight is {bound_weight}; give a number above 0, 0.001 say.")
