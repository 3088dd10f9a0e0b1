"""Measurements are complete and say what they show; how fast anything is, is not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.export import bench, export, latency
from pipeline.export.latency import Latency, Passes
from pipeline.local import LocalEngine
from pipeline.network.build import build_network
from pipeline.network.compact import compact, rebuild
from pipeline.network.weights import load_weights
from pipeline.run.events import unheard
from pipeline.run.result import Result
from pipeline.run.state import Run, run_root
from pipeline.settings.config import Config
from pipeline.train.world import World, configure_process


class Counting(nn.Module):
    def __init__(self, log: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self.log, self.name, self.fc = log, name, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.get_num_threads() == 2
        self.log.append((self.name, len(x)))
        return self.fc(x)


def test_repeats_are_interleaved_after_a_warm_up_and_threads_are_put_back() -> None:
    log: list[tuple[str, int]] = []
    before = torch.get_num_threads()
    rows = latency.measure(
        {"a": Counting(log, "a"), "b": Counting(log, "b")}, (3,), (1, 4), threads=2, passes=Passes(repeats=6, warmup=2)
    )
    assert torch.get_num_threads() == before
    assert [(row.name, row.batch) for row in rows] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert all(0 < row.p10_ms <= row.median_ms <= row.p90_ms for row in rows)
    turns = ["".join(name for name, _ in log[start : start + 2]) for start in range(4, 16, 2)]
    assert set(turns) == {"ab", "ba"}  # both once a repeat, in changing order
    assert log[18:22] == [(name, 4) for name in "abab"]  # two warm-ups, after one run each for the memory


def test_a_measurement_ends_in_time_but_has_five_repeats() -> None:
    log: list[tuple[str, int]] = []
    passes = Passes(repeats=1000, warmup=10, seconds=0)
    latency.measure({"a": Counting(log, "a")}, (3,), (1,), threads=2, passes=passes)
    assert len(log) == 1 + 5 + 1  # a warm-up, the repeats, one for the memory


def test_bytes_are_those_of_tensors() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    assert latency.parameter_bytes(model) == 4 * (200 + 20 + 100 + 5)
    with torch.no_grad():
        assert latency.peak_bytes(model, torch.zeros(8, 10)) == 4 * 8 * (20 + 20)  # before and after the ReLU
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.zero_()[1, 2] = 1
    assert latency.parameter_bytes(export.to_csr(layer)) == 4 * 3 + 4 + 8 + 8 * 4  # bias, value, column, row starts


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device=cuda"):
        latency.measure({"a": nn.Linear(1, 1)}, (1,), device="cuda")


def row(name: str, batch: int, middle: float, spread: float = 0.02) -> Latency:
    return Latency(name, batch, middle, middle * (1 - spread), middle * (1 + spread), 0, 0)


def test_the_verdict_says_faster_slower_or_neither() -> None:
    rows = [row("dense", 1, 1.8), row("compact", 1, 1.0), row("CSR", 1, 3.6)]
    rows += [row("dense", 64, 10), row("compact", 64, 9.9), row("CSR", 64, 10.7)]
    assert latency.verdict(rows) == (
        "compact is 1.8x faster at batch 1, no faster at batch 64; CSR is 2.0x slower at batch 1, 7% slower at batch 64"
    )


@pytest.mark.parametrize(("middle", "spread"), [(1.0, 0.5), (1.77, 0.001)])
def test_what_drowns_in_noise_or_is_tiny_is_no_gain(middle: float, spread: float) -> None:
    said = latency.verdict([row("dense", 1, 1.8, spread), row("compact", 1, middle, spread)], "cpu (1 thread)")
    assert said == "no faster on cpu (1 thread): compact is no faster at batch 1"


def test_bench_of_a_run_writes_files_that_agree(tiny: Callable[..., Config]) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export is optional: pip install onnx onnxscript onnxruntime")
    pytest.importorskip("onnxruntime", reason="ONNX export is optional: pip install onnx onnxscript onnxruntime")
    config = tiny(**{"prune.rounds": 1, "target.compression": 20, "prune.dense_control": False})
    configure_process(config.threads)
    stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), unheard)
    root = Path(run_root(config))
    report = bench.bench_run(root, repeats=5)
    assert json.loads((root / "final/latency.json").read_text()) == report.to_json()
    assert {(r.name, r.batch) for r in report.rows} == {
        (name, batch) for name in ("dense", "pruned", "compact", "CSR") for batch in (1, 64)
    }
    assert set(report.differences) == {"compact.safetensors", "compact.pt2", "model.onnx", "compact.onnx"}
    assert max(report.differences.values()) < 1e-4
    assert sum(report.removed.values()) > 0
    small = rebuild(build_network(config.model, 10), root / "final/compact.safetensors")
    big = build_network(config.model, 10).eval()
    load_weights(big, root / "final/model.safetensors")
    images = torch.randn(4, 1, 8, 8)
    assert torch.allclose(small(images), big(images), atol=1e-4)
    assert (root / "final/compact.onnx").stat().st_size < (root / "final/model.onnx").stat().st_size
    result = json.loads((root / "result.json").read_text())
    Result.from_json({**result, "latency_ms": report.summary.model_dump()}, "result.json")
    again = bench.bench_run(root, repeats=5, batches=bench.parse_batches("3"))
    assert {row.batch for row in again.rows} == {again.summary.batch} == {3}


@pytest.mark.parametrize("text", ["", "0", "1,", "1.5", "-1", "x", "9999999999"])
def test_batches_that_are_none_are_one_message(text: str) -> None:
    with pytest.raises(UserError, match=r"--batches .*: takes whole numbers from 1 to"):
        bench.parse_batches(text)


def test_a_run_of_an_encoder_is_measured_in_every_form(tiny: Callable[..., Config]) -> None:
    """Whole: attention's weights are pruned, counted and measured, and its fused path takes no form away."""
    more = {"prune.allocation": "uniform", "prune.rounds": 1, "prune.dense_control": False, "dense.epochs": 1}
    config = tiny(**{"model.factory": "networks:Encoding", "model.kwargs": {}}, **more)
    configure_process(config.threads)
    result = stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), unheard)
    layers = {layer.name: layer for layer in result.layers}
    assert layers["encoder.self_attn.in_proj_weight"].flops == 2 * 3 * 8 * 8 * 16
    assert all(layer.density < 1 and layer.activation_density and layer.flops_density for layer in result.layers)
    report = bench.bench_run(run_root(config), repeats=5, trust_code=True)
    assert {row.name for row in report.rows} >= {"dense", "pruned", "compact"}
    assert {row.name for row in report.rows} | report.missing.keys() >= {"dense", "pruned", "compact", "CSR"}
    assert all(report.missing.values())


