"""Putting a call of our own in place of a module's forward, and taking it off again (diffusers' hook registry)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

HOOK = "asyncdiff_pl"
"""Name of our hooks in diffusers' registry."""

Run = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called in a module's place with the module's own forward and the arguments."""


def install(module: nn.Module, run: Run) -> None:
    """Has `run` called in place of a module's forward."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(_Replacement(run), HOOK)


def uninstall(denoiser: nn.Module) -> None:
    """Gives a denoiser and all modules in it their own forward back."""
    HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(HOOK, recurse=True)
    for module in denoiser.modules():
        if hasattr(module, "_diffusers_hook") and not module._diffusers_hook.hooks:
            # the registry is ours, and so is the attribute that hides the class's own forward
            del module._diffusers_hook
            if vars(module).get("forward") == type(module).forward.__get__(module):
                del module.forward


def with_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; `inspect.signature` need not work out its signature at each call."""

    def same(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    same.__signature__ = inspect.signature(function)
    return same


def is_installed(denoiser: nn.Module) -> bool:
    """Whether a denoiser runs in stages."""
    return hasattr(denoiser, "_diffusers_hook") and denoiser._diffusers_hook.get_hook(HOOK) is not None


class _Replacement(ModelHook):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.fn_ref.original_forward, args, kwargs)
