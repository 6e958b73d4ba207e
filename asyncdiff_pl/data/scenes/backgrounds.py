"""Backgrounds: every kind is the same stack of layers, in other amounts."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import BACKGROUNDS, Scenes
from asyncdiff_pl.data.scenes.motion import Pose
from asyncdiff_pl.data.scenes.palettes import background_colours
from asyncdiff_pl.data.scenes.textures import TILE, look_up, sky_table

# texture: index into textures.TEXTURES; stripes: strength; glow: strength and radius; disc: radius; far, near: height
# of the ridges (0: flat) and whether they are pointed; ground: whether there is one; checks, waves: strength
_COLUMNS = ("texture", "stripes", "glow", "glow_radius", "disc", "far", "near", "pointed", "ground", "checks", "waves")
_LAYERS: dict[str, dict[str, float]] = {
    "gradient": {},
    "spotlight": {"glow": 1.0, "glow_radius": 0.75},
    "stripes": {"stripes": 1.0},
    "checkered floor": {"ground": 1, "checks": 1},
    "hills": {"texture": 2, "far": 0.16, "near": 0.13, "ground": 1, "glow": 0.5, "glow_radius": 0.9},
    "mountains": {"far": 0.42, "near": 0.2, "pointed": 1, "ground": 1, "glow": 0.5, "glow_radius": 0.9},
    "sea": {"texture": 2, "ground": 1, "waves": 0.55},
    "sunset": {"ground": 1, "waves": 0.25, "glow": 0.75, "glow_radius": 0.6, "disc": 0.3},
    "clouds": {"texture": 2},
    "night sky": {"texture": 1, "far": 0.1, "near": 0.1, "ground": 1},
    "blurred lights": {"texture": 3},
}
assert tuple(_LAYERS) == BACKGROUNDS


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    layers = torch.tensor([[float(_LAYERS[kind].get(column, 0)) for column in _COLUMNS] for kind in BACKGROUNDS])
    return layers.to(device), background_colours().to(device)


def smooth(value: Tensor) -> Tensor:
    """0 below 0, 1 above 1, and a smooth step between."""
    value = value.clamp(0, 1)
    return value * value * (3 - 2 * value)


def _mountains(x: Tensor) -> Tensor:
    """A row of peaks, from -1 to 1."""
    return 4 * (torch.remainder(x, 1) - 0.5).abs() - 1


def draw_background(scenes: Scenes, pose: Pose, size: int) -> Tensor:
    """Draws what is behind the objects.

    Args:
        scenes: B scenes.
        pose: The scenes at F times each.
        size: Side of the picture in pixels.

    Returns:
        (B * F, 3, size, size), float32, from 0 to 1.
    """
    num_frames = pose.time.shape[1]
    layers, colours = _tables(pose.time.device)

    def each_frame(value: Tensor) -> Tensor:
        return value.repeat_interleave(num_frames, 0)

    kind = each_frame(layers[scenes.background])
    amount = {name: kind[:, i, None, None] for i, name in enumerate(_COLUMNS)}
    # (7, N, 3, 1, 1)
    palette = each_frame(colours[scenes.background, scenes.palette]).transpose(0, 1)[..., None, None]
    top, bottom, far, near, front, pattern, light = palette
    first, second, third, fourth = (part[:, None, None] for part in each_frame(scenes.offset).unbind(1))
    camera = pose.camera.flatten(0, 1)
    pan_x, pan_y = camera[:, 0, None, None], camera[:, 1, None, None]
    time = pose.time.flatten()[:, None, None]
    pixel = 2 / size
    axis = (torch.arange(size, device=camera.device) + 0.5) * pixel - 1
    x, y = axis[None, None, :], axis[None, :, None]
    horizon = each_frame(scenes.horizon)[:, None, None] - pan_y

    sky = top.lerp(bottom, smooth((y + 1) / torch.where(amount["ground"] > 0, horizon + 1.1, 2.1))[:, None])

    # the sky is far away: it moves little when the camera pans
    across = torch.remainder((x + 0.35 * pan_x + 0.04 * time) / TILE + first, 1) * 2 - 1
    down = torch.remainder((y + 0.35 * pan_y) / TILE + second, 1) * 2 - 1
    across, down = torch.broadcast_tensors(across, down)
    shown = look_up(sky_table(camera.device), amount["texture"][:, 0, 0], across, down)[0]
    slant = third * math.pi
    stripe = ((x + 0.6 * pan_x) * slant.cos() + (y + 0.6 * pan_y) * slant.sin()) * (2 * math.pi / 0.42) + 6 * fourth
    shown = shown + amount["stripes"] * (0.5 + stripe.sin() * 2.2).clamp(0, 1)
    image = sky.lerp(pattern, shown[:, None])

    light_x = (third - 0.5) * 1.0 - 0.2 * pan_x
    light_y = torch.where(amount["ground"] > 0, horizon - 0.15 - 0.1 * fourth, (fourth - 0.6) * 0.6)
    wide = amount["glow_radius"].clamp(min=0.1)
    glow_x = torch.exp(-((x - light_x) / wide).square())
    glow = glow_x * torch.exp(-((y - light_y) / wide).square()) * amount["glow"]
    disc = ((amount["disc"] - ((x - light_x).square() + (y - light_y).square()).sqrt()) / pixel + 0.5).clamp(0, 1)
    image = image.lerp(light, torch.maximum(glow, disc * (amount["disc"] > 0))[:, None])

    # ridges: two waves of different lengths, or peaks of two sizes
    far_x, near_x = x + 0.45 * pan_x, x + 0.75 * pan_x
    round_far = (far_x * 3.1 + 6.3 * first).sin() * 0.6 + (far_x * 5.3 + 6.3 * fourth).sin() * 0.4
    round_near = (near_x * 2.3 + 6.3 * second).sin() * 0.7 + (near_x * 4.1 + 6.3 * third).sin() * 0.3
    peaks_far = torch.maximum(_mountains(far_x * 0.75 + first), _mountains(far_x * 1.1 + fourth) * 0.8 - 0.3)
    peaks_near = torch.maximum(_mountains(near_x * 0.85 + second), _mountains(near_x * 1.3 + third) * 0.8 - 0.3)
    pointed = amount["pointed"]
    far_edge = horizon - 0.05 - amount["far"] * (0.6 + round_far.lerp(peaks_far, pointed))
    near_edge = horizon + torch.where(amount["near"] > 0, 0.2, 0.0)
    near_edge = near_edge - amount["near"] * round_near.lerp(peaks_near, pointed)
    behind = ((y - far_edge) / pixel + 0.5).clamp(0, 1) * (amount["far"] > 0)
    haze = smooth((y - horizon + 0.5) / 1.2)[:, None] * 0.5
    image = image.lerp(far.lerp(bottom, haze), behind[:, None])

    # the nearer the ground, the larger what is on it
    depth = (y - horizon).clamp(min=0)
    nearness = 1 / (depth + 0.22)
    checks = _square((x + pan_x) * nearness * 1.5, depth + 0.1) * _square(nearness * 2.6 + 2 * pan_y, depth + 0.1)
    rolling = 0.35 * ((x + pan_x) * 4 + 1.3 * time + 6 * first).sin()
    waves = (nearness * 9 + rolling + 1.6 * time).sin() * 0.5 + 0.5
    fade = smooth(depth / 0.3)
    texture = amount["checks"] * (0.5 + 0.5 * checks) * (0.25 + 0.75 * fade)
    # the sun's reflection is a column of bright waves
    glitter = amount["disc"] * torch.exp(-((x - light_x) / 0.35).square()) * 2.4
    texture = texture + waves.square() * fade.sqrt() * (amount["waves"] + glitter)
    ground = near.lerp(front, smooth((y - horizon) / (1.05 - horizon))[:, None]).lerp(
        pattern, texture.clamp(0, 1)[:, None]
    )
    before = ((y - near_edge) / pixel + 0.5).clamp(0, 1) * amount["ground"]
    return image.lerp(ground, before[:, None])


def _square(value: Tensor, softness: Tensor) -> Tensor:
    """A square wave of period 2 between -1 and 1, with edges that are softer where the ground is far."""
    return ((value * math.pi).sin() * (9 * softness).clamp(1, 6)).clamp(-1, 1)
