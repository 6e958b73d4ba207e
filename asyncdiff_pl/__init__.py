"""Fast diffusion inference on several GPUs, as a PyTorch Lightning package."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncdiff_pl.parallel import Parallel, WarmUp, parallelize

__version__ = "0.1.0"
__all__ = ["Parallel", "WarmUp", "__version__", "parallelize"]


def __getattr__(name: str) -> Any:
    """Imports torch and diffusers only when something of them is asked for."""
    if name in ("Parallel", "WarmUp", "parallelize"):
        from asyncdiff_pl import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
