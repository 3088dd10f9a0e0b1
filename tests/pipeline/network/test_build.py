import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Attending, ByName, Encoding, Rows, ThereAndBack
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pipeline.base.errors import UserError
from pipeline.network.activity import ActivationMeter
from pipeline.network.build import build_network, load_weights, stored_once
from pipeline.network.cost import flops
from pipeline.network.paper_networks import lenet_5, lenet_300_100
from pipeline.network.survey import survey
from pipeline.settings.model import Model


def network(**settings: Any) -> nn.Module:
    return build_network(Model.model_validate(settings), seed=3)


# The paper's networks ------------------------------------------------------------------------------------------------


def test_lenet_300_100_has_the_papers_size() -> None:
    model = lenet_300_100()
    assert sum(p.numel() for p in model.parameters()) == 266_610
    prunable, left_out = survey(model)
    assert [(t.name, t.kind, t.weights) for t in prunable] == [
        ("fc1.weight", "fc", 235_200),
        ("fc2.weight", "fc", 30_000),
        ("fc3.weight", "fc", 1_000),
    ]
    assert [(t.name, t.shape, t.reason) for t in left_out] == [
        ("fc1.bias", (300,), "bias"),
        ("fc2.bias", (100,), "bias"),
        ("fc3.bias", (10,), "bias"),
    ]
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_dropout_is_there_when_asked_for_and_has_no_weights() -> None:
    assert [m.p for m in lenet_300_100(dropout=0.5).modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert lenet_300_100(dropout=0.5).state_dict().keys() == lenet_300_100().state_dict().keys()


def test_lenet_5_has_the_papers_size_and_flops() -> None:
    model = lenet_5()
    assert sum(p.numel() for p in model.parameters()) == 431_080
    assert flops(model, (1, 28, 28)) == {
        "conv1.weight": 576_000,
        "conv2.weight": 3_200_000,
        "fc1.weight": 800_000,
        "fc2.weight": 10_000,
    }


def test_lenet_300_100_flops() -> None:
    assert list(flops(lenet_300_100(), (1, 28, 28)).values()) == [470_400, 60_000, 2_000]


def test_caffes_trained_weights_load(real_data: Path) -> None:
    path = real_data / "weights/lenet5_caffe_mnist.pth"
    model = network(factory="lenet_5", checkpoint=str(path))
    assert torch.equal(model.state_dict()["conv1.weight"], torch.load(path, weights_only=True)["conv1.weight"])


# build ---------------------------------------------------------------------------------------------------------------


def test_the_seed_sets_the_weights_and_nothing_else() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_network(Model.model_validate({}), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(first["fc1.weight"], again["fc1.weight"])
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])
    assert torch.equal(before, torch.get_rng_state())


def test_number_of_classes_reaches_the_factory() -> None:
    assert build_network(Model.model_validate({}), 7)(torch.zeros(1, 784)).shape == (1, 7)
    assert build_network(Model.model_validate({"kwargs": {"classes": 5}}), 7)(torch.zeros(1, 784)).shape == (1, 5)
    squeezenet = build_network(Model(factory="torchvision.models.squeezenet1_1"), 7)
    assert squeezenet.get_submodule("classifier.1").out_channels == 7


def test_import_path_with_dot_or_colon_and_without_classes() -> None:
    for path in ("torch.nn.Linear", "torch.nn:Linear"):
        model = build_network(Model(factory=path, kwargs={"in_features": 2, "out_features": 3}), 10)
        assert isinstance(model, nn.Linear)


