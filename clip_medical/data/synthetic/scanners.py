"""Simulated image acquisition: X-ray, CT, MRI and ultrasound of the same phantom body.

A body is a list of ellipsoids of one tissue each, as in the head phantom of Shepp and Logan (1974). `TISSUES` lists the
physical properties that each modality measures. The signal models are the standard ones, simplified to about 2 ms per
image: Beer-Lambert projection, Hounsfield units in a display window, spin-echo signal, and attenuated speckle with time
gain compensation. The images serve teaching and testing. They are not clinically realistic and show no patient.

Body coordinates are in units of half the field of view: x points to the patient's left, y to the back, z to the feet.
Images follow the radiological convention, with the patient's left on the right-hand side. Image coordinates are u, to
the right, and v, downwards. Arrays are float32, which is ample for 8-bit images.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

SIZE = 128  # pixels per side

GAMMAS = {"standard exposure": 1.0, "overexposed": 1.4, "underexposed": 0.7}  # of the film's response
WINDOWS = {"soft-tissue window": (40, 400), "bone window": (450, 1800), "lung window": (-550, 1500)}  # level, width; HU
WEIGHTINGS = {"T1-weighted": (500, 12), "T2-weighted": (3500, 95)}  # repetition time and echo time, ms
PROBES = ("curved probe", "linear probe")
BEAMS, DEPTHS = 96, 160  # samples of an ultrasound image across and along the beams


class Tissue(NamedTuple):
    """Typical values, rounded, and exaggerated where the contrast would not show at 128 x 128 pixels."""

    attenuation: float  # X-ray: linear attenuation coefficient, 1 / cm at about 60 keV
    hounsfield: float  # CT number, HU: water 0, air -1000
    t1: float  # MRI: relaxation times at 1.5 T, ms
    t2: float
    proton_density: float  # MRI: relative to water
    backscatter: float  # ultrasound: relative amplitude, 0 (fluid) to 1 (interface with bone or gas)
    absorption: float  # ultrasound: nepers of amplitude per half field of view


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
    "exudate": Tissue(0.24, 40, 1200, 90, 0.90, 0.30, 0.8),
    "blood": Tissue(0.36, 200, 250, 35, 0.90, 0.90, 1.0),
    "capsule": Tissue(0.50, 220, 900, 20, 0.40, 0.95, 0.8),
    "calcium": Tissue(1.20, 1400, 900, 2, 0.05, 1.00, 9.0),
}
NAMES = list(TISSUES)
# property -> (tissues,) in the order of TISSUES
PROPERTIES = dict(zip(Tissue._fields, np.array(list(TISSUES.values()), np.float32).T, strict=True))


class Ellipsoid(NamedTuple):
    """One part of the body, which replaces `parent` tissue by `tissue`."""

    tissue: str
    parent: str
    centre: Sequence[float]  # x, y, z
    radii: Sequence[float]  # half axes


Body = Sequence[Ellipsoid]
# Image planes: the axes (0 = x, 1 = y, 2 = z) along u and v, and the axis of projection or slice position.
Plane = tuple[int, int, int]
AXIAL, CORONAL, SAGITTAL, LONG_AXIS = (0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)


def _patient_grid(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return body coordinates (SIZE, SIZE) along u and v, with a random rotation, zoom and offset of the patient."""
    u = np.linspace(-1, 1, SIZE, dtype=np.float32)
    v = u[:, None]
    angle, zoom = rng.normal(0, 0.05), rng.uniform(0.93, 1.12)
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    return cos * u - sin * v + rng.normal(0, 0.03), sin * u + cos * v + rng.normal(0, 0.03)


