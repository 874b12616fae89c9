"""Procedural radiology phantoms: pictures of bodies that never were, with captions that say truly what is in them.

`phantom(seed, split, index)` is a function: the same three arguments give the same phantom for ever, on every machine,
and there is no end of them. One draw of facts (`describe`) decides scanner, technique, view, anatomy, finding and
place; the picture and the caption are both made from these facts, so the caption cannot lie. No phantom is a patient,
and none may be passed off as one.
"""

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_medical.data import scanners
from clip_medical.data.scanners import Ellipsoid

Vector = tuple[float, float, float]


class Modality(NamedTuple):
    """What a caption may say of a kind of scanner."""

    words: tuple[str, ...]
    views: tuple[str, str]  # the first shows left and right, the second (seen from the side) head and feet
    techniques: tuple[str, ...]


MODALITIES = {
    "X-ray": Modality(
        ("X-ray", "radiograph", "plain film"),
        ("frontal", "lateral"),
        ("standard exposure", "overexposed", "underexposed"),
    ),
    "CT": Modality(("CT", "computed tomography", "CT scan"), ("axial", "sagittal"), tuple(scanners.CT_WINDOWS)),
    "MRI": Modality(
        ("MRI", "MR image", "magnetic resonance image"), ("coronal", "sagittal"), tuple(scanners.MRI_TIMES)
    ),
    "ultrasound": Modality(
        ("ultrasound", "sonogram", "ultrasound image"), ("transverse", "longitudinal"), ("curved probe", "linear probe")
    ),
}
SCANNERS = {"X-ray": scanners.xray, "CT": scanners.ct, "MRI": scanners.mri, "ultrasound": scanners.ultrasound}


def _vector(values: Iterable[float]) -> Vector:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _pair(tissue: str, parent: str, centre: Vector, radii: Vector) -> list[Ellipsoid]:
    """The same part on both sides of the body."""
    x, y, z = centre
    return [Ellipsoid(tissue, parent, (side * x, y, z), radii) for side in (1, -1)]


def _bone(parent: str, centre: Vector, radii: Vector, wall: float = 0.04) -> list[Ellipsoid]:
    """A bone: a dense shell of thickness `wall` round its marrow."""
    rx, ry, rz = (max(r - wall, 0.3 * r) for r in radii)
    return [Ellipsoid("bone", parent, centre, radii), Ellipsoid("marrow", "bone", centre, (rx, ry, rz))]


def _bones(parent: str, centre: Vector, radii: Vector, wall: float = 0.04) -> list[Ellipsoid]:
    x, y, z = centre
    return [part for side in (1, -1) for part in _bone(parent, (side * x, y, z), radii, wall)]


def _layers(radii: Vector, *layers: tuple[str, float]) -> list[Ellipsoid]:
    """Nested shells about the origin: each tissue with the share of `radii` that it fills."""
    parts, parent = [], "air"
    for tissue, share in layers:
        rx, ry, rz = radii
        parts.append(Ellipsoid(tissue, parent, (0, 0, 0), (rx * share, ry * share, rz)))
        parent = tissue
    return parts


def _ribs() -> list[Ellipsoid]:
    rings = []
    for z in np.linspace(-0.75, 0.6, 8):  # a flat disc of bone less a smaller disc: a ring
        rings.append(Ellipsoid("bone", "muscle", (0, 0, float(z)), (0.80, 0.50, 0.04)))
        rings.append(Ellipsoid("muscle", "bone", (0, 0, float(z)), (0.765, 0.465, 0.04)))
    return rings


def _vertebrae() -> list[Ellipsoid]:
    parts = []
    for z in np.arange(-1.0, 1.01, 0.4):
        parts += _bone("muscle", (0, -0.05, float(z)), (0.32, 0.26, 0.15), 0.03)
        parts += [Ellipsoid("disc", "muscle", (0, -0.05, float(z) + 0.2), (0.29, 0.24, 0.045))]
        parts += [Ellipsoid("bone", "muscle", (0, 0.58, float(z)), (0.05, 0.14, 0.09))]
        parts += _pair("bone", "muscle", (0.46, 0.22, float(z)), (0.16, 0.05, 0.05))
    return parts


