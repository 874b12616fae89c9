"""Is the evidence for a finding where the finding is? `python -m experiments.pointing --run runs/x`.

The pointing game (Zhang et al. 2016, arXiv 1608.00507) on phantoms, of which each has a healthy twin: the finding is
where the two images differ. A model scores where its occlusion map, the evidence for the finding over "no abnormality",
has its maximum inside that region. A cell drawn at random scores as often as the region is large, which is the chance
level. Twins that differ nowhere, or in more than LARGEST of the cells, are left out: the display of a scanner follows
the brightest tissue, so that a finding can change the grey level of the whole image.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFilter

from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.evaluation.evidence import occlusion
from clip_medical.evaluation.retrieval import share
from clip_medical.evaluation.table import as_text, comparison
from clip_medical.evaluation.zero_shot import class_features
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main

NORMAL = "no abnormality"
VISIBLE = 15  # grey levels by which the twins differ, after a blur, where the finding is
LARGEST = 0.3  # share of the cells that a finding may fill
CELLS = 14  # of the map, in either direction


class Pointing(Experiment):
    """The pointing game: how often the evidence for a finding is where the finding is, before and after adaptation."""

    name = "pointing"

    def play(self, clip: Clip) -> Reports:
        """Return the share of phantoms on which the map has its maximum in the finding, and the chance level."""
        hits, areas, index = list[bool](), list[float](), 0
        while len(hits) < (self.limit or 100):
            image, _, labels = phantom(self.seed, self.name, index)
            twin = phantom(self.seed, self.name, index, healthy=True).image
            index += 1
            smooth = [np.asarray(each.filter(ImageFilter.BoxBlur(2)), dtype=float) for each in (image, twin)]
            region = torch.from_numpy(np.abs(smooth[0] - smooth[1]) > VISIBLE).float()
            cells = F.adaptive_max_pool2d(region[None], CELLS)[0]  # 1 where a cell of the map has a part of it
            if not 0 < cells.mean() <= LARGEST:
                continue
            texts = class_features(clip, "finding", [labels["finding"], NORMAL]).mean(dim=1)
            drop = occlusion(clip, image, texts, CELLS)
            hits.append(bool(cells.flatten()[drop.argmax()]))
            areas.append(cells.mean().item())
        score = share(torch.tensor(hits)) | {"chance": float(np.mean(areas))}
        return {"pointing game": {"n": len(hits), "maximum in the finding": score}}

    def perform(self) -> int:
        if self.data or self.split:
            raise UserError("The pointing game needs phantoms with a healthy twin. Leave out --data and --split.")
        setup = self.load_models()
        results = {model: self.play(clip) for model, clip in setup.models.items()}
        setup.facts["data"] = f"phantoms with a finding, seed {self.seed}"
        print(as_text(comparison(self.rows(results))))
        self.save(setup, self.name, results, *self.draw(results, setup.folder))
        return 0


if __name__ == "__main__":
    sys.exit(main(Pointing))
