"""Where the package keeps what it can make again: embedded models put together, and measured costs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "ASYNCDIFF_PL_CACHE"
"""Environment variable that names another cache folder than the user's own."""


def cache_folder() -> Path:
    """The folder: $ASYNCDIFF_PL_CACHE, else one in the user's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "asyncdiff_pl"
