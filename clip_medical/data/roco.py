"""Labels of ROCOv2: its UMLS concepts (CUI) as labels of modality, anatomy and view.

The column `cui` of eltorio/ROCOv2-radiology holds only concepts that were set by hand: a modality for nearly every
image, and body region and projection for plain X-rays. A row without concepts holds the text "nan", which is not a
code and becomes no label. Source: Rückert et al. 2024, arXiv 2405.10004.
"""

from collections.abc import Sequence
from typing import Any

CODES = {
    "modality": {"C0040405": "CT", "C1306645": "X-ray", "C0024485": "MRI", "C0041618": "ultrasound",
                 "C0002978": "angiography", "C0032743": "PET", "C1699633": "PET/CT"},
    "anatomy": {"C0817096": "chest", "C0037303": "skull", "C0037949": "spine", "C0000726": "abdomen",
                "C0030797": "pelvis", "C0023216": "lower limb", "C1140618": "upper limb", "C0006141": "breast"},
    "view": {"C1999039": "anteroposterior", "C1996865": "posteroanterior", "C0205129": "lateral"},
}  # fmt: skip


def labels_from_cui(cells: Sequence[Any]) -> dict[str, list[str]]:
    """Translate N lists of codes (None: no codes) -> facet -> N labels, "" where unknown.

    The first code of a facet counts. Cells that are not lists are not ROCOv2's, and give no facets.
    """
    if not any(isinstance(codes, list) for codes in cells):
        return {}
    return {
        facet: [
            next((names[code] for code in (codes if isinstance(codes, list) else ()) if code in names), "")
            for codes in cells
        ]
        for facet, names in CODES.items()
    }
