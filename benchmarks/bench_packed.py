"""What packed files cost: bytes against the entropy of the mask and other formats, seconds and memory.

    python benchmarks/bench_packed.py [model.safetensors ...]

Masks are drawn at random; a pruned network that is given adds a row, of its weights that are matrices or more. Entropy
is H(p)/p bits a kept weight, of an i.i.d. mask of each tensor's density p; "over" is everything that is not values,
headers and fillers too, against it.
"""

from __future__ import annotations

import gzip
import math
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from pipeline.export import packed

# Caffe's two-group AlexNet: shape and the density that the paper's table 4 gives
ALEXNET = {
    "conv1": ((96, 3, 11, 11), 0.84),
    "conv2": ((256, 48, 5, 5), 0.38),
    "conv3": ((384, 256, 3, 3), 0.35),
    "conv4": ((384, 192, 3, 3), 0.37),
    "conv5": ((256, 192, 3, 3), 0.37),
    "fc6": ((4096, 9216), 0.09),
    "fc7": ((4096, 4096), 0.09),
    "fc8": ((1000, 4096), 0.25),
}
REPEATS = 3


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = Table("masks", "density", "coding", "index bits", "entropy", "over", "packed kB", "gzip", "CSR", "bitmask")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.packed"
        for percent in (1, 2, 5, 10, 20, 50):
            compare(table, path, "random", {"w": pruned((1000, 1000), percent / 100)})
        for model in sys.argv[1:]:
            compare(table, path, Path(model).name, {n: t for n, t in load_file(model).items() if t.dim() > 1})
        speed, size = alexnet(path)
    console = Console(width=120)
    console.print(table)
    print(f"AlexNet, one thread, best of {REPEATS}: {size}; " + "; ".join(speed))


def pruned(shape: tuple[int, ...], density: float) -> Tensor:
    return torch.where(torch.rand(shape) < density, torch.randn(shape), 0.0)


def compare(table: Table, path: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """A row for one packed file. CSR has an int32 for each kept weight and for each row's start."""
    sizes = packed.write(path, tensors)
    numel = kept = values = csr = bitmask = 0
    bits = 0.0
    for tensor in tensors.values():
        some = int(torch.count_nonzero(tensor))
        numel, kept, values = numel + tensor.numel(), kept + some, values + some * tensor.element_size()
        bits += entropy(some, tensor.numel())
        csr += 4 * (some + len(tensor) + 1)
        bitmask += (tensor.numel() + 7) // 8
    zipped = len(gzip.compress(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()), 6))
    codings = ", ".join(sorted({size.coding for size in sizes.tensors.values()}))
    index = 8 * (sizes.total - values)
    cells = [f"{kept / numel:.1%}", codings, f"{index / kept:.3f}", f"{bits / kept:.3f}", f"{index / bits:.3f}"]
    others = (sizes.total, zipped, values + csr, values + bitmask)
    table.add_row(name, *cells, *(f"{size / 1000:,.1f}" for size in others))


def entropy(kept: int, numel: int) -> float:
    """Bits of a whole mask whose places are independent."""
    counts = (kept, numel - kept)
    return -sum(count * math.log2(count / numel) for count in counts if count)


def alexnet(path: Path) -> tuple[list[str], str]:
    """Seconds and peak memory, besides the tensors given, to write all layers, read them, and read them one by one."""
    tensors = {name: pruned(shape, density) for name, (shape, density) in ALEXNET.items()}
    numel, kept = (sum(count(t) for t in tensors.values()) for count in (Tensor.numel, lambda t: int((t != 0).sum())))
    work = {
        "write": lambda: packed.write(path, tensors),
        "read": lambda: packed.read(path),
        "read one by one": lambda: [None for _ in packed.iterate(path)],
    }
    lines = []
    for name, call in work.items():
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        lines.append(f"{name} {min(seconds):.2f} s, {peak / 1e6:,.0f} MB at most")
    size = f"{numel / 1e6:.1f}M weights at {kept / numel:.1%}, {path.stat().st_size / 1e6:.1f} MB"
    return lines, size


if __name__ == "__main__":
    main()
