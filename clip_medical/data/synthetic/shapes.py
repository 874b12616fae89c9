"""Scenes of coloured shapes and textures with captions: the general-domain pretraining data of the tiny CLIP.

They stand in for the web images on which OpenAI's CLIP was trained. `experiments/ablation.py` measures on them how much
general knowledge an adaptation loses. `scene(seed, split, index)` is a pure function, like `phantoms.phantom`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from clip_medical.data.synthetic import Example, pick, random_stream

VERSION = 1  # raise it when any pixel or caption changes: image caches are keyed by it

SIZE = 112  # pixels per side

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (235, 215, 50),
    "orange": (240, 140, 30), "purple": (140, 50, 180), "pink": (245, 150, 190), "brown": (130, 80, 40),
    "cyan": (60, 205, 215), "white": (245, 245, 245), "grey": (128, 128, 128), "black": (15, 15, 15),
}  # fmt: skip
# shape of radius 1 about the origin -> its mask, from x and y and from the polar coordinates r and t
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y, r, t: r < 0.95,
    "square": lambda x, y, r, t: np.maximum(np.abs(x), np.abs(y)) < 0.8,
    "triangle": lambda x, y, r, t: (y < 0.7) & (y > 1.9 * np.abs(x) - 1.0),
    "star": lambda x, y, r, t: r < 0.72 + 0.28 * np.cos(5 * (t + np.pi / 2)),
    "ring": lambda x, y, r, t: (r < 1) & (r > 0.68),
    "cross": lambda x, y, r, t: (np.minimum(np.abs(x), np.abs(y)) < 0.28) & (np.maximum(np.abs(x), np.abs(y)) < 0.95),
    "oval": lambda x, y, r, t: (x / 1.1) ** 2 + (y / 0.6) ** 2 < 1,
    "hexagon": lambda x, y, r, t: np.maximum(np.abs(x), np.abs(x) / 2 + np.abs(y) * 0.866) < 0.85,
    "crescent": lambda x, y, r, t: (r < 1) & (np.hypot(x - 0.45, y) > 0.8),
    "bar": lambda x, y, r, t: (np.abs(x) < 1.1) & (np.abs(y) < 0.25),
}
# texture -> brightness 0..1 at rotated coordinates u and v, with a period p
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "solid": lambda u, v, p, rng: np.ones_like(u),
    "striped": lambda u, v, p, rng: np.sin(2 * np.pi * u / p) > 0,
    "dotted": lambda u, v, p, rng: 1 - (np.hypot(u % p - p / 2, v % p - p / 2) < 0.3 * p),
    "checkered": lambda u, v, p, rng: (np.floor(u / p) + np.floor(v / p)) % 2,
    "grainy": lambda u, v, p, rng: rng.random(u.shape, dtype=np.float32),
    "cloudy": lambda u, v, p, rng: _clouds(rng),
    "shaded": lambda u, v, p, rng: np.clip(0.5 + 0.6 * u, 0, 1),
}
PLACES = ("left", "right", "upper", "lower", "upper left", "upper right", "lower left", "lower right", "middle")
TEMPLATES = ("a picture of {}.", "{}.", "an image showing {}.", "there is {}.", "{} in the picture.")
X, Y = np.meshgrid(*[np.linspace(-1, 1, SIZE, dtype=np.float32)] * 2)  # pixel coordinates, (SIZE, SIZE) each


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Return the sum of five plane waves of low frequency."""
    waves = [np.sin(rng.normal(0, 7) * X + rng.normal(0, 7) * Y + rng.uniform(0, 6)) for _ in range(5)]
    clouds: np.ndarray = np.clip(0.5 + sum(waves) / 5, 0, 1)
    return clouds


def _mask(shape: str, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Return the pixels (SIZE, SIZE) inside a shape that is rotated by `angle`."""
    u, v = (X - centre[0]) / radius, (Y - centre[1]) / radius
    x, y = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    return SHAPES[shape](x, y, np.hypot(x, y), np.arctan2(y, x))


def _surface(texture: str, colour: str, rng: np.random.Generator) -> np.ndarray:
    """Return a textured surface (SIZE, SIZE, 3) of one colour and a much darker or lighter one."""
    main = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 12, 3), 0, 255)
    other = main * 0.35 if main.mean() > 90 else main + 110
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.12, 0.35)
    u, v = X * np.cos(angle) + Y * np.sin(angle), Y * np.cos(angle) - X * np.sin(angle)
    brightness = TEXTURES[texture](u, v, period, rng)[..., None]
    surface: np.ndarray = main * brightness + other * (1 - brightness)
    return surface


def scene(seed: int, split: str, index: int) -> Example:
    """Return one, two or six objects on a textured background, in colour or in grey. About 4 ms on one core."""
    rng = random_stream(seed, split, index)
    palette = ("white", "grey", "black") if rng.random() < 0.4 else tuple(COLOURS)
    background, background_texture = pick(rng, palette), pick(rng, TEXTURES)
    pixels = _surface(background_texture, background, rng)

    def attributes() -> tuple[str, str, str, str]:
        return pick(rng, palette), pick(rng, SHAPES), pick(rng, TEXTURES), pick(rng, ("small", "large"))

    count = int(rng.choice([1, 2, 6], p=[0.5, 0.35, 0.15]))
    colour, shape, texture, size = attributes()
    places = [PLACES[i] for i in rng.permutation(len(PLACES))[:count]]
    labels = dict(colour=colour, shape=shape, texture=texture, place=places[0])
    phrases = []
    for n, place in enumerate(places):
        if n and count == 2:  # six objects are alike, two are not
            colour, shape, texture, size = attributes()
        radius = rng.uniform(0.13, 0.18) if count == 6 or size == "small" else rng.uniform(0.32, 0.45)
        side, height = ("right" in place) - ("left" in place), ("lower" in place) - ("upper" in place)
        centre = np.array([0.5 * side, 0.5 * height]) + rng.normal(0, 0.05, 2)
        mask = _mask(shape, centre, radius, rng.normal(0, 0.2))
        pixels = np.where(mask[..., None], _surface(texture, colour, rng), pixels)
        location = "in the middle" if place == "middle" else f"on the {place} side"
        phrases.append(f"a {size} {texture} {colour} {shape} {location}")
    objects = f"several small {texture} {colour} {shape}s" if count == 6 else " and ".join(phrases)
    caption = pick(rng, TEMPLATES).format(f"{objects} on a {background_texture} {background} background")
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(3, 20), pixels.shape[:2])[..., None]
    return Example(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), caption, labels)
