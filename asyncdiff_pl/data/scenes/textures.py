"""Tables that drawing looks things up in: distance and surface of each shape, stars, clouds and blurred lights.

They are computed once for each device, in float32 whatever the mode of the first call. A look-up costs the same for any
shape, so a batch may mix shapes freely.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import SHAPES
from asyncdiff_pl.data.scenes.numbers import Numbers

# the table of a shape reaches so far from its centre, in radii
REACH = 1.5
_RESOLUTION = 192
TEXTURES = ("none", "stars", "clouds", "lights")
# side of a texture that repeats itself, in half frames
TILE = 4.0
_TILE_PIXELS = 256


def look_up(table: Tensor, layer: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolates a table at points.

    Args:
        table: (1, C, L, H, W): C channels of L layers.
        layer: Layer of each picture, from 0 to L - 1, shape (N,).
        x: Where from the left (-1) to the right (1) edge, (N, h, w); points beyond take the edge's value.
        y: Where from the upper (-1) to the lower (1) edge, (N, h, w).

    Returns:
        (C, N, h, w).
    """
    depth = (layer * (2 / (table.shape[2] - 1)) - 1)[:, None, None].expand_as(x)
    grid = torch.stack([x, y, depth], -1)[None]
    return F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


@functools.cache
@torch.autocast("cpu", enabled=False)
def shape_table(device: torch.device) -> Tensor:
    """Distance from the edge (in radii, negative inside) and x and y of the surface's normal: (1, 3, 8, 192, 192)."""
    axis = torch.linspace(-REACH, REACH, _RESOLUTION)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    distance = torch.stack([_distance(name, points) for name in SHAPES])
    normal = _normals(distance)
    return torch.cat([distance[:, None], normal], 1).transpose(0, 1)[None].contiguous().to(device)


def _distance(name: str, points: Tensor) -> Tensor:
    """Signed distance (h, w) of points (h, w, 2) from a shape of radius about 1."""
    if name == "circle":
        return points.norm(dim=-1) - 0.9
    if name == "ring":
        return (points.norm(dim=-1) - 0.67).abs() - 0.29
    corners, rounding = _outline(name)
    return _polygon(points, corners) - rounding


def _outline(name: str) -> tuple[Tensor, float]:
    """Corners of a polygon (n, 2), and by how much it is then rounded."""
    if name == "square":
        return torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) * 0.69, 0.1
    if name == "triangle":
        turn = torch.arange(3) * (2 * math.pi / 3)
        return torch.stack([turn.sin(), 0.17 - turn.cos()], -1) * 0.94, 0.1
    if name == "star":
        turn = torch.arange(10) * (math.pi / 5)
        radius = torch.where(torch.arange(10) % 2 == 0, 1.0, 0.44)
        return torch.stack([radius * turn.sin(), 0.04 - radius * turn.cos()], -1) * 0.97, 0.06
    if name == "cross":
        arm, long = 0.25, 0.86
        right = [[arm, -long], [arm, -arm], [long, -arm], [long, arm], [arm, arm], [arm, long]]
        return torch.tensor(right + [[-x, -y] for x, y in right]), 0.07
    if name == "heart":
        t = torch.linspace(0, 2 * math.pi, 73)[:-1]
        x = 16 * t.sin() ** 3
        y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
        return torch.stack([x, -y - 2.0], -1) / 17.5, 0.03
    assert name == "crescent", name
    # a disc less another one that is moved to the right; both circles meet at the two tips
    outer, inner, shift = 0.92, 0.78, 0.44
    tip = math.acos((shift**2 + outer**2 - inner**2) / (2 * shift * outer))
    tip_inner = math.pi - math.acos((shift**2 + inner**2 - outer**2) / (2 * shift * inner))
    back = torch.linspace(tip, 2 * math.pi - tip, 48)
    front = torch.linspace(2 * math.pi - tip_inner, tip_inner, 40)[1:-1]
    first = torch.stack([back.cos(), back.sin()], -1) * outer
    second = torch.stack([front.cos(), front.sin()], -1) * inner + torch.tensor([shift, 0.0])
    return torch.cat([first, second]) + torch.tensor([0.2, 0.0]), 0.03


