"""Colours: those of objects, those of backgrounds, and which objects would not stand out from which background."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import BACKGROUND_COLOURS, BACKGROUNDS, COLOURS

OBJECT_COLOURS = {
    "red": "d8232f",
    "orange": "f58216",
    "yellow": "fbd61f",
    "green": "2fa044",
    "cyan": "22c3d6",
    "blue": "2452cf",
    "purple": "7d2fb4",
    "pink": "f77fb4",
    "brown": "7a4a26",
    "white": "f4f3ee",
}
# stripes and dots: light ones on dark colours and dark ones on light colours
OBJECT_ACCENTS = {
    "red": "ffe9dc",
    "orange": "fff1dc",
    "yellow": "5d4a1e",
    "green": "eafbe0",
    "cyan": "124a5e",
    "blue": "dfeaff",
    "purple": "f1e2ff",
    "pink": "7c2450",
    "brown": "f5e3cb",
    "white": "3d4757",
}

# name: sky at the top, sky at the bottom, far ground, near ground at its far end and in front, pattern, light
PALETTES: dict[str, dict[str, str]] = {
    "gradient": {
        "blue": "6fa8dc d9ecfa 000000 000000 000000 ffffff ffffff",
        "green": "7fbf8e e6f4d9 000000 000000 000000 ffffff ffffff",
        "pink": "e996b0 fde7e6 000000 000000 000000 ffffff ffffff",
        "purple": "9a86cf ece3f8 000000 000000 000000 ffffff ffffff",
        "gray": "7d8792 e3e7ea 000000 000000 000000 ffffff ffffff",
        "orange": "eda160 fdebcf 000000 000000 000000 ffffff ffffff",
    },
    "spotlight": {
        "blue": "16305a 1d3c6e 000000 000000 000000 ffffff 86b6e8",
        "green": "12402f 184f3a 000000 000000 000000 ffffff 93d0a4",
        "red": "541520 64202a 000000 000000 000000 ffffff e89a8e",
        "purple": "2d1d55 3a2768 000000 000000 000000 ffffff ad94e6",
        "gray": "262a30 333941 000000 000000 000000 ffffff bcc6cf",
    },
    "stripes": {
        "blue": "8fbfe6 9fcaeb 000000 000000 000000 c6e0f5 ffffff",
        "green": "97cf9f a5d6aa 000000 000000 000000 cdebc9 ffffff",
        "pink": "f0a9bd f3b6c6 000000 000000 000000 fbdae0 ffffff",
        "yellow": "efd27c f1d88c 000000 000000 000000 f9ebbd ffffff",
        "gray": "a4adb6 b0b8c0 000000 000000 000000 d3d9de ffffff",
        "purple": "b3a1de bcade2 000000 000000 000000 dcd2f1 ffffff",
    },
    "checkered floor": {
        "blue": "b9cfe4 e4edf5 000000 6d9ace 3f74b8 eaf1f8 ffffff",
        "red": "e6cfc2 f7ebe3 000000 cf7a74 b24848 f8ece6 ffffff",
        "green": "c4dcc9 e9f4e8 000000 7ab88b 468f5d ecf6ea ffffff",
        "gray": "bcc2c9 e2e5e9 000000 80868f 4d535c e8ebee ffffff",
        "purple": "cfc5e2 efe9f7 000000 a08bc8 6f55a5 f0eaf8 ffffff",
    },
    "hills": {
        "green": "7db9e8 dff0f7 9ccf8f 79bf63 3f8f45 ffffff fff6d8",
        "blue": "9cc4e4 eaf3f8 a7c6dd 7ba7cb 3f6f9f ffffff fff6d8",
        "yellow": "8fc3ea f4f3e0 ecd58a e2c05a b98f2f ffffff fff6d8",
        "purple": "d9a4c4 fae3dc bba0d2 9379bd 5c4590 ffffff fff0dc",
        "orange": "a8cbe0 f8ead6 efb67f dd8b4b a85a2c ffffff fff0dc",
    },
    "mountains": {
        "gray": "86b4dc e3eef5 aab4be 7e8893 4d555f ffffff fff6d8",
        "blue": "a9cfea f1f6f8 8fb2d3 587fae 2d4f80 ffffff fff6d8",
        "brown": "a3cbe2 f5efe2 c9a888 9f7753 6b4a30 ffffff fff6d8",
        "purple": "f0b5a8 fce6d2 b292c0 84649f 4d3670 ffffff fff0dc",
        "green": "a9d3e6 eef6ee 93bda0 5f9677 2f6148 ffffff fff6d8",
    },
    "sea": {
        "blue": "8cc6ee e6f4fb 000000 4f9fd6 1f5fa6 bfe2f6 ffffff",
        "green": "a8d8d6 eef8f0 000000 5dbd9f 1e7f6c c4efdc ffffff",
        "gray": "a2adb8 dfe5ea 000000 8794a1 4a5764 c5cfd8 ffffff",
        "purple": "e3b1cf fbe4dc 000000 9d84c9 5a4391 d9c6ee ffffff",
    },
    "sunset": {
        "orange": "e0663a fdc66f 000000 a3503c 4a2435 ffd18a fff0b8",
        "pink": "b04f90 fba8a4 000000 8c4678 3d2150 ffc4bd ffe9cf",
        "purple": "4a3488 d38fc0 000000 5a3f8c 271d4c e3b5dc ffdfd0",
        "red": "8e1f35 f2805c 000000 7c2a38 38141f ffab86 ffd99a",
        "yellow": "e9a53c fdec9c 000000 b98a3c 5c4524 fff0b0 fffbe0",
    },
    "clouds": {
        "blue": "5ba4e2 a9d3f2 000000 000000 000000 ffffff ffffff",
        "pink": "e58fb4 f8c3cc 000000 000000 000000 fff1ee ffffff",
        "orange": "ee9a5c f9cb94 000000 000000 000000 fff3e0 ffffff",
        "purple": "8775c8 bfabe2 000000 000000 000000 f4ecfb ffffff",
        "gray": "7f8a96 aab3bc 000000 000000 000000 eceff2 ffffff",
    },
    "night sky": {
        "blue": "0b1740 2a4a8c 12204a 0c1636 070d22 fff8dc ffffff",
        "purple": "1c0f40 5a3590 231450 170c38 0e0722 fff1e8 ffffff",
        "green": "06231f 1f6b5a 0a332c 06231f 041512 f4ffe4 ffffff",
        "gray": "14161b 474d58 1e2128 15171c 0c0d10 ffffff ffffff",
        "red": "2b0a18 7a2440 381022 250a17 16060e fff0dc ffffff",
    },
    "blurred lights": {
        "blue": "122447 1d3f73 000000 000000 000000 8fc6ff ffffff",
        "green": "0f3326 1b5440 000000 000000 000000 a5efb4 ffffff",
        "purple": "27164a 44287a 000000 000000 000000 d0a8ff ffffff",
        "orange": "46220e 73401a 000000 000000 000000 ffc987 ffffff",
        "pink": "451530 74264f 000000 000000 000000 ffaed0 ffffff",
    },
}
MAX_PALETTES = max(len(palettes) for palettes in PALETTES.values())


def _rgb(code: str) -> list[float]:
    return [int(code[start : start + 2], 16) / 255 for start in (0, 2, 4)]


def object_colours() -> Tensor:
    """Colours and accents of objects: float32 (10, 2, 3), in the order of `COLOURS`."""
    return torch.tensor([[_rgb(OBJECT_COLOURS[name]), _rgb(OBJECT_ACCENTS[name])] for name in COLOURS])


def background_colours() -> Tensor:
    """The seven colours of each palette, float32 (kinds, `MAX_PALETTES`, 7, 3); kinds with fewer repeat theirs."""
    rows = []
    for kind in BACKGROUNDS:
        codes = list(PALETTES[kind].values())
        rows.append([[_rgb(code) for code in codes[i % len(codes)].split()] for i in range(MAX_PALETTES)])
    return torch.tensor(rows)


def palette_counts() -> Tensor:
    """Number of palettes of each kind of background, int64 (kinds,)."""
    return torch.tensor([len(PALETTES[kind]) for kind in BACKGROUNDS])


def palette_names() -> Tensor:
    """Index into `BACKGROUND_COLOURS` of each palette, int64 (kinds, `MAX_PALETTES`)."""
    rows = [list(PALETTES[kind]) for kind in BACKGROUNDS]
    return torch.tensor([[BACKGROUND_COLOURS.index(row[i % len(row)]) for i in range(MAX_PALETTES)] for row in rows])


def _lab(rgb: Tensor) -> Tensor:
    """CIE L*a*b* of sRGB colours, on the last axis."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = linear @ to_xyz.T / torch.tensor([0.9505, 1.0, 1.089])
    root = torch.where(ratio > 0.008856, ratio ** (1 / 3), 7.787 * ratio + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def clashes(limit: float = 30.0) -> Tensor:
    """Which colours of objects would not stand out from a background: bool (kinds, `MAX_PALETTES`, 10).

    Args:
        limit: Distance in CIE L*a*b* below which two colours are too much alike.
    """
    kinds = background_colours()
    drawn = (kinds[..., :5, :].sum(-1) > 0) | (torch.arange(5) < 2)
    distance = (_lab(kinds)[..., :5, None, :] - _lab(object_colours()[:, 0])).norm(dim=-1)
    alike = (distance.where(drawn[..., None], torch.tensor(float("inf"))) < limit).any(-2)
    names = torch.tensor([COLOURS.index(name) if name in COLOURS else -1 for name in BACKGROUND_COLOURS])
    return alike | (names[palette_names()][..., None] == torch.arange(len(COLOURS)))
