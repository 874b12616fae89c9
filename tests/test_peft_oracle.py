"""Comparison with Hugging Face PEFT: equal outputs from the same weights, equal files, equal training."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from lora import adapter_parameters, inject, load_adapter, merge, save_adapter

peft = pytest.importorskip("peft")


def make_clip() -> CLIPModel:
    """A CLIP of two layers a tower, the towers of different widths; always the same random weights."""
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = CLIPConfig(
        text_config={
            **tower, "hidden_size": 32, "vocab_size": 60, "max_position_embeddings": 12,
            "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 59,
        },
        vision_config={**tower, "hidden_size": 48, "image_size": 24, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    model = CLIPModel(config)
    model.eval()
    with torch.no_grad():  # the default initialisation is so small that logits hardly depend on the attention
        for name, p in model.named_parameters():
            if name.endswith("_proj.weight"):
                p.mul_(8)
    return model


def make_batch(n: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 58, (n, 12), generator=generator)
    ids[:, -1] = 59
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 24, 24, generator=generator)}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """In double precision, where scaling B and scaling B A x are the same to 15 digits."""
    batch = make_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    result: torch.Tensor = copy.deepcopy(model).double()(**batch).logits_per_image
    return result


def randomise(model: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
            elif p.requires_grad:  # a bias, or a whole weight, near the value that it starts from
                p.add_(torch.randn_like(p), alpha=0.1)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank 24": {"r": 24, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "image tower": {"target_modules": r"vision_model\..*\.(q_proj|v_proj)"},
    "text tower": {"target_modules": r"text_model\..*\.(q_proj|v_proj)"},
    "dotted endings": {"target_modules": ["layers.1.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"]},
    "other targets": {"target_modules": ["fc1", "out_proj", "visual_projection"]},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "all linear layers": {"target_modules": "all-linear"},
    "ranks by pattern": {"rank_pattern": {"^text_model.*q_proj": 9, "no_such_layer": 3, "q_proj": 2}},
    "alphas by pattern": {"alpha_pattern": {"layers.1.self_attn.v_proj": 11, "v_proj": 3}, "use_rslora": True},
    "ranks in one layer": {"rank_pattern": {"^vision_model.encoder.layers.0.self_attn.q_proj": 7}},
    "without some names": {"exclude_modules": ["text_model.encoder.layers.0.self_attn.q_proj", "no_such_layer"]},
    "without a regex": {"exclude_modules": r"vision_model\..*q_proj"},
    "one layer": {"layers_to_transform": 1},
    "some layers": {"layers_to_transform": [0, 7], "layers_pattern": "layers"},
    "layers of several names": {"layers_to_transform": 1, "layers_pattern": ["layers", "blocks"]},
    "rank above a width": {"target_modules": ["visual_projection"], "r": 30},
    "biases": {"bias": "lora_only"},
    "biases where there are some": {"bias": "lora_only", "target_modules": ["q_proj", "visual_projection"]},
    "whole projections": {"modules_to_save": ["visual_projection", "text_projection", "no_such_layer"]},
    "whole layers by the end of a name": {"modules_to_save": ["projection", "vision_model.encoder.layers.0.mlp.fc1"]},
    "whole projections and biases": {"modules_to_save": ["visual_projection", "fc1"], "bias": "lora_only"},
    "whole projections beside dora": {"modules_to_save": ["text_projection"], "use_dora": True},
    "whole projections and one layer": {"modules_to_save": ["text_projection"], "layers_to_transform": 1},
}


def peft_model(**fields: Any) -> Any:
    """A PeftModel of make_clip() with random A and B."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}
    model = peft.get_peft_model(make_clip(), peft.LoraConfig(**settings))
    randomise(model)
    return model.eval()


def step(model: nn.Module) -> nn.Module:
    """Take one optimizer step on all trainable parameters, without dropout; in double precision, as Adam moves an entry
    by the sign of its gradient, however small, and so makes of a rounding a whole step."""
    train(model.double(), [p for p in model.parameters() if p.requires_grad], steps=1)
    return model


