"""Writes small run directories in the layout of DESIGN.md. The numbers stand for the format, not for any result."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import scan_records

from pipeline.run.records import DenseFigures
from pipeline.settings.config import Config, dump_config, parse_config

CREATED = 1_760_000_000_000
LAYERS = [("fc1.weight", "linear", 235_200), ("fc2.weight", "linear", 30_000), ("fc3.weight", "linear", 1_000)]
TOTAL = sum(weights for _, _, weights in LAYERS)


def config(runs_dir: Path, name: str = "lenet", **sections: Any) -> Config:
    return parse_config({"name": name, "runs_dir": str(runs_dir), **sections})


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def history(epochs: int, start: float, end: float) -> list[dict[str, Any]]:
    return [
        {
            "epoch": e + 1,
            "loss": 0.4 * math.exp(-e / 3) + 0.02,
            "lr": 0.1 / (e + 1),
            "val_top1": start + (end - start) * (1 - math.exp(-(e + 1) / 2)),
            "seconds": 1.5,
        }
        for e in range(epochs)
    ]


def scores(top1: float, **more: float) -> dict[str, Any]:
    return {"top1": top1, "top5": None, "loss": round(4 * (1 - top1), 6), **more}


def begin(config: Config, uid: str = "0123456789abcdef") -> Path:
    """A run that has only just been started."""
    run = Path(config.runs_dir) / config.name
    put(run / "run.json", {"uid": uid, "name": config.name, "created_ms": CREATED})
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    put(run / "data.json", {"train": 54000, "val": 6000, "test": 10000, "classes": 10, "source": "idx", "root": "/d"})
    return run


def dense(run: Path) -> None:
    put(
        run / "dense/metrics.json",
        {"val": scores(0.983), "history": history(8, 0.9, 0.983), "seconds": 12.0, "finished_ms": CREATED + 20_000},
    )


def scan(run: Path, layers: list[tuple[str, str, int]] | None = None) -> None:
    tensors = []
    for i, (name, kind, weights) in enumerate(layers or LAYERS):
        levels = []
        for density in (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01):
            top1 = 0.983 / (1 + math.exp(-(math.log10(density) + 1.4 - 0.5 * math.sin(i) ** 2) * 9))
            near = {"low": max(0.0, top1 - 0.01), "high": min(1.0, top1 + 0.01)}
            drop, rise = 0.983 - top1, 1 - top1 - 0.07
            near |= {"drop": drop, "drop_low": drop - 0.01, "drop_high": drop + 0.01}
            near |= {"rise": rise, "rise_low": rise - 0.02, "rise_high": rise + 0.02}
            levels.append(
                scan_records.level(density, quality=-math.log(density), samples=6000, top1=top1, loss=1 - top1, **near)
            )
        tensors.append(scan_records.tensor(name, weights, levels, kind=kind, quality=0.9 + i / 9))
    found = scan_records.scan(tensors, samples=6000, dense=DenseFigures(0.983, 0.07))
    put(run / "scan/scan.json", found.to_json())


def plan(run: Path, number: int, density: float, attempt: int = 1) -> None:
    rows = [{"name": n, "weights": w, "keep": round(density * w), "threshold": 0.03} for n, _, w in LAYERS]
    put(
        run / f"rounds/{number:02d}/plan.json",
        {"round": number, "attempt": attempt, "planned_density": density, "budget": density, "tensors": rows},
    )


def round_done(run: Path, number: int, density: float, attempt: int = 1, accepted: bool = True) -> None:
    plan(run, number, density, attempt)
    kept = round(density * TOTAL)
    after = 0.984 - 0.001 * number
    put(
        run / f"rounds/{number:02d}/metrics.json",
        {
            "round": number,
            "attempt": attempt,
            "accepted": accepted,
            "planned_density": density,
            "density": kept / TOTAL,
            "compression": TOTAL / kept,
            "kept": kept,
            "weights": TOTAL,
            "val_before_retrain": {"top1": 0.983 - 0.04 * number**1.3, "loss": 0.4},
            "val": scores(after),
            "mask_digest": "ab12",
            "history": history(4, 0.96, after),
            "layers": [{"name": n, "weights": w, "kept": round(density * w), "density": density} for n, _, w in LAYERS],
            "seconds": 7.25,
            "steps": 400,
            "finished_ms": CREATED + 20_000 + 10_000 * number,
        },
    )


def control(run: Path) -> None:
    put(
        run / "rounds/control.json",
        {"val": scores(0.9835), "history": history(16, 0.98, 0.9835), "seconds": 20.0, "finished_ms": CREATED + 75_000},
    )


def result(config: Config, **changes: Any) -> dict[str, Any]:
    shares = {"fc1.weight": 0.07, "fc2.weight": 0.09, "fc3.weight": 0.26}
    layers = [
        {
            "name": name,
            "kind": kind,
            "weights": weights,
            "kept": round(weights * shares.get(name, 0.1)),
            "density": shares.get(name, 0.1),
            "flops": 2 * weights,
            "activation_density": 0.4,
            "flops_density": 0.08,
            "threshold": 0.031,
            "packed_bits_per_kept": 37.6,
        }
        for name, kind, weights in LAYERS
    ]
    kept = sum(layer["kept"] for layer in layers)
    return {
        "name": config.name,
        "network": "lenet_300_100",
        "seed": 0,
        "verdict": "no loss",
        "test_looks": 1,
        "weights_total": TOTAL,
        "weights_kept": kept,
        "compression": TOTAL / kept,
        "density": kept / TOTAL,
        "flops_density": 0.081,
        "val": {"dense": scores(0.983), "pruned": scores(0.9805)},
        "test": {
            "samples": 10_000,
            "dense": scores(0.9836),
            "dense_control": scores(0.9841),
            "pruned": scores(0.9838),
            "mcnemar": {
                "only_dense_right": 41,
                "only_pruned_right": 38,
                "p_value": 0.822,
                "drop_ci95": [-0.0015, 0.0021],
            },
        },
        "layers": layers,
        "bytes": {"dense_fp32": 1_066_440, "packed": 90_300, "packed_index": 12_900, "dense_gzip": 118_000},
        "latency_ms": None,
        "rounds": [],
        "seconds": {"shards": None, "dense": 12.0, "scan": 6.5, "rounds": 36.0, "final": 2.0},
        "mlflow": None,
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        **changes,
    }


def finals(run: Path, config: Config, **changes: Any) -> None:
    (run / "final").mkdir(parents=True, exist_ok=True)
    (run / "final/model.safetensors").write_bytes(b"weights" * 1000)
    (run / "final/model.packed").write_bytes(b"packed" * 100)
    edges = [-0.12 + 0.24 * i / 60 for i in range(61)]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    before = [round(9000 * math.exp(-((m / 0.03) ** 2))) for m in middles]
    after = [round(700 * math.exp(-(((abs(m) - 0.06) / 0.015) ** 2))) if abs(m) > 0.03 else 0 for m in middles]
    rows = [{"name": name, "edges": edges, "before": before, "after": after} for name, _, _ in LAYERS]
    put(run / "final/histograms.json", {"tensors": rows})
    put(
        run / "final/activity.json",
        [
            {"name": n, "output_density": 0.4, "input_density": 0.5, "measured": "outputs after ReLU"}
            for n, _, _ in LAYERS
        ],
    )
    (run / "test_looks.jsonl").write_text('{"what": "final"}\n', encoding="utf-8")
    put(run / "result.json", result(config, **changes))


def whole(config: Config, **changes: Any) -> Path:
    """A finished run with every part."""
    run = begin(config)
    dense(run)
    scan(run)
    for number, density in enumerate((0.54, 0.29, 0.15, 0.0724), start=1):
        round_done(run, number, density)
    control(run)
    finals(run, config, **changes)
    return run
