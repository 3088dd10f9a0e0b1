"""What removing dead units gains: parameters, bytes, latency of dense, compact and CSR, and the outputs' difference.

    SECATEUR_DATA=... python benchmarks/bench_compact.py

LeNet-5 (Caffe, MNIST) is pruned twelvefold by magnitude over each layer's std, without retraining; "channels" means
that the weakest half of the channels and units (by L2 norm of their weights) is set to 0 instead. Outputs are compared
on random inputs, so their accuracy does not matter.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

from pipeline.export import export, latency
from pipeline.network.compact import compact
from pipeline.network.layers import LAYERS
from pipeline.network.paper_networks import lenet_5
from pipeline.network.weights import load_weights

THREADS = 1


def main() -> None:
    folder = os.environ.get("SECATEUR_DATA")
    if not folder:
        sys.exit("set SECATEUR_DATA to the folder of real weights")
    weights = Path(folder) / "weights"
    torch.manual_seed(0)
    lenet, squeezenet = lenet_5(), torchvision.models.squeezenet1_1()
    load_weights(lenet, weights / "lenet5_caffe_mnist.pth")
    load_weights(squeezenet, weights / "squeezenet1_1_imagenet.pth")
    columns = ("network", "form", "parameters", "kB", "batch", "ms", "10-90%", "peak kB", "difference")
    table = Table(*columns, title=f"cpu, {THREADS} thread")
    cases: list[tuple[str, nn.Module, Callable[[nn.Module], None], tuple[int, ...]]] = [
        ("LeNet-5, 12x weights", lenet, prune_weights, (1, 28, 28)),
        ("LeNet-5, half the channels", lenet, prune_channels, (1, 28, 28)),
        ("SqueezeNet 1.1, 3x weights", squeezenet, lambda model: prune_weights(model, 3), (3, 224, 224)),
        ("SqueezeNet 1.1, half the channels", squeezenet, prune_channels, (3, 224, 224)),
    ]
    said = [compare(table, *case) for case in cases]
    Console(width=160).print(table)
    print("\n".join(said))


def compare(
    table: Table, name: str, dense: nn.Module, prune: Callable[[nn.Module], None], shape: tuple[int, ...]
) -> str:
    """Add the rows of one network; returns the verdict."""
    dense.eval()
    masked = copy.deepcopy(dense)
    prune(masked)
    forms = {"dense": dense, "masked": masked, "compact": compact(masked, torch.zeros(2, *shape)).model}
    if any(isinstance(part, nn.Linear) for part in masked.modules()):
        forms["CSR"] = export.to_csr(masked)
    inputs = torch.randn(8, *shape)
    with torch.no_grad():
        wanted = masked(inputs)
        differences = {form: float((model(inputs) - wanted).abs().max()) for form, model in forms.items()}
    rows = latency.measure(forms, shape, threads=THREADS, passes=latency.Passes(repeats=200))
    for row in rows:
        model = forms[row.name]
        count = sum(int((p != 0).sum()) for p in masked.parameters()) if row.name == "CSR" else sum(
            p.numel() for p in model.parameters()
        )  # fmt: skip
        difference = "" if row.name in ("dense", "masked") else f"{differences[row.name]:.1e}"
        table.add_row(
            name, row.name, f"{count:,}", f"{row.parameter_bytes / 1e3:,.0f}", str(row.batch), f"{row.median_ms:.3f}",
            f"{row.p10_ms:.3f}-{row.p90_ms:.3f}", f"{row.peak_bytes / 1e3:,.0f}", difference,
        )  # fmt: skip
    table.add_section()
    return f"{name}: {latency.verdict(rows)}"


@torch.no_grad()
def prune_weights(model: nn.Module, times: float = 12) -> None:
    """Keep one weight in `times`, the largest of |w| / std of its layer over the whole network."""
    layers = [part for part in model.modules() if isinstance(part, LAYERS)]
    scores = [(layer.weight / layer.weight.std()).abs() for layer in layers]
    pooled = torch.cat([score.flatten() for score in scores])
    limit = pooled.kthvalue(len(pooled) - int(len(pooled) / times)).values
    for layer, score in zip(layers, scores, strict=True):
        layer.weight[score <= limit] = 0


@torch.no_grad()
def prune_channels(model: nn.Module) -> None:
    """Set the weaker half of every layer's channels or units to 0, biases too; not of the last layer's."""
    layers = [part for part in model.modules() if isinstance(part, LAYERS)]
    for layer in layers[:-1]:
        norms = layer.weight.flatten(1).norm(dim=1)
        weak = norms.argsort()[: len(norms) // 2]
        layer.weight[weak] = 0
        if layer.bias is not None:
            layer.bias[weak] = 0


if __name__ == "__main__":
    main()
