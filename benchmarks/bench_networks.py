"""What secateur does with large networks of other people: plan, scan of two tensors, a round of three steps, bench.

    pip install '.[networks]'
    python benchmarks/bench_networks.py [NAME ...]

Random weights, 14 images of noise, so no accuracy means anything: what counts is that each step ends well, or says why
not. FLOPs are those of one image by the weights that can be pruned, and all that torch's own counter finds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from pipeline.network.build import build_network
from pipeline.network.cost import count
from pipeline.network.survey import survey
from pipeline.settings.config import Config, parse_config

HERE = Path(__file__).resolve().parent
CLASSES, TRAIN, OTHERS = 2, 3, 2  # images a class
# name: (factory, size of its input in pixels)
NETWORKS = {
    "ViT-B/16": ("torchvision.models.vit_b_16", 224),
    "Swin-T": ("torchvision.models.swin_t", 224),
    "ConvNeXt-T": ("torchvision.models.convnext_tiny", 224),
    "MobileNetV3": ("torchvision.models.mobilenet_v3_large", 224),
    "GoogLeNet": ("torchvision.models.googlenet", 224),
    "Inception-v3": ("torchvision.models.inception_v3", 299),
    "HF-ViT": ("foreign:hugging_face_vit", 224),
    "BERT-on-patches": ("foreign:BertOnPatches", 224),
    "timm-ResNet-18": ("foreign:timm_resnet", 224),
    "timm-MobileNetV3": ("foreign:timm_mobilenet", 224),
    "timm-MLP-Mixer": ("foreign:timm_mixer", 224),
}


def main() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("timm", "transformers")):
        sys.exit("needs timm and transformers: pip install '.[networks]'")
    names = sys.argv[1:] or list(NETWORKS)
    columns = ("network", "tensors", "GFLOPs, theirs / all", "plan", "run", "levels", "kept", "bench", "report", "says")
    table = Table(*columns, title=f"torch {torch.__version__}, cpu; seconds")
    with tempfile.TemporaryDirectory() as folder:
        images(Path(folder) / "images")
        for name in names:
            table.add_row(name, *carry_out(name, Path(folder)))
            Console(width=220).print(table)


def images(root: Path) -> None:
    """A folder of noise: train, val and test, of two classes."""
    random = np.random.default_rng(0)
    for split, number in (("train", TRAIN), ("val", OTHERS), ("test", OTHERS)):
        for label in range(CLASSES):
            (root / split / str(label)).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (320, 320, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / str(label) / f"{index}.png")


def carry_out(name: str, folder: Path) -> list[str]:
    """The row of a network."""
    factory, size = NETWORKS[name]
    tree = {
        "name": "network",
        "runs_dir": str(folder / name.replace("/", "-")),
        "data": {
            "source": "folder", "root": str(folder / "images"), "channels": 3, "resize": size, "size": size,
            "mean": [0.5], "std": [0.25], "lanes": 1,
        },
        "model": {"factory": factory, "trained": True},
        "dense": {"epochs": 0},
        "scan": {"levels": [0.5, 0.1], "together": [0.5]},
        "prune": {"allocation": "budget", "rounds": 1, "dense_control": False},
        "retrain": {"epochs": 1, "batch_size": 2, "lr": 0.0001},
        "target": {"compression": 2},
        "tracking": {"enabled": False},
    }  # fmt: skip
    tensors, flops, chosen = facts(parse_config(tree), size)
    tree["prune"]["include"] = chosen
    path = folder / "network.yaml"
    path.write_text(yaml.safe_dump(tree))
    run = folder / name.replace("/", "-") / "network"
    said: list[str] = []
    plan = command(said, "pipeline", "plan", str(path))
    ran = command(said, "pipeline", "run", str(path))
    bench = command(said, "cluster", "bench", str(run), "--repeats", "5", "--batches", "1", "--trust-code")
    report = command(said, "cluster", "report", str(run))
    levels = kept = ""
    if (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text())
        kept = f"{result['density']:.0%}"
        trials = json.loads((run / "scan/scan.json").read_text())["tensors"]
        levels = str(sum(len(tensor["levels"]) for tensor in trials))
    return [tensors, flops, plan, ran, levels, kept, bench, report, "\n".join(said)]


def facts(config: Config, size: int) -> tuple[str, str, list[str]]:
    """Prunable tensors of how many; their GFLOPs and all; the names of the two largest tensors."""
    network = build_network(config.model, CLASSES).eval()
    prunable, left_out = survey(network)
    cost = count(network, (3, size, size))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, size, size))
    theirs = sum(cost.by_tensor.get(tensor.name, 0) for tensor in prunable)
    chosen = [tensor.name for tensor in sorted(prunable, key=lambda each: each.weights)[-2:]]
    matrices = len(prunable) + len(left_out)
    return f"{len(prunable)} of {matrices}", f"{theirs / 1e9:.3f} / {counter.get_total_flops() / 1e9:.3f}", chosen


def command(said: list[str], program: str, *args: str) -> str:
    """Run a command to its end; its seconds, or its exit code. What it refuses or cannot do is added to `said`."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", program, *args], capture_output=True, text=True, check=False, cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
             "COLUMNS": "200"},
    )  # fmt: skip
    seconds = time.monotonic() - started
    text = done.stdout + done.stderr
    said += [line[:160] for line in done.stderr.splitlines() if re.match(r"(error|Traceback)", line)]
    said += [line.strip("│ ")[:160] for line in text.splitlines() if "none: " in line]
    return f"{seconds:.0f}" if done.returncode == 0 else f"exit {done.returncode}"


if __name__ == "__main__":
    main()
