"""Operations counted: those that the shapes ask for, and those that are done."""

import pytest
import torch
import torch.nn.functional as F

from clip_medical import products
from experiments.flops import count_flops, published_flops


def test_operations_are_those_of_the_published_shapes() -> None:
    """Mistake: padding to the longest, or to 77 tokens, or the weight gradients of frozen layers, counted in.

    By hand: 12 layers, of each token 12 products with D x D, and L x L attention twice, 2 operations each; and again
    backward, but for what nothing below the first adapter needs.
    """
    picture = 2 * 12 * (50 * 12 * 768**2 + 2 * 50**2 * 768) + 2 * 49 * 3072 * 768
    for length, counted in zip((12, 56), published_flops(torch.tensor([12, 56])), strict=True):
        caption = 2 * 12 * (length * 12 * 512**2 + 2 * length**2 * 512)
        assert 1.93 < counted / (picture + caption) < 2.03


def test_attention_on_a_cpu_is_counted() -> None:
    """Mistake: the fused kernel of a CPU, which torch's counter does not know, taken for no work at all. Two products
    forward and five backward, of which one is done again."""
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    counted = count_flops(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    assert counted == 2 * (2 + 5) * (2 * 3 * 5 * 5 * 8)


def test_products_that_torch_does_not_count_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: addmm_ or oneDNN's product, which torch's counter does not know either, taken for no work."""
    assert count_flops(lambda: torch.zeros(2, 3).addmm_(torch.ones(2, 5), torch.ones(5, 3))) == 2 * 2 * 5 * 3
    monkeypatch.setattr(products, "MKL_IS_SLOW", products.ONEDNN_CAN)  # without it the product of torch, counted too
    assert count_flops(lambda: products.product(torch.ones(4, 2, 5), torch.ones(3, 5))) == 2 * 4 * 2 * 5 * 3
