"""Branches: runs that begin at an accepted round of another run, their source (start.from).

A branch copies what it needs from its source into its own folder, dense/ and start/. Afterwards it does not need the
source. It has the source's dense network, so verdict, sigmas and drops are measured against the same network. Its dense
control is trained with the recipe of every round since the dense network: first the rounds before the branch, then its
own. Both runs must therefore describe the same network and dense training, and hold the same data. Their seeds must be
equal, since the seed draws val and test: otherwise a branch would be judged on images that its source was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.data.manifest import Manifest
from pipeline.network.survey import Prunable
from pipeline.rounds import attempts
from pipeline.rounds.campaign import Origin
from pipeline.run import state
from pipeline.run.layout import DENSE, START, accepted, control_folder, round_folder, trail
from pipeline.run.records import Ancestor, DenseMetrics, RoundMetrics, RunFacts, StartFacts
from pipeline.run.result import Result
from pipeline.run.state import Run
from pipeline.scan import known
from pipeline.settings.config import Config, differences, load_begun
from pipeline.settings.training import Retrain
from pipeline.train import checkpoint, session

# Settings in which a branch may differ from its source. data.root may differ, since the shards' hashes are compared.
OWN = (
    *state.OPERATIONAL, "name", "threads", "device", "reproducible", "compile", "exchange_precision", "data.root",
    "data.class_index", "scan", "prune", "retrain", "target", "export", "start",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The run that `start.from` names, checked to fit the branch; `given` is the setting's text."""

    given: str
    run: Run
    config: Config
    round: int
    facts: StartFacts

    @property
    def checkpoint(self) -> str:
        """The folder of the checkpoint that the branch begins with."""
        return f"{round_folder(self.round) if self.round else _root_of(self.run)}/checkpoint"

    @property
    def origin(self) -> Origin:
        """Where the branch's first round begins."""
        return Origin(self.facts.kept, self.facts.weights, self.facts.generation)


def find(config: Config, prunable: Sequence[Prunable]) -> Source:
    """The run and round of `start.from`.

    Raises UserError where there is no such run, links lead out of it, its round is undone or unfinished, or branch and
    source do not fit.
    """
    given = f"start.from={config.start.source}"
    root = state.source_root(config.start, config.runs_dir)
    run, number = Run(root, 0), config.start.round
    if root == state.run_root(config):
        raise UserError(f"{given} is this run itself: give the branch another name=...")
    if not (run.has("config.yaml") and run.has("run.json")):
        raise UserError(f"{given}: '{root}' is not a run; give a name under runs_dir, a path or a URL, and the round")
    storage.require_closed(root)
    theirs = load_begun(run.path("config.yaml"))
    changed = differences(theirs, config, ignore=OWN)
    if changed:
        raise UserError(
            f"{given}: a branch shares data, seed, network and dense training with its source, and these settings "
            f"differ: {'; '.join(changed)}; give them as they are in {run.path('config.yaml')}"
        )
    _require_accepted(given, run, number)
    return Source(str(config.start.source), run, theirs, number, _facts(given, run, theirs.retrain, number, prunable))


def take(config: Config, here: Run, prunable: Sequence[Prunable]) -> None:
    """Copy what the branch needs from its source: dense network, control, scan, and the round that it begins with."""
    source = find(config, prunable)
    manifest = session.load_data(config, here)
    _require_same_data(manifest, source)
    parts = {f"{DENSE}/checkpoint": f"{DENSE}/checkpoint"}
    for generation in range(1, source.facts.generation + 1):
        folder = f"{control_folder(generation)}/checkpoint"
        if source.run.has(folder, "manifest.json"):
            parts[folder] = folder
    if _pruned(source):
        parts[source.checkpoint] = f"{START}/checkpoint"
    for theirs, ours in parts.items():
        checkpoint.save(here, ours, checkpoint.load(source.run, theirs))
    metrics = source.run.load(DenseMetrics, DENSE, "metrics.json")
    here.commit(replace(metrics, data=manifest.identity), DENSE, "metrics.json")
    known.copy(source.run, here)
    if _pruned(source):
        folder = source.checkpoint.rpartition("/")[0]
        for name in ("plan.json", "metrics.json"):
            here.commit(source.run.read(folder, name), START, name)
    here.commit(source.facts, START, "start.json")


