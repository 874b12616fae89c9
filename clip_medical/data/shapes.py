"""The general world of the tiny CLIP: coloured shapes and textures, drawn and described by seed.

Plays the part that web pictures play for OpenAI's CLIP: what the base model knows well before it meets radiology, and
so what adaptation might make it forget. `scene(seed, split, index)` is a pure function, like `phantom`.
"""

import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 112  # pixels a side

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 215, 50),
    "orange": (240, 140, 30),
    "purple": (140, 50, 180),
    "pink": (245, 150, 190),
    "brown": (130, 80, 40),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "oval", "hexagon", "crescent", "bar")
TEXTURES = ("solid", "striped", "dotted", "checkered", "grainy", "cloudy", "shaded")
PLACES = {
    "left": (-0.5, 0.0),
    "right": (0.5, 0.0),
    "upper": (0.0, -0.5),
    "lower": (0.0, 0.5),
    "upper left": (-0.5, -0.5),
    "upper right": (0.5, -0.5),
    "lower left": (-0.5, 0.5),
    "lower right": (0.5, 0.5),
    "middle": (0.0, 0.0),
}
OPENINGS = ("a picture of {}.", "{}.", "an image showing {}.", "there is {}.", "{} in the picture.")


class Scene(NamedTuple):
    """A picture of coloured shapes, and the truth about it."""

    image: Image.Image  # mode "RGB", 112 x 112
    caption: str
    labels: dict[str, str]  # colour, shape, texture of the first object, and the place where it lies


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of a shape of radius 1 about the origin."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    match shape:
        case "circle":
            return radius < 0.95
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) < 0.8
        case "triangle":
            return (y < 0.7) & (y > 1.9 * np.abs(x) - 1.0)
        case "star":
            return radius < 0.72 + 0.28 * np.cos(5 * (angle + np.pi / 2))
        case "ring":
            return (radius < 1) & (radius > 0.68)
        case "cross":
            return (np.minimum(np.abs(x), np.abs(y)) < 0.28) & (np.maximum(np.abs(x), np.abs(y)) < 0.95)
        case "oval":
            return (x / 1.1) ** 2 + (y / 0.6) ** 2 < 1
        case "hexagon":
            return np.maximum(np.abs(x), np.abs(x) / 2 + np.abs(y) * 0.866) < 0.85
        case "crescent":
            return (radius < 1) & (np.hypot(x - 0.45, y) > 0.8)
        case _:  # a bar
            return (np.abs(x) < 1.1) & (np.abs(y) < 0.25)


def _texture(name: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness 0..1 over the picture, to mix a colour with its dark or light companion."""
    turn, period = rng.uniform(0, np.pi), rng.uniform(0.12, 0.35)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    match name:
        case "striped":
            return (np.sin(2 * np.pi * u / period) > 0).astype(np.float32)
        case "dotted":
            return 1 - (np.hypot(u % period - period / 2, v % period - period / 2) < 0.3 * period).astype(np.float32)
        case "checkered":
            return ((np.floor(u / period) + np.floor(v / period)) % 2).astype(np.float32)
        case "grainy":
            return rng.random(x.shape, dtype=np.float32)
        case "cloudy":  # a few coarse waves
            waves = [np.sin(rng.normal(0, 7) * x + rng.normal(0, 7) * y + rng.uniform(0, 6)) for _ in range(5)]
            return np.clip(0.5 + sum(waves) / 5, 0, 1)
        case "shaded":
            return np.clip(0.5 + 0.6 * u, 0, 1)
    return np.ones_like(x)


def _paint(name: str, colour: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A coloured texture over the whole picture, (SIZE, SIZE, 3)."""
    main = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 12, 3), 0, 255)
    other = main * 0.35 if main.mean() > 90 else main + 110  # the same colour, much darker or lighter
    mix = _texture(name, x, y, rng)[..., None]
    return main * mix + other * (1 - mix)


def scene(seed: int, split: str, index: int) -> Scene:
    """One or two shapes, or several small ones, on a textured ground, in colour or in grey. About 1 ms on one core."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIZE, dtype=np.float32)] * 2)
    grey = rng.random() < 0.4
    palette = ("white", "grey", "black") if grey else tuple(COLOURS)
    ground, ground_texture = pick(palette), pick(TEXTURES)
    pixels = _paint(ground_texture, ground, x, y, rng)

    count = int(rng.choice([1, 2, 6], p=[0.5, 0.35, 0.15]))
    colour, shape, texture, size = pick(palette), pick(SHAPES), pick(TEXTURES), pick(("small", "large"))
    places = [list(PLACES)[i] for i in rng.permutation(len(PLACES))]
    phrases = []
    for n in range(count):
        if n and count == 2:
            colour, shape, texture, size = pick(palette), pick(SHAPES), pick(TEXTURES), pick(("small", "large"))
        if count == 1 or n < 1:
            first = dict(colour=colour, shape=shape, texture=texture, place=places[0])
        radius = rng.uniform(0.13, 0.18) if count == 6 or size == "small" else rng.uniform(0.32, 0.45)
        cx, cy = np.array(PLACES[places[n]]) + rng.normal(0, 0.05, 2)
        turn = rng.normal(0, 0.2)
        u, v = (x - cx) / radius, (y - cy) / radius
        inside = _inside(shape, u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn))
        pixels = np.where(inside[..., None], _paint(texture, colour, x, y, rng), pixels)
        where = "in the middle" if places[n] == "middle" else f"on the {places[n]} side"
        phrases.append(f"a {size} {texture} {colour} {shape} {where}")
    things = f"several small {texture} {colour} {shape}s" if count == 6 else " and ".join(phrases)
    caption = pick(OPENINGS).format(f"{things} on a {ground_texture} {ground} background")
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(3, 20), pixels.shape[:2])[..., None]
    return Scene(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), caption, first)
