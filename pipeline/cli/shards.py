"""What `secateur shards` does."""

from __future__ import annotations

from pipeline.base.errors import UserError
from pipeline.base.spread import processes
from pipeline.cli import commands
from pipeline.cli.display import Display
from pipeline.data import push as pushing
from pipeline.data import shards
from pipeline.run.events import ShardsCounted


def build(config: str, overrides: list[str], out: str, workers: int | None) -> None:
    """Shards of a config's data."""
    loaded = commands.load(config, overrides, trust_code=True)  # no network is built here
    with Display() as display:
        spread = processes(workers or loaded.data.build_workers)
        made = shards.build(loaded.data, loaded.seed, out, _counting(display), spread)
    _describe(made)


def index(
    root: str, label: str, classes: int | None, val_fraction: float, seed: int, skip_bad: bool, workers: int | None
) -> None:
    """A manifest of shards that another program wrote."""
    with Display() as display:
        made, notes = shards.index(
            root,
            label=label,
            val_fraction=val_fraction,
            seed=seed,
            num_classes=classes,
            progress=_counting(display),
            skip_bad=skip_bad,
            spread=processes(workers),
        )
    for note in notes:
        print(f"warning: {note}")
    _describe(made)


def verify(root: str, workers: int | None) -> None:
    """Shards against their manifest."""
    with Display() as display:
        problems = shards.verify(root, _counting(display), processes(workers))
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} problems in '{root}': replace the shards named above, or index again")
    print("all shards are as their manifest says")


def push(source: str, target: str) -> None:
    """Shards to S3."""
    with Display() as display:
        sent, there = pushing.push(source, target, _counting(display))
    print(f"{sent} shards uploaded, {there} were there: data.source=shards data.root={target}")


def _counting(display: Display) -> shards.Progress:
    return lambda text, done, total: display(ShardsCounted(text, done, total))


def _describe(manifest: shards.Manifest) -> None:
    parts = ", ".join(
        f"{split}: {parts.used.sum():,} samples in {len(parts)} shards" for split, parts in manifest.splits.items()
    )
    held = f"; val: {manifest.sizes['val']:,} samples held out of train" if manifest.holdout else ""
    print(f"{parts}{held}; {manifest.num_classes} classes")