def _polygon(points: Tensor, corners: Tensor) -> Tensor:
    """Signed distance of points (h, w, 2) from a polygon with corners (n, 2)."""
    nearest = torch.full(points.shape[:-1], float("inf"))
    inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
    for start, end in zip(corners, corners.roll(-1, 0), strict=True):
        edge, way = end - start, points - start
        along = (way @ edge / edge.square().sum()).clamp(0, 1)
        nearest = torch.minimum(nearest, (way - along[..., None] * edge).norm(dim=-1))
        crosses = (start[1] > points[..., 1]) != (end[1] > points[..., 1])
        left = edge[0] * (points[..., 1] - start[1]) - edge[1] * (points[..., 0] - start[0])
        inside ^= crosses & ((left > 0) == (edge[1] > 0))
    return torch.where(inside, -nearest, nearest)


def _normals(distance: Tensor) -> Tensor:
    """X and y of the normals of the shapes, inflated like cushions: (8, 2, h, w).

    The height is a blurred mask, so that the surface is smooth where distances have creases.
    """
    pixel = 2 * REACH / (_RESOLUTION - 1)
    mask = (0.5 - distance / pixel).clamp(0, 1)
    wide, narrow = _blur(mask, 0.2 / pixel), _blur(mask, 0.09 / pixel)
    bulge = (2 * wide - 1).clamp(min=0) * 0.75 + (2 * narrow - 1).clamp(min=0) * 0.25
    height = _blur(0.62 * (bulge + 0.01).sqrt(), 0.025 / pixel)
    slope_y, slope_x = torch.gradient(height, spacing=pixel, dim=(1, 2))
    length = (1 + slope_x.square() + slope_y.square()).sqrt()
    return torch.stack([-slope_x / length, -slope_y / length], 1)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (n, h, w); sigma in pixels."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    weights = (weights / weights.sum())[None, None, None]
    image = F.conv2d(image[:, None], weights, padding=(0, reach))
    return F.conv2d(image, weights.transpose(2, 3), padding=(reach, 0))[:, 0]


@functools.cache
@torch.autocast("cpu", enabled=False)
def sky_table(device: torch.device) -> Tensor:
    """How much there is of stars, clouds and blurred lights, 0 to 1, each repeating itself: (1, 1, 4, 257, 257)."""
    axis = torch.arange(_TILE_PIXELS) / _TILE_PIXELS
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    numbers = Numbers(torch.zeros(1, dtype=torch.int64), "train")

    waves = torch.zeros_like(x)
    for i in range(-10, 11):
        for j in range(-10, 11):
            power = 2.2 * i * i + 1.2 * j * j
            if 2 < power < 110:
                phase = numbers.uniform(0, 2 * math.pi).item()
                waves += (2 * math.pi * (i * x + j * y) + phase).cos() * power**-0.8
    clouds = ((waves / waves.std() + 0.1) / 1.6).clamp(0, 1)
    clouds = clouds * clouds * (3 - 2 * clouds) * 0.9

    stars, lights = torch.zeros_like(x), torch.zeros_like(x)
    # one star in each cell of a grid: evenly spread, and no two in one place
    for cell in range(14 * 14):
        jitter = numbers.uniform(0, 1, 4)[0].tolist()
        centre = ((cell % 14 + 0.15 + 0.7 * jitter[0]) / 14, (cell // 14 + 0.15 + 0.7 * jitter[1]) / 14)
        sigma = (0.9 + 0.7 * jitter[2]) / _TILE_PIXELS
        stars += (0.35 + 0.65 * jitter[3] ** 2) * torch.exp(-0.5 * _away(x, y, *centre).square() / sigma**2)
    for cell in range(7 * 7):
        jitter = numbers.uniform(0, 1, 4)[0].tolist()
        centre = ((cell % 7 + jitter[0]) / 7, (cell // 7 + jitter[1]) / 7)
        radius, soft = (7 + 11 * jitter[2]) / _TILE_PIXELS, 3 / _TILE_PIXELS
        disc = ((radius - _away(x, y, *centre)) / soft + 0.5).clamp(0, 1)
        lights += (0.1 + 0.3 * jitter[3]) * disc * disc * (3 - 2 * disc)
    layers = torch.stack([torch.zeros_like(x), stars, clouds, lights]).clamp(0, 1)
    # the first column again after the last, so that interpolation goes on across the seam
    return F.pad(layers[None, None], (0, 1, 0, 1, 0, 0), mode="circular").to(device)


def _away(x: Tensor, y: Tensor, centre_x: float, centre_y: float) -> Tensor:
    """Distance from a point on a tile whose edges meet."""
    dx, dy = (x - centre_x).abs(), (y - centre_y).abs()
    return torch.minimum(dx, 1 - dx).hypot(torch.minimum(dy, 1 - dy))
