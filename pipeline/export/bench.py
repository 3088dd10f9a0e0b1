"""`secateur bench RUN`: the compact network and the ONNX files of a finished run, checked, and what they gain here."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.environment import processor
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.data import loader
from pipeline.data.images import normalize
from pipeline.data.split import Split
from pipeline.export import export, latency, table
from pipeline.export.latency import Latency
from pipeline.export.load import masked_of
from pipeline.network.build import FOREIGN
from pipeline.network.compact import Compacted, compact
from pipeline.network.survey import survey
from pipeline.prune import channels
from pipeline.prune.latency import predictor
from pipeline.run.records import LatencyTable
from pipeline.run.result import LatencySummary
from pipeline.run.state import Run, config_of
from pipeline.settings.config import Config
from pipeline.settings.data import Data
from pipeline.task.feed import Feed
from pipeline.train import checkpoint, session
from pipeline.train.world import choose_device

BATCHES = (1, 64)
MOST = 2**20  # samples in a batch
SAMPLES = 64  # random and real inputs each, at most, on which the compact network and the ONNX files are checked
CHECK_S = 5.0  # seconds that a pass of them takes at most, where FEW do not take longer
FEW = 4  # of both kinds together; CSR, which can be very slow, is checked on no more
SLOW_S, SLOW = 1.0, 10.0  # CSR that takes longer than so many seconds, and times what the pruned network takes, is left
TOLERANCE = 1e-3  # largest difference, as a share of the largest output, that passes for rounding of float32
T = TypeVar("T")


@dataclass(frozen=True)
class Foreseen(Record):
    """Where the run had a budget of latency: what its table says of the dense and the compact network, in ms.

    `device` and `batch` are the table's. `error` is the predicted share of the dense network's time over the measured
    one, minus 1: both networks are measured side by side, so other load on the machine does not count. It is None
    where another device or batch was measured.
    """

    device: str
    batch: int
    dense_ms: float
    compact_ms: float
    error: float | None


@dataclass(frozen=True)
class Bench(Record):
    """final/latency.json: what was measured, and the files that were checked on the way.

    `rows` are of the networks dense, pruned, compact, and CSR (the pruned network with CSR matrices). `differences` has
    the largest difference from the pruned network's outputs, by file. `removed` counts units by layer, and `notes` say
    what compaction left alone. `summary` is result.json's latency_ms, at batch 1. `predicted` is
    what the run's latency table says. `missing` says, by form or file, why
    this network has none.
    """

    rows: tuple[Latency, ...]
    verdict: str
    differences: dict[str, float]
    removed: dict[str, int]
    notes: tuple[str, ...]
    summary: LatencySummary
    missing: dict[str, str] = field(default_factory=dict)
    predicted: Foreseen | None = None


def bench_run(
    run_dir: str | Path, repeats: int = 100, *, batches: Sequence[int] = BATCHES, trust_code: bool = False,
    check: storage.Check = lambda: None,
) -> Bench:  # fmt: skip
    """Write final/{compact.safetensors, .pt2, .onnx, model.onnx, fc.csr.safetensors, latency.json}; returns the last.

    Measured on config.device with config.threads, at each of `batches`; the summary is of the first. A form or file
    that the network cannot take, or for which a package is missing, is left out, and `missing` says why. `check` is
    called before each file is written. Raises UserError for a run that is not finished, and where its config names a
    network by import path (unless `trust_code`).
    """
    pruned = masked_of(run_dir, trust_code=trust_code)
    config, here = config_of(run_dir), Run(str(run_dir), 0)
    manifest = session.load_data(config, here)
    dense = copy.deepcopy(pruned)
    dense.load_state_dict(checkpoint.load(here, "dense/checkpoint").weights)
    split = loader.open_split(config.data, session.data_root(config, here), manifest, "val")
    inputs = affordable(pruned, check_inputs(split, config.data, config.seed))
    missing: dict[str, str] = {}
    found = _attempt("compact", lambda: compact(pruned, inputs[:2]), missing)
    differences = write_files(here, pruned, found, inputs, missing, check)
    device, shape = choose_device(config.device), Feed.of(config).shape
    forms = {"dense": dense, "pruned": pruned}
    if found is not None and "compact.safetensors" in differences:
        forms["compact"] = found.model
    sparse = _attempt("CSR", lambda: checked_csr(pruned, inputs, shape, batches, device), missing)
    forms |= {} if sparse is None else {"CSR": sparse}
    rows = latency.measure(forms, shape, batches, config.threads, latency.Passes(repeats), device)
    where = device_name(device, config.threads)
    verdict = latency.verdict(rows, where)
    single = {row.name: row.median_ms for row in rows if row.batch == batches[0]}
    summary = LatencySummary(
        device=where,
        batch=batches[0],
        dense=single["dense"],
        pruned=single["pruned"],
        compact=single.get("compact"),
        verdict=verdict,
    )
    predicted = _foreseen(here, pruned, inputs[:2], config, where, rows)
    removed, notes = ({}, ()) if found is None else (found.removed, tuple(found.notes))
    made = Bench(tuple(rows), verdict, differences, removed, notes, summary, missing, predicted)
    storage.write_json(here.path("final", "latency.json"), made.to_json(), check)
    return made


def _foreseen(
    here: Run, pruned: nn.Module, example: Tensor, config: Config, where: str, rows: Sequence[Latency]
) -> Foreseen | None:
    """What the run's latency table says of its networks, beside what was measured; None without a table."""
    if not here.has(table.FILE):
        return None
    known = here.load(LatencyTable, table.FILE)
    pruned.cpu()  # where the example is; measuring has left the network on the run's device
    prunable, _ = survey(pruned, config.prune.include, config.prune.exclude)
    groups = channels.groups_of(pruned, prunable, example, config.prune)
    assert groups is not None, "a run with a table prunes channels"
    milliseconds = predictor(groups, known)
    masks = {each.name: pruned.get_parameter(each.name) != 0 for each in prunable}
    kept = {name: int(flags.sum()) for name, flags in groups.alive(masks).items()}
    whole, small = milliseconds(groups.sizes), milliseconds(kept)
    measured = {row.name: row.median_ms for row in rows if row.batch == known.batch}
    error = None
    if where == known.device and "compact" in measured:
        error = small / whole / (measured["compact"] / measured["dense"]) - 1
    return Foreseen(known.device, known.batch, whole, small, error)


