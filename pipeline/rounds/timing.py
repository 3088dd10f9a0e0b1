"""The latency table of a run: measured once, before anything is trained, or read from a file; then kept in its folder.

Every rank, and every later start of the run, takes it from there. So the same table gives the same plans.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.export import table as tables
from pipeline.export.bench import device_name
from pipeline.network.groups import Groups
from pipeline.network.survey import survey
from pipeline.prune import channels, latency
from pipeline.prune.channels import Price
from pipeline.run.events import Noted
from pipeline.run.records import LatencyTable
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.task.feed import Feed
from pipeline.train.session import Session
from pipeline.train.world import choose_device

FILE = tables.FILE


def known(config: Config, run: Run, groups: Groups | None) -> LatencyTable | None:
    """The run's table; before it has one, that of target.latency_table; None where there is neither, or no need.

    Raises UserError for a table of another network, batch or device.
    """
    if config.target.budget != "latency" or groups is None:
        return None
    if run.has(FILE):
        return run.load(LatencyTable, FILE)
    return None if config.target.latency_table is None else read(config, groups, workers_device(config))


def require_known(config: Config, price: Price | None) -> None:
    """Raise UserError where the budget is a time, and how long the network takes is not known."""
    if config.target.budget == "latency" and price is None:
        raise UserError(
            "target.budget=latency: how long this network takes is not known yet: `secateur bench CONFIG --table FILE` "
            "measures it, and target.latency_table=FILE takes it; a run measures it by itself"
        )


def workers_device(config: Config) -> torch.device | None:
    """The device of the run's workers, as far as it can be told here; None where they have GPUs and this process none.

    A driver is often on a machine without a GPU. Raises UserError where device=cuda finds none for the workers either.
    """
    if config.device != "cpu" and config.cluster.gpus_per_worker > 0 and not torch.cuda.is_available():
        return None
    return choose_device(config.device)


def read(config: Config, groups: Groups, device: torch.device | None) -> LatencyTable:
    """The table in the file target.latency_table, which must be of this network and of the device that is meant.

    `device` is that of the run; None leaves it to the workers to compare the table's with theirs.
    """
    target, path = config.target, str(config.target.latency_table)
    given = f"target.latency_table={path}"
    try:
        document = storage.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{given}: cannot be read as a table of latencies: {error}") from error
    found = LatencyTable.from_json(document, path)
    if found.network != tables.network(groups, Feed.of(config).shape):
        raise UserError(
            f"{given}: is of another network, or of other layers that may be pruned: measure one of this config with "
            "`secateur bench CONFIG --table FILE`"
        )
    names = {step.name for step in groups.steps}
    fits = all(each.keep.keys() == groups.sizes.keys() and each.steps.keys() <= names for each in found.timed)
    numbers = [number for each in found.timed for number in (each.ms, *each.steps.values())]
    if not found.timed or not fits or not all(0 <= number < float("inf") for number in numbers):
        raise UserError(f"{given}: its times are not those of this network's steps: measure it again")
    if found.batch != target.latency_batch:
        raise UserError(
            f"{given}: is of {found.batch} samples a pass, and target.latency_batch={target.latency_batch}: give the "
            "same number"
        )
    here = None if device is None else device_name(device, config.threads)
    meant = target.latency_device or here
    if meant is not None and found.device != meant:
        asked = f"target.latency_device={meant}" if target.latency_device else f"this run's device is '{here}'"
        raise UserError(
            f"{given}: is of the device '{found.device}', and {asked}: measure one there with `secateur bench "
            f"--table`, or set target.latency_device='{found.device}' if the small network is to run on that one"
        )
    return found


def measure(session: Session) -> None:
    """Write the run's table: that of target.latency_table, or one that rank 0 measures on its device."""
    config = session.config
    if session.world.first and not session.run.has(FILE):
        model = session.new_model()
        made, groups = of_model(model, config, session.world.device)
        session.run.commit(made, FILE)
        session.progress(Noted(f"latency table: {told(made, groups)}"))
    session.world.barrier()


def told(made: LatencyTable, groups: Groups) -> str:
    """What a table says, in words."""
    return (
        f"on {made.device} the whole network takes {made.timed[0].ms:.3g} ms at batch {made.batch}; predictions are "
        f"within {latency.error(groups, made):.0%} of what was measured at {len(made.timed)} sets of widths"
    )


def of_model(model: nn.Module, config: Config, device: torch.device) -> tuple[LatencyTable, Groups]:
    """The table of a network, read or measured, and its groups. Raises UserError where no channel can be removed."""
    feed = Feed.of(config)
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    channels_only = config.prune.model_copy(update={"pattern": "channels"})
    groups = channels.groups_of(model, prunable, feed.zeros(2, device), channels_only)
    assert groups is not None
    channels.require_some(groups, "latency")
    if config.target.latency_table is not None:
        return read(config, groups, device), groups
    where, batch = device_name(device, config.threads), config.target.latency_batch
    return tables.measure(model, groups, feed.shape, device, where, batch, config.threads), groups
