"""Saving and loading adapters: round trips, refused files, and saves that are refused or interrupted."""

import copy
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import (
    LoRAError,
    LoRALinear,
    adapter_parameters,
    disabled,
    inject,
    load_adapter,
    remove,
    save_adapter,
    set_strength,
)

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.vision.0.q_proj.lora_A.weight"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.out(torch.tanh(self.q_proj(x)) * self.v_proj(x))
        return x + branch


class Net(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.vision, self.text = nn.Sequential(*[Block(8) for _ in range(depth)]), nn.Sequential(Block(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.text(self.vision(x))
        return y


def make(depth: int = 2, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(depth)


def adapted(seed: int = 0, **settings: Any) -> Net:
    net = make()
    inject(net, **{"rank": 2, "alpha": 3.0, **settings})
    torch.manual_seed(100 + seed)
    for p in adapter_parameters(net):
        nn.init.normal_(p, std=0.3)
    return net


def lora_layer(model: nn.Module, name: str) -> LoRALinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, LoRALinear)
    return layer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, for the tests to damage."""
    save_adapter(adapted(), tmp_path / "adapter", base_model="some/model")
    return tmp_path / "adapter"


def fingerprint(model: nn.Module) -> list[object]:
    modules = [(n, id(m), m.training) for n, m in model.named_modules()]
    return [modules, [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]]


def refuses(model: nn.Module, folder: Path, says: str) -> None:
    before = fingerprint(model)
    with pytest.raises(LoRAError, match=says) as caught:
        load_adapter(model, folder)
    assert fingerprint(model) == before, "a refused load must leave the model alone"
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**config, **fields}.items() if v != "DELETE"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True, "dropout": 0.2, "alpha": 2.5}, {"within": "vision"}, {"targets": "out"}],
)
def test_round_trip_is_bit_equal(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Catches a tensor that is lost or rounded, a setting that is lost, or the wrong tower adapted on loading."""
    net = adapted(**settings)
    save_adapter(net, tmp_path)
    fresh = make()
    names = load_adapter(fresh, tmp_path)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, LoRALinear)}
    assert names == list(layers)
    for name, layer in layers.items():
        twin = lora_layer(fresh, name)
        assert torch.equal(twin.lora_A, layer.lora_A) and torch.equal(twin.lora_B, layer.lora_B)
        fields = ("rank", "alpha", "dropout", "rslora", "scaling", "strength")
        assert [getattr(twin, f) for f in fields] == [getattr(layer, f) for f in fields]
    assert torch.equal(fresh.eval()(X), net.eval()(X))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {f"{n}.lora_{m}" for n in names for m in "AB"}


def test_names_match_from_dot_to_dot(tmp_path: Path) -> None:
    """Catches "q" that also selects "mq" on loading; an ending "x.q" that also selects "yx.q", unlike in PEFT."""

    def net() -> nn.ModuleDict:
        inner = nn.ModuleDict({"q": nn.Linear(8, 8), "mq": nn.Linear(8, 8)})
        return nn.ModuleDict({"q": nn.Linear(8, 8), "mq": nn.Linear(8, 8), "x": inner, "yx": copy.deepcopy(inner)})

    ours = net()
    assert inject(ours, "q", rank=2) == ["q", "x.q", "yx.q"]
    save_adapter(ours, tmp_path)
    assert load_adapter(net(), tmp_path) == ["q", "x.q", "yx.q"]
    edit_config(tmp_path, target_modules=["x.q"])
    edit_tensors(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".x.q." not in key])
    assert load_adapter(net(), tmp_path) == ["x.q"]