def origin(config: Config, here: Run, prunable: Sequence[Prunable], dense: Mapping[str, Tensor] | None) -> Origin:
    """Where the first round of a run begins; a branch that has copied what it needs does not read its source again.

    `dense` is as for `attempts.origin`. Raises UserError as `find` does.
    """
    if config.start.source is None or here.has(START, "start.json"):
        return attempts.origin(here, prunable, config, dense)
    return find(config, prunable).origin


def retrainings(recipe: Retrain, run: Run) -> list[Retrain]:
    """The recipe of each round since the dense network: the rounds before this run, then its own accepted ones."""
    start = begun(run)
    before = start.retrain if start is not None else ()
    return [*map(Retrain.model_validate, before), *[recipe] * accepted(run)]


def begun(run: Run) -> StartFacts | None:
    """Where a branch begins; None where the run began with a dense network of its own."""
    return run.load(StartFacts, START, "start.json") if run.has(START, "start.json") else None


def _root_of(run: Run) -> str:
    """The folder of the network that a run's first round begins with."""
    return START if run.has(START, "checkpoint", "manifest.json") else DENSE


def _pruned(source: Source) -> bool:
    """Whether the branch begins with a pruned network."""
    return source.checkpoint != f"{DENSE}/checkpoint"


def _require_accepted(given: str, run: Run, number: int) -> None:
    if not run.has(DENSE, "finished.json"):
        raise UserError(f"{given}: the dense network of '{run.root}' is not finished; carry that run on first")
    made = trail(run)
    done = sum(metrics.accepted for metrics in made)
    if number <= done:
        return
    tried = [metrics for metrics in made if metrics.round == number]
    why = "is not finished"
    if tried:
        shares = [f"{metrics.density:.3%}" for metrics in tried]
        why = f"was undone ({few(shares)} of the weights: more was lost than target.tolerance)"
    known = f"rounds 0 (dense) to {done} can be" if done else "only round 0, the dense network, can be"
    raise UserError(f"{given}: round {number} of '{run.root}' {why}; {known} started from")


def _facts(given: str, run: Run, recipe: Retrain, number: int, prunable: Sequence[Prunable]) -> StartFacts:
    """start.json: where the branch begins, which runs it descends from, and how each round before it was retrained."""
    before = begun(run)
    folder = round_folder(number) if number else _root_of(run)
    weights = sum(tensor.weights for tensor in prunable)
    kept = weights
    if folder != DENSE:
        metrics = run.load(RoundMetrics, folder, "metrics.json")
        kept = metrics.kept
        theirs, ours = {layer.name for layer in metrics.layers}, {tensor.name for tensor in prunable}
        if theirs != ours:
            raise UserError(
                f"{given}: a branch from a pruned round prunes the same tensors, but prune.include and prune.exclude "
                f"choose {few(sorted(theirs ^ ours))} in only one of the two runs: give them as in the source"
            )
    facts = run.load(RunFacts, "run.json")
    result = run.load(Result, "result.json") if run.has("result.json") else None
    return StartFacts(
        run=facts.name,
        path=run.root,
        uid=facts.uid,
        round=number,
        generation=(before.generation if before else 0) + number,
        weights=weights,
        kept=kept,
        density=kept / weights,
        compression=weights / kept,
        mlflow_run_id=result.mlflow.run_id if result and result.mlflow else None,
        ancestors=(*before.ancestors, Ancestor(before.run, before.uid, before.round)) if before else (),
        retrain=(*(before.retrain if before else ()), *[recipe.model_dump(mode="json")] * number),
    )


def _require_same_data(ours: Manifest, source: Source) -> None:
    theirs = session.load_data(source.config, source.run)
    for split in ours.splits.keys() | theirs.splits.keys():
        pair = [each.splits[split].uses() if split in each.splits else [] for each in (ours, theirs)]
        if pair[0] != pair[1]:
            raise UserError(
                f"start.from={source.given}: the {split} images differ from those of '{source.run.root}', "
                "or other images are held out as val: give the same data.root"
            )
