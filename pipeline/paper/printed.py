"""What the paper reports (Han et al. 2015, arXiv 1506.02626), as printed: errors and shares in percent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrintedLayer:
    """A row of tables 2 and 3: Act%, Weights% and FLOP% are shares left after pruning, in percent."""

    name: str
    weights: int
    flops: int
    activations: float
    weights_left: float
    flops_left: float


@dataclass(frozen=True)
class Network:
    """One network of table 1 (top-1 errors in percent) with its table of layers."""

    title: str
    table: int
    dense_error: float
    pruned_error: float
    weights: int
    weights_kept: int
    compression: float
    layers: tuple[PrintedLayer, ...]
    total: PrintedLayer


NETWORKS = {
    "lenet-300-100": Network(
        title="LeNet-300-100",
        table=2,
        dense_error=1.64,
        pruned_error=1.59,
        weights=267_000,
        weights_kept=22_000,
        compression=12,
        layers=(
            PrintedLayer("fc1", 235_000, 470_000, 38, 8, 8),
            PrintedLayer("fc2", 30_000, 60_000, 65, 9, 4),
            PrintedLayer("fc3", 1_000, 2_000, 100, 26, 17),
        ),
        total=PrintedLayer("total", 266_000, 532_000, 46, 8, 8),
    ),
    "lenet-5": Network(
        title="LeNet-5",
        table=3,
        dense_error=0.80,
        pruned_error=0.77,
        weights=431_000,
        weights_kept=36_000,
        compression=12,
        layers=(
            PrintedLayer("conv1", 500, 576_000, 82, 66, 66),
            PrintedLayer("conv2", 25_000, 3_200_000, 72, 12, 10),
            PrintedLayer("fc1", 400_000, 800_000, 55, 8, 6),
            PrintedLayer("fc2", 5_000, 10_000, 100, 19, 10),
        ),
        total=PrintedLayer("total", 431_000, 4_586_000, 77, 8, 16),
    ),
}

# What each figure of the paper shows, to read ours against.
FIGURES = {
    4: "LeNet-300-100's first layer: non-zeros in 28 bands, one for each row of the image, dense in the middle of the "
    "digit.",
    5: "Accuracy loss against parameters away. Without retraining L1 is better than L2; with retraining L2 is better "
    "than L1; L2 with iterative pruning and retraining is the best.",
    6: "Accuracy when one layer alone is pruned, CONV and FC layers: the first convolution is the most sensitive.",
    7: "Weights of a layer: one peak at 0 before pruning; after it and retraining two lobes that reach further out.",
}
