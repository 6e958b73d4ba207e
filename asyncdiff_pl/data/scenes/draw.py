"""Draws scenes: a background, then each object's shadow and each object, for all frames of all scenes at once."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import MATERIALS, Scenes
from asyncdiff_pl.data.scenes.backgrounds import draw_background, smooth
from asyncdiff_pl.data.scenes.motion import pose_at
from asyncdiff_pl.data.scenes.palettes import object_colours
from asyncdiff_pl.data.scenes.textures import REACH, look_up, shape_table

# how a material answers light: its own brightness, what Lambert's law adds, mirror bands, highlight, stripes, dots,
# then the outline: its width inside in half frames, how far it reaches outside in radii, how dark it is
_MATERIALS: dict[str, tuple[float, ...]] = {
    "matte": (0.52, 0.66, 0.0, 0.0, 0, 0, 0.02, 0, 0.6),
    "glossy": (0.38, 0.72, 0.0, 1.0, 0, 0, 0.02, 0, 0.6),
    "metallic": (0.2, 0.2, 1.0, 0.3, 0, 0, 0.02, 0, 0.65),
    "striped": (0.72, 0.45, 0.0, 0.0, 1, 0, 0.02, 0, 0.6),
    "dotted": (0.72, 0.45, 0.0, 0.0, 0, 1, 0.02, 0, 0.6),
    "outlined": (1.0, 0.0, 0.0, 0.0, 0, 0, 0.035, 0.1, 0.92),
}
assert tuple(_MATERIALS) == MATERIALS

# from the upper left, towards the eye
_LIGHT = (-0.45, -0.6, 0.66)
_SHADOW = 0.42


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(list(_MATERIALS.values())).to(device), object_colours().to(device)


@torch.no_grad()
def draw(scenes: Scenes, times: Tensor, size: int = 128) -> Tensor:
    """Draws scenes at the given times.

    Args:
        scenes: B scenes.
        times: Seconds, shape (B, F), on the scenes' device.
        size: Side of the picture in pixels.

    Returns:
        Pictures (B, F, 3, size, size), float32, from 0 to 1.
    """
    pose = pose_at(scenes, times)
    image = draw_background(scenes, pose, size)
    # the first object lies on top
    for number in reversed(range(scenes.max_objects)):
        image = _draw_object(
            image, scenes, pose.centre[:, :, number], pose.radius[:, :, number], pose.angle[:, :, number], number
        )
    return image.clamp_(0, 1).unflatten(0, times.shape)


def _draw_object(image: Tensor, scenes: Scenes, centre: Tensor, radius: Tensor, angle: Tensor, number: int) -> Tensor:
    """Draws one object of each scene over the pictures (N, 3, size, size)."""
    num_frames, size = centre.shape[1], image.shape[-1]
    materials, colours = _tables(image.device)

    def each_frame(value: Tensor) -> Tensor:
        return value.repeat_interleave(num_frames, 0)[:, None, None]

    own, lambert, mirror, shine, stripes, dots, outline, growth, darkness = (
        each_frame(part) for part in materials[scenes.material[:, number]].unbind(1)
    )
    base, accent = each_frame(colours[scenes.colour[:, number]]).squeeze(2).squeeze(1).transpose(0, 1)[..., None, None]
    present = each_frame((scenes.number > number).float())
    shape = scenes.shape[:, number].float().repeat_interleave(num_frames, 0)
    table = shape_table(image.device)

    centre, radius, angle = centre.flatten(0, 1), radius.flatten()[:, None, None], angle.flatten()[:, None, None]
    pixel = 2 / size
    axis = (torch.arange(size, device=image.device) + 0.5) * pixel - 1
    x = (axis[None, None, :] - centre[:, 0, None, None]) / radius
    y = (axis[None, :, None] - centre[:, 1, None, None]) / radius
    cos, sin = angle.cos(), angle.sin()

    # the shadow falls to the lower right, by so much in half frames
    fall = (0.035 + 0.08 * radius) / radius
    from_x, from_y = x - 0.75 * fall, y - fall
    shade_x, shade_y = (cos * from_x + sin * from_y) / REACH, (cos * from_y - sin * from_x) / REACH
    distance = look_up(table[:, :1], shape, shade_x, shade_y)[0]
    shadow = smooth(0.55 - distance / 0.5) * (_SHADOW * present)
    image = image * (1 - shadow)[:, None]

    own_x, own_y = cos * x + sin * y, cos * y - sin * x
    distance, tilt_x, tilt_y = look_up(table, shape, own_x / REACH, own_y / REACH)
    distance = distance * radius
    normal_x, normal_y = cos * tilt_x - sin * tilt_y, sin * tilt_x + cos * tilt_y
    normal_z = (1 - normal_x.square() - normal_y.square()).clamp(min=0).sqrt()
    lit = (normal_x * _LIGHT[0] + normal_y * _LIGHT[1] + normal_z * _LIGHT[2]).clamp(min=0)

    # the half-way vector between light and eye
    length = math.sqrt(_LIGHT[0] ** 2 + _LIGHT[1] ** 2 + (1 + _LIGHT[2]) ** 2)
    facing = (normal_x * _LIGHT[0] + normal_y * _LIGHT[1] + normal_z * (1 + _LIGHT[2])) / length
    highlight = shine * smooth((facing - 0.93) / 0.06)

    # a mirror shows a bright sky, a dark horizon and a lighter ground
    height = 0.55 * y + 0.45 * x + 0.9 * (normal_y + 0.5 * normal_x)
    bands = 0.55 + 0.5 * (height * 3.3 + 1.3).cos()
    white = mirror * smooth((bands - 0.75) / 0.3) * 0.75

    period = 0.1 + 0.3 * radius
    turns = (2 * math.pi) * radius / period
    stripe = ((own_x * 0.8 + own_y * 0.6) * turns).sin() * stripes
    dot = (2 * (own_x * turns * 0.72).cos() * (own_y * turns * 0.72).cos() - 0.9) * dots
    marks = ((stripe + dot) * period / pixel * 0.2).clamp(0, 1)

    # a cartoon's outline has a thin pale rim, so that it shows in the dark
    reach = growth * radius
    rim = ((distance - reach) / pixel + 0.5).clamp(0, 1) * (growth > 0)
    brightness = own + lambert * lit + mirror * bands * 0.85
    line = ((distance + outline) / pixel + 0.5).clamp(0, 1) * darkness
    glare = (highlight + white).clamp(max=1) * (1 - line)
    glare = torch.maximum(glare, rim * 0.85)
    brightness = brightness * (1 - line) * (1 - glare)
    cover = (0.5 - (distance - reach - 0.022 * (growth > 0)) / pixel).clamp(0, 1) * present
    surface = base.lerp(accent, marks[:, None]) * brightness[:, None] + glare[:, None]
    return image.lerp(surface, cover[:, None])
