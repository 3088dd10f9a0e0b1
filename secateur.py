"""secateur from Python: prune a network, load what a run made, hold masks in a training loop of your own.

    import secateur

    pruned = secateur.prune(model, train, val, test, compression=8, retrain={"epochs": 5})
    pruned.verdict, pruned.model, pruned.masks

Settings have the names and defaults of the YAML files, a dictionary for each group. A mistake
raises `secateur.UserError` with one sentence: the setting, its value, the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from pipeline import stages
from pipeline.base.errors import RunStopped, UserError
from pipeline.cli import commands
from pipeline.cli.called import Call
from pipeline.cli.display import Display
from pipeline.engine import Engine
from pipeline.export import load as loading
from pipeline.export.bench import BATCHES, Bench
from pipeline.local import LocalEngine
from pipeline.network import compact as compaction
from pipeline.network import given
from pipeline.prune.masks import Applier
from pipeline.results import outcome, report
from pipeline.results.tables import TextTable, percent
from pipeline.results.tables import short as shortened
from pipeline.rounds import outlook
from pipeline.rounds.outlook import RunPlan
from pipeline.run import contents
from pipeline.run.events import Event, Progress, unheard
from pipeline.run.records import Scan
from pipeline.run.result import Result
from pipeline.run.state import open_run, run_root
from pipeline.settings.config import Config
from pipeline.train.hold import Held, hold, matched
from pipeline.train.world import World, choose_device, configured

__all__ = [
    "Event", "Held", "Pruned", "RunStopped", "Scanned", "UserError", "compact", "hold", "load", "masks_of", "plan",
    "prune", "scan",
]  # fmt: skip

EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class Pruned:
    """What a run made. `path` is its folder or URL, `result` its result.json; accuracies are fractions in 0..1."""

    path: str
    result: Result
    given: nn.Module | None = field(default=None, repr=False)  # the network, where it was given as an object

    @property
    def verdict(self) -> str:
        """`no loss`, `undecided` or `loss`: on test, against the dense network that was trained on as long."""
        return self.result.verdict

    @property
    def compression(self) -> float:
        """Prunable weights over kept weights."""
        return self.result.compression

    @cached_property
    def model(self) -> nn.Module:
        """The compact network, in evaluation mode, on the CPU: float32 (batch, channels, size, size) to logits."""
        return loading.compact_of(self.path, self.given, trust_code=True)

    @cached_property
    def masked(self) -> nn.Module:
        """The pruned network in its dense shapes, in evaluation mode, on the CPU; `hold` can hold `masks` on it."""
        return loading.masked_of(self.path, self.given, trust_code=True)

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Bool tensors by parameter, True keeps."""
        return loading.masks_of(self.path)

    @property
    def table(self) -> TextTable:
        """A row a prunable tensor: its weights, those kept, and their share. `table.markdown()` is its text."""
        rows = [
            (layer.name, layer.kind, shortened(layer.weights), shortened(layer.kept), percent(layer.density))
            for layer in self.result.layers
        ]
        return TextTable(self.result.name, ("tensor", "kind", "weights", "kept", "density"), rows)

    @property
    def figures(self) -> dict[str, str]:
        """SVG elements by name: layers, rounds, training, sensitivity; those that the run has."""
        drawn = report.plots_of(contents.read(self.path), self.result)
        named = {name: getattr(drawn, name) for name in ("layers", "rounds", "training", "sensitivity")}
        return {name: str(svg) for name, svg in named.items() if svg is not None}

    def bench(self, repeats: int = 100, batches: Sequence[int] = BATCHES) -> Bench:
        """Write final/compact.safetensors, .pt2 and .onnx, and measure how fast they are here (`secateur bench`)."""
        with configured(1), _known(self.given):
            return commands.bench(self.path, repeats, batches, trust_code=True)

    def _rows(self) -> list[tuple[str, str]]:
        return [*outcome.rows_of(contents.read(self.path), self.result), ("run", self.path)]

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def _repr_html_(self) -> str:
        return _html(self.result.name, self._rows(), self.figures)


