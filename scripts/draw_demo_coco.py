"""Draws the six pictures of the packaged sample and writes their captions in COCO's format.

    python scripts/draw_demo_coco.py

Each scene is painted at four times its size and scaled down, which smooths its edges. Every number is fixed, so that a
second run draws the same pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

WIDTH, HEIGHT, SCALE = 320, 240, 4
FOLDER = Path(__file__).parents[1] / "asyncdiff_pl" / "assets" / "demo_coco"

Point = tuple[float, float]
Paint = Sequence[float] | np.ndarray

# pixel coordinates of the canvas, in units of the finished picture
X, Y = np.meshgrid((np.arange(WIDTH * SCALE) + 0.5) / SCALE, (np.arange(HEIGHT * SCALE) + 0.5) / SCALE)


class Canvas:
    """A picture in work: floats 0-255 at `SCALE` times the size; lengths are pixels of the finished picture."""

    def __init__(self) -> None:
        self.pixels = np.zeros((HEIGHT * SCALE, WIDTH * SCALE, 3))

    def lay(self, paint: Paint, mask: Image.Image | np.ndarray | None = None, opacity: float = 1.0) -> None:
        """Lays a colour, or an array of colours, over what is there, as far as the mask (0-255 or 0-1) lets it."""
        alpha = opacity * np.ones(X.shape)
        if isinstance(mask, Image.Image):
            alpha = opacity * np.asarray(mask, dtype=np.float64) / 255
        elif mask is not None:
            alpha = opacity * mask
        self.pixels += alpha[..., None] * (np.asarray(paint, dtype=np.float64) - self.pixels)

    def finish(self) -> Image.Image:
        """The picture in its final size."""
        image = Image.fromarray(self.pixels.round().clip(0, 255).astype(np.uint8))
        return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


# -- masks ------------------------------------------------------------------------------------------------------------


def polygon(points: Sequence[Point], blur: float = 0) -> Image.Image:
    mask = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE))
    ImageDraw.Draw(mask).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=255)
    return mask.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else mask


def ellipse(x: float, y: float, rx: float, ry: float | None = None, blur: float = 0, turn: float = 0) -> Image.Image:
    """An ellipse about (x, y), turned by `turn` degrees clockwise."""
    ry = rx if ry is None else ry
    angle = math.radians(turn)
    ring = [math.tau * k / 120 for k in range(120)]
    points = [
        (
            x + rx * math.cos(a) * math.cos(angle) - ry * math.sin(a) * math.sin(angle),
            y + rx * math.cos(a) * math.sin(angle) + ry * math.sin(a) * math.cos(angle),
        )
        for a in ring
    ]
    return polygon(points, blur)


def stroke(points: Sequence[Point], width: float, blur: float = 0) -> Image.Image:
    """A line with round ends."""
    mask = Image.new("L", (WIDTH * SCALE, HEIGHT * SCALE))
    draw = ImageDraw.Draw(mask)
    scaled = [(x * SCALE, y * SCALE) for x, y in points]
    draw.line(scaled, fill=255, width=max(1, round(width * SCALE)), joint="curve")
    half = width * SCALE / 2
    for x, y in (scaled[0], scaled[-1]):
        draw.ellipse((x - half, y - half, x + half, y + half), fill=255)
    return mask.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else mask


def curve(*points: Point, num: int = 40) -> list[Point]:
    """Points of the Bezier curve with these control points."""
    degree = len(points) - 1
    weights = [
        [math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)]
        for t in (i / (num - 1) for i in range(num))
    ]
    return [
        (
            sum(w * p[0] for w, p in zip(row, points, strict=True)),
            sum(w * p[1] for w, p in zip(row, points, strict=True)),
        )
        for row in weights
    ]


def below(line: Callable[[float], float]) -> Image.Image:
    """All that lies below the line y = line(x)."""
    xs = np.linspace(-2, WIDTH + 2, 330)
    return polygon([*((x, line(x)) for x in xs), (WIDTH + 2, HEIGHT + 2), (-2, HEIGHT + 2)])


def both(a: Image.Image, b: Image.Image) -> Image.Image:
    return ImageChops.multiply(a, b)


# -- paints -----------------------------------------------------------------------------------------------------------


def down(*stops: tuple[float, Sequence[float]], along: np.ndarray | None = None) -> np.ndarray:
    """Colours that change from stop to stop along y, or along another array."""
    places = [place for place, _ in stops]
    values = Y if along is None else along
    return np.stack([np.interp(values, places, [colour[c] for _, colour in stops]) for c in range(3)], axis=-1)


def glow(x: float, y: float, radius: float) -> np.ndarray:
    """1 at (x, y), falling off to the sides."""
    return np.exp(-((X - x) ** 2 + (Y - y) ** 2) / (2 * radius**2))


def ball(x: float, y: float, rx: float, ry: float | None = None) -> np.ndarray:
    """How bright a sphere is that is lit from the upper left: 0-1."""
    u, v = (X - x) / rx, (Y - y) / (rx if ry is None else ry)
    depth = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    return np.clip(-0.45 * u - 0.6 * v + 0.66 * depth, 0, 1)


def cloud(canvas: Canvas, x: float, y: float, size: float, opacity: float = 1.0) -> None:
    puffs = [(-1.5, 0.1, 0.55), (-0.8, -0.25, 0.8), (0.1, -0.5, 1.0), (0.95, -0.15, 0.75), (1.6, 0.12, 0.5)]
    mask = polygon([(x - 1.9 * size, y + 0.2 * size), (x + 2.0 * size, y + 0.2 * size), (x, y)])
    for dx, dy, r in puffs:
        mask = ImageChops.lighter(mask, ellipse(x + dx * size, y + dy * size, r * size, r * size * 0.85))
    mask = both(mask, polygon([(0, 0), (WIDTH, 0), (WIDTH, y + 0.45 * size), (0, y + 0.45 * size)]))
    mask = mask.filter(ImageFilter.GaussianBlur(0.09 * size * SCALE))
    canvas.lay(down((y - 1.2 * size, (255, 255, 255)), (y + 0.5 * size, (205, 218, 234))), mask, opacity)


# -- scenes -----------------------------------------------------------------------------------------------------------


def sun_over_hills() -> Image.Image:
    rng = random.Random(1)
    canvas = Canvas()
    canvas.lay(down((0, (92, 148, 214)), (70, (176, 205, 226)), (115, (253, 222, 170)), (150, (255, 196, 128))))
    sun = (214, 86)
    canvas.lay((255, 226, 150), glow(*sun, 70), 0.75)
    canvas.lay((255, 244, 200), glow(*sun, 30), 0.8)
    canvas.lay((255, 250, 224), ellipse(*sun, 18, blur=0.4))
    for x, y, length in ((60, 48, 46), (118, 62, 60), (272, 42, 40), (38, 80, 34)):
        canvas.lay((255, 240, 220), ellipse(x, y, length, 3.2, blur=2.2), 0.7)
    ridges = (
        (lambda x: 128 - 20 * math.sin(x / 47 + 0.6) - 7 * math.sin(x / 17), (170, 178, 196), (206, 200, 190)),
        (lambda x: 146 - 15 * math.sin(x / 58 + 2.6) - 4 * math.sin(x / 21 + 1), (120, 152, 150), (168, 184, 150)),
        (lambda x: 166 - 14 * math.sin(x / 66 + 5.0) - 3 * math.sin(x / 25), (84, 136, 96), (140, 176, 104)),
        (lambda x: 192 - 15 * math.sin(x / 84 + 1.0), (62, 122, 62), (118, 170, 72)),
    )
    for line, top, bottom in ridges:
        crest = np.interp(X[0], np.arange(-2, WIDTH + 3), [line(x) for x in range(-2, WIDTH + 3)])
        canvas.lay(down((0, bottom), (10, top), (60, [0.7 * c for c in top]), along=Y - crest[None]), below(line))
        canvas.lay((255, 232, 190), below(line), 0.05)
    line = ridges[2][0]
    for _ in range(34):
        x = rng.uniform(4, 316)
        y, r = line(x) + rng.uniform(2, 7), rng.uniform(2.2, 4.2)
        canvas.lay((40, 84, 52), ellipse(x - 1.5, y + 1.2, r * 1.2, r * 0.5, blur=0.8), 0.4)
        canvas.lay(down((0, (52, 104, 58)), (1, (142, 182, 92)), along=ball(x, y - r, r) ** 0.8), ellipse(x, y - r, r))
    left = [*curve((128, 240), (150, 214), (206, 210), (190, 186)), (193, 186)]
    right = curve((193, 186), (216, 212), (176, 216), (166, 240))
    canvas.lay(
        down((186, (236, 218, 170)), (240, (216, 184, 128))), both(polygon([*left, *right], 0.4), below(ridges[3][0]))
    )
    for _ in range(90):
        x, y = rng.uniform(0, 320), rng.uniform(204, 238)
        if 118 < x < 214:
            continue
        colour = rng.choice([(255, 255, 255), (250, 214, 80), (238, 110, 96), (214, 160, 226)])
        canvas.lay(colour, ellipse(x, y, 0.5 + (y - 195) / 38), 0.95)
    return canvas.finish()


def sailing_boat() -> Image.Image:
    rng = random.Random(2)
    canvas = Canvas()
    canvas.lay(down((0, (70, 140, 214)), (130, (206, 230, 244))))
    cloud(canvas, 66, 52, 15)
    cloud(canvas, 262, 36, 11, 0.95)
    cloud(canvas, 292, 98, 7, 0.7)
    horizon = 132
    canvas.lay(
        (150, 178, 196),
        both(
            below(lambda x: 132 - max(0, 9 * math.sin((x - 206) / 36))),
            polygon([(200, 0), (320, 0), (320, 132), (200, 132)]),
        ),
        0.8,
    )
    sea = down((horizon, (104, 176, 206)), (170, (36, 124, 176)), (240, (14, 74, 130)))
    canvas.lay(sea, below(lambda x: horizon))
    for _ in range(420):
        y = horizon + 2 + 106 * rng.random() ** 1.6
        near = (y - horizon) / 108
        x, length = rng.uniform(-10, 330), 3 + 22 * near * rng.uniform(0.4, 1)
        colour = rng.choice([(176, 222, 238), (220, 242, 250), (16, 84, 140)])
        canvas.lay(colour, ellipse(x, y, length, 0.3 + 0.9 * near), 0.16 + 0.2 * near)
    for k in range(26):
        y = 180 + 2 * k
        canvas.lay(
            (250, 246, 232), ellipse(164 + rng.uniform(-9, 9) * (1 + k / 20), y, 26 - 0.7 * k, 0.9), 0.34 * (1 - k / 27)
        )
    canvas.lay((12, 60, 104), ellipse(160, 180, 62, 6, blur=2), 0.55)
    main = [*curve((163, 32), (206, 84), (222, 118), (224, 146)), *curve((224, 146), (196, 152), (163, 150))]
    canvas.lay(down((160, (255, 255, 252)), (226, (206, 212, 222)), along=X), polygon(main))
    for y in (70, 98, 124):
        canvas.lay((176, 184, 198), both(stroke([(163, y), (228, y + 6)], 0.7), polygon(main)), 0.8)
    jib = [*curve((157, 40), (132, 92), (112, 132), (104, 150)), *curve((104, 150), (130, 146), (156, 149))]
    canvas.lay(down((100, (238, 108, 84)), (158, (196, 56, 52)), along=X), polygon(jib))
    canvas.lay((255, 236, 220), both(stroke([(96, 122), (160, 118)], 5), polygon(jib)))
    canvas.lay(down((157, (150, 104, 62)), (163, (92, 58, 32)), along=X), stroke([(160, 28), (160, 164)], 3.2))
    canvas.lay((120, 78, 44), stroke([(161, 152), (224, 149)], 2.2))
    flag = [*curve((161, 24), (170, 20), (176, 28), (184, 24)), *curve((184, 31), (176, 35), (170, 27), (161, 31))]
    canvas.lay((246, 196, 60), polygon(flag))
    hull = [
        (90, 160),
        (232, 160),
        *curve((232, 160), (226, 174), (214, 183)),
        (118, 183),
        *curve((118, 183), (102, 178), (90, 160)),
    ]
    canvas.lay(down((158, (250, 250, 246)), (172, (222, 226, 232)), (183, (150, 164, 184))), polygon(hull))
    canvas.lay((34, 78, 140), both(stroke([(84, 167), (240, 167)], 3.4), polygon(hull)))
    canvas.lay((140, 90, 50), stroke([(91, 160), (231, 160)], 2.4))
    canvas.lay(
        down((150, (236, 226, 204)), (160, (196, 178, 148))), polygon([(172, 159), (176, 152), (206, 152), (211, 159)])
    )
    for x in (181, 190, 199):
        canvas.lay((60, 92, 124), ellipse(x, 155.5, 2))
    canvas.lay(
        (240, 250, 255),
        both(stroke(curve((84, 184), (120, 178), (170, 188), (244, 183)), 2.6, blur=0.8), below(lambda x: 178)),
        0.85,
    )
    for x, y, size in ((60, 84, 6), (82, 96, 4.4), (240, 70, 5)):
        wings = [
            *curve((x - size, y - size * 0.5), (x - size * 0.4, y - size * 0.7), (x, y)),
            *curve((x, y), (x + size * 0.4, y - size * 0.7), (x + size, y - size * 0.5)),
        ]
        canvas.lay((64, 80, 100), stroke(wings, 1), 0.9)
    return canvas.finish()


def balloon() -> Image.Image:
    canvas = Canvas()
    canvas.lay(down((0, (52, 124, 206)), (150, (158, 206, 240)), (215, (232, 240, 240))))
    cloud(canvas, 58, 70, 17)
    cloud(canvas, 268, 132, 15)
    cloud(canvas, 286, 46, 9, 0.85)
    cloud(canvas, 40, 158, 10, 0.8)
    for line, colour in (
        (lambda x: 214 - 6 * math.sin(x / 31) - 4 * math.sin(x / 53 + 1), (150, 184, 196)),
        (lambda x: 222 - 5 * math.sin(x / 44 + 2), (120, 170, 120)),
    ):
        canvas.lay(down((206, colour), (240, [0.78 * c for c in colour])), below(line))
    edges = [-8, 44, 82, 140, 172, 236, 270, 330]
    tints = [
        (214, 200, 110),
        (150, 186, 92),
        (196, 170, 96),
        (176, 204, 120),
        (222, 196, 104),
        (140, 180, 96),
        (206, 184, 104),
    ]
    for tint, a, b in zip(tints, edges, edges[1:], strict=False):
        # fields seen from above: their edges run apart towards the eye
        near_a, near_b = 160 + 1.4 * (a - 160), 160 + 1.4 * (b - 160)
        field = [(a + 1, 229), (b - 1, 229), (near_b - 1.5, 241), (near_a + 1.5, 241)]
        canvas.lay(down((229, tint), (240, [0.88 * c for c in tint])), polygon(field, 0.4), 0.85)
    cx, cy, rx, ry = 164, 82, 60, 64
    throat = 163
    outline = [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in np.linspace(math.pi * 0.93, math.pi * 2.07, 80)]
    right = curve(outline[-1], (cx + rx * 0.86, cy + ry * 0.78), (cx + 17, throat - 12), (cx + 11, throat), num=30)
    left = curve((cx - 11, throat), (cx - 17, throat - 12), (cx - rx * 0.86, cy + ry * 0.78), outline[0], num=30)
    envelope = polygon([*outline, *right, *left])
    # the gores are lines of longitude: they bunch up towards the rim, and run together at the throat
    half = np.interp(Y[:, 0], [cy - ry, cy, cy + 30, throat], [rx, rx, rx * 0.93, 11])
    bulge = np.sqrt(np.clip(1 - ((Y[:, 0] - cy) / ry) ** 2, 0, 1)) * rx
    half = np.where(Y[:, 0] < cy, np.maximum(bulge, 1), half)[:, None]
    turn = np.arcsin(np.clip((X - cx) / half, -1, 1))
    colours = np.array([(226, 62, 52), (250, 198, 62), (246, 244, 232), (34, 132, 176)], dtype=float)
    canvas.lay(colours[(np.floor((turn / math.pi + 0.5) * 12).astype(int)) % 4], envelope)
    canvas.lay(
        (24, 52, 104),
        both(envelope, stroke(curve((cx - 66, 92), (cx - 20, 112), (cx + 20, 112), (cx + 66, 92)), 9)),
        0.9,
    )
    canvas.lay(
        (255, 236, 170), both(envelope, stroke(curve((cx - 66, 92), (cx - 20, 112), (cx + 20, 112), (cx + 66, 92)), 2))
    )
    light = ball(cx, cy + 4, rx * 1.06, ry * 1.3)
    canvas.lay((20, 20, 60), np.asarray(envelope) / 255 * (1 - light), 0.5)
    canvas.lay((255, 255, 255), np.asarray(envelope) / 255 * glow(cx - 24, cy - 28, 17), 0.45)
    canvas.lay((70, 40, 30), ellipse(cx, throat, 11, 2.4))
    canvas.lay((255, 190, 80), ellipse(cx, throat + 1.5, 4, 4.5, blur=1.2), 0.9)
    for dx in (-9.5, -3.5, 3.5, 9.5):
        canvas.lay((84, 62, 44), stroke([(cx + dx, throat), (cx + dx * 0.86, 187)], 0.8))
    basket = [(cx - 11, 186), (cx + 11, 186), (cx + 9, 203), (cx - 9, 203)]
    canvas.lay(down((cx - 11, (206, 150, 86)), (cx + 11, (120, 76, 40)), along=X), polygon(basket))
    for y in (190, 194, 198, 202):
        canvas.lay((96, 58, 30), both(stroke([(cx - 12, y), (cx + 12, y)], 0.7), polygon(basket)), 0.7)
    canvas.lay((92, 54, 28), stroke([(cx - 11, 186), (cx + 11, 186)], 2.2))
    for dx, colour in ((-4, (40, 60, 110)), (4.5, (168, 44, 48))):
        canvas.lay(colour, both(ellipse(cx + dx, 186, 3.2, 6), polygon([(0, 0), (320, 0), (320, 185), (0, 185)])))
        canvas.lay((240, 200, 164), ellipse(cx + dx, 177.5, 2.3))
    return canvas.finish()


def red_ball() -> Image.Image:
    rng = random.Random(4)
    canvas = Canvas()
    canvas.lay(down((0, (206, 214, 206)), (320, (164, 178, 178)), along=X + 0.3 * Y))
    # light of a window on the wall
    for x, y in ((24, 16), (66, 20), (24, 64), (66, 68)):
        pane = [(x, y), (x + 38, y + 4), (x + 38, y + 46), (x, y + 42)]
        canvas.lay((255, 246, 214), polygon(pane, 1.8), 0.6)
    edge = 134
    table = below(lambda x: edge)
    canvas.lay(down((edge, (178, 118, 66)), (240, (206, 142, 84))), table)
    for k in range(9):
        # planks run towards the eye: their edges meet far behind the wall
        far, near = 160 + (k - 4) * 46, 160 + (k - 4) * 82
        next_far, next_near = far + 46, near + 82
        plank = polygon([(far - 23, edge), (next_far - 23, edge), (next_near - 41, 240), (near - 41, 240)])
        canvas.lay((rng.choice([(216, 150, 88), (186, 122, 66), (200, 138, 80), (170, 108, 58)])), plank, 0.45)
        for _ in range(15):
            a, shade = rng.random(), rng.choice([(120, 70, 34), (232, 176, 116)])
            x0, x1 = far - 23 + 46 * a, near - 41 + 82 * a
            bend = rng.uniform(-3, 3)
            grain = stroke(curve((x0, edge), ((x0 + x1) / 2 + bend, 185), (x1, 242)), rng.uniform(0.3, 1), blur=0.3)
            canvas.lay(shade, both(grain, both(plank, table)), rng.uniform(0.15, 0.4))
        canvas.lay((92, 52, 26), stroke([(far - 23, edge), (near - 41, 240)], 1.1, blur=0.2), 0.75)
    canvas.lay((255, 226, 170), np.asarray(table) / 255 * glow(110, 190, 90), 0.25)
    canvas.lay((110, 66, 36), stroke([(0, edge), (320, edge)], 1.6))
    canvas.lay(
        (40, 24, 14),
        both(
            polygon([(0, edge - 9), (320, edge - 9), (320, edge), (0, edge)], 4),
            polygon([(0, 0), (320, 0), (320, edge), (0, edge)]),
        ),
        0.3,
    )
    cx, cy, r = 158, 138, 52
    canvas.lay((44, 20, 8), ellipse(cx + 40, cy + 49, 66, 12, blur=6), 0.6)
    canvas.lay((24, 8, 4), ellipse(cx + 12, cy + 50, 36, 7, blur=3), 0.7)
    lit = ball(cx, cy, r)
    shaded = down((0, (88, 8, 16)), (0.35, (160, 18, 26)), (0.75, (222, 42, 40)), (1, (248, 92, 72)), along=lit)
    canvas.lay(shaded, ellipse(cx, cy, r))
    rim = np.asarray(ellipse(cx, cy, r)) / 255
    below_light = np.clip(((Y - cy) / r - 0.45) * 1.6, 0, 1) * np.clip(
        ((X - cx) ** 2 + (Y - cy) ** 2) / r**2 - 0.45, 0, 1
    )
    canvas.lay((232, 140, 80), rim * below_light, 0.8)
    canvas.lay((255, 255, 255), ellipse(cx - 20, cy - 26, 12, 7, blur=2.5, turn=-38), 0.85)
    canvas.lay((255, 255, 255), ellipse(cx - 22, cy - 28, 5, 3, blur=0.8, turn=-38))
    return canvas.finish()


def house_under_moon() -> Image.Image:
    rng = random.Random(5)
    canvas = Canvas()
    canvas.lay(down((0, (10, 16, 48)), (110, (34, 48, 104)), (180, (78, 86, 142))))
    for _ in range(150):
        x, y = rng.uniform(0, 320), 150 * rng.random() ** 1.3
        canvas.lay((255, 250, 230), ellipse(x, y, rng.choice([0.45, 0.6, 0.9])), rng.uniform(0.4, 1))
    moon = (248, 54)
    canvas.lay((206, 214, 250), glow(*moon, 46), 0.5)
    canvas.lay((240, 240, 255), glow(*moon, 24), 0.45)
    disc = ellipse(*moon, 22)
    canvas.lay(down((0, (206, 204, 196)), (1, (255, 252, 232)), along=ball(*moon, 30) + 0.25), disc)
    for dx, dy, r in ((-7, -5, 5), (6, 3, 6.5), (-4, 9, 3.5), (9, -9, 3), (-13, 4, 2.5)):
        canvas.lay((206, 204, 190), both(ellipse(moon[0] + dx, moon[1] + dy, r, blur=0.7), disc), 0.6)
    for x, y, length in ((206, 84, 44), (284, 96, 30), (60, 40, 36)):
        canvas.lay((120, 130, 184), ellipse(x, y, length, 3, blur=2.4), 0.5)
    canvas.lay(
        down((150, (52, 64, 112)), (200, (40, 50, 92))),
        below(lambda x: 164 - 12 * math.sin(x / 49 + 1) - 4 * math.sin(x / 19)),
    )
    ground = lambda x: 188 - 7 * math.sin(x / 70 + 0.4)  # noqa: E731
    canvas.lay(down((180, (62, 92, 98)), (240, (26, 46, 62))), below(ground))
    for x, y, size in ((34, 190, 1.25), (72, 186, 0.85), (288, 194, 1.35), (258, 190, 0.8)):
        canvas.lay((16, 26, 46), ellipse(x, y + 1, 16 * size, 3 * size, blur=2), 0.6)
        canvas.lay((40, 32, 44), stroke([(x, y), (x, y - 12 * size)], 3.4 * size))
        for k in range(4):
            base, half, top = y - (8 + 12 * k) * size, (19 - 4 * k) * size, y - (30 + 12 * k) * size
            tier = polygon(
                [(x - half, base), *curve((x - half, base), (x, base + 5 * size), (x + half, base)), (x, top)]
            )
            canvas.lay(down((-20 * size, (18, 46, 56)), (20 * size, (48, 92, 92)), along=X - x), tier)
    left, right, floor, eaves = 112, 206, 196, 138
    canvas.lay((12, 20, 40), ellipse(150, 198, 72, 6, blur=3), 0.6)
    canvas.lay(
        down((left, (146, 122, 118)), (right, (188, 164, 150)), along=X),
        polygon([(left, floor), (left, eaves), (right, eaves), (right, floor)]),
    )
    for y in range(143, 196, 6):
        canvas.lay((104, 84, 92), stroke([(left, y), (right, y)], 0.5), 0.6)
    canvas.lay(down((128, (104, 62, 62)), (140, (78, 44, 50))), polygon([(126, 98), (134, 98), (134, 122), (126, 122)]))
    canvas.lay((120, 74, 70), polygon([(123.5, 95), (136.5, 95), (136.5, 99), (123.5, 99)]))
    for k in range(6):
        puff = ellipse(130 + 3.2 * k + 3 * math.sin(k), 88 - 9 * k, 4.5 + 1.7 * k, 3.8 + 1.3 * k, blur=2.2)
        canvas.lay((196, 200, 224), puff, 0.42 - 0.055 * k)
    roof = polygon([(left - 10, eaves + 2), (left + 20, 102), (right - 20, 102), (right + 10, eaves + 2)])
    canvas.lay(down((102, (112, 56, 62)), (140, (158, 78, 68))), roof)
    for k, y in enumerate(range(107, 142, 6)):
        canvas.lay((84, 38, 50), both(stroke([(80, y), (240, y)], 0.8), roof), 0.8)
        for x in range(96 + 5 * (k % 2), 224, 10):
            canvas.lay((84, 38, 50), both(stroke([(x, y), (x, y + 6)], 0.6), roof), 0.5)
    canvas.lay((206, 214, 240), both(stroke([(left + 20, 102.5), (right - 20, 102.5)], 1.6), roof), 0.6)
    canvas.lay((52, 28, 42), stroke([(left - 10, eaves + 2), (right + 10, eaves + 2)], 1.8), 0.8)
    for x in (120, 178):
        canvas.lay((255, 190, 90), glow(x + 10, 163, 19), 0.4)
    for x in (120, 178):
        canvas.lay((74, 46, 44), polygon([(x - 2, 150), (x + 22, 150), (x + 22, 176), (x - 2, 176)]))
        canvas.lay(
            down((0, (255, 176, 70)), (1, (255, 240, 170)), along=glow(x + 10, 163, 10)),
            polygon([(x, 152), (x + 20, 152), (x + 20, 174), (x, 174)]),
        )
        canvas.lay((92, 56, 46), stroke([(x + 10, 152), (x + 10, 174)], 1.4))
        canvas.lay((92, 56, 46), stroke([(x, 163), (x + 20, 163)], 1.4))
    door = polygon(
        [(150, floor), (150, 166), *curve((150, 166), (151, 157), (159, 156), (167, 157), (168, 166)), (168, floor)]
    )
    canvas.lay(down((150, (54, 92, 96)), (168, (34, 62, 76)), along=X), door)
    canvas.lay((255, 214, 120), ellipse(164.5, 180, 1.2))
    path = [
        (150, floor),
        (168, floor),
        *curve((168, floor), (180, 214), (170, 226), (196, 242)),
        *curve((126, 242), (126, 222), (152, 216), (150, floor)),
    ]
    canvas.lay(down((196, (198, 176, 150)), (240, (92, 96, 116))), polygon(path, 0.5), 0.9)
    for x in (128, 188):
        spill = [(x - 8, 198), (x + 8, 198), (x + 18, 222), (x - 18, 222)]
        canvas.lay((255, 196, 100), polygon(spill, 4), 0.3)
    for x in (*range(6, 108, 12), *range(216, 320, 12)):
        y = ground(x) + 22
        canvas.lay(
            (150, 152, 172), polygon([(x - 2.2, y), (x - 2.2, y - 15), (x, y - 18), (x + 2.2, y - 15), (x + 2.2, y)])
        )
    for a, b in ((0, 106), (212, 320)):
        for height in (6, 12):
            canvas.lay((132, 136, 160), stroke([(x, ground(x) + 22 - height) for x in range(a, b + 1, 4)], 1.8))
    return canvas.finish()


def flower(canvas: Canvas, x: float, y: float, r: float, colour: Sequence[float], turn: float, num: int = 9) -> None:
    """A daisy-like flower head of radius r."""
    deep = [0.66 * c for c in colour]
    for ring, reach in ((0, 1.0), (1, 0.72)):
        for k in range(num):
            a = turn + math.tau * (k + 0.5 * ring) / num
            px, py = x + reach * 0.58 * r * math.cos(a), y + reach * 0.58 * r * math.sin(a)
            petal = ellipse(px, py, reach * 0.46 * r, 0.2 * r, turn=math.degrees(a))
            canvas.lay(
                [0.6 * c for c in deep],
                ellipse(px + 0.5, py + 0.7, reach * 0.46 * r, 0.2 * r, 0.6, math.degrees(a)),
                0.5,
            )
            away = np.hypot(X - x, Y - y) / r
            canvas.lay(down((0.1, deep), (0.5, colour), (1, [min(255, c + 40) for c in colour]), along=away), petal)
    canvas.lay((110, 64, 16), ellipse(x + 0.4, y + 0.8, 0.27 * r, blur=0.5), 0.6)
    canvas.lay(down((0, (172, 106, 20)), (1, (255, 216, 90)), along=ball(x, y, 0.27 * r)), ellipse(x, y, 0.25 * r))


def vase_with_flowers() -> Image.Image:
    canvas = Canvas()
    canvas.lay(down((0, (250, 236, 212)), (320, (222, 196, 174)), along=X + 0.4 * Y))
    canvas.lay((255, 250, 232), glow(84, 60, 80), 0.7)
    edge = 190
    canvas.lay(down((edge, (120, 150, 164)), (240, (150, 182, 192))), below(lambda x: edge))
    cloth = below(lambda x: edge)
    for k in range(-6, 26):
        canvas.lay(
            (236, 244, 246), both(stroke([(160 + (k - 10) * 20, edge), (160 + (k - 10) * 30, 242)], 3.4), cloth), 0.22
        )
    for y in (195, 205, 219, 236):
        canvas.lay((236, 244, 246), stroke([(0, y), (320, y)], 1.2 + (y - edge) / 13), 0.22)
    canvas.lay((88, 112, 128), stroke([(0, edge), (320, edge)], 1.4), 0.8)
    canvas.lay((40, 52, 70), ellipse(196, 221, 58, 7, blur=5), 0.55)
    canvas.lay((24, 32, 50), ellipse(168, 223, 32, 4.5, blur=2), 0.6)
    heads = (
        (160, 52, 27, (240, 92, 110), 0.1), (112, 72, 24, (250, 186, 64), 0.4), (210, 70, 25, (168, 112, 214), 0.7),
        (136, 100, 21, (250, 246, 240), 0.2), (186, 102, 22, (250, 134, 76), 0.5), (84, 108, 17, (126, 146, 232), 0.0),
        (238, 108, 18, (246, 130, 168), 0.3),
    )  # fmt: skip
    for x, y, _, _, _ in heads:
        stem = curve((x, y), (0.4 * x + 96, y + 45), (160 + (x - 160) * 0.1, 150))
        canvas.lay((58, 120, 62), stroke(stem, 2.4))
        canvas.lay((128, 180, 96), stroke([(a - 0.5, b) for a, b in stem], 0.8), 0.7)
    for x, y, length, turn in (
        (122, 128, 22, 32), (198, 130, 22, 146), (104, 132, 17, 12), (218, 134, 17, 166), (148, 134, 18, 70),
        (176, 136, 18, 108),
    ):  # fmt: skip
        a = math.radians(turn)
        tip, base = (
            (x - length * math.cos(a), y - length * math.sin(a)),
            (x + length * math.cos(a), y + length * math.sin(a)),
        )
        side = (0.55 * length * math.sin(a), -0.55 * length * math.cos(a))
        one = curve(base, (x + side[0], y + side[1]), tip)
        two = curve(tip, (x - side[0], y - side[1]), base)
        canvas.lay(down((y - 9, (120, 178, 92)), (y + 10, (44, 104, 60))), polygon([*one, *two]))
        canvas.lay((170, 208, 130), stroke([base, tip], 0.8), 0.7)
    for x, y, r, colour, turn in heads:
        flower(canvas, x, y, r, colour, turn)
    right = [(178, 146), *curve((178, 146), (168, 160), (206, 172), (204, 196), (200, 214), (184, 223)), (160, 224)]
    outline = [*right, *((320 - x, y) for x, y in reversed(right))]
    body = polygon(outline)
    canvas.lay(
        down((114, (52, 104, 150)), (142, (120, 184, 214)), (158, (74, 142, 186)), (206, (18, 52, 96)), along=X), body
    )
    band = [
        *curve((112, 186), (140, 195), (180, 195), (208, 186)),
        *curve((208, 198), (180, 208), (140, 208), (112, 198)),
    ]
    canvas.lay((246, 240, 222), both(polygon(band), body), 0.85)
    for k in range(9):
        x = 120 + 10 * k
        canvas.lay((206, 96, 70), both(ellipse(x, 199 - 6.5 * ((x - 160) / 48) ** 2, 2.6), body), 0.9)
    canvas.lay((10, 30, 60), np.asarray(body) / 255 * np.clip((X - 160) / 60, 0, 1), 0.45)
    canvas.lay((255, 255, 255), both(stroke(curve((137, 170), (124, 186), (132, 206)), 4.5, blur=1.6), body), 0.7)
    canvas.lay(down((142, (150, 204, 228)), (178, (40, 92, 140)), along=X), ellipse(160, 147, 18.5, 3.6))
    canvas.lay((24, 54, 70), ellipse(160, 146.4, 16, 2.6))
    for x in (149, 155, 160, 166, 171):
        canvas.lay((52, 110, 60), stroke([(x, 147), (160 + (x - 160) * 1.15, 134)], 2.2))
    return canvas.finish()


SCENES: dict[str, tuple[Callable[[], Image.Image], tuple[str, ...]]] = {
    "sun_over_hills": (
        sun_over_hills,
        (
            "The sun rises over a row of green hills.",
            "A path winds through a meadow with flowers towards rolling hills.",
            "A warm morning sky above hills dotted with small trees.",
            "Rolling green countryside with the sun low in the sky.",
            "A drawing of a bright sun shining on hills and a flowery field.",
        ),
    ),
    "sailing_boat": (
        sailing_boat,
        (
            "A sailing boat with a white and a red sail on the blue sea.",
            "A small sailboat crosses calm water under a blue sky with clouds.",
            "A white boat with a yellow flag sails on the ocean.",
            "Birds fly above a sailboat out at sea on a sunny day.",
            "A boat with two sails floating on the water near a distant coast.",
        ),
    ),
    "balloon": (
        balloon,
        (
            "A colorful hot air balloon floats in a blue sky.",
            "Two people ride in the basket of a striped hot air balloon.",
            "A hot air balloon with red, yellow, white and blue stripes above the fields.",
            "A large balloon drifts between white clouds over the countryside.",
            "A drawing of a balloon flying high over green land.",
        ),
    ),
    "red_ball": (
        red_ball,
        (
            "A shiny red ball lies on a wooden table.",
            "A red ball casts a shadow on the planks of a table.",
            "A single round red object on a brown wood surface.",
            "Light from a window falls on the wall behind a red ball.",
            "A glossy red sphere resting on a tabletop in front of a grey wall.",
        ),
    ),
    "house_under_moon": (
        house_under_moon,
        (
            "A small house with lit windows under a full moon.",
            "The moon shines over a cottage and fir trees at night.",
            "A house with a red roof and a smoking chimney on a starry night.",
            "A path leads to the door of a house behind a wooden fence in the dark.",
            "A night scene of a cozy home with warm light in its windows.",
        ),
    ),
    "vase_with_flowers": (
        vase_with_flowers,
        (
            "A blue vase full of colorful flowers on a table.",
            "A bouquet of pink, yellow, purple and white flowers in a vase.",
            "A vase of fresh flowers stands on a checkered tablecloth.",
            "Several bright flowers with green leaves in a round blue vase.",
            "A drawing of a flower arrangement on a table against a light wall.",
        ),
    ),
}


def annotations() -> dict[str, object]:
    """The sample's captions in COCO's format."""
    images, captions = [], []
    for number, (name, (_, texts)) in enumerate(SCENES.items(), start=1):
        images.append({"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT, "license": 1})
        for text in texts:
            captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
    return {
        "info": {
            "description": "Six drawn pictures with captions, made by scripts/draw_demo_coco.py of asyncdiff_pl",
            "version": "1.0",
            "year": 2025,
            "contributor": "asyncdiff_pl",
        },
        "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "images": images,
        "annotations": captions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write captions.json and images/")
    folder = parser.parse_args().folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, (draw, _) in SCENES.items():
        draw().save(folder / "images" / f"{name}.jpg", quality=92, optimize=True)
    (folder / "captions.json").write_text(json.dumps(annotations(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
