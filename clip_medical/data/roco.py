"""What ROCOv2 says of an image by code: its UMLS concepts (CUI) as labels of modality, anatomy and view.

The column `cui` of eltorio/ROCOv2-radiology holds the manually set concepts alone: a modality for nearly every image,
and for plain X-rays the body region and the projection. A row without any holds the word "nan", which is no code and
becomes no label. Rückert et al. 2024, arXiv 2405.10004.
"""

from collections.abc import Sequence
from typing import Any

CODES = {
    "modality": {
        "C0040405": "CT",
        "C1306645": "X-ray",
        "C0024485": "MRI",
        "C0041618": "ultrasound",
        "C0002978": "angiography",
        "C0032743": "PET",
        "C1699633": "PET/CT",
    },
    "anatomy": {
        "C0817096": "chest",
        "C0037303": "skull",
        "C0037949": "spine",
        "C0000726": "abdomen",
        "C0030797": "pelvis",
        "C0023216": "lower limb",
        "C1140618": "upper limb",
        "C0006141": "breast",
    },
    "view": {
        "C1999039": "anteroposterior",
        "C1996865": "posteroanterior",
        "C0205129": "lateral",
    },
}


def labels_from_cui(cells: Sequence[Any]) -> dict[str, list[str]]:
    """N lists of codes (None for none) -> facet -> N labels, "" where no code says; the first of a facet counts."""
    return {
        facet: [next((names[code] for code in codes or () if code in names), "") for codes in cells]
        for facet, names in CODES.items()
    }