@dataclass(frozen=True)
class Scanned:
    """How sensitive each tensor is. `path` is the run's folder; densities and accuracies are fractions, losses nats."""

    path: str
    scan: Scan

    def _repr_html_(self) -> str:
        from pipeline.results import figures, plots

        rows = [
            (each.name, ", ".join(f"{percent(level.density)}: {percent(level.top1)}" for level in each.levels))
            for each in self.scan.tensors
        ]
        drawn = figures.inline(
            figures.to_svg(plots.sensitivity(self.scan), "Accuracy against weights kept"), "sensitivity"
        )
        return _html("val accuracy with one tensor pruned", rows, {"sensitivity": drawn})


def prune(
    model: Any = None, train: Any = None, val: Any = None, test: Any = None, *, compression: float | None = None,
    config: str | Path | None = None, model_settings: Mapping[str, Any] | None = None, engine: EngineName = "local",
    progress: bool | Callable[[Event], None] = True, trust_code: bool = False, **settings: Any,
) -> Pruned:  # fmt: skip
    """Prune and retrain a network in rounds, and judge on `test` whether anything was lost (`secateur run`).

    `model` is an nn.Module, which stays as it is: the run works on copies. It is taken as trained, so dense.epochs is 0
    unless it is given; this is the one default that differs from YAML's. Or it is a function of a module, or an import
    path (my_module:build), as model.factory is; a cluster's workers need one of these. It takes float32 images (batch,
    channels, size, size) and gives logits (batch, classes), alone, first of several, or as `.logits`.

    `train`, `val` and `test` are map-style or iterable data sets of (image, label), without random transforms; what
    images may be is said in `pipeline.data.given.write`. They are written once as shards, under runs_dir. Without val
    or test a share of train is held out. Or `train` is the folder or URL of your shards, which hold all three. Pixels
    reach the network as (x / 255 - data.mean) / data.std; set these two to what it was trained with.

    `compression` is target.compression: prunable weights over kept ones, 12 by default. `settings` are the groups and
    settings of a config, as in `retrain={"epochs": 5, "lr": 0.01}, seed=1, name="mine"`, those of the group model as
    `model_settings`; they go before those of `config`, a YAML file. The same call again goes on where it was stopped,
    and a finished run only gives its result. `engine` is local (this process, no Ray) or ray (cluster.address, or Ray
    on this machine). `progress` shows it; a function gets the events of `pipeline.run.events` instead. `trust_code`
    lets a config of somebody else (a URL, a run's folder) name code.

    Raises UserError for a mistake, RunStopped where training cannot go on. Source: Han et al. 2015, section 3.
    """
    call = _call(model, train, val, test, compression, config, model_settings, engine, trust_code, settings)
    with _shown(progress) as heard, call.opened(heard) as opened, _running(opened, engine) as runner:
        result = stages.run(opened, runner, heard)
    return Pruned(run_root(opened), result, given.copied(model) if isinstance(model, nn.Module) else None)


def scan(
    model: Any = None, train: Any = None, val: Any = None, test: Any = None, *, config: str | Path | None = None,
    model_settings: Mapping[str, Any] | None = None, engine: EngineName = "local",
    progress: bool | Callable[[Event], None] = True, trust_code: bool = False, **settings: Any,
) -> Scanned:  # fmt: skip
    """Measure on `val` how each tensor, pruned alone, changes accuracy and loss (`secateur scan`).

    Arguments, and what is raised, as of `prune`. Source: Han et al. 2015, figure 6.
    """
    call = _call(model, train, val, test, None, config, model_settings, engine, trust_code, settings)
    with (
        _shown(progress) as heard, call.opened(heard) as opened, _running(opened, engine) as runner,
        open_run(opened) as here,
    ):  # fmt: skip
        return Scanned(run_root(opened), stages.scan(opened, runner, here, heard))


def plan(
    model: Any = None, train: Any = None, val: Any = None, test: Any = None, *, compression: float | None = None,
    config: str | Path | None = None, model_settings: Mapping[str, Any] | None = None,
    progress: bool | Callable[[Event], None] = True, trust_code: bool = False, **settings: Any,
) -> RunPlan:  # fmt: skip
    """What `prune` would do, without training: tensors, those left out and why, rounds with weights, FLOPs and bytes.

    Arguments as `prune`; data sets are written as shards. Raises UserError as the run itself would.
    """
    call = _call(model, train, val, test, compression, config, model_settings, "local", trust_code, settings)
    with _shown(progress) as heard, call.opened(heard, needs_data=False) as opened:
        return outlook.make(opened)


