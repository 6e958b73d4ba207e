"""The data module that serves samples to a predict run: subclass it for a new kind of data.

Lightning would share a `DataLoader` out over the ranks with a sampler of its own, which fails where there are fewer
samples than data groups, and it skips all hooks of a rank without batches, so that the others wait for it at the end.
What `predict_dataloader` returns here is therefore no `DataLoader` but an iterable over one. Lightning takes it as it
is: it is already shared out, and a group that has nothing to do gets one empty batch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from asyncdiff_pl.data.sample import Sample, StepSweep, UnreadableSample
from asyncdiff_pl.data.workers import worker_settings


def share_out(num_entries: int, batch_size: int, num_groups: int, group: int) -> list[list[int]]:
    """Batches of one data group: entry i belongs to group i % num_groups.

    Args:
        num_entries: Number of entries of all groups together.
        batch_size: Entries in a batch; the last batch may have fewer.
        num_groups: Number of data groups.
        group: Which of them.

    Returns:
        The entries' indices, batch by batch; a group without entries gets one empty batch.
    """
    entries = list(range(group, num_entries, num_groups))
    return [entries[start : start + batch_size] for start in range(0, max(1, len(entries)), batch_size)]


class SampleBatches:
    """The batches of one data group: lists of samples, without those that cannot be read.

    Args:
        entries: The samples of all groups.
        batches: This group's batches, as indices into `entries`.
        num_workers: Number of processes that read ahead; 0 reads in this process.
        on_unreadable: Called in this process with each sample that cannot be read.
    """

    def __init__(
        self,
        entries: StepSweep,
        batches: Sequence[Sequence[int]],
        num_workers: int,
        on_unreadable: Callable[[UnreadableSample], None],
    ) -> None:
        dataset = _Caught(entries)
        self._loader = DataLoader(
            dataset, batch_sampler=batches, collate_fn=list, **worker_settings(dataset, num_workers)
        )
        self._on_unreadable = on_unreadable
        self.step_counts = [[entries.entries[index][0] for index in batch] for batch in batches]
        """For each batch the step counts of its samples, known without reading them; None takes the module's."""

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for batch in self._loader:
            samples: list[Sample] = []
            for item in batch:
                if isinstance(item, UnreadableSample):
                    self._on_unreadable(item)
                else:
                    samples.append(item)
            yield samples


class _Caught(Dataset["Sample | UnreadableSample"]):
    """Gives the error in place of a sample that cannot be read, so that it is counted in the main process."""

    def __init__(self, entries: Dataset[Sample]) -> None:
        self.entries = entries

    def __getitem__(self, index: int) -> Sample | UnreadableSample:
        try:
            return self.entries[index]
        except UnreadableSample as error:
            return error


class SampleDataModule(LightningDataModule, ABC):
    """Serves samples in batches: `list[Sample]`, once for each step count that the module names.

    A subclass says what `samples` there are and their `ids`; a dataset that raises `UnreadableSample` loses that
    sample and no more. With `num_workers` above 0 the dataset must be picklable. A batch may be empty.

    Args:
        batch_size: Number of samples that the pipeline gets in one call.
        num_workers: Number of processes that read samples ahead; 0 reads them in the main process.
    """

    def __init__(self, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.unreadable: dict[str, str] = {}
        """Files that this process could not read, and why; each once, however many step counts there are."""
        self._done: set[tuple[int | None, str]] = set()

    # -- what a subclass says -----------------------------------------------------------------------------------

    @abstractmethod
    def samples(self) -> Dataset[Sample]:
        """The samples; an element is read when it is asked for and may raise `UnreadableSample`."""

    @abstractmethod
    def ids(self) -> Sequence[str]:
        """The ids of `samples()`, in order, known without reading them."""

    def check(self) -> None:
        """Tells bad arguments and missing files early: cheap, and called before any weight is loaded.

        Raises:
            ValueError: In one sentence, with the value and the remedy.
        """
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give a number from 1 up.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; give 0 or a number of processes.")

    # -- what a run asks ----------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Number of samples, whatever the step counts and what is done."""
        return len(self.ids())

    @property
    def num_unreadable(self) -> int:
        """Number of samples that this process could not read so far, each counted once."""
        return len(self.unreadable)

    def exclude(self, keys: Collection[tuple[int | None, str]]) -> None:
        """Leaves out what an earlier start of the run has done.

        Args:
            keys: Keys `(steps, id)` of done samples, the same on all ranks; call it before the data loader is built,
                in a callback's `setup` say.
        """
        self._done |= set(keys)

    @override
    def setup(self, stage: str) -> None:
        """Checks the arguments and the files."""
        self.check()

    @override
    def predict_dataloader(self) -> SampleBatches:
        """This data group's batches of all samples with all step counts, less those that are done.

        The groups are those of the strategy's `distributed_sampler_kwargs`, whatever the trainer's
        `use_distributed_sampler` says: work that two groups did would be done twice.
        """
        steps = getattr(self.trainer.lightning_module, "num_inference_steps", None) if self.trainer else None
        sweep = StepSweep(self.samples(), self.ids(), steps if isinstance(steps, list) else [steps], self._done)
        groups = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        num_groups = groups["num_replicas"]
        if not len(sweep):
            rank_zero_info(f"Nothing is left to do: all of the {self.num_samples} samples are done.")
        elif len(sweep) < num_groups:
            rank_zero_warn(
                f"{len(sweep)} samples are to be done by {num_groups} data groups: {num_groups - len(sweep)} of them "
                "have nothing to do."
            )
        batches = share_out(len(sweep), self.batch_size, num_groups, groups["rank"])
        return SampleBatches(sweep, batches, self.num_workers, self._leave_out)

    def _leave_out(self, error: UnreadableSample) -> None:
        if error.source in self.unreadable:
            return
        self.unreadable[error.source] = error.reason
        # all ranks of a group read the same files: one of them tells
        if getattr(self.trainer.strategy, "is_group_leader", True) if self.trainer else True:
            warnings.warn(f"{error}; it is left out.", stacklevel=2)
