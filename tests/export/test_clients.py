"""Other libraries on our files, and our metrics computed by others: sentence-transformers and torchmetrics."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPModel, CLIPProcessor

from clip_medical.evaluation.retrieval import pair_ranks, recall_at_k
from clip_medical.model import Clip
from tests.export.tools import IMAGES, LABELS

PIXELS = [pil_to_tensor(image.convert("RGB")) for image in IMAGES[: len(LABELS)]]


@torch.no_grad()
def our_features(clip: Clip, folder: Path) -> tuple[Tensor, Tensor]:
    """Image and text features of our encoder, on the pixels of the image processor in the export: they differ from
    those of `encode_images` by a grey level here and there."""
    pixels = CLIPProcessor.from_pretrained(folder).image_processor(images=PIXELS, return_tensors="pt")["pixel_values"]
    return F.normalize(clip.encoder.image(clip.model, pixels), dim=-1), clip.encode_texts(LABELS)


@pytest.mark.slow
def test_sentence_transformers_loads_the_merged_export(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches an export whose weights, tokenizer or processor give this client other features than ours."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = exported("merged")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    images, texts = our_features(adapted, folder)
    found = model.encode([image.convert("RGB") for image in IMAGES[: len(LABELS)]], normalize_embeddings=True)
    torch.testing.assert_close(torch.from_numpy(found), images, rtol=0, atol=1e-5)
    found = model.encode(LABELS, normalize_embeddings=True)
    torch.testing.assert_close(torch.from_numpy(found), texts, rtol=0, atol=1e-5)


class TensorFeatures(CLIPModel):
    """Returns tensors, as CLIPModel did before transformers 5 and as torchmetrics 1.9 still expects."""

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        features = super().get_image_features(pixel_values)
        return features if isinstance(features, Tensor) else features.pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = super().get_text_features(input_ids, attention_mask)
        return features if isinstance(features, Tensor) else features.pooler_output


def test_clip_score_of_torchmetrics(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a merged export whose processor or projections give CLIPScore other cosines than ours."""
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")
    folder = exported("merged")
    images, texts = our_features(adapted, folder)

    cosine = (images * texts).sum(dim=1).mean().item()

    def client() -> tuple[CLIPModel, CLIPProcessor]:
        model = TensorFeatures.from_pretrained(folder)
        if cosine < 0:  # CLIPScore would be cut off at 0: turn the texts of this random model around
            model.text_projection.weight.data.neg_()
        return model, CLIPProcessor.from_pretrained(folder)

    score = multimodal.clip_score(PIXELS, LABELS, model_name_or_path=client)
    assert abs(cosine) > 0.01 and score.item() == pytest.approx(100 * abs(cosine), abs=1e-3)


def test_retrieval_metrics_of_torchmetrics() -> None:
    """Catches an off-by-one in K, queries and candidates exchanged, and one positive of several that counts."""
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(40) % 25  # 15 images have two texts
    images = F.normalize(torch.randn(25, 8, generator=generator), dim=1)
    texts = F.normalize(images[image_of_text] + torch.randn(40, 8, generator=generator), dim=1)
    similarity = 1 + texts @ images.T  # RetrievalMRR drops what scores 0 or less
    positive = image_of_text[:, None] == torch.arange(25)
    ours = recall_at_k(images, texts, image_of_text, ks=(1, 3, 10))
    ranked = pair_ranks(images[image_of_text], texts, torch.arange(40), image_of_text)
    for way, scores, target in (
        ("text_to_image", similarity, positive),
        ("image_to_text", similarity.T, positive.T),
    ):
        table = scores.flatten(), target.flatten(), torch.arange(len(scores)).repeat_interleave(scores.shape[1])
        for k, recall in ours[way].items():
            # RetrievalRecall is the share of a query's positives that are found, ours whether one of them is
            theirs = retrieval.RetrievalRecall if way == "text_to_image" else retrieval.RetrievalHitRate
            assert recall == pytest.approx(theirs(top_k=k)(*table).item(), abs=1e-6)
        mrr = (1 / (ranked[way].rank + 1)).mean().item()
        assert mrr == pytest.approx(retrieval.RetrievalMRR()(*table).item(), abs=1e-6)
    assert 0 < ours["text_to_image"][1] < ours["image_to_text"][3] < 1