def load(run: str | Path | Pruned, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """The compact network of a finished run, on the CPU, in evaluation mode.

    `run` is its folder or URL (s3://...), or what `prune` gave. The network takes float32 images (batch, channels,
    size, size), with the run's data.mean and data.std, and gives logits (batch, classes), equal to those of the masked
    network but for rounding.
    `model` is the network itself, which stays as it is; it is needed where the run was given one as an object, and is
    otherwise built by the run's model.factory: with `trust_code` where that is an import path other than torchvision's.

    Raises UserError for what is no finished run, for code that is not trusted, and for a model that does not fit.
    """
    return loading.compact_of(_place(run), model, trust_code)


def masks_of(run: str | Path | Pruned) -> dict[str, Tensor]:
    """The masks of a run's last accepted round: bool tensors on the CPU by parameter, each of its shape, True keeps.

    `run` is its folder or URL, or what `prune` gave. Raises UserError for what is no run, and for one that has no round
    yet.
    """
    return loading.masks_of(_place(run))


def compact(model: nn.Module, example: Tensor, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A smaller copy of a pruned network without the units that do nothing, in evaluation mode; `model` stays.

    Pruned weights are exactly 0, or `masks` (bool, by parameter, True keeps) makes them so first. `example` is an input
    (batch, ...); its values do not matter. Outputs are equal but for rounding; what cannot be followed stays as it is.
    Raises UserError for masks that do not fit, and where the network does not take the example. Source: Han et al.
    2015, section 3.5.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}, not a torch.nn.Module: give the network itself")
    if not isinstance(example, Tensor):
        raise UserError(f"example is a {type(example).__name__}: give an input of the network, a tensor (batch, ...)")
    compaction.require_taken(model, example)
    work = model
    if masks is not None:
        work = given.copied(model).to(example.device)
        weights, kept = matched(work, masks)
        Applier([*weights.values()], [mask.to(example.device) for mask in kept.values()]).clean()
    return compaction.compact(work, example).model


def _place(run: str | Path | Pruned) -> str | Path:
    """A run's folder or URL."""
    return run.path if isinstance(run, Pruned) else run


def _call(
    model: Any, train: Any, val: Any, test: Any, compression: float | None, config: str | Path | None,
    model_settings: Mapping[str, Any] | None, engine: str, trust_code: bool, settings: dict[str, Any],
) -> Call:  # fmt: skip
    """What was given, as settings."""
    if engine not in ("local", "ray"):
        raise UserError(f"engine='{engine}' is unknown: give 'local' or 'ray'")
    if model is None and config is None and model_settings is None:
        raise UserError("model is missing: give a network, its import path (my_module:build), or config='my.yaml'")
    if compression is not None:
        target = settings.get("target", {})
        if not isinstance(target, Mapping):
            raise UserError(f"target={target!r}: give a mapping, as in target={{'budget': 'flops'}}")
        if "compression" in target:
            raise UserError("compression and target['compression'] are one setting: leave one of them out")
        settings["target"] = {**target, "compression": compression}
    if model_settings is not None:
        settings["model"] = dict(model_settings)
    return Call(model, {"train": train, "val": val, "test": test}, config, settings, trust_code, engine == "local")


@contextmanager
def _shown(progress: bool | Callable[[Event], None]) -> Iterator[Progress]:
    """Where a run's events go."""
    if callable(progress):
        yield progress
    elif progress:
        with Display() as display:
            yield display
    else:
        yield unheard


@contextmanager
def _running(config: Config, engine: EngineName) -> Iterator[Engine]:
    """The engine, with torch set as the config says; afterwards torch is as it was."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("secateur runs in one process of its own: under torchrun use `torchrun -m pipeline run CONFIG`")
    made: Engine
    if engine == "ray":
        from cluster.engine import RayEngine

        made = RayEngine()
    else:
        made = LocalEngine(World(0, 1, choose_device(config.device)))
    with configured(config.threads, config.reproducible):
        try:
            yield made
        finally:
            made.close()


@contextmanager
def _known(model: nn.Module | None) -> Iterator[None]:
    """While the block lasts, a network that was given as an object is known by its digest."""
    if model is None:
        yield
    else:
        with given.held(model):
            yield


def _html(title: str, rows: Sequence[tuple[str, str]], figures: Mapping[str, str]) -> str:
    """A table and figures for a notebook."""
    cells = "".join(f"<tr><th style='text-align:left'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table><caption>{escape(title)}</caption>{cells}</table>{''.join(figures.values())}"
