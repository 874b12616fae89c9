"""inject, remove, merge, strengths and parameter counts; a refused call must leave the model unchanged."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lora import (
    LoRAError,
    LoRALinear,
    adapter_parameters,
    count_parameters,
    disabled,
    inject,
    merge,
    remove,
    set_strength,
)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.v_proj, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.mq_proj, self.q_proj_2 = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        product = torch.tanh(self.q_proj(z)) * self.v_proj(z)
        branch: Tensor = self.dropout(self.out(product) + self.mq_proj(self.q_proj_2(z)))
        return x + branch


class Net(nn.Module):
    """Two towers, the name of one beginning with the name of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.vision2 = nn.Sequential(Block(), Block()), nn.Sequential(Block())
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.vision2(self.vision(x))
        return self.scale * y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def shake(model: nn.Module) -> None:
    """Give every B values, as training would."""
    for p in adapter_parameters(model):
        nn.init.normal_(p, std=0.3)


def lora_layer(model: nn.Module, name: str) -> LoRALinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, LoRALinear)
    return layer


def fingerprint(model: nn.Module) -> list[object]:
    """Everything that a refused call could have touched."""
    modules = [(n, id(m), m.training, getattr(m, "strength", None)) for n, m in model.named_modules()]
    return [modules, [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]]


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# --- inject -----------------------------------------------------------------------------------------------------------


def test_names_are_matched_whole_and_returned_in_module_order(net: Net) -> None:
    """Catches substring matching, by which q_proj also selects mq_proj and q_proj_2; a returned list that differs from
    the adapted layers."""
    names = inject(net, rank=2)
    assert names == [f"{b}.{p}" for b in ("vision.0", "vision.1", "vision2.0") for p in ("q_proj", "v_proj")]
    assert [n for n, m in net.named_modules() if isinstance(m, LoRALinear)] == names


def test_everything_but_the_adapters_is_frozen(net: Net) -> None:
    """Catches a base weight, norm or temperature left trainable; an A or B that is frozen."""
    names = inject(net, rank=2)
    trainable = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{m}" for n in names for m in "AB"}
    assert [id(p) for p in adapter_parameters(net)] == [id(p) for p in net.parameters() if p.requires_grad]


def test_within_is_a_dotted_prefix(net: Net) -> None:
    """Catches startswith without the dot, by which "vision" also selects "vision2"."""
    assert inject(net, within="vision", rank=2) == [f"vision.{i}.{p}_proj" for i in (0, 1) for p in "qv"]
    remove(net)
    assert inject(net, "q_proj", within=["vision2", "vision.1"], rank=2) == ["vision.1.q_proj", "vision2.0.q_proj"]


def test_ways_to_name_layers(net: Net) -> None:
    """Catches a regular expression compared with the last name only, or without the dot before it; "all-linear" without
    a layer; an `exclude` that does nothing."""
    ways: dict[str, tuple[object, object, list[str]]] = {
        "dotted endings": (["0.q_proj", "1.v_proj"], (), ["vision.0.q_proj", "vision.1.v_proj", "vision2.0.q_proj"]),
        "a regex": (
            r"vision\.\d\.q_proj(_2)?",
            (),
            [f"vision.{i}.{q}" for i in (0, 1) for q in ("q_proj", "q_proj_2")],
        ),
        "without some": ("[qv]_proj", ["v_proj", "1.q_proj"], ["vision.0.q_proj", "vision2.0.q_proj"]),
        "without a regex": (["q_proj", "v_proj"], r"vision\..*", ["vision2.0.q_proj", "vision2.0.v_proj"]),
        "all": ("all-linear", "vision.*mq?_.*", [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]),
    }
    for way, (targets, exclude, expected) in ways.items():
        names = inject(net, targets, rank=2, exclude=exclude)  # type: ignore[arg-type]
        assert names == [name for name in expected if way != "all" or "mq_proj" not in name], way
        remove(net)


def test_patterns_give_single_layers_another_rank(net: Net) -> None:
    """Catches a pattern that is ignored, compared as a substring, or outdone by a later one that fits as well."""
    names = inject(net, rank=2, alpha=4, rank_pattern={r"1\.q_proj": 5, "q_proj": 3}, alpha_pattern={"vision2.*": 9})
    layers = {name: lora_layer(net, name) for name in names}
    assert [layer.rank for layer in layers.values()] == [3, 2, 5, 2, 3, 2]
    assert [layer.alpha for layer in layers.values()] == [4, 4, 4, 4, 9, 9]


def test_identity_and_settings_after_injection(net: Net) -> None:
    """Catches an injection that changes the output of the model, or drops one of its arguments."""
    before = net(X)
    inject(net, rank=3, alpha=5, dropout=0.25, rslora=True)
    assert torch.equal(net(X), before)
    layer = lora_layer(net, "vision.0.q_proj")
    assert (layer.rank, layer.alpha, layer.dropout, layer.rslora) == (3, 5.0, 0.25, True)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_device_survive(training: bool) -> None:
    """Catches dropout that is active in a model in eval mode; A and B on another device than the model."""
    net = Net().to("meta").train(training)
    inject(net, rank=2, dropout=0.5)
    assert all(m.training == training for m in net.modules())
    assert {p.device.type for p in net.parameters()} == {"meta"}


