"""What a pipeline is called with: a template of its arguments, filled in from each sample and joined to batches."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from asyncdiff_pl.data.sample import Sample

SOURCES = {
    "prompt": ("prompt",),
    "image": ("image",),
    "mask_image": ("mask_image",),
    "control_image": ("control_image",),
    "class_labels": ("class_label",),
    "ip_adapter_image": ("ip_adapter_image",),
}
"""Arguments that are filled in where a pipeline takes them, and by which of a sample's values."""

PER_SAMPLE = frozenset(
    {
        *("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"),
        *("image", "mask_image", "control_image", "class_labels"),
    }
)
"""Arguments that become lists where several samples share a call; all others must be equal then."""

ALONE = frozenset({"ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image"})
"""Arguments whose lists mean something else (one entry an adapter): samples that have them get calls of their own."""

OWN = frozenset({"num_inference_steps", "generator", "output_type", "return_dict", "latents"})
"""Arguments that the module itself gives."""

MANY = frozenset({"num_images_per_prompt", "num_videos_per_prompt"})
"""Arguments that would give a sample several pictures, all but one of them without noise of its own."""

NAME = re.compile(r"\{(\w+)\}")


@contextmanager
def refusals_told(name: str, arguments: Collection[str]) -> Iterator[None]:
    """Tells in a sentence that a pipeline of diffusers refuses what it is called with.

    Args:
        name: The pipeline.
        arguments: Names of what it is called with.

    Raises:
        ValueError: The pipeline's own code raised one.
    """
    try:
        yield
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__", "")).startswith("diffusers.pipelines."):
            raise
        raise ValueError(
            f"{name} refuses its call: {str(error).rstrip('.')}. It was called with {', '.join(sorted(arguments))}; "
            "model.call takes all of its arguments."
        ) from error


