"""Synthetic radiology images (phantoms) with captions that are exact by construction.

`phantom(seed, split, index)` is a pure function: equal arguments give the same phantom on every machine, and any number
can be generated. `describe` draws the labels (modality, technique, view, anatomy, finding, place, size), and the image
and the caption are both made from these labels. No phantom shows a patient, and none may be presented as one.
"""

import numpy as np
from PIL import Image

from clip_medical.data.synthetic import Example, pick, random_stream
from clip_medical.data.synthetic.scanners import MODALITIES, Ellipsoid

VERSION = 1  # raise it when any pixel or caption changes: image caches are keyed by it

Vector = tuple[float, float, float]


def _both_sides(parts: list[Ellipsoid]) -> list[Ellipsoid]:
    """Return the parts on the left and their mirror images on the right."""
    return [p._replace(centre=(side * p.centre[0], *p.centre[1:])) for side in (1, -1) for p in parts]


def _bone(parent: str, centre: Vector, radii: Vector, cortex: float = 0.04) -> list[Ellipsoid]:
    """Return a bone: marrow inside cortical bone of thickness `cortex`."""
    cavity = [max(r - cortex, 0.3 * r) for r in radii]
    return [Ellipsoid("bone", parent, centre, radii), Ellipsoid("marrow", "bone", centre, cavity)]


def _layers(radii: Vector, *layers: tuple[str, float]) -> list[Ellipsoid]:
    """Return nested cylinder-like shells about the origin: each tissue with its fraction of the radii in x and y."""
    x, y, z = radii
    parents = ["air", *(tissue for tissue, _ in layers[:-1])]
    return [Ellipsoid(t, parent, (0, 0, 0), (x * f, y * f, z)) for parent, (t, f) in zip(parents, layers, strict=True)]


def _ribs() -> list[Ellipsoid]:
    # a ring is a flat disc of bone minus a smaller disc
    discs = (("bone", "muscle", (0.80, 0.50, 0.04)), ("muscle", "bone", (0.765, 0.465, 0.04)))
    heights = np.linspace(-0.75, 0.6, 8).tolist()
    return [Ellipsoid(tissue, parent, (0, 0, z), radii) for z in heights for tissue, parent, radii in discs]


def _vertebrae() -> list[Ellipsoid]:
    parts = []
    for z in np.arange(-1.0, 1.01, 0.4).tolist():
        parts += _bone("muscle", (0, -0.05, z), (0.32, 0.26, 0.15), 0.03)
        parts.append(Ellipsoid("disc", "muscle", (0, -0.05, z + 0.2), (0.29, 0.24, 0.045)))
        parts.append(Ellipsoid("bone", "muscle", (0, 0.58, z), (0.05, 0.14, 0.09)))
        parts += _both_sides([Ellipsoid("bone", "muscle", (0.46, 0.22, z), (0.16, 0.05, 0.05))])
    return parts


def _digits() -> list[Ellipsoid]:
    # x, tip and root of each digit, the thumb last
    digits = [(-0.36, -0.45, 0.12), (-0.16, -0.72, 0.12), (0.04, -0.82, 0.12), (0.24, -0.66, 0.12), (0.52, -0.1, 0.42)]
    parts = []  # the soft tissue of all digits first, so that it covers no bone
    for x, tip, root in digits:
        parts.append(Ellipsoid("muscle", "air", (x, 0, (tip + root) / 2), (0.10, 0.11, (root - tip) / 2 + 0.12)))
    for x, tip, root in digits:
        length = (root - tip) / 3
        for k in range(3):  # three phalanges, then the metacarpal
            parts += _bone("muscle", (x, 0, tip + (k + 0.5) * length), (0.045, 0.05, 0.44 * length), 0.02)
        parts += _bone("muscle", (0.85 * x, 0, root + 0.24), (0.045, 0.05, 0.2), 0.02)
    for x in (-0.2, -0.05, 0.1, 0.24):  # carpal bones
        parts += _bone("muscle", (x, 0, 0.66), (0.07, 0.07, 0.07), 0.02)
    return parts


