"""A denoiser's arguments by name: a pipeline gives some by their place, and halves of a guidance batch are given so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a denoiser call."""


class Arguments:
    """Finds and replaces single arguments of a function's calls.

    Args:
        function: What is called; its signature names the arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.names = list(inspect.signature(function).parameters)
        """In the order of their places."""

    def find(self, inputs: Inputs, name: str) -> Any:
        """An argument of a call.

        Args:
            inputs: The call's arguments.
            name: Name of the argument.

        Returns:
            None if it is not given, or the function has none of that name.
        """
        args, kwargs = inputs
        place = self._place(name)
        return args[place] if place is not None and place < len(args) else kwargs.get(name)

    def replace(self, inputs: Inputs, name: str, value: Any) -> Inputs:
        """A call's arguments with another one in the place of one, which stands where it stood.

        Args:
            inputs: The call's arguments.
            name: Name of the argument.
            value: The other one.
        """
        args, kwargs = inputs
        place = self._place(name)
        if place is not None and place < len(args):
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, kwargs | {name: value}

    def _place(self, name: str) -> int | None:
        return self.names.index(name) if name in self.names else None
