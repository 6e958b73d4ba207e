"""Timesteps drawn by a learned policy: a small network sees the clean image and gives a Beta distribution over time.

After Kim et al. (2024), "Adaptive Non-Uniform Timestep Sampling for Accelerating Diffusion Model Training"
(arXiv 2411.09998), algorithms 1 and 2. What differs from its public code, whose reward is mostly noise: before and
after a step the network is asked in eval mode about the same images, timesteps and noises; a running baseline is taken
off the reward; no gradient goes through the reward; entropy is a term of its own; the timesteps whose progress stands
for all are chosen from three entries on (two lie on a line always); and those of the last choice serve, so that one
pass before and one after the step suffice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F
from typing_extensions import override

from asyncdiff_pl.training.discrete_noise import PredictionType
from asyncdiff_pl.training.loss_weights import in_terms_of_noise, signal_to_noise
from asyncdiff_pl.training.timesteps.base import Probe, TimestepSampler

LEAST = 1e-5
"""What is added to α and β, and how near to 0 and 1 a drawn place may be."""

ENOUGH = 3
"""Entries from which on a correlation tells something: any two lie on a line."""

DECAY = 0.9
"""How much of the running baseline stays at each update."""


class BetaPolicy(TimestepSampler):
    """Draws timesteps from Beta distributions that a policy gives for each image, and trains the policy by its effect.

    Every `every` steps the network's KL divergences (in nats an image) are measured before and after the optimizer's
    step, on a grid of timesteps for one image, and at a few timesteps for all images of the batch. The few are those
    whose progress on the grid correlates best with the sum over the grid, over the last entries. An image's reward is
    the sum of its progress at those few, and the policy takes a step of REINFORCE with Adam. Nothing corrects the
    network's loss for how timesteps are drawn. Images are 32 pixels high and wide, or are pooled as if they were.

    Args:
        every: The optimizer's steps between two updates of the policy.
        grid: Timesteps at which progress is measured for one image, spread evenly over all.
        chosen: Timesteps whose progress is the reward.
        queue: Entries of progress on the grid that are kept.
        learning_rate: Adam's, for the policy.
        entropy: Weight of the policy's entropy, which keeps it from settling early.
        channels: Channels of the images.
    """

    places: Tensor
    nats: Tensor
    entries: Tensor
    best: Tensor
    baseline: Tensor

    def __init__(
        self,
        every: int = 40,
        grid: int = 100,
        chosen: int = 3,
        queue: int = 20,
        learning_rate: float = 1e-2,
        entropy: float = 0.01,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if every < 1 or not 1 <= chosen <= grid or queue < ENOUGH:
            raise ValueError(
                f"every is {every}, grid {grid}, chosen {chosen} and queue {queue}; give 1 step or more, a grid of at "
                f"least as many timesteps as are chosen, and {ENOUGH} entries or more."
            )
        self.every = every
        self.grid = grid
        self.chosen = chosen
        self.queue = queue
        self.entropy = entropy
        # the same on all ranks, whatever their seeds: only gradients are brought together
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.policy = _network(channels)
        # but for the policy's own update: DDP waits for the gradients of all parameters that ask for one
        self.policy.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self.seen = 0
        """Entries of progress so far."""
        self._saved: dict[str, Any] | None = None
        self._places_drawn: Tensor | None = None
        self._before: tuple[Tensor, Tensor, Tensor] | None = None

    @override
    def build(self, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        super().build(alphas_cumprod, prediction_type)
        if self.grid > self.number:
            raise ValueError(f"grid is {self.grid}, but there are {self.number} timesteps; give a smaller grid.")
        alphas = alphas_cumprod.double()
        places = torch.linspace(0, self.number - 1, self.grid).round().long()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("nats", _nats(alphas, prediction_type).float(), persistent=False)
        self.register_buffer("entries", torch.zeros(self.queue, self.grid))
        self.register_buffer("best", torch.zeros(self.chosen, dtype=torch.int64))
        self.register_buffer("baseline", torch.zeros(()))

    def distribution(self, clean: Tensor) -> Beta:
        """The policy's distributions over [0, 1] for images [B, C, H, W]."""
        with torch.autocast(clean.device.type, enabled=False):
            alpha, beta = (F.softplus(self.policy(clean.float())) + LEAST).unbind(1)
        return Beta(alpha, beta, validate_args=False)

    @override
    @torch.no_grad()
    def draw(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        places = self.distribution(clean).sample().clamp(LEAST, 1 - LEAST)
        self._places_drawn = places
        return (places * (self.number - 1)).round().long(), torch.ones_like(places)

    @override
    @torch.no_grad()
    def before_step(self, probe: Probe, clean: Tensor) -> None:
        timesteps = self.places
        images = clean[:1].expand(self.grid, *clean.shape[1:])
        if self.seen >= ENOUGH:
            timesteps = torch.cat([timesteps, self.best.repeat_interleave(len(clean))])
            images = torch.cat([images, clean.repeat(self.chosen, *[1] * (clean.ndim - 1))])
        noise = torch.randn_like(images)
        self._before = timesteps, noise, self._divergences(probe, timesteps, images, noise)

    @override
    @torch.no_grad()
    def after_step(self, probe: Probe, clean: Tensor) -> None:
        assert self._before is not None
        timesteps, noise, before = self._before
        self._before = None
        images = clean[:1].expand(self.grid, *clean.shape[1:])
        if len(timesteps) > self.grid:
            images = torch.cat([images, clean.repeat(self.chosen, *[1] * (clean.ndim - 1))])
        progress = before - self._divergences(probe, timesteps, images, noise)
        if len(timesteps) > self.grid:
            self._improve(clean, progress[self.grid :].view(self.chosen, -1).sum(0))
        self.entries[self.seen % self.queue] = self.reduce(progress[: self.grid].contiguous())
        self.seen += 1
        if self.seen >= ENOUGH:
            self.best = self.places[best_predictors(self.entries[: self.seen], self.chosen)]

    def _divergences(self, probe: Probe, timesteps: Tensor, images: Tensor, noise: Tensor) -> Tensor:
        losses = probe(timesteps, images, noise).float()
        return losses * self.nats[timesteps] * images[0].numel()

    def _improve(self, clean: Tensor, rewards: Tensor) -> None:
        """One step of the policy.

        Args:
            clean: [B, C, H, W], the images whose timesteps were drawn last.
            rewards: [B], what the step of the network with those timesteps brought.
        """
        assert self._places_drawn is not None
        mean = self.reduce(rewards.mean())
        is_first = self.seen == ENOUGH
        baseline = mean if is_first else self.baseline
        with torch.enable_grad():
            self.policy.requires_grad_(True)
            distribution = self.distribution(clean)
            expected = ((rewards - baseline) * distribution.log_prob(self._places_drawn)).mean()
            (-expected - self.entropy * distribution.entropy().mean()).backward()
        for parameter in self.policy.parameters():
            assert parameter.grad is not None
            parameter.grad = self.reduce(parameter.grad)
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        if self._saved is not None:
            self.optimizer.load_state_dict(self._saved)
            self._saved = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.policy.requires_grad_(False)
        self.baseline = DECAY * baseline + (1 - DECAY) * mean

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "optimizer": self._saved or self.optimizer.state_dict()}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        # taken up with the next step, when the policy is on its device: the optimizer's state goes where it is then
        self._saved = state["optimizer"]


