"""The run's tables: a row a sample while it runs, a row for each step count at its end; a stopped run goes on."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from asyncdiff_pl.callbacks.configuration import COLUMNS, configuration, difference, settings
from asyncdiff_pl.callbacks.frame_files import write_atomically
from asyncdiff_pl.callbacks.roles import (
    data_rank,
    gather,
    is_leader,
    log_folder,
    run_metrics,
    step_metrics,
    tensorboard,
)
from asyncdiff_pl.callbacks.sample_table import (
    PartFile,
    Row,
    cell,
    gather_parts,
    key_of,
    part_path,
    read_table,
    row_of,
    summarise,
    write_table,
)
from asyncdiff_pl.metrics.paired import Mean
from asyncdiff_pl.models.base import Prediction
from asyncdiff_pl.parallel.stages.cut import cut_hash

log = logging.getLogger(__name__)

RUN_METRICS = ("peak_memory_gib", "mib_per_step")

REFERENCE = {"avg_psnr_db": "PSNR dB", "avg_ssim": "SSIM", "avg_lpips": "LPIPS"}
"""Averages that the terminal's table shows where they are, and their titles."""

DISTANCES = ("fid", "frechet_distance", "precision", "recall")
"""What the names of measures against real pictures start with; the terminal's table shows them as well."""


