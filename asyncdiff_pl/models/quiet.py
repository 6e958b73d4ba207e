"""What diffusers and transformers say while they load, which nobody can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet_libraries(only_if: bool = True) -> Iterator[None]:
    """Keeps loading bars and hints of diffusers and transformers off the terminal.

    Args:
        only_if: If false, nothing changes.
    """
    if not only_if:
        yield
        return
    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bar) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()
