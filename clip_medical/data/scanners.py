"""Four scanners for a phantom: what X-ray, CT, MRI and ultrasound make of the same body.

A body is a list of ellipsoids, as in the head phantom of Shepp and Logan (1974), each of one tissue. Each scanner asks
the tissue for the property that it measures (`TISSUES`) and adds the artefacts by which its pictures are known.
The pictures are caricatures made to teach and to test; they show nobody.

All arrays are float32: a pixel of the picture has 8 bits.

Axes, in units of half the field of view: x runs to the patient's left, y to the back, z to the feet. Pictures follow
the radiological convention: the patient's left is on the right-hand side.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

SIZE = 128  # pixels a side


class Tissue(NamedTuple):
    """What each scanner measures of a tissue: typical values, rounded, stretched where 128 pixels would hide them."""

    attenuation: float  # X-ray: linear attenuation, 1 / cm at about 60 keV
    hounsfield: float  # CT number: water is 0, air -1000
    t1: float  # MRI relaxation times at 1.5 T, ms
    t2: float
    proton_density: float  # relative to water
    echo: float  # ultrasound: backscatter, 0 (fluid) to 1 (interface with bone or gas)
    absorption: float  # ultrasound: loss of amplitude by the half field of view, in nepers


TISSUES = {
    "air": Tissue(0.00, -1000, 1, 1, 0.00, 0.90, 9.0),
    "lung": Tissue(0.04, -800, 1100, 30, 0.20, 0.75, 3.0),
    "fat": Tissue(0.17, -100, 260, 80, 0.90, 0.80, 0.5),
    "muscle": Tissue(0.21, 50, 900, 45, 0.80, 0.20, 0.6),
    "organ": Tissue(0.21, 70, 600, 50, 0.85, 0.38, 0.6),
    "gland": Tissue(0.22, 45, 1000, 70, 0.85, 0.65, 0.7),
    "grey matter": Tissue(0.21, 42, 1000, 100, 0.85, 0.35, 0.5),
    "white matter": Tissue(0.21, 28, 680, 75, 0.72, 0.50, 0.5),
    "fluid": Tissue(0.20, 5, 4000, 1500, 1.00, 0.02, 0.0),
    "disc": Tissue(0.22, 90, 1100, 90, 0.80, 0.40, 0.8),
    "marrow": Tissue(0.32, 260, 350, 70, 0.75, 0.60, 3.0),
    "bone": Tissue(0.60, 1000, 500, 2, 0.15, 1.00, 6.0),
    "tumour": Tissue(0.34, 130, 1400, 120, 0.92, 0.14, 0.9),
    "capsule": Tissue(0.50, 220, 900, 20, 0.40, 0.95, 0.8),
    "calcium": Tissue(1.20, 1400, 900, 2, 0.05, 1.00, 9.0),
}
NAMES = list(TISSUES)
PROPERTIES = np.array([list(t) for t in TISSUES.values()], dtype=np.float32)


class Ellipsoid(NamedTuple):
    """One part of the body: `tissue` where `parent` would be without it, with its centre and half axes (x, y, z)."""

    tissue: str
    parent: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


# view -> the axes (0 = x, 1 = y, 2 = z) that run to the right and down in the picture, and the one looked along
PLANES = {
    "frontal": (0, 2, 1),
    "coronal": (0, 2, 1),
    "lateral": (1, 2, 0),
    "sagittal": (1, 2, 0),
    "axial": (0, 1, 2),
    "transverse": (0, 1, 2),
    "longitudinal": (2, 1, 0),
}


GRID = np.linspace(-1, 1, SIZE, dtype=np.float32)


def _grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (SIZE, SIZE) of the pixels, as the patient lies: a little turned, shifted and scaled."""
    right, down = GRID, GRID[:, None]
    angle, zoom = rng.normal(0, 0.05), rng.uniform(0.93, 1.12)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    return cos * right - sin * down + rng.normal(0, 0.03), sin * right + cos * down + rng.normal(0, 0.03)


