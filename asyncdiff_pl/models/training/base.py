"""The LightningModule that trains one network: what all networks have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from asyncdiff_pl.models.quiet import quiet_libraries
from asyncdiff_pl.models.training.captured_pass import CapturedPass
from asyncdiff_pl.models.training.components import load_start
from asyncdiff_pl.models.training.optimizer import Optimizer
from asyncdiff_pl.models.training.tokens import Tokenize

Encoded = TypeVar("Encoded")
Batch = dict[str, Any]
"""`frames` [B, F, 3, H, W] from 0 to 1, `captions`, `changed_captions`, `fps` [B], `label` [B], and `index` [B], which
clip of the set each is; data/scene_clips.py."""


class NetworkTraining(LightningModule):
    """Trains one network with AdamW: a subclass builds it, and says what its loss is.

    Parts that stay as they are go into `frozen`, not into attributes: they are no part of checkpoints, averages or DDP.

    Args:
        network: What is trained; its class has `save_pretrained`.
        optimizer: How the weights follow the gradients.
        compile: Compile the network: faster steps on a GPU, after some minutes at the start.
        start_from: Folder of weights to start from, as exported, or the name of a component; null draws new ones.
        capture: Record the network's forward and backward pass as CUDA graphs. A small network's steps on a GPU are
            several times faster, since its thousands of kernels are then launched at once. Needs batches of one size.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        compile: bool,
        start_from: str | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__()
        if start_from is not None:
            load_start(network, start_from)
        self.network = network.train().requires_grad_(True)
        self.optimizer = optimizer
        self.compile_network = compile
        self.capture_network = capture
        self._captured: CapturedPass | None = None
        self.frozen: dict[str, nn.Module] = {}
        """Networks that are used and not trained, by name."""
        self.tokenize: Tokenize | None = None
        """Makes tokens of captions, if the network is trained with captions."""
        self._sums: dict[str, Any] = {}
        self._summed = 0
        self._encoded: tuple[Tensor, Any] | None = None

    # -- what a subclass says -----------------------------------------------------------------------------------

    def load_frozen(self) -> dict[str, nn.Module]:
        """Loads the parts that are not trained, once, before the first step."""
        return {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """What is to become small, as `loss`, and the parts that it is made of; each is logged."""
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is.")

    def validate(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Measures of a validation batch, logged as their means over all clips that count.

        Args:
            batch: The batch; of a last one only the first clips may count, see `counted`.
            number: Number of the batch; the same on each call, so noise may be drawn from it.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it is validated.")

    def pictures(self, batch: Batch) -> Tensor | None:
        """Pictures [rows, columns, 3, H, W] from 0 to 1 to look at, made from the first validation batch."""
        return None

    def export(self, folder: Path) -> None:
        """Writes the network as the pipelines load it: config.json and weights in float16.

        Args:
            folder: Is made if it is not there.
        """
        with quiet_libraries():
            copy.deepcopy(self.network).half().cpu().save_pretrained(folder)

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if not self.frozen:
            self.frozen = {name: part.eval().requires_grad_(False) for name, part in self.load_frozen().items()}
        if self.tokenize is not None and hasattr(self.trainer.datamodule, "tokenize"):
            # the workers of a data module that offers it make tokens, while this process draws and trains
            self.trainer.datamodule.tokenize = self.tokenize

    def check_weights(self, state: dict[str, Tensor]) -> None:
        """Tells that a checkpoint is of another network.

        Args:
            state: The checkpoint's `state_dict`.

        Raises:
            ValueError: In one sentence, with the first entry that differs.
        """
        own, found = ({k: tuple(v.shape) for k, v in one.items()} for one in (self.state_dict(), state))
        for name in [*own, *(name for name in found if name not in own)]:
            if own.get(name) != found.get(name):
                here, there = (f"is {one[name]}" if name in one else "is missing" for one in (own, found))
                raise ValueError(
                    f"The checkpoint is of another network or method: {name} {there} there, and {here} by this config; "
                    "give the config that it was trained with (config.yaml in its log folder)."
                )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_weights(checkpoint["state_dict"])
        if self.trainer.state.fn == "validate":
            # what is logged then stands at the checkpoint's step
            self.trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])

    @override
    def on_validation_start(self) -> None:
        for part in self.frozen.values():
            part.to(self.device)

    @override
    def on_fit_start(self) -> None:
        for part in self.frozen.values():
            part.to(self.device)
        if self.compile_network:
            # whole, also under DDP: the network is small, and its gradients are sent after all of its backward pass
            torch._dynamo.config.optimize_ddp = False
            self.network.compile()
        if self.capture_network and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"model.capture takes gradients of one batch, and trainer.accumulate_grad_batches is "
                f"{self.trainer.accumulate_grad_batches}; set one of them back, model.capture to false say."
            )
        if self.capture_network and self.device.type != "cuda":
            rank_zero_warn(f"model.capture does nothing on {self.device.type}: CUDA graphs need a GPU of NVIDIA.")

    @override
    def on_train_start(self) -> None:
        # noise differs from rank to rank, and a run that goes on does not draw that of its first steps again
        torch.manual_seed(hash((torch.initial_seed(), self.global_rank, self.global_step)))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        parts = self.loss(batch)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._summed += 1
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            # means over the steps since the last time, which are made on the device
            self.log_dict({f"train/{name}": total / self._summed for name, total in self._sums.items()})
            self.log("train/learning_rate", self._schedule.get_last_lr()[0])
            self._sums, self._summed = {}, 0
        return parts["loss"]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self._as_called_by_pipelines():
            found = self.validate(batch, batch_idx)
            # the ranks' whole numbers are divided by their number, and rounded down if they do not divide by it
            number = counted(batch) * self.trainer.world_size
            measures = {f"validation/{name}": value for name, value in found.items()}
            self.log_dict(measures, sync_dist=True, batch_size=number)
            if batch_idx == 0 and not self.trainer.sanity_checking and self.trainer.is_global_zero:
                self._show(batch)

    @override
    def configure_optimizers(self) -> Any:
        return self.build_optimizer(self.network)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # past the mixed precision's own, which does not clip for fused optimizers: they may undo a scaling of
        # gradients, and without float16 there is none
        clip = Precision.clip_gradients if self._is_fused else type(self.trainer.precision_plugin).clip_gradients
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
        clip(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def build_optimizer(self, trained: nn.Module) -> dict[str, Any]:
        """What `configure_optimizers` returns.

        Args:
            trained: Holds all parameters that are trained.
        """
        return self.optimizer.build(trained, self.trainer.max_steps, self._is_fused)

    @property
    def _is_fused(self) -> bool:
        return self.trainer.precision != "16-mixed"

    # -- helpers ------------------------------------------------------------------------------------------------

    def call_network(self, **inputs: Tensor) -> Tensor:
        """What a denoiser makes of inputs without gradients; from CUDA graphs in training, if asked for.

        Args:
            inputs: The network's own arguments, all of them tensors.
        """
        if not (self.capture_network and self.network.training and self.device.type == "cuda"):
            return self._call_network(**inputs)
        if self._captured is None:
            self._captured = CapturedPass(self._call_network, self.network.parameters(), inputs)
        return self._captured(**inputs)

    def _call_network(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs, return_dict=False)[0]

    @property
    def _schedule(self) -> LambdaLR:
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        return schedule

    def _once(self, frames: Tensor, encode: Callable[[Tensor], Encoded]) -> Encoded:
        """What is made of clips without chance, once for all steps that have the same clips.

        Args:
            frames: The clips of a batch; known again as an object.
            encode: Makes it; one thing only is kept.
        """
        if self._encoded is None or self._encoded[0] is not frames:
            self._encoded = None
            self._encoded = frames, encode(frames)
        return self._encoded[1]

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens of the captions [B, L] and of the changed ones [B, K, L]."""
        if "tokens" in batch:
            return batch["tokens"], batch["changed_tokens"]
        assert self.tokenize is not None
        tokens, changed = self.tokenize(batch["captions"], batch["changed_captions"])
        return tokens.to(self.device), changed.to(self.device)

    @contextmanager
    def _as_called_by_pipelines(self) -> Iterator[None]:
        """Runs the network in eval mode and without its compiled form, which other sizes would compile anew."""
        compiled, self.network._compiled_call_impl = self.network._compiled_call_impl, None
        try:
            yield
        finally:
            self.network._compiled_call_impl = compiled

    def _show(self, batch: Batch) -> None:
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers:
            return
        # pipelines keep their state in the format of what networks return: 16 bits would be too rough
        with torch.autocast(self.device.type, enabled=False):
            pictures = self.pictures(batch)
        if pictures is not None:
            rows = [torch.cat(list(row), dim=-1) for row in pictures.float().clamp(0, 1)]
            loggers[0].experiment.add_image("validation/pictures", torch.cat(rows, dim=-2).cpu(), self.global_step)


def counted(batch: Batch) -> int:
    """How many of a validation batch's clips count, the first ones: others make ranks have equally many batches."""
    return batch.get("counted", len(batch["frames"]))


def to_pil(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] from 0 to 1 as pipelines take it."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Makes all that is drawn within depend on the seed alone, and puts the random state back.

    Args:
        seed: Any number.
        device: Where it is drawn, besides the CPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