def _fingers() -> list[Ellipsoid]:
    parts = []
    for x, tip in ((-0.36, -0.45), (-0.16, -0.72), (0.04, -0.82), (0.24, -0.66), (0.52, -0.10)):
        root = 0.12 if x < 0.5 else 0.42
        parts += [Ellipsoid("muscle", "air", (x, 0, (tip + root) / 2), (0.10, 0.11, (root - tip) / 2 + 0.12))]
    for x, tip in ((-0.36, -0.45), (-0.16, -0.72), (0.04, -0.82), (0.24, -0.66), (0.52, -0.10)):
        root = 0.12 if x < 0.5 else 0.42
        length = (root - tip) / 3
        for k in range(3):  # three phalanges a finger, then the bone of the palm
            parts += _bone("muscle", (x, 0, tip + (k + 0.5) * length), (0.045, 0.05, 0.44 * length), 0.02)
        parts += _bone("muscle", (0.85 * x, 0, root + 0.24), (0.045, 0.05, 0.2), 0.02)
    for x in (-0.2, -0.05, 0.1, 0.24):
        parts += _bone("muscle", (x, 0, 0.66), (0.07, 0.07, 0.07), 0.02)
    return parts


BODIES: dict[str, list[Ellipsoid]] = {
    "chest": _layers((0.92, 0.62, 1.4), ("fat", 1), ("muscle", 0.93))
    + _ribs()
    + _pair("lung", "muscle", (0.40, 0.0, -0.08), (0.32, 0.44, 0.75))
    + [Ellipsoid("muscle", "lung", (0.14, -0.12, 0.28), (0.32, 0.26, 0.32))]
    + _bone("muscle", (0, 0.42, 0), (0.13, 0.13, 1.4)),
    "head": [Ellipsoid("muscle", "air", (0, 0.12, 1.0), (0.34, 0.36, 0.7))]
    + _layers((0.70, 0.86, 0.80), ("fat", 1), ("bone", 0.94), ("grey matter", 0.85), ("white matter", 0.68))
    + _pair("fluid", "white matter", (0.12, 0.0, -0.05), (0.07, 0.30, 0.16))
    + _pair("fluid", "fat", (0.27, -0.72, 0.30), (0.12, 0.12, 0.12)),
    "abdomen": _layers((0.95, 0.70, 1.5), ("fat", 1), ("muscle", 0.90), ("fat", 0.80))
    + [Ellipsoid("organ", "fat", (-0.34, -0.05, -0.25), (0.40, 0.40, 0.48))]
    + [Ellipsoid("organ", "fat", (0.52, 0.12, -0.32), (0.18, 0.22, 0.28))]
    + _pair("organ", "fat", (0.34, 0.28, 0.18), (0.14, 0.14, 0.28))
    + [Ellipsoid("air", "fat", (0.26, -0.30, -0.42), (0.17, 0.12, 0.13))]
    + _pair("air", "fat", (0.45, -0.25, 0.62), (0.12, 0.12, 0.2))
    + _bone("fat", (0, 0.42, 0), (0.15, 0.15, 1.5)),
    "pelvis": _layers((0.95, 0.66, 1.4), ("fat", 1), ("muscle", 0.92))
    + _bones("muscle", (0.46, 0.15, -0.34), (0.30, 0.12, 0.36))
    + _bones("muscle", (0.55, 0.0, 0.28), (0.18, 0.18, 0.18))
    + _bones("muscle", (0.63, 0.0, 0.85), (0.11, 0.11, 0.5))
    + _pair("bone", "muscle", (0.15, -0.18, 0.45), (0.17, 0.07, 0.07))
    + _bone("muscle", (0, 0.38, -0.25), (0.22, 0.13, 0.36))
    + [Ellipsoid("fluid", "muscle", (0, -0.14, 0.12), (0.24, 0.22, 0.22))],
    "lumbar spine": _layers((1.15, 0.95, 1.9), ("fat", 1), ("muscle", 0.86))
    + _vertebrae()
    + [Ellipsoid("fluid", "muscle", (0, 0.31, 0), (0.10, 0.08, 1.6))],
    "knee": _layers((0.62, 0.66, 1.6), ("fat", 1), ("muscle", 0.85))
    + _bone("muscle", (0, 0.05, -0.85), (0.18, 0.18, 0.65))
    + _bones("muscle", (0.20, 0.0, -0.22), (0.24, 0.30, 0.23))
    + _bone("muscle", (0, 0.05, 0.24), (0.43, 0.30, 0.16))
    + _bone("muscle", (0, 0.05, 0.90), (0.19, 0.18, 0.7))
    + [Ellipsoid("bone", "muscle", (0.38, 0.25, 0.85), (0.07, 0.07, 0.6))]
    + _bone("muscle", (0, -0.47, -0.24), (0.17, 0.09, 0.20)),
    "hand": [Ellipsoid("muscle", "air", (0, 0, 0.42), (0.45, 0.20, 0.44))]
    + [Ellipsoid("muscle", "air", (0.02, 0, 1.0), (0.26, 0.18, 0.5))]
    + _fingers()
    + _bones("muscle", (0.11, 0.0, 1.05), (0.09, 0.09, 0.34), 0.03),
    "breast": [Ellipsoid("muscle", "air", (0, 0.80, 0), (1.2, 0.35, 1.3))]
    + _pair("fat", "air", (0.48, 0.05, 0), (0.42, 0.60, 0.55))
    + _pair("gland", "fat", (0.48, -0.02, 0), (0.27, 0.40, 0.34))
    + [Ellipsoid("lung", "muscle", (0, 1.05, 0), (1.0, 0.35, 1.2))],
}
# anatomy -> where a lesion lies (on the left; mirrored on the right), the tissue there, and how large it may be. Slices
# are taken through it, so it lies where a slice in any direction also shows what the anatomy is known by.
HOSTS: dict[str, tuple[Vector, str, float]] = {
    "chest": ((0.42, 0.05, -0.10), "lung", 1.0),
    "head": ((0.33, 0.10, -0.10), "white matter", 1.0),
    "abdomen": ((0.36, 0.05, 0.00), "organ", 1.0),  # at the height of liver and kidneys
    "pelvis": ((0.52, 0.02, 0.26), "marrow", 0.8),  # a femoral head, with the ilium above and the bladder between
    "lumbar spine": ((0.19, -0.05, 0.20), "marrow", 0.8),  # a vertebral body
    "knee": ((0.22, 0.00, -0.18), "marrow", 0.8),  # a femoral condyle
    "hand": ((0.24, 0.00, 0.32), "muscle", 0.7),
    "breast": ((0.48, -0.05, 0.00), "gland", 0.9),
}
FINDINGS = {
    "no abnormality": ("no abnormality", "normal appearance", "no focal lesion"),
    "solid mass": ("solid mass", "lobulated mass", "solid tumour"),
    "cyst": ("cyst", "fluid-filled cyst", "thin-walled cyst"),
    "calcification": ("calcification", "calcified lesion", "dense calcification"),
    "gas collection": ("gas collection", "pocket of gas", "air collection"),
    "multiple nodules": ("multiple nodules", "several nodules", "scattered nodules"),
}
TEMPLATES = (
    "{View} {modality} of the {anatomy}, {technique}, showing {finding}.",
    "{Modality} of the {anatomy} in {view} view, {technique}: {finding}.",
    "{View} {anatomy} {modality} with {finding}, {technique}.",
    "{Finding} on {view} {modality} of the {anatomy}, {technique}.",
)