def _in_plane(parts: Sequence[Ellipsoid], view: str, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Squared distance (parts, H, W) from the centre of each in half axes, seen along the third axis: under 1 inside.

    All parts at once and in place: between many short operations, threads queue for the interpreter's lock.
    """
    shown = list(PLANES[view][:2])
    x, y = np.array([part.centre for part in parts], np.float32).T[shown][..., None, None]
    a, b = np.array([part.radii for part in parts], np.float32).T[shown][..., None, None]
    distance, below = right - x, down - y
    distance /= a
    distance *= distance
    below /= b
    below *= below
    distance += below
    return distance


def _slice(body: Sequence[Ellipsoid], view: str, at: float, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Index into TISSUES at each point of the plane `at` on the view's third axis; later parts cover earlier ones."""
    through = PLANES[view][2]
    depths = [((at - part.centre[through]) / part.radii[through]) ** 2 for part in body]
    cut = [(part, 1 - depth) for part, depth in zip(body, depths, strict=True) if depth < 1]
    tissue = np.zeros(right.shape, dtype=np.int64)
    if cut:
        distances = _in_plane([part for part, _ in cut], view, right, down)
        for (part, outline), distance in zip(cut, distances, strict=True):
            tissue[distance < outline] = NAMES.index(part.tissue)
    return tissue


def _noise(rng: np.random.Generator, shape: tuple[int, ...], passes: int) -> np.ndarray:
    """Gaussian noise with neighbours mixed by a [1 2 1] / 4 filter `passes` times, brought back to unit variance."""
    height, width = (side + 2 * passes for side in shape)
    noise = rng.standard_normal((height, width), dtype=np.float32)
    for _ in range(passes):
        noise = noise[:-2] + 2 * noise[1:-1] + noise[2:]
        noise = noise[:, :-2] + 2 * noise[:, 1:-1] + noise[:, 2:]
    return noise / noise.std()


def xray(body: Sequence[Ellipsoid], view: str, at: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Beer and Lambert: each pixel is exp(-attenuation integrated along its ray), with counting noise, shown as film.

    The integral over an ellipsoid has a closed form, its chord length; `at` is not used, a projection has no slice.
    Returns (SIZE, SIZE) in 0..1.
    """
    right, down = _grid(rng)
    chords = np.sqrt(np.maximum(0, 1 - _in_plane(body, view, right, down)))  # in half axes along the ray
    along = PLANES[view][2]
    more = [TISSUES[part.tissue].attenuation - TISSUES[part.parent].attenuation for part in body]
    each = np.array([2 * part.radii[along] * mu for part, mu in zip(body, more, strict=True)], np.float32)
    path = (each[:, None, None] * chords).sum(axis=0)
    photons = rng.poisson(4000 * np.exp(-3.5 * np.maximum(path, 0))) + 1
    film = np.log(4001 / photons)  # bone bright, air dark
    low, high = np.percentile(film, (2, 99.5))
    exposure = {"overexposed": 1.9, "standard exposure": 1.0, "underexposed": 0.5}[technique]
    return np.clip((film - low) / (high - low + 1e-6), 0, 1) ** exposure


# level and width, in HU
CT_WINDOWS = {"soft-tissue window": (40, 400), "bone window": (450, 1800), "lung window": (-550, 1500)}


def ct(body: Sequence[Ellipsoid], view: str, at: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """One slice of Hounsfield units with reconstruction noise, on the scanner's table, shown through a window."""
    right, down = _grid(rng)
    units = PROPERTIES[_slice(body, view, at, right, down), Tissue._fields.index("hounsfield")]
    if view == "axial":  # the table: two thin arcs of plastic behind the back
        arc = down - 0.86 + 0.12 * right**2
        units = np.where((np.abs(arc) < 0.015) & (np.abs(right) < 0.8), 60, units)
    units = units + 14 * _noise(rng, units.shape, 1)
    level, width = CT_WINDOWS[technique]
    return np.clip((units - level) / width + 0.5, 0, 1)


MRI_TIMES = {"T1-weighted": (500, 12), "T2-weighted": (3500, 95)}  # repetition and echo time, ms


def mri(body: Sequence[Ellipsoid], view: str, at: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Spin echo: PD (1 - exp(-TR/T1)) exp(-TE/T2), under a coil's smooth bias field, with Rician noise."""
    right, down = _grid(rng)
    t1, t2, density = (PROPERTIES[:, Tissue._fields.index(k)] for k in ("t1", "t2", "proton_density"))
    tr, te = MRI_TIMES[technique]
    of_tissue = density * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)
    a, b, c = rng.normal(0, 0.15, 3).tolist()
    signal = of_tissue[_slice(body, view, at, right, down)] * np.exp(a * right + b * down + c * right * down)
    real, imaginary = 0.018 * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude = np.sqrt((signal + real) ** 2 + imaginary**2)  # of two noisy channels: never below zero
    return np.clip(magnitude / np.percentile(magnitude, 99.3), 0, 1)


BEAMS, DEPTHS = 96, 160


def ultrasound(body: Sequence[Ellipsoid], view: str, at: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Echoes along beams: speckle times backscatter, weakened by all that lies above, so bone and gas throw shadows.

    Computed on a grid of beams and depths, then drawn as a sector (curved probe) or a rectangle (linear probe).
    """
    depths, right, down, shown_at, inside = _probe(technique == "curved probe")
    skin = min(part.centre[1] - part.radii[1] for part in body) + 0.02
    tissue = _slice(body, view, at, right, skin + down)
    # outside the skin lies coupling gel, not air: it neither echoes nor absorbs
    gel = ~np.logical_or.accumulate(tissue > 0, axis=0)
    echo, absorption = (np.where(gel, 0, PROPERTIES[tissue, Tissue._fields.index(k)]) for k in ("echo", "absorption"))
    step = depths[1, 0]
    survives = np.exp(-step * np.cumsum(absorption, axis=0))
    survives = np.vstack([np.ones_like(survives[:1]), survives[:-1]])
    gain = np.exp(0.55 * depths)  # for the usual loss with depth: what lies behind fluid, where none is lost, is bright
    edges = np.abs(np.diff(echo, axis=0, prepend=echo[:1])) * 0.6
    speckle = np.sqrt(sum(_noise(rng, echo.shape, 2) ** 2 for _ in range(2)))  # Rayleigh: two quadratures
    floor = 0.004 * np.sqrt(2 * rng.standard_exponential(echo.shape, dtype=np.float32))  # Rayleigh again
    amplitude = (echo * speckle + edges) * survives * gain + floor
    shown = np.clip(1 + np.log10(amplitude + 1e-4) / 2, 0, 1) * 0.8  # log compression, 40 dB
    return np.where(inside, shown[shown_at], 0)


@cache
def _probe(curved: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """What is the same in all pictures of a probe: its depths (DEPTHS, 1), where its beams run, right and down from
    the skin (DEPTHS, BEAMS); and of each pixel the depth and beam that it shows, and whether it shows one."""
    beams, depths = np.linspace(-1, 1, BEAMS, dtype=np.float32), np.linspace(0, 1.55, DEPTHS, dtype=np.float32)[:, None]
    across, below = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(0, 1.6, SIZE))
    if curved:
        right, down = (0.45 + depths) * np.sin(0.75 * beams), (0.45 + depths) * np.cos(0.75 * beams) - 0.45
        beam, depth = np.arctan2(across, below + 0.45) / 0.75, np.hypot(across, below + 0.45) - 0.45
    else:
        right, down = np.broadcast_arrays(0.72 * beams, depths)
        beam, depth = across / 0.72, below
    i, j = np.rint(depth / depths[1, 0]).astype(int), np.rint((beam + 1) * (BEAMS - 1) / 2).astype(int)
    inside = (i >= 0) & (i < DEPTHS) & (j >= 0) & (j < BEAMS)
    return depths, right, down, (i.clip(0, DEPTHS - 1), j.clip(0, BEAMS - 1)), inside
