"""Where everything is at a time: closed forms, so that any frame of any scene is one evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from asyncdiff_pl.data.scenes.attributes import Scenes

# straight on and back from the frame's edges; falling and bouncing on the lower edge; to and fro; round in a circle
PATHS = ("drift", "bounce", "swing", "orbit")


@dataclass
class Pose:
    """A batch of scenes at F times each.

    Args:
        centre: Centres of the objects in half frames, (B, F, O, 2).
        radius: Radii in half frames, (B, F, O).
        angle: Rotations in radians, (B, F, O).
        camera: How far the camera has moved from where it began, in half frames, (B, F, 2).
        time: The times in seconds, (B, F).
    """

    centre: Tensor
    radius: Tensor
    angle: Tensor
    camera: Tensor
    time: Tensor


def fold(value: Tensor, limit: Tensor) -> Tensor:
    """A straight path reflected at -limit and +limit: a triangle wave that is the identity between them."""
    return 2 * limit - (torch.remainder(value + limit, 4 * limit) - 2 * limit).abs() - limit


def pose_at(scenes: Scenes, times: Tensor) -> Pose:
    """Moves the scenes to the given times.

    Args:
        scenes: B scenes.
        times: Seconds, shape (B, F).
    """
    time = times[:, :, None, None]
    start, velocity = scenes.position[:, None], scenes.velocity[:, None]
    limit = (0.98 - scenes.radius)[:, None, :, None]
    phase = 2 * math.pi * scenes.phase[:, None, :, None]
    speed = velocity.norm(dim=-1, keepdim=True)

    drift = fold(start + velocity * time, limit)
    # both go so fast as their speed says in the middle of the swing
    reach = 0.12 + 0.3 * scenes.phase[:, None, :, None]
    turn = phase + time * speed / reach
    direction = velocity / speed.clamp(min=1e-6)
    swing = fold(start + reach * direction * (turn.sin() - phase.sin()), limit)
    here, there = (torch.cat([place, place + math.pi / 2], -1).sin() for place in (phase, turn))
    orbit = fold(start + reach * (there - here), limit)
    bounce = torch.stack(
        [drift[..., 0], _fall(start[..., 1], speed[..., 0], limit[..., 0], phase[..., 0], time[..., 0])], -1
    )

    path = scenes.path[:, None, :, None]
    centre = drift
    for number, other in enumerate((bounce, swing, orbit), start=1):
        centre = torch.where(path == number, other, centre)

    amplitude, rate = scenes.pulse[:, None].unbind(-1)
    throb = 2 * math.pi * rate * times[:, :, None]
    radius = scenes.radius[:, None] * (1 + amplitude * throb.sin())
    angle = scenes.angle[:, None] + scenes.spin[:, None] * times[:, :, None]

    reach, rate = scenes.sway[:, None].unbind(-1)
    swaying = reach * (2 * math.pi * rate * times).sin()
    sway = torch.stack([swaying, 0.3 * swaying], -1)
    camera = scenes.pan[:, None] * times[..., None] + sway
    # while the camera pans it follows the objects, so that they stay in view
    return Pose(centre - sway[:, :, None], radius, angle, camera, times)


def _fall(start: Tensor, speed: Tensor, limit: Tensor, phase: Tensor, time: Tensor) -> Tensor:
    """Heights of a ball that bounces on the lower edge for ever: a repeated parabola, at `start` at time 0."""
    height = (limit - start).clamp(min=0.05)
    # part of the way between two bounces at time 0, from -1 to 1; the top of the parabola stays in the frame
    part = phase.sin() * (1 - height / (2 * limit)).clamp(min=0).sqrt()
    top = height / (1 - part.square())
    rate = (0.55 * speed / top.sqrt()).clamp(max=2.5)
    way = torch.remainder(part + rate * time + 1, 2) - 1
    return start + height - top * (1 - way.square())