def test_targets_that_need_more_than_leaf_names(tmp_path: Path) -> None:
    """Catches a config whose target_modules select more layers than were adapted."""
    save_adapter(adapted(), tmp_path / "leaf")
    save_adapter(adapted(within="vision"), tmp_path / "path")
    tail = nn.ModuleDict({"fc": LoRALinear(nn.Linear(4, 4), 2), "x": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    save_adapter(tail, tmp_path / "tail")
    targets = {f: json.loads((tmp_path / f / CONFIG).read_text())["target_modules"] for f in ("leaf", "path", "tail")}
    assert targets["leaf"] == ["q_proj", "v_proj"]
    assert targets["path"] == "|".join(rf"^vision\.{i}\.{p}_proj" for i in (0, 1) for p in "qv")
    assert targets["tail"] == "^fc"  # as a list, ["fc"] would mean x.fc as well
    assert load_adapter(make(), tmp_path / "path") == [f"vision.{i}.{p}_proj" for i in (0, 1) for p in "qv"]


def test_the_files_are_those_of_peft(folder: Path) -> None:
    """Catches keys, dtypes or config fields that are not those of PEFT's layout."""
    tensors = load_file(folder / WEIGHTS)
    assert KEY in tensors and len(tensors) == 12
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    config = json.loads((folder / CONFIG).read_text())
    assert config == {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "use_rslora": False,
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "some/model",
        "auto_mapping": {"base_model_class": "Net", "parent_library": __name__},
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_into_fp32(folder: Path, dtype: torch.dtype) -> None:
    """Catches parameters in the dtype of the file: GradScaler refuses fp16, and bf16 rounds small updates away."""
    edit_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    net = make()
    load_adapter(net, folder)
    assert {p.dtype for p in adapter_parameters(net)} == {torch.float32}
    loaded, saved = (lora_layer(model, "vision.0.q_proj").lora_A for model in (net, adapted()))
    torch.testing.assert_close(loaded, saved, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_loading_keeps_mode_and_base(folder: Path, training: bool) -> None:
    """Catches dropout that is active after loading into a model in eval mode; a load that writes to the base."""
    net = make().train(training)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    y = net(X)
    load_adapter(net, folder)
    assert all(m.training == training for m in net.modules())
    with disabled(net):
        assert torch.equal(net(X), y)
    remove(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- refusals on loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"peft_type": "DELETE"}, "peft_type = None"),
        ({"use_qalora": True}, "use_qalora"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["out"]}, "out.weight found none, expected \\(8, 8\\)"),
        ({"modules_to_save": ["vision"]}, "vision: found Sequential, expected nn.Linear"),
        ({"modules_to_save": 3}, "modules_to_save"),
        ({"bias": "lora_only"}, "q_proj.base_layer.bias found none, expected"),
        ({"bias": "lora_only", "use_dora": True}, "asks for (bias|use_dora)"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layers_to_transform": [0]}, "12 tensors.*expected none"),
        ({"layers_to_transform": 0.5}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern.*missing"),
        ({"exclude_modules": ["v_proj"]}, "v_proj.*expected none"),
        ({"exclude_modules": 3}, "exclude_modules"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"something_of_tomorrow": {"gain": 2}}, "something_of_tomorrow"),
        ({"r": "DELETE"}, "rank is None"),
        ({"r": 2.0}, "rank is 2.0"),
        ({"r": 0}, "0.q_proj: rank is 0"),
        ({"r": 3}, "12 tensors.*lora_A.weight found \\(2, 8\\), expected \\(3, 8\\)"),
        ({"lora_alpha": math.nan}, "alpha is nan"),
        ({"lora_alpha": "DELETE"}, "alpha is None"),
        ({"use_rslora": "false"}, "rslora is 'false'"),
        ({"lora_dropout": 1.5}, "dropout is 1.5"),
        ({"target_modules": None}, "expected target_modules.*selects nothing"),
        ({"target_modules": ["k_proj"]}, "12 tensors.*q_proj.*expected none"),
        ({"target_modules": "(q_proj"}, "a regex \\(missing"),
        ({"target_modules": ["vision"]}, "vision: found Sequential"),
        ({"target_modules": ["q_proj"]}, "6 tensors.*v_proj.*found.*expected none"),
        ({"target_modules": ["q_proj", "v_proj", "out"]}, "out.lora_A.weight found none, expected"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj.lora_A.weight found \\(2, 8\\), expected \\(4, 8\\)"),
        ({"rank_pattern": {"q_proj": "4"}}, "q_proj: rank is '4'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "q_proj: alpha is 0"),
        ({"alpha_pattern": {"(q_proj": 4}}, "a regex \\(missing"),
    ],
)
def test_configs_that_are_refused(folder: Path, fields: dict[str, Any], says: str) -> None:
    """Catches a config field that changes the computation and is ignored without an error."""
    edit_config(folder, **fields)
    refuses(make(), folder, says)


def drop_key(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY]


def drop_layer(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY], tensors[KEY.replace("lora_A", "lora_B")]


def add_key(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.vision.0.out.lora_A.weight"] = torch.zeros(2, 8)


def add_magnitude(tensors: dict[str, Tensor]) -> None:
    tensors[KEY.replace("lora_A.weight", "lora_magnitude_vector")] = torch.zeros(8)


def bare_names(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("base_model.model.", "model.")] = tensors.pop(key)


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].T.contiguous()


def to_int(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].int()


def to_nan(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0, 0] = math.nan


def beyond_fp32(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].double() + 1e300


@pytest.mark.parametrize(
    "change, says",
    [
        (drop_key, f"1 tensors.*{KEY} found none"),
        (drop_layer, f"2 tensors.*{KEY} found none"),
        (add_key, "vision.0.out.*found \\(2, 8\\), expected none"),
        (add_magnitude, "magnitude_vector found \\(8,\\), expected none"),
        (bare_names, "24 tensors.*for another model"),
        (transpose, f"{KEY} found \\(8, 2\\), expected \\(2, 8\\)"),
        (to_int, f"{KEY} found.*int32"),
        (to_nan, f"{KEY} found NaN"),
        (beyond_fp32, f"{KEY} found NaN, inf"),
        (dict.clear, "12 tensors"),
    ],
)
def test_tensors_that_are_refused(folder: Path, change: Callable[[dict[str, Tensor]], object], says: str) -> None:
    """Catches non-strict loading, after which some or all layers of the "adapted" model are those of the base."""
    edit_tensors(folder, change)
    refuses(make(), folder, says)


def test_an_adapter_of_another_model_is_refused_by_name(folder: Path) -> None:
    """Catches the adapter of a deeper model loaded in part; one of another width that fails half-way."""
    refuses(make(depth=1), folder, "vision.1.q_proj.lora_A.weight found \\(2, 8\\), expected none.*another model")
    wide = make()
    wide.text[0] = Block(16)
    refuses(wide, folder, "text.0.q_proj.lora_A.weight found \\(2, 8\\), expected \\(2, 16\\)")


def test_files_that_are_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    """Catches the exception of a parser where a LoRAError should name the file."""
    refuses(make(), tmp_path / "nowhere", f"No such file.*{CONFIG}")
    (tmp_path / "empty").mkdir()
    refuses(make(), tmp_path / "empty", f"No such file.*{CONFIG}")
    config, weights = (folder / CONFIG).read_text(), (folder / WEIGHTS).read_bytes()
    for text in (b"{", b"[1]", b"null", b"", b"\xff\xfe\x00"):
        (folder / CONFIG).write_bytes(text)
        refuses(make(), folder, "cannot read")
    (folder / CONFIG).write_text(config)
    for damaged in (weights[:-100], weights[:20], b"", b"\xff" * 64):
        (folder / WEIGHTS).write_bytes(damaged)
        refuses(make(), folder, "cannot read")
    (folder / WEIGHTS).unlink()
    refuses(make(), folder, f"No such file.*{WEIGHTS}")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, (str(Path(os.environ["BOMB"])),))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Catches a fallback to torch.load, which runs the code in a downloaded file."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refuses(make(), folder, "never opened")
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    refuses(make(), folder, "cannot read")
    assert not (tmp_path / "exploded").exists()


def test_loading_into_an_adapted_model_is_refused(folder: Path) -> None:
    """Catches an adapter loaded over another, or LoRA layers inside LoRA layers."""
    refuses(adapted(), folder, "already holds")


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saves_that_are_refused(folder: Path) -> None:
    """Catches a good adapter overwritten by one that is not finite, not at strength 1, of mixed settings, empty or of a
    wrapped model."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def spoil(net: Net, layer: LoRALinear, what: str) -> nn.Module:
        if what == "NaN":
            layer.lora_B.data[0, 0] = math.nan
        elif what == "strength":
            set_strength(net, 0.5)
        elif what == "one set":
            layer.dropout = 0.5
        elif what == "no LoRA":
            remove(net)
        elif what == "_orig_mod":
            compiled: Any = torch.compile(net)
            net = compiled
        return net

    for what in ("NaN", "strength", "one set", "no LoRA", "_orig_mod"):
        net = adapted()
        with pytest.raises(LoRAError, match=what):
            save_adapter(spoil(net, lora_layer(net, "vision.0.q_proj"), what), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_interrupted_save_leaves_a_whole_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Catches a write to the final file name, by which an interrupted save leaves half a file and no adapter."""
    old, new = adapted(), adapted(seed=1)
    real = os.replace
    calls: list[str] = []

    def replace(source: str | Path, target: str | Path) -> None:
        calls.append(Path(target).name)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(new, folder)
    monkeypatch.undo()
    assert calls == [WEIGHTS, CONFIG][:fails_at], "weights first, config last"
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS], "no temporary file stays behind"
    net = make()
    load_adapter(net, folder)
    assert torch.equal(net(X), (old if fails_at == 1 else new)(X))


def test_a_full_disk_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are replaced before the new config is on the disk."""

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    written: list[int] = []

    def fsync(fd: int) -> None:
        written.append(fd)
        if len(written) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no space"):
        save_adapter(adapted(seed=1), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_again_keeps_other_files(folder: Path) -> None:
    """Catches a save that empties or replaces the whole folder, and deletes the user's other files."""
    (folder / "README.md").write_text("mine")
    save_adapter(adapted(seed=1), folder)
    assert (folder / "README.md").read_text() == "mine"
    net = make()
    load_adapter(net, folder)
    assert torch.equal(net(X), adapted(seed=1)(X))
