"""Peak memory and utilisation of each rank's device."""

from __future__ import annotations

import dataclasses
import logging
import resource
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.roles import gather, log_folder, tensorboard
from asyncdiff_pl.callbacks.sample_table import cell, write_table

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class DeviceReport:
    """What one rank's device did during a run.

    Args:
        rank: Number of the rank in the world.
        host: Name of its machine.
        device: Name of its device.
        peak_memory_gib: Highest memory in GiB.
        memory: What was counted: `reserved on the GPU` by torch, or `resident in the process` where there is no GPU.
        utilisation_percent: Mean share of the time in which the GPU computed, in percent; None where it is unknown.
    """

    rank: int
    host: str
    device: str
    peak_memory_gib: float
    memory: str
    utilisation_percent: float | None


class UtilisationSampler:
    """Asks in a thread of its own how busy a GPU is.

    Args:
        device: The GPU.
        interval: Seconds between two questions.
    """

    def __init__(self, device: torch.device, interval: float) -> None:
        self._device = device
        self._interval = interval
        self._stopped = threading.Event()
        self._values: list[int] = []
        self._thread = threading.Thread(target=self._run, name="gpu-utilisation", daemon=True)

    def start(self) -> None:
        """Starts asking; one warning and nothing else where the driver's library is not to be had."""
        try:
            torch.cuda.utilization(self._device)
        except Exception as error:  # without the library, without its permission, on a GPU that does not tell
            log.warning("GPU utilisation is not measured (it needs `pip install nvidia-ml-py`): %s", error)
            return
        self._thread.start()

    def stop(self) -> float | None:
        """Stops asking and returns the mean in percent; None where nothing was measured."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return sum(self._values) / len(self._values) if self._values else None

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._values.append(torch.cuda.utilization(self._device))


class DeviceStats(Callback):
    """Reports the peak memory and the utilisation of every rank's device.

    On a GPU the memory is what torch reserved at most during the run; on a CPU it is the peak resident memory of the
    whole process since its start. The table is `devices.csv`; TensorBoard has `memory_gib/rank<r>` (on a CPU
    `resident_memory_gib/rank<r>`) and `gpu_utilisation_percent/rank<r>`.

    Args:
        interval: Seconds between two questions to the GPU of how busy it is.
    """

    def __init__(self, interval: float = 0.5) -> None:
        if interval <= 0:
            raise ValueError(f"interval is {interval}; give a number of seconds above 0.")
        self.interval = interval
        self.run_metrics: dict[str, float] = {}
        """On rank 0 at the end: `peak_memory_gib`, the highest of all ranks."""
        self._folder: Path | None = None
        self._sampler: UtilisationSampler | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            self._folder = log_folder(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            self._sampler = UtilisationSampler(pl_module.device, self.interval)
            self._sampler.start()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reports = gather(trainer, self._report(trainer, pl_module.device))
        if reports is None:
            return
        assert self._folder is not None
        self.run_metrics = {"peak_memory_gib": max(report.peak_memory_gib for report in reports)}
        writer = tensorboard(trainer)
        if writer is not None:
            for report in reports:
                name = "memory_gib" if report.memory == "reserved on the GPU" else "resident_memory_gib"
                writer.add_scalar(f"{name}/rank{report.rank}", report.peak_memory_gib, 0)
                if report.utilisation_percent is not None:
                    writer.add_scalar(f"gpu_utilisation_percent/rank{report.rank}", report.utilisation_percent, 0)
        write_reports(self._folder / "devices.csv", reports)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._sampler is not None:
            self._sampler.stop()

    def _report(self, trainer: Trainer, device: torch.device) -> DeviceReport:
        utilisation = self._sampler.stop() if self._sampler is not None else None
        if device.type == "cuda":
            peak, memory = torch.cuda.max_memory_reserved(device), "reserved on the GPU"
        else:
            peak, memory = peak_resident_bytes(), "resident in the process"
        host, name = socket.gethostname(), device_name(device)
        return DeviceReport(trainer.global_rank, host, name, peak / GIB, memory, utilisation)


def device_name(device: torch.device) -> str:
    """Name of a device as people know it: the GPU's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since its start, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # KiB on Linux


def write_reports(path: Path, reports: list[DeviceReport]) -> None:
    """Writes one row a rank, with the names of `DeviceReport` as columns."""
    rows = [{name: cell(value) for name, value in dataclasses.asdict(report).items()} for report in reports]
    write_table(path, rows, [field.name for field in dataclasses.fields(DeviceReport)])