def test_a_module_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "my_net_of_test.py").write_text(
        "from torch import nn\ndef make(classes):\n    return nn.Linear(4, classes)\n"
    )
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from pipeline.settings.model import Model; from pipeline.network.build import build_network\n"
        "print(build_network(Model(factory='my_net_of_test.make'), 6))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert "out_features=6" in done.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "lenet5"}, r"model.factory='lenet5'.*did you mean 'lenet_5'"),
        ({"factory": "lenet_5", "kwargs": {"clases": 3}}, r"'clases'"),
        ({"factory": "lenet_300_100", "kwargs": {"dropout": 1.5}}, r"does not work with .*1.5"),
        ({"factory": "no_such_package.net"}, r"module 'no_such_package' cannot be imported"),
        ({"factory": "torchvision.models.squeezenet1_2"}, r"did you mean 'squeezenet1_\d'"),
        ({"factory": "torch.nn.modules"}, r"is a module, not a function"),
        ({"factory": ":f"}, r"not an import path"),
        ({"factory": "builtins.dict"}, r"made a dict, not a torch.nn.Module"),
    ],
)
def test_mistakes_in_the_factory(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(**settings)


# load_weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_back(tmp_path: Path, suffix: str, prefix: str) -> None:
    source, target, path = lenet_5(), lenet_5(), tmp_path / f"w{suffix}"
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    load_weights(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_every_mismatch_is_listed(tmp_path: Path) -> None:
    state = lenet_5().state_dict()
    state["fc9.weight"] = state.pop("fc2.weight")
    state["fc1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as caught:
        load_weights(lenet_5(), tmp_path / "w.pth")
    text = str(caught.value)
    assert "missing: fc2.weight;" in text
    assert "unexpected: fc9.weight;" in text
    assert "shapes that differ: fc1.bias (3,) for (500,)" in text


def test_long_lists_are_cut(tmp_path: Path) -> None:
    torch.save({f"x{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected: x0, x1, x2, x3, x4, x5, x6, x7 and 12 more"):
        load_weights(lenet_5(), tmp_path / "w.pth")


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    model = lenet_5()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = lenet_5().state_dict() | {"fc2.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Path(os.environ["BOMB"])),))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"w": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="weights_only"):
        load_weights(lenet_5(), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not tensors", b"PK\x03\x04" + bytes(40), b"\x80\x02}q"])
def test_a_damaged_file(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(lenet_5(), path)


def test_other_things_in_a_file(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"conv1.weight": 3}, tmp_path / "number.pth")
    (tmp_path / "w.npz").write_bytes(b"")
    for name, message in (
        ("list.pth", "holds a list"),
        ("number.pth", "not named tensors: conv1"),
        ("w.npz", "end in"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(lenet_5(), tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        load_weights(lenet_5(), tmp_path / "none.pth")


def test_batch_norm_of_older_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: tensor for name, tensor in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")


# survey --------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.again = self.one


def test_tied_tensors_count_once() -> None:
    prunable, left_out = survey(Tied())
    assert [(t.name, t.aliases) for t in prunable] == [("one.weight", ("two.weight", "again.weight"))]
    reasons = {item.name: item.reason for item in left_out}
    assert reasons["table.weight"] == (
        "shared by table.weight, head.weight: embedding (a table that is looked up, not multiplied)"
    )
    assert "head.weight" not in reasons


def test_tied_tensors_load_from_safetensors(tmp_path: Path) -> None:
    source, target = Tied(), Tied()
    unique = dict(source.named_parameters())
    save_file({name: tensor.detach() for name, tensor in unique.items()}, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.head.weight, source.head.weight)
    assert torch.equal(target.two.weight, source.one.weight)


def test_tied_tensors_are_stored_once() -> None:
    model = Tied()
    once = stored_once(model, model.state_dict())
    assert once.keys() == {"table.weight", "head.bias", "one.weight", "one.bias", "two.bias"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_every_kind_of_parameter_has_its_reason() -> None:
    parts = {
        "depthwise": nn.Conv2d(4, 4, 3, groups=4, bias=False),
        "conv1d": nn.Conv1d(2, 3, 3, bias=False),
        "conv3d": nn.Conv3d(2, 3, 3, bias=False),
        "up": nn.ConvTranspose2d(2, 2, 2, bias=False),
        "norm": nn.BatchNorm2d(2),
        "layernorm": nn.LayerNorm(2),
        "table": nn.Embedding(2, 2),
        "prelu": nn.PReLU(),
        "weightnorm": parametrizations.weight_norm(nn.Linear(2, 2, bias=False)),
        "attention": nn.MultiheadAttention(4, 2, bias=False),
        "lazy": nn.LazyLinear(3, bias=False),
        "fp16": nn.Linear(2, 2, bias=False).half(),
        "empty": nn.Linear(0, 2, bias=False),
    }
    prunable, left_out = survey(nn.ModuleDict(parts))
    assert [(t.name, t.kind, t.weights) for t in prunable] == [
        ("depthwise.weight", "conv", 36),
        ("conv1d.weight", "conv", 18),
        ("conv3d.weight", "conv", 162),
        ("attention.in_proj_weight", "attention", 48),
        ("attention.out_proj.weight", "fc", 16),
        ("fp16.weight", "fc", 4),
    ]
    assert prunable[0].module is parts["depthwise"]
    reasons = {item.name: item.reason for item in left_out}
    assert reasons["up.weight"] == "transposed convolution (ConvTranspose2d)"
    assert reasons["norm.weight"] == "normalisation (BatchNorm2d)"
    assert reasons["norm.bias"] == "bias"
    assert reasons["table.weight"].startswith("embedding")
    assert reasons["prelu.weight"] == "parameter of a PReLU, which is neither a linear nor a convolution layer"
    assert reasons["weightnorm.parametrizations.weight.original0"].startswith("parametrised")
    assert reasons["lazy.weight"].startswith("LazyLinear is lazy")
    assert reasons["empty.weight"] == "empty"


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_listed() -> None:
    prunable, left_out = survey(nn.Sequential(nn.Linear(2, 2), torch.ao.nn.quantized.Linear(3, 4)))
    assert [t.name for t in prunable] == ["0.weight"]
    assert [(t.name, t.shape, t.reason) for t in left_out][-1] == ("1.weight", (4, 3), "quantised layer (Linear)")


def test_patterns_choose() -> None:
    prunable, left_out = survey(lenet_5(), include=["fc*", "conv2.weight"], exclude=["fc2.*"])
    assert [t.name for t in prunable] == ["conv2.weight", "fc1.weight"]
    reasons = {item.name: item.reason for item in left_out}
    assert reasons["fc2.weight"] == "excluded by prune.exclude 'fc2.*'"
    assert reasons["conv1.weight"] == "not in prune.include ['fc*', 'conv2.weight']"
    assert [item.name for item in left_out][:3] == ["conv1.weight", "conv1.bias", "conv2.bias"]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["*"], ["fc3.weight"], r"prune.exclude: 'fc3.weight' matches no tensor; did you mean 'fc[12].weight'"),
        (["fc1"], [], r"prune.include: 'fc1' matches no tensor; did you mean"),
        (["fc1.bias"], [], r"prune.include: 'fc1.bias' matches no tensor"),  # it exists, but cannot be pruned
        (["*"], ["*"], r"nothing in the network can be pruned: conv1.weight \(excluded by prune.exclude '\*'\)"),
    ],
)
def test_patterns_that_choose_nothing(include: list[str], exclude: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        survey(lenet_5(), include, exclude)


def test_nothing_to_prune() -> None:
    with pytest.raises(UserError, match=r"nothing in the network can be pruned: weight \(normalisation"):
        survey(nn.BatchNorm1d(3))


def test_a_layer_by_itself() -> None:
    assert survey(nn.Linear(2, 3))[0][0].name == "weight"
    assert flops(nn.Linear(2, 3), (2,)) == {"weight": 12}


# flops and activations -----------------------------------------------------------------------------------------------


def test_flops_of_groups_strides_and_shared_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1)
            self.point = nn.Conv2d(8, 8, 1)
            self.unused = nn.Linear(2, 2)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.point(self.point(self.norm(self.conv(x))))
            return out

    model = Net().train()
    model.norm.eval()
    # conv: 8 channels x 2 inputs each x 9, at 3x3 places; point: 64 weights at 9 places, twice
    assert flops(model, (4, 6, 6)) == {
        "conv.weight": 2 * 8 * 2 * 9 * 9,
        "point.weight": 2 * 2 * 64 * 9,
        "unused.weight": 0,
    }
    assert model.training
    assert not model.norm.training
    assert model.norm.num_batches_tracked == 0


def test_flops_of_an_input_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"\(3, 8, 8\) \(data.channels, data.size\)"):
        flops(lenet_5().train(), (3, 8, 8))


def measure(model: nn.Module, names: list[str], *batches: Tensor) -> dict[str, tuple[float | None, float | None, str]]:
    with ActivationMeter(model, names) as meter, torch.no_grad():
        for batch in batches:
            model(batch)
    return {n: (a.output_density, a.input_density, a.measured) for n, a in meter.result().items()}


def identity(size: int) -> nn.Linear:
    layer = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(size))
    return layer


def named(**parts: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model.eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_densities_by_hand(inplace: bool) -> None:
    model = named(fc1=identity(4), relu=nn.ReLU(inplace=inplace), fc2=identity(4))
    first, second = torch.tensor([[1.0, -1.0, 2.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    # after the ReLU 2 of 4 and 3 of 4 are not zero; fc1 reads the network's input, set to 1
    assert measure(model, ["fc1.weight", "fc2.weight"], first, second) == {
        "fc1.weight": (5 / 8, 1.0, "after relu"),
        "fc2.weight": (5 / 8, 5 / 8, "own output"),
    }


def test_norm_and_activation_are_followed_and_dropout_is_not_counted() -> None:
    torch.manual_seed(0)
    model = named(fc1=identity(4), norm=nn.LayerNorm(4), relu=nn.ReLU(), drop=nn.Dropout(0.9), fc2=identity(4))
    model.train()
    found = measure(model, ["fc1.weight", "fc2.weight"], torch.tensor([[1.0, -1.0, 2.0, -2.0]]))
    assert found["fc1.weight"] == (0.5, 1.0, "after relu")


def test_pooling_ends_the_trail() -> None:
    model = named(conv1=nn.Conv2d(1, 2, 3), pool=nn.MaxPool2d(2), relu=nn.ReLU(), conv2=nn.Conv2d(2, 1, 1))
    assert measure(model, ["conv1.weight"], torch.rand(1, 1, 8, 8))["conv1.weight"][2] == "own output"


def test_the_first_layer_called_is_the_networks_not_the_first_asked_for() -> None:
    model = named(fc1=identity(2), relu=nn.ReLU(), fc2=identity(2))
    found = measure(model, ["fc2.weight"], torch.tensor([[1.0, -1.0]]))
    assert found == {"fc2.weight": (0.5, 0.5, "own output")}


def test_functional_activations_are_seen_and_unused_layers_say_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.unused = identity(2), identity(2), identity(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(F.relu(self.one(x)))
            return out

    found = measure(Net(), ["one.weight", "two.weight", "unused.weight"], torch.tensor([[1.0, -1.0]]))
    assert found == {
        "one.weight": (0.5, 1.0, "after relu()"),
        "two.weight": (0.5, 0.5, "own output"),
        "unused.weight": (0.0, 0.0, "never called"),
    }


def test_a_block_is_measured_after_its_sum_and_the_activation_there() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = identity(4), identity(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.one(x))
            return F.relu(self.norm(self.two(h)) - h - 0.5)

    # After the first ReLU 1, 0, 2, 0; the sum is -0.5 or less everywhere, but for rounding.
    found = measure(Block().eval(), ["one.weight", "two.weight"], torch.tensor([[1.0, -1.0, 2.0, -2.0]]))
    assert found == {"one.weight": (0.5, 1.0, "after relu()"), "two.weight": (0.0, 0.5, "after relu()")}


def test_a_weight_without_a_product_of_its_own_is_not_measured() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = identity(2), identity(2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.one.weight + self.two.weight)

    found = measure(Sum(), ["one.weight"], torch.ones(1, 2))
    assert found == {"one.weight": (None, None, "not measured")}


def test_attention_and_layers_called_by_keyword_are_measured() -> None:
    for network in (Attending(), Encoding(), ThereAndBack(), Rows(), ByName()):
        names = [tensor.name for tensor in survey(network)[0]]
        with ActivationMeter(network.eval(), names) as meter, torch.inference_mode():
            network(torch.randn(3, 1, 8, 8))
        found = meter.result()
        assert found.keys() == set(names)
        assert all(each.input_density and each.output_density for each in found.values()), found
        hidden = {"encoder.linear1.weight", "fc1.weight"} & found.keys()
        assert all(found[name].measured.startswith("after ") for name in hidden)


def test_a_second_consumer_does_not_overwrite_the_first() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.relu, self.gate = identity(2), nn.ReLU(), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            out: Tensor = self.relu(x) + self.gate(x)
            return out

    assert measure(Net(), ["fc.weight"], torch.tensor([[1.0, -1.0]])) == {"fc.weight": (0.5, 1.0, "after relu")}


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    model = lenet_300_100()
    with pytest.raises(RuntimeError), ActivationMeter(model, ["fc1.weight"]):
        model(torch.zeros(1, 3))
    assert all(not part._forward_hooks for part in model.modules())
    with pytest.raises(UserError):
        flops(model, (3,))
    assert all(not part._forward_hooks for part in model.modules())


def test_activations_are_not_kept_alive() -> None:
    model = named(fc1=identity(2), relu=nn.ReLU(), fc2=identity(2))
    with ActivationMeter(model, ["fc1.weight"]) as meter, torch.inference_mode():
        model(torch.ones(1, 2))
        alive = [trail for trails in meter._meter.trails.values() for trail in trails if not trail.storage.expired()]
    assert len(alive) == 0
    assert math.isclose(meter.result()["fc1.weight"].output_density, 1.0)
