"""How many bytes the ranks of a pipeline exchange in a denoising step."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import data_rank, gather, tensorboard

MIB = 2**20


class Traffic(Callback):
    """Reports what every rank sends in one asynchronous step, or in any step of an exact mode, in MiB.

    The strategy counts: its `traffic()` gives the `sent_bytes` and the asynchronous `steps` so far; a strategy without
    it exchanges nothing. TensorBoard has `traffic_mib_per_step/rank<r>` and, for the ranks of one pipeline together,
    `traffic_mib_per_step/pipeline`.
    """

    def __init__(self) -> None:
        self.run_metrics: dict[str, float] = {}
        """On rank 0 at the end: `mib_per_step`, the sum over the ranks of one pipeline."""

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = gather(trainer, (data_rank(trainer), mib_per_step(trainer)))
        if ranks is None:
            return
        total = sum(sent for group, sent in ranks if group == 0)
        self.run_metrics = {"mib_per_step": total}
        writer = tensorboard(trainer)
        if writer is not None:
            for rank, (_, sent) in enumerate(ranks):
                writer.add_scalar(f"traffic_mib_per_step/rank{rank}", sent, 0)
            writer.add_scalar("traffic_mib_per_step/pipeline", total, 0)


def mib_per_step(trainer: Trainer) -> float:
    """MiB that this rank sends in an asynchronous step, in the mean over the steps so far; 0 before the first."""
    if not hasattr(trainer.strategy, "traffic"):
        return 0.0
    counted = trainer.strategy.traffic()
    return counted["sent_bytes"] / MIB / counted["steps"] if counted["steps"] else 0.0
