"""Synthetic radiology images (phantoms) with captions that are exact by construction.

`phantom(seed, split, index)` is a pure function: equal arguments give the same phantom on every machine, and any number
can be generated. `describe` draws the labels (modality, technique, view, anatomy, finding, place, size), and the image
and the caption are both made from these labels. No phantom shows a patient, and none may be presented as one.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_medical.data.synthetic import Example, pick, random_stream
from clip_medical.data.synthetic.scanners import MODALITIES, Ellipsoid

VERSION = 2  # raise it when any pixel or caption changes: image caches are keyed by it

Vector = tuple[float, float, float]
Array = npt.NDArray[np.float64]


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
    for z in (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0):
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
CONTENT = json.loads(Path(__file__).with_name("findings.json").read_text(encoding="utf-8"))
# finding -> its phrases in captions; those of a normal image follow its anatomy, see NORMAL
FINDINGS: dict[str, list[str]] = {name: entry["phrases"] for name, entry in CONTENT["findings"].items()}
# modality -> anatomy -> the findings that are looked for, beside "no abnormality"
EXAMINATIONS: dict[str, dict[str, list[str]]] = CONTENT["examinations"]
FOCAL = ("mass", "cyst", "calcification")  # these have a size, and a level where the view does not show the side
MIDLINE = 0.2  # findings nearer to it have no side
NORMAL = ("no abnormality", "normal appearance", "unremarkable study", "no abnormality, no {}", "no {} or {}")
CT_WINDOWS = {"chest": ("lung window", "soft-tissue window"), "lumbar spine": ("bone window",)}  # others: soft tissue
BREAKS = {"pelvis": (-0.3, 0.0), "knee": (0.1, 0.4), "hand": (-0.8, -0.6)}  # level in the bone: -1 top, 1 bottom
# (anatomy, finding) -> its centre (on the left, mirrored for the right) and the tissue there. Slices pass through it,
# so each site lies where a slice in any direction also shows the landmarks of the anatomy.
SITES: dict[tuple[str, str], tuple[Vector, str]] = {
    (anatomy, finding): (tuple(centre), host) for anatomy, of, centre, host in CONTENT["sites"] for finding in of
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
    modality = pick(rng, MODALITIES)
    anatomy = pick(rng, EXAMINATIONS[modality])
    findings = EXAMINATIONS[modality][anatomy]
    finding = pick(rng, ("no abnormality", *findings))
    terms, views, techniques, _ = MODALITIES[modality]
    view = pick(rng, views)
    technique = pick(rng, CT_WINDOWS.get(anatomy, ("soft-tissue window",)) if modality == "CT" else techniques)
    lateral = finding != "no abnormality" and SITES[anatomy, finding][0][0] > MIDLINE
    sides = views[view][0] == 0 and lateral  # left and right only where u is the x axis
    focal = finding in FOCAL
    # a place that the view can show
    place = pick(rng, ("left", "right")) if sides else pick(rng, ("upper", "lower")) if focal else ""
    size = pick(rng, ("small", "large")) if focal else ""
    if finding == "no abnormality":
        place, absent = "", rng.permutation(findings).tolist()
        phrase = pick(rng, NORMAL if len(findings) > 1 else NORMAL[:-1]).format(*absent)
    else:
        location = f" on the {place} side" if sides else f" in the {place} part" if focal else ""
        phrase = f"{size} {pick(rng, FINDINGS[finding])}{location}".strip()
    labels = dict(modality=modality, anatomy=anatomy, finding=finding, view=view)
    labels |= dict(technique=technique, place=place, size=size)
    slots = labels | dict(modality=pick(rng, terms), finding=phrase)
    capitals = {key.capitalize(): value[:1].upper() + value[1:] for key, value in slots.items()}
    return pick(rng, TEMPLATES).format(**slots, **capitals), labels


def _blobs(
    rng: np.random.Generator, tissue: str, host: str, centre: Array, radius: float, count: int
) -> list[Ellipsoid]:
    """Return overlapping ellipsoids around a centre, the first of them in it: an irregular region of one tissue."""
    offsets = rng.normal(0, 0.6 * radius, (count, 3))
    offsets[0] = 0
    radii = radius * rng.uniform(0.7, 1.1, (count, 3))
    return [Ellipsoid(tissue, host, c, r) for c, r in zip((centre + offsets).tolist(), radii.tolist(), strict=True)]


def vary(parts: list[Ellipsoid], rng: np.random.Generator) -> list[Ellipsoid]:
    """Return the body of another patient: parts moved and scaled, concentric ones (a bone, its marrow) together."""
    centres = list(dict.fromkeys(part.centre for part in parts))
    shifts, factors = rng.normal(0, 0.012, (len(centres), 3)), rng.uniform(0.95, 1.05, (len(centres), 3))
    rows = [centres.index(part.centre) for part in parts]
    shifted = (np.array([part.centre for part in parts]) + shifts[rows]).tolist()
    scaled = (np.array([part.radii for part in parts]) * factors[rows]).tolist()
    return [part._replace(centre=c, radii=r) for part, c, r in zip(parts, shifted, scaled, strict=True)]


def with_finding(
    body: list[Ellipsoid], labels: dict[str, str], rng: np.random.Generator
) -> tuple[list[Ellipsoid], list[float]]:
    """Return a body with the finding of the labels, and the point that a slice passes through.

    The side is random where the view cannot show it. Normal bodies are cut where a finding could be.
    """
    anatomy, finding, body = labels["anatomy"], labels["finding"], list(body)
    where = pick(rng, EXAMINATIONS[labels["modality"]][anatomy]) if finding == "no abnormality" else finding
    site, host = SITES[anatomy, where]
    side = {"left": 1, "right": -1}.get(labels["place"], rng.choice([-1, 1]) if site[0] > MIDLINE else 1)
    centre = np.array(site) * (side, 1, 1)
    rows = [row for row, part in enumerate(BODIES[anatomy]) if np.array_equal(part.centre, centre)]  # what is there
    centre += rng.normal(0, 0.03, 3)
    centre[2] += {"upper": -0.25, "lower": 0.25}.get(labels["place"], 0)
    radius = rng.uniform(0.22, 0.28) if labels["size"] == "large" else rng.uniform(0.13, 0.16)

    def add(tissue: str, parent: str, *radii: float, offset: Vector = (0, 0, 0)) -> None:
        body.append(Ellipsoid(tissue, parent, (centre + np.array(offset) * (side, 1, 1)).tolist(), radii))

    def scale(*factors: float) -> None:
        for row in rows:
            body[row] = body[row]._replace(radii=tuple(f * r for f, r in zip(factors, body[row].radii, strict=True)))

    match finding:
        case "consolidation":
            body += _blobs(rng, "exudate", host, centre, 0.2, 7)
        case "pleural effusion":  # sinks to the base and the back of the lung
            add("exudate", host, 0.30, 0.40, rng.uniform(0.26, 0.40), offset=(0, 0.05, 0.05))
        case "pneumothorax":  # air around a lung that has shrunk towards the hilum
            add("air", host, 0.32, 0.44, 0.74)
            add("exudate", "air", 0.13, 0.22, 0.36, offset=(-0.14, 0.05, 0.08))
        case "cardiomegaly":
            scale(*3 * [rng.uniform(1.55, 1.8)])
        case "fracture" if anatomy == "lumbar spine":  # the vertebral body is compressed
            scale(1.15, 1.15, rng.uniform(0.35, 0.5))
        case "fracture":  # two fragments, the lower one displaced
            level, slip = rng.uniform(*BREAKS[anatomy]), rng.choice([-1, 1], 2) * rng.uniform(0.12, 0.18, 2)
            for row in rows:
                bone = body[row]
                (x, y, z), (a, b, c) = bone.centre, bone.radii
                body[row] = bone._replace(centre=(x, y, z - c * (1 - level) / 2), radii=(a, b, c * (1 + level) / 2))
                lower = (x + slip[0], y + slip[1], z + c * (1 + level) / 2)
                body.append(bone._replace(centre=lower, radii=(a, b, c * (1 - level) / 2)))
                centre[2] = z + level * c
        case "mass":
            body += _blobs(rng, "tumour", host, centre, 0.8 * radius, 5)
        case "cyst":
            add("capsule", host, radius, radius, radius)
            add("fluid", "capsule", *3 * [radius - 0.04])
        case "calcification":
            body += _blobs(rng, "calcium", host, centre, 0.5 * radius, 3)
        case "haemorrhage":  # a lens of blood inside the skull
            add("blood", host, 0.15, *rng.uniform(0.3, 0.45, 2))
        case "hydronephrosis":
            scale(1.4, 1.4, 1.4)
            add("fluid", host, 0.15, 0.15, 0.30)
    return body, centre.tolist()


def phantom(seed: int, split: str, index: int, healthy: bool = False) -> Example:
    """Return phantom number `index` (from 0) of a split. Pure and deterministic, about 2 ms on one core.

    healthy: without its finding, but of the same patient in the same position, to see where the finding is.
    """
    caption, labels = describe(seed, split, index)
    modality = MODALITIES[labels["modality"]]
    plane = modality.views[labels["view"]]
    rng = random_stream(seed, split, index, 1)
    normal = vary(BODIES[labels["anatomy"]], rng)
    body, centre = with_finding(normal, labels, random_stream(seed, split, index, 2))
    pixels = modality.acquire(normal if healthy else body, plane, centre[plane[2]], labels["technique"], rng)
    return Example(Image.fromarray((255 * pixels + 0.5).astype(np.uint8)), caption, labels)
