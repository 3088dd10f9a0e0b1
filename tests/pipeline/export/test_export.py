"""Exported files give the same outputs: read back here, and by programs that know nothing of secateur."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.export import export
from pipeline.network.compact import compact, rebuild
from pipeline.network.paper_networks import lenet_5, lenet_300_100

pytest.importorskip("onnxscript", reason="ONNX export is optional: pip install onnx onnxscript onnxruntime")
pytest.importorskip("onnxruntime", reason="ONNX export is optional: pip install onnx onnxscript onnxruntime")


def pruned_lenet() -> nn.Module:
    """LeNet-5 with some channels, units and most weights at 0."""
    torch.manual_seed(0)
    model = lenet_5().eval()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight[torch.rand_like(part.weight) < 0.7] = 0
        model.get_submodule("conv2").weight[::3] = 0
        model.get_submodule("fc1").weight[::2] = 0
    return model


class HardCoded(nn.Module):
    """Has its number of features in the code, and layers of every kind that shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)
        self.deep, self.group = nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 4, 1, groups=2)
        self.fc = nn.Linear(64, 3, bias=False)
        with torch.no_grad():
            self.conv.weight[1] = 0
            self.norm.bias.fill_(0.5)
            self.group.weight[[0, 2]] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.deep(self.act(self.norm(self.conv(x)))))
        return self.fc(x.view(-1, 64))


@pytest.mark.parametrize(("make", "shape"), [(lenet_5, (1, 28, 28)), (HardCoded, (1, 6, 6))])
def test_a_compact_file_is_rebuilt_from_the_factory(make: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = pruned_lenet() if make is lenet_5 else HardCoded().eval()
    inputs = torch.randn(4, *shape)
    found = compact(model, inputs)
    assert sum(found.removed.values()) > 0
    export.save_compact(found, tmp_path / "compact.safetensors")
    again = rebuild(make(), tmp_path / "compact.safetensors")
    assert torch.equal(again(inputs), found.model(inputs))
    assert torch.allclose(again(inputs), model(inputs), atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_program_is_loaded_without_secateur_and_takes_any_batch(tmp_path: Path) -> None:
    model, inputs = pruned_lenet(), torch.randn(5, 1, 28, 28)
    found = compact(model, inputs)
    file = tmp_path / "compact.pt2"
    export.save_program(export.to_program(found.model, inputs[:1]), file)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = """
import sys, torch
model = torch.export.load("compact.pt2").module()
inputs = torch.load("inputs.pt", weights_only=True)
torch.save([model(inputs), model(inputs[:1])], "outputs.pt")
assert not any(name.partition(".")[0] in ("pipeline", "cluster", "secateur") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    many, one = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert torch.allclose(many, model(inputs), atol=1e-5)
    assert torch.allclose(one, model(inputs[:1]), atol=1e-5)


def test_a_program_holds_no_pickle_no_input_and_no_path_and_has_the_same_bytes_twice(tmp_path: Path) -> None:
    found = compact(HardCoded().eval(), torch.randn(2, 1, 6, 6))
    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    for file in (first, second):
        export.save_program(export.to_program(found.model, torch.randn(2, 1, 6, 6)), file)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert not parts["data/sample_inputs/model.pt"]
    weights = json.loads(parts["data/weights/model_weights_config.json"])["config"]
    assert weights
    assert not any(weight["use_pickle"] for weight in weights.values())
    assert not any(str(Path(__file__).parents[3]).encode() in part for part in parts.values())


def test_a_network_of_one_batch_size_makes_no_program() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 4).sum(1)

    with pytest.raises(UserError, match=r"torch\.export cannot follow the network: "):
        export.to_program(Fixed(), torch.randn(2, 4))


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    export.save_compact(compact(model, torch.zeros(2, 3)), tmp_path / "c.safetensors")
    assert set(load_file(tmp_path / "c.safetensors")) == {"0.weight", "0.bias", "1.bias"}
    twin = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twin[1].weight = twin[0].weight
    assert torch.equal(rebuild(twin, tmp_path / "c.safetensors")(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_a_file_that_is_no_compact_network_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"no compact network.*compact.safetensors"):
        rebuild(lenet_5(), tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        rebuild(lenet_5(), tmp_path / "torn.safetensors")
    export.save_compact(compact(pruned_lenet(), torch.zeros(2, 1, 28, 28)), tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="does not fit the network"):
        rebuild(lenet_300_100(), tmp_path / "c.safetensors")


STRANGER = """
import json, sys
sys.modules["pipeline"] = sys.modules["torch"] = None  # importing either fails
import numpy, onnxruntime
session = onnxruntime.InferenceSession("m.onnx")
(out,) = session.run(None, {session.get_inputs()[0].name: numpy.load("in.npy")})
print(json.dumps(out.tolist()))
"""


@pytest.mark.parametrize("batch", [1, 5])
def test_onnx_runs_without_secateur_or_torch(batch: int, tmp_path: Path) -> None:
    model = pruned_lenet()
    small = compact(model, torch.zeros(1, 1, 28, 28)).model
    export.to_onnx(small, torch.zeros(1, 1, 28, 28), tmp_path / "m.onnx")
    inputs = torch.randn(batch, 1, 28, 28)
    assert export.check_onnx(tmp_path / "m.onnx", model, inputs) < 1e-5
    np.save(tmp_path / "in.npy", inputs.numpy())
    done = subprocess.run(
        [sys.executable, "-c", STRANGER], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert np.allclose(json.loads(done.stdout), model(inputs).detach().numpy(), atol=1e-5)
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "m.onnx").read_bytes(), "holds local paths"
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["m.onnx"]


def test_what_onnx_does_not_have_is_said(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UserError, match="cannot be exported to ONNX"):
        export.to_onnx(Branches(), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed; pip install"):
        export.to_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"onnxruntime is not installed; pip install"):
        export.check_onnx(tmp_path / "m.onnx", nn.Linear(2, 2), torch.zeros(1, 2))


def test_csr_computes_the_same_and_is_stored_as_scipy_has_it(tmp_path: Path) -> None:
    model = pruned_lenet()
    inputs = torch.randn(3, 1, 28, 28)
    quick = export.to_csr(model)
    assert torch.allclose(quick(inputs), model(inputs), atol=1e-5)
    assert type(model.get_submodule("fc1")) is nn.Linear
    assert isinstance(quick.get_submodule("fc1"), export.CsrLinear)
    assert isinstance(export.to_csr(nn.Linear(2, 2)), export.CsrLinear)
    export.save_csr(model, tmp_path / "fc.safetensors")
    stored = load_file(tmp_path / "fc.safetensors")
    parts = {name: stored[f"fc1.weight.{name}"].numpy() for name in ("data", "indices", "indptr", "shape")}
    matrix = sparse.csr_matrix((parts["data"], parts["indices"], parts["indptr"]), tuple(parts["shape"]))
    assert np.array_equal(matrix.toarray(), model.get_submodule("fc1").weight.detach().numpy())
    assert {name.split(".")[0] for name in stored} == {"fc1", "fc2"}
