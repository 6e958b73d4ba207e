"""Whether a picture finds its own text among others: how often the true text has the highest similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ranks_first(similarity: Tensor) -> Tensor:
    """Whether each picture is more similar to its true text than to every other candidate; a tie is a miss.

    Args:
        similarity: [B, 1 + N]: for each picture the similarity of its true text, then those of N others; others that
            are not a number or minus infinity are left out.

    Returns:
        [B], bool.

    Raises:
        ValueError: There are no others.
    """
    if similarity.ndim != 2 or similarity.shape[1] < 2:
        raise ValueError(f"A rank needs similarities [B, 1 + N] with N from 1 up; given is {tuple(similarity.shape)}.")
    others = similarity[:, 1:].nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)
    return similarity[:, 0] > others.amax(1)


def ranks_first_among(similarity: Tensor, others: Tensor) -> Tensor:
    """Whether picture i is more similar to text i than to each of its chosen other texts; a tie is a miss.

    Args:
        similarity: [B, T], T from B up: pictures by texts; text i is picture i's.
        others: [B, N], int64: for each picture the other texts' indices, as `choose_others` gives them.

    Returns:
        [B], bool.
    """
    return ranks_first(torch.cat([similarity.diagonal()[:, None], similarity.gather(1, others)], dim=1))


def choose_others(texts: Sequence[str], number: int, seed: int = 0) -> Tensor:
    """Chooses for each text others of the list at random, none of them the same in words.

    Args:
        texts: B texts.
        number: How many others each text gets, N.
        seed: Seed of the choice.

    Returns:
        [B, N], int64, on the CPU: indices of texts; no index comes twice in a row.

    Raises:
        ValueError: A text has fewer than `number` others.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for text in texts:
        order = torch.randperm(len(texts), generator=generator).tolist()
        row = [index for index in order if texts[index] != text][:number]
        if len(row) < number:
            raise ValueError(
                f"There are only {len(row)} texts other than {text!r}, but {number} are asked for; give more texts."
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)