def best_predictors(entries: Tensor, number: int) -> Tensor:
    """The columns that tell the sum of a row best, by F-tests of simple regressions over rows.

    F = r² (n − 2) / (1 − r²) rises with r², the squared correlation of a column with the row's sum; columns without
    any spread come last.

    Args:
        entries: [n, K], n from 3 up.
        number: How many columns.

    Returns:
        [number], int64, the best first.
    """
    columns = entries.double() - entries.double().mean(0)
    sums = columns.sum(1)
    squares = columns.square().sum(0) * sums.square().sum()
    correlation = (columns.T @ sums).square() / squares
    return correlation.nan_to_num(nan=-1.0).topk(number).indices


def _network(channels: int) -> nn.Sequential:
    """The policy: α and β before their softplus, [B, 2], equal and for all images the same at first."""
    last = nn.Linear(256, 2)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, 0.5)
    return nn.Sequential(
        *_convolution(channels, 32),
        *_convolution(32, 64),
        *_convolution(64, 128),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        last,
    )


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)


def _nats(alphas_cumprod: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the network's mean square error weighs in the KL divergence of each timestep, in nats a pixel, [T].

    β² / (2 σ² α (1 − ᾱ)) of the noise's error with σ² = β (Ho et al. 2020, equation 12).
    """
    alphas = alphas_cumprod / F.pad(alphas_cumprod, (1, 0), value=1.0)[:-1]
    nats = (1 - alphas) / (2 * alphas * (1 - alphas_cumprod))
    return nats * in_terms_of_noise(prediction_type, signal_to_noise(alphas_cumprod))