class Results(Callback):
    """Writes `samples.csv` and `results.csv`, and lets a run that was stopped go on where it was.

    A sample's row is on disk after all other callbacks have seen it (this one moves itself to the end of the trainer's
    callbacks) and its frames are written, which may be one batch later; a run that is stopped keeps all of them, one
    that is killed makes the last two batches again. A run into a log folder that holds samples leaves those out and
    goes on; with other settings than `settings.json` there, it is an error. `results.csv` is about all samples of the
    folder: one row for each step count, times over timed samples only, standard deviations of the population.

    The columns `peak_memory_gib` and `mib_per_step`, and those that callbacks measured of all samples of a step count
    together, are those of the latest run that made samples of the step count.
    """

    def __init__(self) -> None:
        self.done: set[tuple[int, str]] = set()
        """Keys `(steps, id)` of the samples that earlier runs into this folder made."""
        self._folder: Path | None = None
        self._part: PartFile | None = None
        self._waiting: deque[tuple[Row, Sequence[Future[None]]]] = deque()

    @property
    def folder(self) -> Path:
        """Log folder of the run."""
        if self._folder is None:
            raise RuntimeError("The log folder is known only after `setup()`.")
        return self._folder

    # -- what was done before -----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        # a new list: Lightning is walking through the old one just now
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]
        self._folder = log_folder(trainer)
        self._part = PartFile(part_path(self.folder, data_rank(trainer)))
        self._hand_over_choices(trainer)
        self._refuse_other_settings(trainer, pl_module, complete=False)
        rows = gather_parts(self.folder) if trainer.is_global_zero else []
        self.done = set(trainer.strategy.broadcast([key_of(row) for row in rows]))
        if not self.done:
            return
        if hasattr(trainer.datamodule, "exclude"):
            trainer.datamodule.exclude(self.done)
            _say(trainer, f"{len(self.done)} samples are done in {self.folder}: going on with the others.")
        else:
            _say(trainer, f"{len(self.done)} samples are done in {self.folder}, but the data cannot leave them out.")

    def _hand_over_choices(self, trainer: Trainer) -> None:
        """Gives the strategy what an earlier run into this folder chose: its layout and its cut."""
        if not hasattr(trainer.strategy, "keep"):
            return
        names = ("layout.json", "cut.json")
        found = [_read(self.folder / name) for name in names] if trainer.is_global_zero else None
        trainer.strategy.keep(*trainer.strategy.broadcast(found))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a layout that was chosen, say, is known only now
        self._refuse_other_settings(trainer, pl_module, complete=True)
        choice = getattr(trainer.strategy, "choice", None)
        if trainer.is_global_zero:
            _write(self.folder / "settings.json", settings(trainer, pl_module))
        if trainer.is_global_zero and choice is not None and not (self.folder / "layout.json").exists():
            _write(self.folder / "layout.json", choice.as_json())

    def _refuse_other_settings(self, trainer: Trainer, pl_module: LightningModule, complete: bool) -> None:
        problem = None
        if trainer.is_global_zero:
            problem = difference(self.folder, settings(trainer, pl_module), complete)
        # all ranks stop for the same reason
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)

    # -- samples ------------------------------------------------------------------------------------------------

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Sequence[Prediction],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._part is not None
        if is_leader(trainer):
            for prediction in outputs:
                self._waiting.append((row_of(prediction), prediction.pending))
            self._append_finished()
        handle = getattr(trainer.strategy, "handle", None)
        cut = getattr(handle, "cut", None)
        path = self.folder / "cut.json"
        if cut and trainer.is_global_zero and not path.exists():
            # as the strategy takes it back, to run the same cut on other shapes
            _write(path, cut)
            costs = getattr(handle, "costs", None)
            if costs:
                _write(self.folder / "costs.json", [dataclasses.asdict(cost) for cost in costs])

    def _append_finished(self, wait: bool = False) -> None:
        """Writes the rows of samples that are finished, in order; those that never will be get none."""
        assert self._part is not None
        finished = []
        while self._waiting and (wait or all(future.done() for future in self._waiting[0][1])):
            row, pending = self._waiting.popleft()
            if all(future.exception() is None for future in pending):
                finished.append(row)
        if finished:
            # at once: a disk takes its time for each write that it is waited for, and small pictures come in hundreds
            self._part.append(*finished)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._part is None:
            return
        self._append_finished(wait=True)
        self._part.close()
        if self._part.rows or self.done or isinstance(exception, KeyboardInterrupt):
            _say(trainer, f"Stopped; what is done is kept. Go on with: --resume {self.folder}")

    # -- step counts --------------------------------------------------------------------------------------------

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._part is not None
        self._append_finished(wait=True)
        self._part.close()
        # the rows themselves meet, not only their files: data groups need not share a disk
        found = gather(trainer, (self._part.rows, list(getattr(trainer.datamodule, "unreadable", ()))))
        if found is None:
            return
        new = [row for rows, _ in found for row in rows]
        unreadable = {source for _, sources in found for source in sources}
        rows = gather_parts(self.folder, new)
        results = self._results(trainer, pl_module, rows, {int(row["steps"]) for row in new})
        columns = dict.fromkeys(name for row in results for name in row)
        write_table(self.folder / "results.csv", results, list(columns))
        writer = tensorboard(trainer)
        for row in results:
            for name in (column for column in row if column.startswith("avg_")):
                if writer is not None and row[name]:
                    writer.add_scalar(f"results/{name}", float(row[name]), int(row["steps"]))
            if row["timed_samples"] == "0":
                log.warning(
                    "steps=%s: the time cells are empty, since no sample was timed (a process's first call is not, "
                    "nor is the first of each shape: of a prompt's length, with some pipelines).",
                    row["steps"],
                )
        if unreadable:
            _say(trainer, f"{len(unreadable)} of the images could not be read and were left out.")
        _say(trainer, report(results))
        _say(trainer, f"results: {self.folder}")

    def _results(self, trainer: Trainer, pl_module: LightningModule, rows: Sequence[Row], made: set[int]) -> list[Row]:
        before = {int(row["steps"]): row for row in read_table(self.folder / "results.csv")}
        described = {name: cell(value) for name, value in configuration(trainer, pl_module).items()}
        if not described["cut"] and (self.folder / "cut.json").exists():
            # all was done before: this process never cut anything
            described["cut"] = cut_hash(json.loads((self.folder / "cut.json").read_text(encoding="utf-8")))
        results = []
        for steps, averages in summarise(rows).items():
            kept = before.get(steps, {}) if steps not in made else {}
            measured = run_metrics(trainer) | step_metrics(trainer).get(steps, {})
            run = {name: kept.get(name) or cell(measured.get(name)) for name in (*RUN_METRICS, *measured)}
            results.append({**kept, **averages, **run, **{name: described[name] for name in COLUMNS}, **described})
        return results


def report(results: Sequence[Row]) -> str:
    """A small table for the terminal: steps, score, seconds, step latency, and how near the reference's frames are."""
    extra = {name: title for name, title in REFERENCE.items() if any(row.get(name) for row in results)}
    extra |= {name: name for row in results for name in row if name.startswith(DISTANCES) and row[name]}
    lines = [("steps", "samples", "score", "seconds", "ms a step", *extra.values())]
    for row in results:
        score, seconds = (
            " ± ".join(filter(None, Mean(float(row[f"avg_{name}"]), float(row[f"std_{name}"])).texts()))
            if row[f"avg_{name}"]
            else "-"
            for name in ("score", "time")
        )
        latency = f"{float(row['avg_step_latency_ms']):.4g}" if row["avg_step_latency_ms"] else "-"
        others = (f"{float(row[name]):.4g}" if row.get(name) else "-" for name in extra)
        lines.append((row["steps"], row["samples"], score, seconds, latency, *others))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    if results and results[0]["scorer"]:
        table.append(f"score: {results[0]['scorer']}")
    return "\n".join(table)


def _read(path: Path) -> Any:
    """What a JSON file holds; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, flush=True)