def test_a_layer_with_two_names_stays_one_layer() -> None:
    """Catches tied layers that are untied, because only one of their two names was replaced."""
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    net["c"] = net["a"]
    base = net["a"]
    assert inject(net, ["a"], rank=2) == ["a"]
    assert isinstance(net["a"], LoRALinear) and net["a"] is net["c"] and type(net["b"]) is nn.Linear
    assert len(adapter_parameters(net)) == 2
    remove(net)
    assert net["a"] is base and net["c"] is base


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"targets": ["nothing"]}, "nothing"),
        ({"targets": []}, "matches"),
        ({"targets": ["q_proj", "k_proj"]}, "k_proj"),
        ({"targets": ["q_proj", "norm"]}, "vision.0.norm.*LayerNorm"),
        ({"targets": ["7.q_proj"]}, "7.q_proj"),
        ({"targets": "(q_proj"}, "a regex"),
        ({"rank_pattern": {"k_proj": 4}}, "k_proj"),
        ({"rank_pattern": {"0.q_proj": 9}}, "rank is 9.*1 to 8"),
        ({"exclude": ["q_proj", "v_proj"]}, "q_proj"),
        ({"exclude": ["vision"]}, "vision"),
        ({"within": "text"}, "text"),
        ({"within": ["vision", "visio"]}, "visio'"),
        ({"within": ["vision", "vision.0.norm"]}, "vision.0.norm"),
        ({"rank": 9}, "vision.0.q_proj: rank is 9.*1 to 8"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": -1}, "alpha"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_a_refused_injection_touches_nothing(net: Net, settings: dict[str, Any], says: str) -> None:
    """Catches a model half injected or half frozen after an error; a target without a match that raises no error."""
    before = fingerprint(net)
    with pytest.raises(LoRAError, match=says):
        inject(net, **settings)
    assert fingerprint(net) == before


def test_a_rank_too_wide_for_the_last_site_only_is_refused_before_the_first_is_touched() -> None:
    """Catches a check of each layer just before it is replaced, which leaves the earlier layers adapted."""
    net = nn.ModuleDict({"one": nn.ModuleDict({"fc": nn.Linear(8, 8)}), "two": nn.ModuleDict({"fc": nn.Linear(8, 2)})})
    before = fingerprint(net)
    with pytest.raises(LoRAError, match="two.fc"):
        inject(net, ["fc"], rank=4)
    assert fingerprint(net) == before


def test_a_second_injection_is_refused(net: Net) -> None:
    """Catches a second set of adapters in a model that has one already."""
    inject(net, rank=2)
    before = fingerprint(net)
    with pytest.raises(LoRAError, match="already holds 6 LoRA"):
        inject(net, ["out"], rank=2)
    assert fingerprint(net) == before


def test_a_lone_layer_is_refused() -> None:
    """Catches setattr with an empty name, which raises no error and replaces nothing."""
    layer = nn.Linear(4, 4)
    with pytest.raises(LoRAError, match="nothing in Linear"):
        inject(layer)
    for undo in (remove, merge):
        with pytest.raises(LoRAError, match="itself"):
            undo(LoRALinear(layer, rank=2))


def test_multihead_attention_is_refused() -> None:
    """Catches adapters on nn.MultiheadAttention, which uses out_proj.weight and never calls the layer."""
    with pytest.raises(LoRAError, match="no subclass"):
        inject(nn.Sequential(nn.MultiheadAttention(8, 2)), ["out_proj"], rank=2)


# --- taking it out again ----------------------------------------------------------------------------------------------


def test_remove_gives_the_base_back_bit_for_bit(net: Net) -> None:
    """Catches a base changed by training; a base restored as W + D - D, which differs from W by rounding."""
    before, ids = copy.deepcopy(net.state_dict()), {n: id(m) for n, m in net.named_modules()}
    names = inject(net, rank=2, dropout=0.1)
    net.train()
    optimizer = torch.optim.AdamW(adapter_parameters(net), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()
    net.eval()
    assert remove(net) == names
    assert same_state(net.state_dict(), before) and {n: id(m) for n, m in net.named_modules()} == ids
    assert not any(m.training for m in net.modules())


def test_merge_keeps_the_function_and_leaves_plain_layers(net: Net) -> None:
    """Catches a merge that leaves out a layer or the scaling; a second merge that raises no error."""
    names = inject(net, rank=2)
    shake(net)
    y = net(X)
    assert merge(net) == names
    torch.testing.assert_close(net(X), y, rtol=1e-5, atol=1e-5)
    assert type(net.vision[0].q_proj) is nn.Linear and set(net.state_dict()) == set(Net().state_dict())
    merged_state = copy.deepcopy(net.state_dict())
    with pytest.raises(LoRAError, match="no LoRA"):
        merge(net)
    assert same_state(net.state_dict(), merged_state)


def test_a_refused_merge_leaves_the_adapters_in(net: Net) -> None:
    """Catches a merge that stops half-way, at the one layer that diverged."""
    inject(net, rank=2)
    with torch.no_grad():
        lora_layer(net, "vision2.0.v_proj").lora_B[0, 0] = math.inf
    before = fingerprint(net)
    with pytest.raises(LoRAError, match="vision2.0.v_proj"):
        merge(net)
    assert fingerprint(net) == before


# --- strength ---------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_and_is_undone(net: Net) -> None:
    """Catches strengths reset to 1 instead of their earlier values; a nested block or an exception that loses them."""
    base = net(X)
    inject(net, rank=2)
    shake(net)
    lora_layer(net, "vision.0.q_proj").strength = 0.3
    adapted = net(X)
    assert not torch.allclose(adapted, base)
    with disabled(net):
        assert torch.equal(net(X), base)
        with disabled(net):
            pass
        assert torch.equal(net(X), base)
    assert torch.equal(net(X), adapted)
    with pytest.raises(RuntimeError), disabled(net):
        raise RuntimeError
    assert torch.equal(net(X), adapted) and lora_layer(net, "vision.0.q_proj").strength == 0.3


def test_strength_scales_the_correction_linearly(net: Net) -> None:
    """Catches a strength that multiplies the earlier one instead of replacing it, or that scales both A and B."""
    inject(net, ["out"], rank=2, within="vision2")
    shake(net)
    outputs = []
    for s in (1.0, 0.0, 0.5, 0.5, 2.0):
        set_strength(net, s)
        outputs.append(net(X))
    one, zero, half, again, two = outputs
    assert torch.equal(half, again) and not torch.allclose(half, zero)
    torch.testing.assert_close(half - zero, (one - zero) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two - zero, (one - zero) * 2, rtol=1e-4, atol=1e-6)


def test_strength_must_be_finite(net: Net) -> None:
    """Catches a strength of NaN or infinity, which makes every output NaN."""
    inject(net, rank=2)
    before = fingerprint(net)
    for bad in (math.nan, math.inf):
        with pytest.raises(LoRAError, match="strength"):
            set_strength(net, bad)
    assert fingerprint(net) == before


def enter_disabled(model: nn.Module) -> None:
    with disabled(model):
        pass


@pytest.mark.parametrize("call", [remove, merge, adapter_parameters, lambda m: set_strength(m, 1), enter_disabled])
def test_without_lora_the_answer_is_a_sentence(net: Net, call: Callable[[nn.Module], object]) -> None:
    """Catches an optimizer over an empty list, or a merge that changes nothing and raises no error."""
    with pytest.raises(LoRAError, match="no LoRA layers"):
        call(net)


# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within, per_rank", [(None, 61_440), ("vision_model", 36_864), ("text_model", 24_576)])
@pytest.mark.parametrize("rank", [1, 8, 24, 32])
def test_exact_counts_on_clip_vit_b_32(within: str | None, per_rank: int, rank: int) -> None:
    """Catches a layer or tower too many or too few; a percentage of the wrong total."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    assert count_parameters(clip) == (151_277_313, 151_277_313, 100)
    names = inject(clip, rank=rank, within=within)
    count = count_parameters(clip)
    assert (count.trainable, count.total) == (per_rank * rank, 151_277_313)
    assert len(names) == (48 if within is None else 24)
    if within is None:
        assert (count.percent < 1) == (rank <= 24)
        if rank == 8:
            assert count.trainable == 491_520 and f"{count.percent:.2f}" == "0.32"


def test_shared_parameters_are_counted_once() -> None:
    """Catches tied parameters that are counted twice."""
    net = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    net["b"].weight = net["a"].weight
    assert count_parameters(net) == (16, 16, 100)


def test_checkpointing_gives_the_same_gradients() -> None:
    """Catches gradients of A or B that are zero, or that differ when checkpointing recomputes the forward pass."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 29},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    clip = CLIPModel(config).train()
    inject(clip, rank=2)
    shake(clip)
    ids = torch.randint(0, 29, (3, 8))
    ids[:, -1] = 29  # without an end token CLIP pools token 0, which attends only to itself: no gradient in q_proj
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        clip.zero_grad()
        clip(**batch, return_loss=True).loss.backward()
        grads.append([p.grad.clone() for p in adapter_parameters(clip) if p.grad is not None])
    assert len(grads[0]) == len(adapter_parameters(clip)) and all(g.abs().max() > 0 for g in grads[0])
    for plain, replayed in zip(*grads, strict=True):
        torch.testing.assert_close(replayed, plain)
