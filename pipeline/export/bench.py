"""`secateur bench RUN`: the compact network and the ONNX files of a finished run, checked, and what they gain here."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.data import loader, shards
from pipeline.data.images import normalize
from pipeline.data.split import Split
from pipeline.export import export, latency
from pipeline.export.latency import Latency
from pipeline.network.build import build_network
from pipeline.network.compact import Compacted, compact
from pipeline.network.weights import load_weights
from pipeline.run.result import LatencySummary
from pipeline.run.state import Run, config_of
from pipeline.settings import trust
from pipeline.settings.data import Data
from pipeline.task.feed import Feed
from pipeline.train import checkpoint, session
from pipeline.train.world import choose_device

BATCHES = (1, 64)
SAMPLES = 64  # random and real inputs each, on which the compact network and the ONNX files are checked
TOLERANCE = 1e-3  # largest difference, as a share of the largest output, that passes for rounding of float32


@dataclass(frozen=True)
class Bench(Record):
    """final/latency.json: what was measured, and the files that were checked on the way.

    `rows` are of the networks dense, pruned, compact, and CSR (the pruned network with CSR matrices). `differences` has
    the largest difference from the pruned network's outputs, by file. `removed` counts units by layer, and `notes` say
    what compaction left alone. `summary` is result.json's latency_ms, at batch 1.
    """

    rows: tuple[Latency, ...]
    verdict: str
    differences: dict[str, float]
    removed: dict[str, int]
    notes: tuple[str, ...]
    summary: LatencySummary


def bench_run(run_dir: str | Path, repeats: int = 100, *, trust_code: bool = False) -> Bench:
    """Write final/{compact.safetensors, model.onnx, compact.onnx, fc.csr.safetensors, latency.json}; returns the last.

    Measured on config.device with config.threads. Raises UserError for a run that is not finished, where its config
    names a network by import path (unless `trust_code`), and where onnxscript or onnxruntime is missing.
    """
    config = config_of(run_dir)
    trust.require_known_code(config.model, f"run '{run_dir}'", trust_code)
    here = Run(str(run_dir), 0)
    if not here.has("final", "model.safetensors"):
        raise UserError(f"'{run_dir}' has no final/model.safetensors: carry the run to its end first (secateur run)")
    manifest = shards.load_manifest(session.data_root(config, here))
    pruned = build_network(config.model, manifest.num_classes, config.seed).eval()
    dense = copy.deepcopy(pruned)
    load_weights(pruned, here.path("final", "model.safetensors"))
    dense.load_state_dict(checkpoint.load(here, "dense/checkpoint").weights)
    split = loader.open_split(config.data, session.data_root(config, here), manifest, "val")
    inputs = check_inputs(split, config.data, config.seed)
    found = compact(pruned, inputs[:2])
    differences = write_files(here, pruned, found, inputs)
    device = choose_device(config.device)
    rows = latency.measure(
        {"dense": dense, "pruned": pruned, "compact": found.model, "CSR": export.to_csr(pruned)},
        Feed.of(config).shape, BATCHES, config.threads, latency.Passes(repeats), device,
    )  # fmt: skip
    where = device_name(device, config.threads)
    verdict = latency.verdict(rows, where)
    single = {row.name: row.median_ms for row in rows if row.batch == BATCHES[0]}
    summary = LatencySummary(
        device=where,
        batch=BATCHES[0],
        dense=single["dense"],
        pruned=single["pruned"],
        compact=single["compact"],
        verdict=verdict,
    )
    made = Bench(tuple(rows), verdict, differences, found.removed, tuple(found.notes), summary)
    storage.write_json(here.path("final", "latency.json"), made.to_json())
    return made


def check_inputs(split: Split, data: Data, seed: int) -> Tensor:
    """Random inputs and then real ones, of val (never test), float32 (at most 2 * SAMPLES, channels, height, width)."""
    batch = next(loader.EvalLoader(split, data, SAMPLES, seed).batches(0, 1))
    real = normalize(batch.images[:SAMPLES], data.mean, data.std)
    noise = torch.randn(SAMPLES, *real.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.cat([noise, real])


def write_files(here: Run, pruned: nn.Module, found: Compacted, inputs: Tensor) -> dict[str, float]:
    """Export and check; the largest absolute difference of outputs from the pruned network's, by file.

    Raises UserError where a difference is more than rounding: the file is then not to be used.
    """
    with torch.no_grad():
        wanted = pruned(inputs)
        differences = {"compact.safetensors": float((found.model(inputs) - wanted).abs().max())}
    export.save_compact(found, here.path("final", "compact.safetensors"))
    export.save_csr(pruned, here.path("final", "fc.csr.safetensors"))
    for name, model in (("model.onnx", pruned), ("compact.onnx", found.model)):
        export.to_onnx(model, inputs[:2], here.path("final", name))
        differences[name] = export.check_onnx(here.path("final", name), pruned, inputs)
    limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
    for name, difference in differences.items():
        if not difference <= limit:
            raise UserError(
                f"final/{name} differs from the pruned network by {difference:.3g}, more than rounding; do not use it, "
                "use final/model.safetensors, and report this with the network's code"
            )
    return differences


def device_name(device: torch.device, threads: int) -> str:
    """The device in words: a GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
