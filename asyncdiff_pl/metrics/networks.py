"""Networks that metrics need: how their weights are fetched, and what is said where they cannot be had."""

from __future__ import annotations

import torch
from torch import Tensor

FETCH = "fetch"
"""In place of a path: the weights are fetched, and kept in torch's cache."""


class MissingNetwork(Exception):
    """A network cannot be had here, so its column is left out; the message says why and what helps."""


def fetch_weights(url: str, what: str) -> dict[str, Tensor]:
    """Weights from torch's cache, or from where their authors keep them.

    Args:
        url: Address of the file; its name ends with the first digits of its hash, which are checked.
        what: What is missing without them, for the message.

    Raises:
        MissingNetwork: They are not in the cache and could not be fetched.
    """
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    # no network, a proxy's answer in place of the file, no room
    except (OSError, RuntimeError) as error:
        raise MissingNetwork(
            f"{what} could not be fetched ({' '.join(str(error).split())}); give the path of a local copy of "
            f"{url.rpartition('/')[2]}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