@pytest.mark.parametrize(("seconds", "each"), [(0.0, 2), (1e6, 64)])
def test_a_network_is_checked_on_as_many_inputs_as_it_is_fast(
    seconds: float, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CHECK_S", seconds)
    inputs = torch.arange(128.0).view(128, 1).expand(128, 64).reshape(128, 1, 8, 8)
    found = bench.affordable(networks.Rows().eval(), inputs)
    assert found[:, 0, 0, 0].tolist() == [*range(each), *range(64, 64 + each)]  # as many random as real ones


def test_csr_that_is_far_too_slow_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SLOW_S", 1e-9)
    monkeypatch.setattr(bench, "SLOW", 1e-3)
    inputs = torch.randn(128, 1, 8, 8)
    with pytest.raises(UserError, match=r"s for 4 images, \d+ times as long as with whole matrices"):
        bench.checked_csr(networks.Rows().eval(), inputs, (1, 8, 8), (1, 64), torch.device("cpu"))


def test_a_form_that_a_network_cannot_take_is_said(tmp_path: Path) -> None:
    inputs, shape, cpu = torch.randn(4, 1, 8, 8), (1, 8, 8), torch.device("cpu")
    rows = networks.Rows().eval()
    assert torch.allclose(bench.checked_csr(rows, inputs, shape, (1, 64), cpu)(inputs), rows(inputs), atol=1e-5)
    with pytest.raises(RuntimeError):
        bench.checked_csr(networks.ThereAndBack().eval(), inputs, shape, (1, 64), cpu)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x.flatten(1))
            return x if x.sum() > 0 else -x

    here, model, missing = Run(str(tmp_path), 0), Branching().eval(), dict[str, str]()
    differences = bench.write_files(here, model, compact(model, inputs), inputs, missing)
    assert differences.keys() == {"compact.safetensors"}
    assert missing.keys() == {"compact.pt2", "model.onnx", "compact.onnx"}
    assert "torch.export cannot follow the network" in missing["compact.pt2"]
    assert "cannot be exported to ONNX" in missing["model.onnx"]
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["compact.safetensors", "fc.csr.safetensors"]


def test_a_run_whose_flops_cannot_be_told_says_nothing_of_them(tiny: Callable[..., Config]) -> None:
    more = {"prune.allocation": "uniform", "prune.rounds": 1, "prune.dense_control": False, "dense.epochs": 1}
    config = tiny(**{"model.factory": "networks:Mixed", "model.kwargs": {}}, **more)
    configure_process(config.threads)
    with pytest.warns(UserWarning, match="cannot be counted"):
        result = stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), unheard)
    one, _, head = result.layers
    assert (one.flops, one.activation_density, one.flops_density, result.flops_density) == (None, None, None, None)
    assert head.flops == 2 * 16 * 10


def test_bench_of_an_unfinished_run_is_refused(tmp_path: Path, tiny_yaml: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.yaml").write_bytes(tiny_yaml.read_bytes())
    with pytest.raises(UserError, match="to its end first"):
        bench.bench_run(tmp_path / "r")


def test_sparse_layers_are_called_by_keyword_as_linear_ones_are() -> None:
    layer, inputs = nn.Linear(6, 3), torch.rand(4, 2, 6)
    made = export.CsrLinear(layer)
    assert torch.allclose(made(input=inputs), layer(input=inputs), atol=1e-6)
    assert made(input=inputs).shape == (4, 2, 3)