def _squared_distance(part: Ellipsoid, plane: Plane, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return squared distances (H, W) from the centre in half axes, in the image plane: below 1 is inside."""
    i, j, _ = plane
    distance: np.ndarray = ((u - part.centre[i]) / part.radii[i]) ** 2 + ((v - part.centre[j]) / part.radii[j]) ** 2
    return distance


def _tissue_map(body: Body, plane: Plane, position: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return indices (H, W) into TISSUES in the slice at `position`. Later parts cover earlier ones."""
    axis = plane[2]
    tissues = np.zeros(u.shape, dtype=np.int64)
    for part in body:
        squared_radius = 1 - ((position - part.centre[axis]) / part.radii[axis]) ** 2  # of the cross-section
        if squared_radius > 0:
            tissues[_squared_distance(part, plane, u, v) < squared_radius] = NAMES.index(part.tissue)
    return tissues


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], passes: int) -> np.ndarray:
    """Return Gaussian noise of about unit variance, smoothed `passes` times with a [1 2 1] / 4 filter."""
    height, width = (side + 2 * passes for side in shape)
    noise: np.ndarray = rng.standard_normal((height, width), dtype=np.float32)
    for _ in range(passes):
        noise = noise[:-2] + 2 * noise[1:-1] + noise[2:]
        noise = noise[:, :-2] + 2 * noise[:, 1:-1] + noise[:, 2:]
    noise /= noise.std()
    return noise