@pytest.mark.parametrize("case", CASES)
def test_peft_to_us_and_back(tmp_path: Path, case: str) -> None:
    """Catches a difference from PEFT in scaling, target matching, keys or config fields, in merging or in training."""
    theirs = peft_model(**CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make_clip()
    names = load_adapter(ours, tmp_path / "theirs")
    kinds = (peft.tuners.lora.Linear, peft.utils.ModulesToSaveWrapper)
    assert names == [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, kinds)]
    expected = logits(theirs)
    assert (expected - logits(make_clip())).abs().max() > 1e-3, "the adapter must change the logits"
    torch.testing.assert_close(logits(ours), expected, rtol=1e-12, atol=1e-12)

    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for missing and unexpected keys PEFT only warns
        warnings.filterwarnings("ignore", category=FutureWarning)
        again = peft.PeftModel.from_pretrained(make_clip(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-12, atol=1e-12)
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (again, theirs)]
    assert shapes[0] == shapes[1], "the same layers, no more and no fewer"

    for dtype in (torch.float64, torch.float32):  # in double the merged logits are equal, in fp32 the merged weights
        models: list[Any] = [ours, theirs, again]
        copies = [copy.deepcopy(model).to(dtype) for model in models]
        merge(copies[0])
        results = [copies[0], *(each.merge_and_unload() for each in copies[1:])]
        weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in results]
        for model, found in zip(results, weights, strict=True):
            if dtype == torch.float64:
                torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found, weights[0], rtol=0, atol=1e-6)
    again = peft.PeftModel.from_pretrained(make_clip(), tmp_path / "ours", is_trainable=True).eval()
    after = logits(step(theirs))
    assert (after - expected).abs().max() > 1e-4, "the step must change the logits"
    for model in (ours, again):
        torch.testing.assert_close(logits(step(model)), after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["plain", "rslora", "image tower", "text tower"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_stored_in_half_precision(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Catches half-precision tensors that are refused, kept in half precision or converted wrongly; a merge that
    differs from PEFT's."""
    peft_model(**CASES[case]).to(dtype).save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}
    theirs, ours = peft.PeftModel.from_pretrained(make_clip(), tmp_path).eval(), make_clip()
    load_adapter(ours, tmp_path)
    assert {p.dtype for p in adapter_parameters(ours)} == {torch.float32}
    expected = logits(theirs)
    assert (expected - logits(make_clip())).abs().max() > 1e-3, "the adapter must change the logits"
    torch.testing.assert_close(logits(ours), expected, rtol=1e-12, atol=1e-12)
    merge(ours)
    torch.testing.assert_close(logits(ours), logits(theirs.merge_and_unload()), rtol=1e-6, atol=1e-6)  # of fp32


@pytest.mark.parametrize("within", [None, "text_model", ["vision_model"], "vision_model.encoder.layers.1"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_inject_makes_loads_in_peft(tmp_path: Path, within: str | list[str] | None, rslora: bool) -> None:
    """Catches a config whose targets select other layers in PEFT than were adapted here."""
    ours = make_clip()
    patterns: dict[str, Any] = dict(rank_pattern={r"1\.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 9})
    names = inject(ours, rank=3, alpha=5, rslora=rslora, within=within, **patterns)
    randomise(ours)
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = peft.PeftModel.from_pretrained(make_clip(), tmp_path).eval()
    loaded = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert loaded == names
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-12, atol=1e-12)


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int = 50) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    batch, losses = make_batch(), []
    batch["pixel_values"] = batch["pixel_values"].to(parameters[0].dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_group_in_the_pattern_of_layers_is_no_number(tmp_path: Path) -> None:
    """Catches the name of the layers taken for their number, which ends in a traceback."""
    peft_model(layers_to_transform=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_pattern": "(layers|blocks)"}))
    assert all(".layers.1." in name for name in load_adapter(make_clip(), tmp_path))


def test_automodel_of_peft_loads_our_adapter_with_its_base(tmp_path: Path) -> None:
    """Catches an adapter_config.json from which PEFT cannot tell the class of the base model."""
    make_clip().save_pretrained(tmp_path / "base")
    ours = make_clip()
    inject(ours, rank=3)
    randomise(ours)
    save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-12, atol=1e-12)


def test_fifty_steps_give_the_loss_curve_of_peft() -> None:
    """Catches a different gradient, scaling, dtype or set of trainable parameters, although the forward pass agrees."""
    theirs = peft.get_peft_model(make_clip(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    ours = make_clip()
    inject(ours, rank=4, alpha=8)
    start = {n.replace(".default.weight", ""): p for n, p in theirs.base_model.model.named_parameters() if "lora_" in n}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == set(start)
    with torch.no_grad():
        for name, p in start.items():
            ours.get_parameter(name).copy_(copy.deepcopy(p))
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert expected[-1] < 0.8 * expected[0], "the loss must fall"
    assert train(ours, adapter_parameters(ours)) == pytest.approx(expected, rel=1e-4)