BODIES: dict[str, list[Ellipsoid]] = {
    "chest": _layers((0.92, 0.62, 1.4), ("fat", 1), ("muscle", 0.93))
    + _ribs()
    + _both_sides([Ellipsoid("lung", "muscle", (0.40, 0.0, -0.08), (0.32, 0.44, 0.75))])
    + [Ellipsoid("muscle", "lung", (0.14, -0.12, 0.28), (0.32, 0.26, 0.32))]
    + _bone("muscle", (0, 0.42, 0), (0.13, 0.13, 1.4)),
    "head": [Ellipsoid("muscle", "air", (0, 0.12, 1.0), (0.34, 0.36, 0.7))]
    + _layers((0.70, 0.86, 0.80), ("fat", 1), ("bone", 0.94), ("grey matter", 0.85), ("white matter", 0.68))
    + _both_sides([Ellipsoid("fluid", "white matter", (0.12, 0.0, -0.05), (0.07, 0.30, 0.16))])
    + _both_sides([Ellipsoid("fluid", "fat", (0.27, -0.72, 0.30), (0.12, 0.12, 0.12))]),
    "abdomen": _layers((0.95, 0.70, 1.5), ("fat", 1), ("muscle", 0.90), ("fat", 0.80))
    + [Ellipsoid("organ", "fat", (-0.34, -0.05, -0.25), (0.40, 0.40, 0.48))]
    + [Ellipsoid("organ", "fat", (0.52, 0.12, -0.32), (0.18, 0.22, 0.28))]
    + _both_sides([Ellipsoid("organ", "fat", (0.34, 0.28, 0.18), (0.14, 0.14, 0.28))])
    + [Ellipsoid("air", "fat", (0.26, -0.30, -0.42), (0.17, 0.12, 0.13))]
    + _both_sides([Ellipsoid("air", "fat", (0.45, -0.25, 0.62), (0.12, 0.12, 0.2))])
    + _bone("fat", (0, 0.42, 0), (0.15, 0.15, 1.5)),
    "pelvis": _layers((0.95, 0.66, 1.4), ("fat", 1), ("muscle", 0.92))
    + _both_sides(_bone("muscle", (0.46, 0.15, -0.34), (0.30, 0.12, 0.36)))
    + _both_sides(_bone("muscle", (0.55, 0.0, 0.28), (0.18, 0.18, 0.18)))
    + _both_sides(_bone("muscle", (0.63, 0.0, 0.85), (0.11, 0.11, 0.5)))
    + _both_sides([Ellipsoid("bone", "muscle", (0.15, -0.18, 0.45), (0.17, 0.07, 0.07))])
    + _bone("muscle", (0, 0.38, -0.25), (0.22, 0.13, 0.36))
    + [Ellipsoid("fluid", "muscle", (0, -0.14, 0.12), (0.24, 0.22, 0.22))],
    "lumbar spine": _layers((1.15, 0.95, 1.9), ("fat", 1), ("muscle", 0.86))
    + _vertebrae()
    + [Ellipsoid("fluid", "muscle", (0, 0.31, 0), (0.10, 0.08, 1.6))],
    "knee": _layers((0.62, 0.66, 1.6), ("fat", 1), ("muscle", 0.85))
    + _bone("muscle", (0, 0.05, -0.85), (0.18, 0.18, 0.65))
    + _both_sides(_bone("muscle", (0.20, 0.0, -0.22), (0.24, 0.30, 0.23)))
    + _bone("muscle", (0, 0.05, 0.24), (0.43, 0.30, 0.16))
    + _bone("muscle", (0, 0.05, 0.90), (0.19, 0.18, 0.7))
    + [Ellipsoid("bone", "muscle", (0.38, 0.25, 0.85), (0.07, 0.07, 0.6))]
    + _bone("muscle", (0, -0.47, -0.24), (0.17, 0.09, 0.20)),
    "hand": [Ellipsoid("muscle", "air", (0, 0, 0.42), (0.45, 0.20, 0.44))]
    + [Ellipsoid("muscle", "air", (0.02, 0, 1.0), (0.26, 0.18, 0.5))]
    + _digits()
    + _both_sides(_bone("muscle", (0.11, 0.0, 1.05), (0.09, 0.09, 0.34), 0.03)),
    "breast": [Ellipsoid("muscle", "air", (0, 0.80, 0), (1.2, 0.35, 1.3))]
    + _both_sides([Ellipsoid("fat", "air", (0.48, 0.05, 0), (0.42, 0.60, 0.55))])
    + _both_sides([Ellipsoid("gland", "fat", (0.48, -0.02, 0), (0.27, 0.40, 0.34))])
    + [Ellipsoid("lung", "muscle", (0, 1.05, 0), (1.0, 0.35, 1.2))],
}
# Anatomy -> site of a lesion (on the left, mirrored for the right), tissue there, largest relative size. Slices pass
# through the lesion, so each site lies where a slice in any direction also shows the landmarks of the anatomy.
LESION_SITES: dict[str, tuple[Vector, str, float]] = {
    "chest": ((0.42, 0.05, -0.10), "lung", 1.0),
    "head": ((0.33, 0.10, -0.10), "white matter", 1.0),
    "abdomen": ((0.36, 0.05, 0.00), "organ", 1.0),  # at the level of liver and kidneys
    "pelvis": ((0.52, 0.02, 0.26), "marrow", 0.8),  # femoral head, with the ilium above and the bladder between
    "lumbar spine": ((0.19, -0.05, 0.20), "marrow", 0.8),  # vertebral body
    "knee": ((0.22, 0.00, -0.18), "marrow", 0.8),  # femoral condyle
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


def describe(seed: int, split: str, index: int) -> tuple[str, dict[str, str]]:
    """Return caption and labels of a phantom without rendering it. Splits of different names share no phantom."""
    rng = random_stream(seed, split, index, 0)
    modality, anatomy, finding = pick(rng, MODALITIES), pick(rng, BODIES), pick(rng, FINDINGS)
    terms, views, techniques, _ = MODALITIES[modality]
    view = pick(rng, views)
    # outside the chest a lung window shows nothing but white
    technique = pick(rng, [t for t in techniques if t != "lung window" or anatomy == "chest"])
    # a place that the view can show: left and right only where u is the x axis
    place = pick(rng, ("left", "right") if views[view][0] == 0 else ("upper", "lower"))
    size = pick(rng, ("small", "large"))
    phrase = pick(rng, FINDINGS[finding])
    if finding == "no abnormality":
        place = size = ""
    else:
        location = f"on the {place} side" if place in ("left", "right") else f"in the {place} part"
        several = finding == "multiple nodules"
        phrase = f"{phrase} ({size}) {location}" if several else f"a {size} {phrase} {location}"
    labels = dict(modality=modality, anatomy=anatomy, finding=finding, view=view)
    labels |= dict(technique=technique, place=place, size=size)
    slots = labels | dict(modality=pick(rng, terms), finding=phrase)
    capitals = {key.capitalize(): value[:1].upper() + value[1:] for key, value in slots.items()}
    return pick(rng, TEMPLATES).format(**slots, **capitals), labels


def draw_lesion(labels: dict[str, str], rng: np.random.Generator) -> list[Ellipsoid]:
    """Return the finding as ellipsoids, none for "no abnormality". The side is random where the view cannot show it."""
    site, host, scale = LESION_SITES[labels["anatomy"]]
    centre = np.array(site) + rng.normal(0, 0.03, 3)
    centre[0] *= {"left": 1, "right": -1}.get(labels["place"], rng.choice([-1, 1]))
    centre[2] += {"upper": -0.28, "lower": 0.28}.get(labels["place"], 0)
    radius = scale * (rng.uniform(0.17, 0.22) if labels["size"] == "large" else rng.uniform(0.09, 0.115))

    def ellipsoid(tissue: str, radius: float, offset: np.ndarray | float = 0) -> Ellipsoid:
        return Ellipsoid(tissue, host, (centre + offset).tolist(), (radius * rng.uniform(0.9, 1.1, 3)).tolist())

    match labels["finding"]:
        case "solid mass":
            bumps = [ellipsoid("tumour", 0.6 * radius, rng.normal(0, 0.6 * radius, 3)) for _ in range(4)]
            return [ellipsoid("tumour", 0.85 * radius), *bumps]
        case "cyst":
            wall = ellipsoid("capsule", radius)
            return [wall, Ellipsoid("fluid", "capsule", wall.centre, [r - 0.035 for r in wall.radii])]
        case "calcification":
            return [ellipsoid("calcium", 0.8 * radius)]
        case "gas collection":
            return [ellipsoid("air", radius)]
        case "multiple nodules":
            radius = 0.045 if labels["size"] == "small" else 0.085
            return [ellipsoid("tumour", radius, rng.uniform(-0.22, 0.22, 3)) for _ in range(7)]
    return []


def phantom(seed: int, split: str, index: int) -> Example:
    """Return phantom number `index` (from 0) of a split. Pure and deterministic, about 2 ms on one core."""
    caption, labels = describe(seed, split, index)
    rng = random_stream(seed, split, index, 1)
    anatomy, modality = labels["anatomy"], MODALITIES[labels["modality"]]
    plane = modality.views[labels["view"]]

    # anatomical variation: concentric parts, such as a bone and its marrow, vary together
    parts = BODIES[anatomy]
    centres = list(dict.fromkeys(part.centre for part in parts))
    shifts, factors = rng.normal(0, 0.012, (len(centres), 3)), rng.uniform(0.95, 1.05, (len(centres), 3))
    rows = [centres.index(part.centre) for part in parts]
    shifted = (np.array([part.centre for part in parts]) + shifts[rows]).tolist()
    scaled = (np.array([part.radii for part in parts]) * factors[rows]).tolist()
    body = [part._replace(centre=c, radii=r) for part, c, r in zip(parts, shifted, scaled, strict=True)]

    lesion = draw_lesion(labels, rng)
    position = (lesion[0].centre if lesion else LESION_SITES[anatomy][0])[plane[2]]
    if labels["finding"] == "multiple nodules":  # move all nodules into the slice
        in_slice = [[position if i == plane[2] else c for i, c in enumerate(nodule.centre)] for nodule in lesion]
        lesion = [nodule._replace(centre=centre) for nodule, centre in zip(lesion, in_slice, strict=True)]
    pixels = modality.acquire(body + lesion, plane, position, labels["technique"], rng)
    return Example(Image.fromarray((255 * pixels + 0.5).astype(np.uint8)), caption, labels)