def xray(body: Body, plane: Plane, position: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Return a radiograph (SIZE, SIZE) in 0..1: Beer-Lambert transmission with photon noise, on a log scale.

    The attenuation integral over an ellipsoid has a closed form, its chord length. A projection uses no `position`.
    """
    u, v = _patient_grid(rng)
    integrals = np.zeros_like(u)
    for part in body:
        contrast = TISSUES[part.tissue].attenuation - TISSUES[part.parent].attenuation
        chord = np.sqrt(np.maximum(0, 1 - _squared_distance(part, plane, u, v)))  # in diameters
        integrals += 2 * part.radii[plane[2]] * contrast * chord
    # the factor turns half fields of view into a thickness that uses the film's range
    photons = rng.poisson(4000 * np.exp(-3.5 * np.maximum(integrals, 0))) + 1
    film = np.log(4001 / photons)  # bone bright, air dark
    low, high = np.percentile(film, (2, 99.5))
    image: np.ndarray = np.clip((film - low) / (high - low + 1e-6), 0, 1) ** GAMMAS[technique]
    return image


def ct(body: Body, plane: Plane, position: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Return a CT slice (SIZE, SIZE) in 0..1: Hounsfield units with correlated noise, in a display window."""
    u, v = _patient_grid(rng)
    units = PROPERTIES["hounsfield"][_tissue_map(body, plane, position, u, v)]
    if plane == AXIAL:  # the patient table, a thin plastic arc behind the back
        arc = v - 0.86 + 0.12 * u**2
        units = np.where((np.abs(arc) < 0.015) & (np.abs(u) < 0.8), 60, units)
    units = units + 14 * _smooth_noise(rng, units.shape, 1)
    level, width = WINDOWS[technique]
    image: np.ndarray = np.clip((units - level) / width + 0.5, 0, 1)
    return image


def mri(body: Body, plane: Plane, position: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Return an MRI slice (SIZE, SIZE) in 0..1: spin-echo signal PD (1 - exp(-TR/T1)) exp(-TE/T2) with a bias field.

    The magnitude of two noisy channels has Rician noise.
    """
    u, v = _patient_grid(rng)
    t1, t2, density = (PROPERTIES[name] for name in ("t1", "t2", "proton_density"))
    tr, te = WEIGHTINGS[technique]
    tissue_signal = density * (1 - np.exp(-tr / t1)) * np.exp(-te / t2)
    a, b, c = rng.normal(0, 0.15, 3).tolist()
    signal = tissue_signal[_tissue_map(body, plane, position, u, v)] * np.exp(a * u + b * v + c * u * v)
    real, imaginary = 0.018 * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude = np.sqrt((signal + real) ** 2 + imaginary**2)
    image: np.ndarray = np.clip(magnitude / np.percentile(magnitude, 99.3), 0, 1)
    return image


def ultrasound(body: Body, plane: Plane, position: float, technique: str, rng: np.random.Generator) -> np.ndarray:
    """Return a B-mode image (SIZE, SIZE) in 0..1: backscatter times speckle, attenuated along each beam.

    Attenuation accumulates with depth, so bone and gas cast shadows and fluid causes enhancement. The signal is
    computed on a grid of beams and depths, then converted to a sector (curved probe) or a rectangle (linear probe).
    """
    beams, depths = np.linspace(-1, 1, BEAMS, dtype=np.float32), np.linspace(0, 1.55, DEPTHS, dtype=np.float32)[:, None]
    x, y = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(0, 1.6, SIZE))  # pixels
    # u and v of the samples relative to the skin (DEPTHS, BEAMS); beam and depth of the pixels (SIZE, SIZE)
    if technique == "curved probe":
        u, v = (0.45 + depths) * np.sin(0.75 * beams), (0.45 + depths) * np.cos(0.75 * beams) - 0.45
        beam, depth = np.arctan2(x, y + 0.45) / 0.75, np.hypot(x, y + 0.45) - 0.45
    else:
        u, v = np.broadcast_arrays(0.72 * beams, depths)
        beam, depth = x / 0.72, y

    skin = min(part.centre[1] - part.radii[1] for part in body) + 0.02
    tissues = _tissue_map(body, plane, position, u, skin + v)
    # above the skin is coupling gel, not air: it neither scatters nor absorbs
    gel = ~np.logical_or.accumulate(tissues > 0, axis=0)
    backscatter, absorption = (np.where(gel, 0, PROPERTIES[name][tissues]) for name in ("backscatter", "absorption"))
    transmission = np.exp(-depths[1, 0] * np.cumsum(absorption, axis=0))
    transmission = np.vstack([np.ones_like(transmission[:1]), transmission[:-1]])  # to the top of each sample
    gain = np.exp(0.55 * depths)  # time gain compensation for average tissue
    interfaces = np.abs(np.diff(backscatter, axis=0, prepend=backscatter[:1])) * 0.6
    speckle = np.sqrt(sum(_smooth_noise(rng, tissues.shape, 2) ** 2 for _ in range(2)))  # Rayleigh: two quadratures
    noise = 0.004 * np.sqrt(2 * rng.standard_exponential(tissues.shape, dtype=np.float32))  # Rayleigh: receiver
    amplitude = (backscatter * speckle + interfaces) * transmission * gain + noise
    samples = np.clip(1 + np.log10(amplitude + 1e-4) / 2, 0, 1) * 0.8  # log compression to 40 dB

    # scan conversion: each pixel shows the nearest sample
    i, j = np.rint(depth / depths[1, 0]).astype(int), np.rint((beam + 1) * (BEAMS - 1) / 2).astype(int)
    field_of_view = (i >= 0) & (i < DEPTHS) & (j >= 0) & (j < BEAMS)
    return np.where(field_of_view, samples[i.clip(0, DEPTHS - 1), j.clip(0, BEAMS - 1)], 0)


class Modality(NamedTuple):
    """What a caption can contain about a modality, and its simulated acquisition."""

    terms: Collection[str]
    views: dict[str, Plane]
    techniques: Collection[str]
    acquire: Callable[[Body, Plane, float, str, np.random.Generator], np.ndarray]


XRAY_VIEWS, CT_VIEWS = {"frontal": CORONAL, "lateral": SAGITTAL}, {"axial": AXIAL, "sagittal": SAGITTAL}
MRI_VIEWS, US_VIEWS = {"coronal": CORONAL, "sagittal": SAGITTAL}, {"transverse": AXIAL, "longitudinal": LONG_AXIS}
MODALITIES = {
    "X-ray": Modality(("X-ray", "radiograph", "plain film"), XRAY_VIEWS, GAMMAS, xray),
    "CT": Modality(("CT", "computed tomography", "CT scan"), CT_VIEWS, WINDOWS, ct),
    "MRI": Modality(("MRI", "MR image", "magnetic resonance image"), MRI_VIEWS, WEIGHTINGS, mri),
    "ultrasound": Modality(("ultrasound", "sonogram", "ultrasound image"), US_VIEWS, PROBES, ultrasound),
}