def parse_batches(text: str) -> tuple[int, ...]:
    """The batch sizes in "1,64". Raises UserError for anything else."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= MOST for part in parts):
        raise UserError(f"--batches {text}: takes whole numbers from 1 to {MOST:,}, as in --batches 1,64")
    return tuple(dict.fromkeys(map(int, parts)))


def checked_csr(
    pruned: nn.Module, inputs: Tensor, shape: Sequence[int], batches: Sequence[int], device: torch.device
) -> nn.Module:
    """The network with CSR matrices, once it has run as it will be measured, with the pruned network's outputs.

    Raises UserError where they differ by more than rounding or it is far too slow to be measured, and whatever a
    network raises that cannot take them.
    """
    made = export.to_csr(pruned)
    few = torch.cat([inputs[: FEW // 2], inputs[-(FEW // 2) :]])
    wanted, usual = _timed(pruned, few)
    found, taken = _timed(made, few)
    difference = float((found - wanted).abs().max())
    if not difference <= _rounding(wanted):
        raise UserError(f"its outputs differ from the pruned network's by {difference:.3g}, more than rounding")
    if taken > max(SLOW_S, SLOW * usual):
        raise UserError(
            f"{taken:.1f} s for {len(few)} images, {taken / usual:.0f} times as long as with whole matrices"
        )
    latency.measure({"CSR": made}, shape, batches, passes=latency.Passes(repeats=1, warmup=0), device=device)
    return made


def affordable(pruned: nn.Module, inputs: Tensor) -> Tensor:
    """Of what `check_inputs` gives, as many of each kind as a pass of CHECK_S seconds takes, or FEW of both.

    A large network would need minutes for all of them, in each of its forms.
    """

    def some(each: int) -> Tensor:
        return torch.cat([inputs[:SAMPLES][:each], inputs[SAMPLES:][:each]])

    _, seconds = _timed(pruned, some(FEW // 2))
    return some(min(SAMPLES, max(FEW // 2, int(CHECK_S / (seconds / FEW) / 2))))


def _timed(network: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
    """The outputs of a pass, and its seconds."""
    began = time.perf_counter()
    with torch.inference_mode():
        outputs = network(inputs)
    return outputs, time.perf_counter() - began


def check_inputs(split: Split, data: Data, seed: int) -> Tensor:
    """Random inputs and then real ones, of val (never test), float32 (at most 2 * SAMPLES, channels, height, width)."""
    batch = next(loader.EvalLoader(split, data, SAMPLES, seed).batches(0, 1))
    real = normalize(batch.images[:SAMPLES], data.mean, data.std)
    noise = torch.randn(SAMPLES, *real.shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.cat([noise, real])


def write_files(
    here: Run, pruned: nn.Module, found: Compacted | None, inputs: Tensor, missing: dict[str, str],
    check: storage.Check = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """Export and check; the largest absolute difference of outputs from the pruned network's, by file.

    A file that cannot be written, or differs by more than rounding, is not there afterwards; `missing` then says why.
    """
    with torch.no_grad():
        wanted = pruned(inputs)
    differences: dict[str, float] = {}

    def checked(name: str, write: Callable[[str], float]) -> None:
        check()
        difference = _written(here.path("final", name), name, write, _rounding(wanted), missing)
        if difference is not None:
            differences[name] = difference

    def compact_tensors(path: str) -> float:
        assert found is not None
        with torch.no_grad():
            difference = float((found.model(inputs) - wanted).abs().max())
        export.save_compact(found, path)
        return difference

    def program(path: str) -> float:
        assert found is not None
        made = export.to_program(found.model, inputs[:2])
        with torch.no_grad():
            difference = float((made.module()(inputs) - wanted).abs().max())
        export.save_program(made, path)
        return difference

    if found is not None:
        checked("compact.safetensors", compact_tensors)
        checked("compact.pt2", program)
    check()
    export.save_csr(pruned, here.path("final", "fc.csr.safetensors"))
    checked("model.onnx", partial(_onnx, pruned, pruned, inputs))
    if found is not None:
        checked("compact.onnx", partial(_onnx, found.model, pruned, inputs))
    return differences


def write_model_onnx(here: Run) -> str | None:
    """Write a finished run's final/model.onnx, checked on random inputs; None, or why this network has none.

    The run is this process's own: its network's code is trusted.
    """
    config, name, missing = config_of(here.root), "model.onnx", dict[str, str]()
    pruned = masked_of(here.root, trust_code=True)
    inputs = torch.randn(4, *Feed.of(config).shape, generator=torch.Generator().manual_seed(config.seed))
    with torch.no_grad():
        wanted = pruned(inputs)
    here.check_fence()
    _written(here.path("final", name), name, partial(_onnx, pruned, pruned, inputs), _rounding(wanted), missing)
    return missing.get(name)


def _onnx(model: nn.Module, pruned: nn.Module, inputs: Tensor, path: str) -> float:
    """Write a form of the pruned network as ONNX; how far its outputs are from the pruned network's."""
    export.to_onnx(model, inputs[:2], path)
    return export.check_onnx(path, pruned, inputs)


def _written(
    path: str, name: str, write: Callable[[str], float], rounding: float, missing: dict[str, str]
) -> float | None:
    """Write a file; the largest difference of its outputs. One that is no use is removed, and `missing` says why."""
    difference = _attempt(name, lambda: write(path), missing)
    if difference is not None and not difference <= rounding:
        missing[name] = f"it differs from the pruned network by {difference:.3g}, more than rounding"
    if name in missing:
        storage.remove(path)
        return None
    return difference


def _attempt(name: str, make: Callable[[], T], missing: dict[str, str]) -> T | None:
    """What `make` makes; None where the network cannot take this form, and `missing` then says why."""
    try:
        return make()
    except torch.OutOfMemoryError:
        raise  # the command line has words for it
    except UserError as error:
        missing[name] = str(error)
    except FOREIGN as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__
        missing[name] = f"the network's code does not work with it: {reason}"
    return None


def _rounding(wanted: Tensor) -> float:
    """The largest difference from these outputs that passes for rounding."""
    return TOLERANCE * max(1.0, float(wanted.abs().max()))


def device_name(device: torch.device, threads: int) -> str:
    """The device in words: a GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({processor()}, {threads} thread{'s' if threads > 1 else ''})"
