"""Parallel in time: all steps of a sample but its first are solved together, on the ranks of a pipeline.

The pipeline around the denoiser runs on every rank as it always does. Its first step shows where the latents are in the
denoiser's input and what the pipeline makes of an estimate. When it calls the denoiser for the second one, all states
that are left are solved: each iteration's evaluations are shared out over the ranks, and every rank iterates on what
all of them gave. From there on each call of the denoiser returns the estimate that it has for the step, and what the
scheduler makes of it is replaced by the solver's state.

Sources: ParaTAA (arXiv 2402.09970) and ParaDiGMS (arXiv 2305.16317).
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from asyncdiff_pl.parallel.arguments import Inputs
from asyncdiff_pl.parallel.exchange import Exchange
from asyncdiff_pl.parallel.guidance import find_latents
from asyncdiff_pl.parallel.layout import Layout
from asyncdiff_pl.parallel.recordings import Recordings
from asyncdiff_pl.parallel.stages.settings import CompileMode
from asyncdiff_pl.parallel.stages.timestep import without_timestep
from asyncdiff_pl.parallel.steps.calls import Call, Calls, Stream
from asyncdiff_pl.parallel.steps.pipeline import FROM_LATENTS
from asyncdiff_pl.parallel.steps.place import Place
from asyncdiff_pl.parallel.steps.settings import StepSettings
from asyncdiff_pl.parallel.steps.twin import first_tensor
from asyncdiff_pl.parallel.time.combination import Combination
from asyncdiff_pl.parallel.time.evaluation import Evaluation
from asyncdiff_pl.parallel.time.settings import TimeParallel
from asyncdiff_pl.parallel.time.solved import Solved
from asyncdiff_pl.parallel.time.solving import as_states, coefficients_of, solve_after
from asyncdiff_pl.parallel.trajectory import Trajectory, TrajectoryListener
from asyncdiff_pl.sampling import Callback, StepCoefficients, read_coefficients

_REMEDY = "take stages or steps"
_KNOWN = ("model_output", "timestep", "sample", "eta", "generator", "return_dict")
"""Arguments of `scheduler.step` that a solver can do without, or knows."""


class TimePipeline(TrajectoryListener):
    """Solves the steps of samples together on the ranks of a pipeline, or plays all of these in one process.

    Args:
        denoiser: The network; its hooks are installed at once.
        trajectory: Where the pipeline stands.
        settings: How steps are solved.
        capture: Whether the denoiser's calls are recorded as CUDA graphs; None for where there is an NVIDIA GPU.
        compile: What torch compiles.
        exchange: This rank's messages; None plays all ranks in this process.
        rank: This rank.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trajectory: Trajectory,
        settings: TimeParallel,
        capture: bool | None = None,
        compile: CompileMode = "none",
        exchange: Exchange | None = None,
        rank: int = 0,
    ) -> None:
        self.trajectory = trajectory
        self.settings = settings
        self.solved: Solved | None = None
        """What the sample in work, or the last one, came to; None before its steps are solved."""
        self.watcher: Callback | None = None
        """Is told of each iteration; its states are those of all steps but the first."""
        self.asynchronous_steps = 0
        """Steps so far that were solved together."""
        self.exact_steps = 0
        """Steps of the sample in work, or of the last one, that were computed one at a time."""
        self.sent_bytes = 0
        """Bytes of noise estimates that this process has sent so far."""
        self.bytes_per_step = 0
        """Bytes that this process sent for the last sample, for each step that was solved."""
        self._exchange = exchange
        self._rank = rank
        # messages travel outside of recordings, and ranks record each for itself: their shares differ in size
        self._calls = Calls(denoiser, trajectory, StepSettings(Layout(), 1, capture, compile), None, 0)
        self._begin_sample()
        self._around_before = trajectory.around_step
        # bound once, so that it can be told from what others put in its place
        self._around = trajectory.around_step = self._around_step
        self._calls.install(self._run_denoiser)
        trajectory.subscribe(self)

    # -- handle -------------------------------------------------------------------------------------------------

    @property
    def recordings(self) -> Recordings:
        """Recordings of the denoiser's calls."""
        return self._calls.recordings

    @property
    def turns_asynchronous(self) -> bool:
        """Whether the step in work is the one before those that are solved together."""
        return self.trajectory.position == 0

    def reset(self) -> None:
        """Forgets the sample in work."""
        self._begin_sample()

    def remove(self) -> None:
        """Gives the denoiser back as it was."""
        self._begin_sample()
        self.trajectory.unsubscribe(self)
        if self.trajectory.around_step is self._around:
            self.trajectory.around_step = self._around_before
        self._calls.remove()

    # -- what the trajectory tells ------------------------------------------------------------------------------

    def on_sample_begin(self, trajectory: Trajectory) -> None:
        """Forgets the sample before, and makes sure that this one can be solved."""
        read_coefficients(trajectory.scheduler)
        self.exact_steps = 0
        self.solved = None
        self._begin_sample()
        self._calls.begin_sample()

    def on_step(self, trajectory: Trajectory, output: Any) -> None:
        """Puts the solver's state in the place of the scheduler's."""
        if trajectory.position == 0:
            self._latents = first_tensor(output)
            if trajectory.num_steps > 1:
                self._combination = self._find_combination()
        elif self.solved is not None and trajectory.position < trajectory.num_steps:
            latents = first_tensor(output)
            state = trajectory.num_steps - 1 - trajectory.position
            assert self._combination is not None
            latents.copy_(torch.cat([self.solved.latents(state)] * self._combination.repeats))
            if state == 0:
                self._ask()

    def _around_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Hears what the scheduler is given."""
        trajectory, eta = self.trajectory, self.settings.eta
        if eta is not None:
            self._give_eta(kwargs, eta)
        if trajectory.position == 0:
            self._step = self._arguments_of_step(args, kwargs)
        elif self.solved is not None and trajectory.position < trajectory.num_steps:
            output = self._arguments_of_step(args, kwargs)["model_output"]
            assert self._combination is not None and self._evaluation is not None
            estimate = self._evaluation.estimates[trajectory.num_steps - 1 - trajectory.position]
            self._doubts["guidance"].append(self._combination.differs(estimate, output))
        return self._around_before(args, kwargs)

    def _give_eta(self, kwargs: dict[str, Any], eta: float) -> None:
        scheduler = self.trajectory.scheduler
        if "eta" not in inspect.signature(type(scheduler).step).parameters:
            raise ValueError(
                f"eta is {eta}, and the step of {type(scheduler).__name__} takes none; leave it null for the "
                "scheduler's own, or take the scheduler ddim."
            )
        # in each step, so that the scheduler draws the noise that is foreseen
        kwargs["eta"] = eta

    def _arguments_of_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        scheduler = self.trajectory.scheduler
        signature = inspect.signature(type(scheduler).step)
        bound = signature.bind(scheduler, *args, **kwargs).arguments
        named = dict([*bound.items()][1:])
        for name, value in named.items():
            # a tensor is no default, and is not to be compared with one
            is_plain = not isinstance(value, Tensor) and value == signature.parameters[name].default
            if name not in _KNOWN and not is_plain:
                raise ValueError(
                    f"The step of {type(scheduler).__name__} is given {name}, which solving steps together does not "
                    f"know of: {_REMEDY}."
                )
        return named

    def _begin_sample(self) -> None:
        self._given: Inputs | None = None
        """The denoiser's arguments in the exact step."""
        self._signature: Any = None
        self._estimate: Tensor | None = None
        """What it gave."""
        self._step: dict[str, Any] = {}
        """Arguments of the scheduler's step after it."""
        self._latents: Tensor | None = None
        """What the scheduler made of it."""
        self._combination: Combination | None = None
        self._evaluation: Evaluation | None = None
        self._doubts: dict[str, list[Tensor]] = {"guidance": [], "inputs": []}
        """Whether the pipeline did something else than in the exact step, to be read at the sample's end."""
        self._calls.begin_streams()

    # -- calls of the denoiser ----------------------------------------------------------------------------------

    def _run_denoiser(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trajectory = self.trajectory
        if trajectory.call > 0:
            raise ValueError(
                "The pipeline calls the denoiser more than once a step, and solving steps together knows one call: "
                f"{_REMEDY}."
            )
        args, kwargs = self._calls.in_one_form(args, kwargs)
        if trajectory.position == 0:
            estimate = self._run_first(call, args, kwargs)
        elif trajectory.position < trajectory.num_steps:
            if self.solved is None:
                self._solve(call)
            self._look(args, kwargs)
            assert self._evaluation is not None
            estimate = self._evaluation.estimates[trajectory.num_steps - 1 - trajectory.position]
        else:
            raise ValueError(
                f"The pipeline takes more steps than the {trajectory.num_steps} that its scheduler announced: "
                f"{_REMEDY}."
            )
        spec = next(iter(self._calls.streams.values())).result
        assert spec is not None
        return tree_unflatten([estimate], spec)

    def _run_first(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The exact step, on every rank."""
        named = self._calls.named(args, kwargs)
        elsewhere = [name for name in FROM_LATENTS if named.get(name) is not None]
        if elsewhere:
            raise ValueError(
                f"The denoiser is given {elsewhere[0]}, which a ControlNet makes from a step's latents; all steps are "
                "solved together before their latents are there: take stages or cfg."
            )
        self.exact_steps = 1
        self._signature = self._calls.signature_of(args, kwargs)
        key = len(find_latents(self._calls.forward, args, kwargs)) if self._calls.keeps_shapes else 0
        stream = self._calls.streams.setdefault(key, Stream())
        if stream.signature != self._signature:
            self._calls.fit_out(stream, self._signature, args, kwargs)
        self._given = args, kwargs
        (self._estimate,) = self._calls.compute(stream, call, args, kwargs)
        return self._estimate

    def _find_combination(self) -> Combination:
        """Learns from the exact step what the pipeline does around the denoiser; the CPU waits for the device."""
        assert self._given is not None and self._estimate is not None
        given = find_latents(self._calls.forward, *self._given)
        noise = as_states(self._step["sample"], self._coefficients().latent_scales[-1])
        place = Place.find(given, noise)
        if not self._all_agree(place is not None):
            raise ValueError(
                "In the first step the denoiser was not given the scheduler's latents, scaled and repeated for "
                f"guidance: solving steps together cannot put others in their place; {_REMEDY}."
            )
        assert place is not None
        found = Combination.find(place, given, self._estimate, self._step["model_output"])
        if not self._all_agree(found is not None):
            raise ValueError(
                "The first step's model output is not u + s (c - u) of the denoiser's estimates u and c, as with "
                f"guidance_rescale: solving steps together knows no other guidance; turn that off, or {_REMEDY}."
            )
        assert found is not None
        if self._exchange is not None and found.scale is not None:
            # ranks that differed in the last bit might come to differ in when they have converged
            self._exchange.broadcast([found.scale], 0)
        return found

    def _all_agree(self, holds: bool) -> bool:
        return holds if self._exchange is None else self._exchange.all_agree(holds)

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes whether the denoiser was given what the solver gave it."""
        assert self._given is not None and self._combination is not None and self.solved is not None
        forward, position = self._calls.forward, self.trajectory.position
        if self._calls.signature_of(args, kwargs) != self._signature:
            raise ValueError(
                f"The denoiser's inputs changed at step {position} of a sample, and all its steps were solved with the "
                f"first step's: {_REMEDY}."
            )
        first, given = find_latents(forward, *self._given), find_latents(forward, args, kwargs)
        states = self.solved.trajectory[:, self.trajectory.num_steps - position]
        expected = self._combination.place.filled(first, states)
        self._doubts["inputs"].append(Place(len(given), 1).differs(given, expected))
        before, now = (tree_leaves(without_timestep(forward, *each)) for each in (self._given, (args, kwargs)))
        for old, new in zip(before, now, strict=True):
            if isinstance(new, Tensor) and new is not old and new is not given:
                self._doubts["inputs"].append((new != old).any())

    def _ask(self) -> None:
        """Reads, at the end of a sample, whether it was solved with what the pipeline did."""
        doubts, self._doubts = self._doubts, {}
        device = find_latents(self._calls.forward, *self._given).device  # type: ignore[misc]
        read = torch.stack([torch.stack(each).any().to(device) for each in doubts.values()]).tolist()
        if read[0]:
            raise ValueError(
                "Guidance changed in the course of a sample, whose steps were solved together with the first step's: "
                f"{_REMEDY}."
            )
        if read[1]:
            raise ValueError(
                "The pipeline, or a callback, changed latents or other inputs of the denoiser in the course of a "
                f"sample, whose steps were solved together before: {_REMEDY}."
            )

    # -- the solution -------------------------------------------------------------------------------------------

    def _coefficients(self) -> StepCoefficients:
        """All steps of the sample."""
        return coefficients_of(self.trajectory.scheduler, self._step, self.trajectory.num_steps)

    @torch.no_grad()
    def _solve(self, call: Call) -> None:
        """Solves all steps that are left."""
        assert self._given is not None and self._estimate is not None
        assert self._latents is not None and self._combination is not None
        settings, combination = self.settings, self._combination
        coefficients = self._coefficients()
        number = len(coefficients) - 1
        self._evaluation = evaluation = Evaluation(
            self._calls,
            combination,
            call,
            self._given,
            self._estimate,
            number,
            settings.ranks,
            settings.batch,
            self._exchange,
            self._rank,
        )
        latents = self._latents[: combination.place.samples].clone()
        scheduler = type(self.trajectory.scheduler).__name__
        solution = solve_after(evaluation, latents, self._step, coefficients, settings, self.watcher)
        noise = as_states(self._step["sample"][: len(latents)], coefficients.latent_scales[-1])
        self.solved = Solved.of(solution, noise, coefficients, scheduler)
        self.asynchronous_steps += number
        self.sent_bytes += evaluation.sent_bytes
        self.bytes_per_step = evaluation.sent_bytes // number
