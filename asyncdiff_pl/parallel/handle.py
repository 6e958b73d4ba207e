"""What `parallelize` leaves in a caller's hand: what was installed, its figures, and its removal."""

from __future__ import annotations

from collections.abc import Sequence

from asyncdiff_pl.parallel.agreement import Agreement
from asyncdiff_pl.parallel.encoders import SharedEncoding
from asyncdiff_pl.parallel.host_side import HostSide
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.patches.pipeline import PatchPipeline
from asyncdiff_pl.parallel.sharing import SharedFrames, SharedPictures
from asyncdiff_pl.parallel.stages.costs import UnitCost
from asyncdiff_pl.parallel.stages.cut import cut_hash
from asyncdiff_pl.parallel.stages.pipeline import StagePipeline
from asyncdiff_pl.parallel.stages.program import Program
from asyncdiff_pl.parallel.steps.pipeline import StepPipeline
from asyncdiff_pl.parallel.time.pipeline import TimePipeline
from asyncdiff_pl.parallel.time.solved import Solved
from asyncdiff_pl.parallel.trajectory import Trajectory
from asyncdiff_pl.sampling import Callback


class Parallel:
    """What `parallelize` installed on a denoiser.

    Args:
        pipeline: The installed stages, patches, steps or solver; None where one rank computes everything.
        agreement: What keeps the ranks equal; None in one process.
        trajectory: Where the pipeline stands.
        host_side: What keeps the CPU ahead of the GPU; None where the trajectory's owner did that.
        layout: The layout in use.
        sharing: Decoding and encoding that the ranks share out.
    """

    def __init__(
        self,
        pipeline: StagePipeline | PatchPipeline | StepPipeline | TimePipeline | None,
        agreement: Agreement | None,
        trajectory: Trajectory,
        host_side: HostSide | None,
        layout: Layout,
        sharing: Sequence[SharedFrames | SharedPictures | SharedEncoding] = (),
    ) -> None:
        self._pipeline = pipeline
        self._agreement = agreement
        self._trajectory = trajectory
        self._host_side = host_side
        self._sharing = sharing
        self.layout = layout
        self._is_removed = False

    @property
    def cut(self) -> list[list[str]] | None:
        """For each stage the names of its modules; None with 1 stage and before the first denoiser call."""
        program = self._program
        return program.cut if program else None

    @property
    def cut_hash(self) -> str:
        """Tells this cut from others; empty where there is none."""
        return cut_hash(self.cut) if self.cut else ""

    @property
    def costs(self) -> list[UnitCost] | None:
        """What each unit of the denoiser costs; None where nothing was measured, and before the first call."""
        program = self._program
        return program.costs() if program else None

    @property
    def _program(self) -> Program | None:
        return self._pipeline.program if isinstance(self._pipeline, StagePipeline) else None

    @property
    def sent_bytes(self) -> int:
        """Bytes of boundary tensors, patches' rows and moments, or estimates that this process has sent so far."""
        return self._pipeline.sent_bytes if self._pipeline else 0

    @property
    def asynchronous_steps(self) -> int:
        """Asynchronous steps that this process has taken part in so far."""
        return self._pipeline.asynchronous_steps if self._pipeline else 0

    @property
    def exact_steps(self) -> int:
        """Steps of the sample in work, or of the last one, that were computed exactly: warm-up and refreshes."""
        return self._pipeline.exact_steps if self._pipeline else self._trajectory.position

    @property
    def bytes_per_step(self) -> int:
        """Bytes of one asynchronous step: for stages over all ranks of a half, for patches and steps as sent here."""
        return self._pipeline.bytes_per_step if self._pipeline else 0

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that were recorded so far; a sample in which it grew took longer than others."""
        return self._pipeline.recordings.num_graphs if self._pipeline else 0

    @property
    def capture_refusal(self) -> str:
        """Why steps are not captured though `capture` is set; empty if they are, or before the first denoiser call."""
        return self._pipeline.recordings.refusal if self._pipeline else ""

    @property
    def solved(self) -> Solved | None:
        """What solving the steps of the last samples together came to; None where they are taken otherwise."""
        return self._pipeline.solved if isinstance(self._pipeline, TimePipeline) else None

    def watch_iterations(self, watcher: Callback | None) -> None:
        """Has someone told of each iteration of a solver; nothing happens where there is none.

        Args:
            watcher: Is told, in place of the one before; None for nobody.
        """
        if isinstance(self._pipeline, TimePipeline):
            self._pipeline.watcher = watcher

    def reset(self) -> None:
        """Forgets the sample in work, as after an interruption: the next denoiser call begins a new one."""
        self._trajectory.reset()
        if self._pipeline:
            self._pipeline.reset()

    def remove(self) -> None:
        """Takes everything off again: the denoiser then computes what it did before, to the bit.

        A second call does nothing.
        """
        if self._is_removed:
            return
        self._is_removed = True
        if self._pipeline:
            self._pipeline.remove()
        if self._agreement:
            self._agreement.remove()
            self._agreement.exchange.close()
        for shared in self._sharing:
            shared.remove()
        if self._host_side:
            # whoever gave the trajectory keeps it
            self._host_side.remove()
            self._trajectory.remove()
