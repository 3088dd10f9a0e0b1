"""final/README.md: the model card of a run, for whoever gets the files and knows nothing of secateur."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import SafetensorError, safe_open

from pipeline import storage
from pipeline.base import stats
from pipeline.base.errors import UserError
from pipeline.export.bench import Bench
from pipeline.results import outcome
from pipeline.results.words import count, number, percent, points, size, span
from pipeline.run.contents import read
from pipeline.run.result import Scores
from pipeline.settings.model import Model

NAME = "README.md"
# What each file of final/ is. Those of `secateur bench` are there once it has run.
FILES = {
    "compact.safetensors": "the compact network's tensors (a state dict), and in the header the width of each layer",
    "compact.pt2": "the compact network as a program of torch.export",
    "compact.onnx": "the compact network as ONNX",
    "model.safetensors": "the pruned network's tensors in the shapes of the dense network",
    "model.packed": "the same, each zero left out",
    "model.onnx": "the pruned network as ONNX, in the shapes of the dense network",
    "fc.csr.safetensors": "the weights of its linear layers as sparse matrices (CSR)",
}


def write(run_dir: str | Path, check: storage.Check | None = None) -> str:
    """Write `final/README.md` into the run directory and return where it is; `check` is called before each try.

    Raises UserError if the run is not finished or a file of it is damaged.
    """
    target = storage.join(run_dir, "final", NAME)
    storage.write_bytes(target, render(run_dir).encode(), check)
    return target


def render(run_dir: str | Path) -> str:
    """The card as Markdown, with the front matter that Hugging Face's hub reads; the same run gives the same text.

    Raises UserError as `write` does.
    """
    run = read(run_dir)
    result, config = run.result, run.config
    if result is None:
        raise UserError(f"run '{run_dir}' has no result.json yet: it is not finished")
    environment = Environment(  # no HTML, so nothing is escaped as such: `text` escapes what Markdown would read
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": text, "percent": percent, "count": count, "number": number, "size": size}
    sizes = {name: known.bytes for name, known in storage.stats(storage.join(run_dir, "final")).items()}
    measured = storage.join(run_dir, "final", "latency.json")
    bench = Bench.from_json(storage.read_json(measured), measured) if storage.exists(measured) else None
    compact = storage.join(run_dir, "final", "compact.safetensors")
    samples, (low, high) = result.test.samples, result.test.mcnemar.drop_ci95
    return environment.get_template("card.md").render(
        result=result,
        config=config,
        licence=config.model.licence,
        front_licence=front_licence(config.model.licence),
        classes=run.data.classes if run.data else None,
        shape=f"{config.data.channels} x {config.data.size} x {config.data.size}",
        rounds=sum(metrics.accepted for metrics in run.finished_rounds),
        accuracies=[
            ("dense", accuracy(result.test.dense, samples)),
            *([("dense control", accuracy(control, samples))] if (control := result.test.dense_control) else []),
            ("pruned", accuracy(result.test.pruned, samples)),
        ],
        drop=f"{points(outcome.drop(result))} (95%: {span(low, high)})",
        reference=outcome.reference_name(result),
        verdict=outcome.verdict(result, config.target.margin),
        files=[(name, sizes[name], what) for name, what in FILES.items() if name in sizes],
        missing=dict(bench.missing) if bench else {},
        bench=bench,
        there=sizes,
        code=fitting_code(config.model, compact, storage.join(run_dir, "final", "model.safetensors"))
        if "compact.safetensors" in sizes
        else None,
    )


def accuracy(scores: Scores, samples: int) -> str:
    """Top-1 with Wilson's 95% interval, and top-5 where it was measured."""
    low, high = stats.wilson(round(scores.top1 * samples), samples)
    top5 = "" if scores.top5 is None else f"; top-5 {percent(scores.top5)}"
    return f"{percent(scores.top1)} (95%: {percent(low)} to {percent(high)}){top5}"


def front_licence(licence: str | None) -> dict[str, str]:
    """The licence as the front matter has it: the hub's own short names, or `other` with a name."""
    if licence is None:
        return {}
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        return {"license": licence}
    return {"license": "other", "license_name": licence}


def fitting_code(model: Model, compact: str, whole: str) -> dict[str, str] | None:
    """How the user's own factory is called, where plain code can fit its network to compact.safetensors; else None.

    It cannot where the factory is secateur's own, was given as an object, or where the network was changed besides its
    sizes: a number of features in its code, attention that lost heads, or a tensor of two names.
    """
    module, _, name = model.factory.partition(":") if ":" in model.factory else model.factory.rpartition(".")
    if not module or module.partition(".")[0] in ("pipeline", "cluster", "secateur"):
        return None
    header, names = _header(compact)
    changed = any(header.get(key) for key in ("flattened", "resized", "narrowed"))
    if changed or _header(whole)[1] - names:
        return None
    arguments = ", ".join(f"{key}={value!r}" for key, value in model.kwargs.items() if key.isidentifier())
    return {"import": f"from {module} import {name.partition('.')[0]}", "call": f"{name}({arguments})"}


def _header(url: str) -> tuple[dict[str, str], set[str]]:
    """The metadata of a .safetensors file, and the names of its tensors. Raises UserError for a damaged one."""
    try:
        with storage.local_copy(url) as path, safe_open(path, "pt") as file:
            return file.metadata() or {}, set(file.keys())
    except SafetensorError as error:
        raise UserError(f"'{url}' is damaged ({error}): delete it, and write it again with `secateur bench`") from error


def text(value: Any) -> str:
    """A value from a config or an error as plain text within Markdown."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