class Phantom(NamedTuple):
    """A picture of a body that never was, and the truth about it."""

    image: Image.Image  # mode "L", 128 x 128
    caption: str
    labels: dict[str, str]  # modality, anatomy, finding, view, technique, place, size ("" where there is none)


def _stream(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """Independent random numbers for the facts (0) and for the picture (1) of one phantom."""
    return np.random.default_rng((seed, zlib.crc32(split.encode()), index, purpose))


def describe(seed: int, split: str, index: int) -> tuple[str, dict[str, str]]:
    """Caption and labels of a phantom, without the cost of drawing it. Splits of other names share no phantom."""
    rng = _stream(seed, split, index, 0)
    pick = lambda options: options[int(rng.integers(len(options)))]  # noqa: E731
    modality, anatomy, finding = pick(list(MODALITIES)), pick(list(BODIES)), pick(list(FINDINGS))
    about = MODALITIES[modality]
    view = pick(about.views)
    technique = pick([t for t in about.techniques if t != "lung window" or anatomy == "chest"])  # else all is white
    place, size = pick(("left", "right") if view == about.views[0] else ("upper", "lower")), pick(("small", "large"))
    words = pick(FINDINGS[finding])
    if finding == "no abnormality":
        place = size = ""
    else:
        many = finding == "multiple nodules"
        where = f"on the {place} side" if place in ("left", "right") else f"in the {place} part"
        words = f"{words} ({size}) {where}" if many else f"a {size} {words} {where}"
    slots = {"view": view, "modality": pick(about.words), "anatomy": anatomy, "technique": technique, "finding": words}
    capitals = {key.capitalize(): value[0].upper() + value[1:] for key, value in slots.items()}
    labels = dict(modality=modality, anatomy=anatomy, finding=finding, view=view)
    return pick(TEMPLATES).format(**slots, **capitals), labels | dict(technique=technique, place=place, size=size)


def _lesion(labels: dict[str, str], rng: np.random.Generator) -> list[Ellipsoid]:
    """The finding as ellipsoids. Its place is one that the view can show: a picture from the side has no left."""
    (x, y, z), host, scale = HOSTS[labels["anatomy"]]
    centre = np.array([x, y, z]) + rng.normal(0, 0.03, 3)
    side = {"left": 1, "right": -1}.get(labels["place"], rng.choice([-1, 1]))
    centre[0] *= side
    centre[2] += {"upper": -0.28, "lower": 0.28}.get(labels["place"], 0)
    radius = scale * (rng.uniform(0.17, 0.22) if labels["size"] == "large" else rng.uniform(0.09, 0.115))
    at = lambda offset, r, tissue, parent: Ellipsoid(  # noqa: E731
        tissue, parent, _vector(centre + offset), _vector(r * rng.uniform(0.9, 1.1, 3))
    )
    here = np.zeros(3)
    match labels["finding"]:
        case "solid mass":
            bumps = [at(rng.normal(0, 0.6 * radius, 3), 0.6 * radius, "tumour", host) for _ in range(4)]
            return [at(here, 0.85 * radius, "tumour", host), *bumps]
        case "cyst":
            outer = at(here, radius, "capsule", host)
            inner = _vector(np.array(outer.radii) - 0.035)
            return [outer, Ellipsoid("fluid", "capsule", outer.centre, inner)]
        case "calcification":
            return [at(here, 0.8 * radius, "calcium", host)]
        case "gas collection":
            return [at(here, radius, "air", host)]
        case "multiple nodules":
            small = 0.045 if labels["size"] == "small" else 0.085
            return [at(rng.uniform(-0.22, 0.22, 3), small, "tumour", host) for _ in range(7)]
    return []


def _moves(rng: np.random.Generator, count: int) -> list[tuple[Vector, Vector]]:
    """By how much to shift a part of a body, and by what factors to stretch it, `count` times."""
    shifts, factors = rng.normal(0, 0.012, (count, 3)), rng.uniform(0.95, 1.05, (count, 3))
    return list(zip(shifts.tolist(), factors.tolist(), strict=True))


def _moved(part: Ellipsoid, shift: Vector, factors: Vector) -> Ellipsoid:
    (x, y, z), (rx, ry, rz), (dx, dy, dz), (fx, fy, fz) = part.centre, part.radii, shift, factors
    return Ellipsoid(part.tissue, part.parent, (x + dx, y + dy, z + dz), (rx * fx, ry * fy, rz * fz))


def phantom(seed: int, split: str, index: int) -> Phantom:
    """The phantom number `index` (0 or more) of a split. Pure and deterministic; about 1.5 ms on one core."""
    caption, labels = describe(seed, split, index)
    rng = _stream(seed, split, index, 1)
    parts = BODIES[labels["anatomy"]]
    places = list(dict.fromkeys(part.centre for part in parts))  # no two bodies are alike, but parts of one centre,
    moves = dict(zip(places, _moves(rng, len(places)), strict=True))  # such as a bone and its marrow, move together
    body = [_moved(part, *moves[part.centre]) for part in parts]
    lesion = _lesion(labels, rng)
    through = scanners.PLANES[labels["view"]][2]
    target = lesion[0].centre if lesion else HOSTS[labels["anatomy"]][0]
    at = target[through]
    if labels["finding"] == "multiple nodules":  # bring the nodules into the slice
        centres = [_vector([at if a == through else c for a, c in enumerate(n.centre)]) for n in lesion]
        lesion = [nodule._replace(centre=centre) for nodule, centre in zip(lesion, centres, strict=True)]
    pixels = SCANNERS[labels["modality"]](body + lesion, labels["view"], at, labels["technique"], rng)
    return Phantom(Image.fromarray((255 * pixels + 0.5).astype(np.uint8)), caption, labels)