class CallTemplate:
    """The arguments of a pipeline's call, with names in braces for what a sample gives.

    Args:
        pipeline_class: The pipeline.
        given: Arguments as the user set them; they take the place of the defaults of `SOURCES`. A text that is exactly
            `{name}` is replaced by the sample's value, names in other texts by what they mean, and the rest is as is.
        num_control: Number of ControlNets; with several, a picture that is no list is given to each.
        has_ip_adapter: Whether an IP-Adapter is loaded, which needs pictures.
    """

    def __init__(
        self,
        pipeline_class: type[DiffusionPipeline],
        given: Mapping[str, Any],
        num_control: int = 0,
        has_ip_adapter: bool = False,
    ) -> None:
        self.name = pipeline_class.__name__
        parameters = inspect.signature(pipeline_class.__call__).parameters
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        kinds = {parameter.kind for parameter in parameters.values()}
        # diffusers' own let unknown arguments pass and ignore them
        is_foreign = pipeline_class.__module__.partition(".")[0] != "diffusers"
        self.takes_anything = is_foreign and inspect.Parameter.VAR_KEYWORD in kinds
        self.defaults = {n: p.default for n, p in parameters.items() if n != "self" and p.kind not in variable}
        """Arguments that the pipeline takes, with their defaults."""
        self.given = dict(given)
        self.num_control = num_control
        self._has_controlnet = "controlnet" in inspect.signature(pipeline_class.__init__).parameters
        self._sources = {
            name: self._sources_of(name)
            for name in SOURCES
            if name in self.defaults and name not in self.given and (name != "ip_adapter_image" or has_ip_adapter)
        }

    def _sources_of(self, name: str) -> tuple[str, ...]:
        # what ControlNet looks at is called `image` by some pipelines and `control_image` by others
        if self._has_controlnet and {name} == {"image", "control_image"} & self.defaults.keys():
            return ("control_image", "image")
        return SOURCES[name]

    # -- before there are samples -------------------------------------------------------------------------------

    @property
    def takes_pictures(self) -> bool:
        """Whether the size of a sample's picture decides that of the result."""
        values = [*self._sources, *(name for name, value in self.given.items() if value is not None)]
        return any(name in values for name in ("image", "control_image"))

    def value(self, name: str) -> Any:
        """An argument's value where it is the same for all samples: as given, else the pipeline's default."""
        return self.given.get(name, self.defaults.get(name))

    def check(self) -> None:
        """Tells arguments that the pipeline does not take.

        Raises:
            ValueError: In one sentence.
        """
        for name in self.given:
            self._check_name(name, f"{name} is set, but")

    def check_inputs(self, names: Collection[str]) -> None:
        """Tells values of samples that would go nowhere.

        Args:
            names: Names in the samples' `inputs`.

        Raises:
            ValueError: In one sentence.
        """
        for name in sorted(names):
            if name not in self._used:
                self._check_name(name, f"The data has {name}, but")

    def _check_name(self, name: str, start: str) -> None:
        if name in OWN or name in MANY:
            remedy = "images_per_prompt of the data" if name in MANY else "the model's own settings"
            raise ValueError(f"{start} the module itself gives {name}; leave it out and set {remedy}.")
        if name in self.defaults or self.takes_anything:
            return
        near = difflib.get_close_matches(name, self.arguments, 1)
        raise ValueError(
            f"{start} {self.name} takes no {name}{f' (but {near[0]})' if near else ''}: it takes "
            f"{', '.join(self.arguments)}."
        )

    @property
    def arguments(self) -> list[str]:
        """Arguments that a user may set."""
        hidden = {*OWN, *MANY}
        return [name for name in self.defaults if name not in hidden and not name.startswith("callback")]

    @property
    def _used(self) -> set[str]:
        names = {source for sources in self._sources.values() for source in sources}
        return names | set(_names_in(self.given))

    # -- a sample -----------------------------------------------------------------------------------------------

    def fill(self, sample: Sample) -> dict[str, Any]:
        """The arguments for one sample.

        Args:
            sample: Its `inputs` may hold arguments as well, which win over those that are the same for all.

        Returns:
            Values by argument; those of `PER_SAMPLE` are not in lists.

        Raises:
            ValueError: The sample lacks a value that the template names, or has one that nothing takes.
        """
        values = {"prompt": sample.text, "image": sample.image, **sample.inputs}
        filled: dict[str, Any] = {}
        for name, sources in self._sources.items():
            if name in sample.inputs and name not in sources:
                continue  # as an argument, below
            found = next((values[source] for source in sources if values.get(source) is not None), None)
            if found is None:
                raise ValueError(
                    f"Sample {sample.id} has no {sources[0]}, which {self.name} takes as `{name}`: let the data serve "
                    f"one, set `call: {{{name}: ...}}` to another of its values, or to null to go without."
                )
            filled[name] = found
        filled |= {name: _fill(value, values, sample.id) for name, value in self.given.items()}
        for name, value in sample.inputs.items():
            if name in self._used:
                continue
            self._check_name(name, f"Sample {sample.id} has {name}, but")
            filled[name] = value
        control = "control_image" if "control_image" in self.defaults else "image"
        if self.num_control > 1 and isinstance(filled.get(control), Image.Image):
            filled[control] = [filled[control]] * self.num_control
        self._set_size(filled)
        return {name: value for name, value in filled.items() if value is not None}

    def _set_size(self, filled: dict[str, Any]) -> None:
        """Makes the result as large as the picture it starts from: some pipelines would bring that to their own."""
        picture = next((filled[name] for name in ("image", "control_image") if filled.get(name) is not None), None)
        while isinstance(picture, (list, tuple)) and picture:
            picture = picture[0]
        if isinstance(picture, Image.Image) and {"height", "width"} <= self.defaults.keys():
            for name, pixels in (("width", picture.width), ("height", picture.height)):
                if filled.get(name) is None:
                    filled[name] = pixels

    # -- a batch ------------------------------------------------------------------------------------------------

    def group(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples in groups that can share a call, in order of each group's first sample."""
        groups: list[tuple[Any, list[Sample]]] = []
        for sample in samples:
            key = self._common(self.fill(sample))
            for other, members in groups:
                if key is not None and other == key:
                    members.append(sample)
                    break
            else:
                groups.append((key, [sample]))
        return [members for _, members in groups]

    def _common(self, filled: dict[str, Any]) -> Any:
        """What must be equal for samples to share a call; None for a sample that shares with none."""
        if ALONE & filled.keys():
            return None
        common = {name: value for name, value in filled.items() if name not in PER_SAMPLE}
        return common, {name: _sizes(filled[name]) for name in PER_SAMPLE & filled.keys()}

    def join(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The arguments of one call for samples of one group."""
        filled = [self.fill(sample) for sample in samples]
        joined = dict(filled[0])
        for name in PER_SAMPLE & joined.keys():
            if len(samples) > 1 or name == "class_labels":
                joined[name] = [values[name] for values in filled]
        return joined


def _fill(value: Any, values: Mapping[str, Any], sample_id: str) -> Any:
    def look_up(name: str) -> Any:
        if values.get(name) is None:
            raise ValueError(
                f"Sample {sample_id} has no {name}, which `call` names; let the data serve one, or name one of "
                f"{', '.join(key for key, known in values.items() if known is not None)}."
            )
        return values[name]

    if isinstance(value, str):
        whole = NAME.fullmatch(value)
        return look_up(whole[1]) if whole else NAME.sub(lambda match: str(look_up(match[1])), value)
    if isinstance(value, Mapping):
        return {key: _fill(entry, values, sample_id) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(entry, values, sample_id) for entry in value]
    return value


def _names_in(value: Any) -> list[str]:
    """Names in braces, at any depth."""
    if isinstance(value, str):
        return NAME.findall(value)
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [name for entry in entries for name in _names_in(entry)]


def _sizes(value: Any) -> Any:
    """Sizes of pictures, which must be equal in a batch."""
    if isinstance(value, Image.Image):
        return value.size
    return [_sizes(entry) for entry in value] if isinstance(value, (list, tuple)) else None
