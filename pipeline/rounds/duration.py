"""About how long a run takes, from steps tried out on this machine, and what it needs of memory and disk."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from pipeline.base.errors import UserError
from pipeline.rounds.outlook import RunPlan
from pipeline.run.events import SCANNED, Outlined
from pipeline.settings.config import Config
from pipeline.settings.training import Retrain, Train
from pipeline.train import first_step
from pipeline.train.world import choose_device, configure_process

STEPS = 3  # timed after a first one, which is slower
ENOUGH_S = 0.2  # a step that takes so long is timed; of a shorter one, one with four times the images is
PATIENCE_S = 5.0  # after so many seconds of steps, the second is the last


@dataclass(frozen=True)
class Needs:
    """What a run takes. `seconds` and `per_image_s` (of a training step) are None where they could not be measured.

    `why` says so then. `memory` is bytes of a worker for weights, gradients, optimizer and masks; `disk` bytes of
    checkpoints and final files, without the shards.
    """

    seconds: float | None
    per_image_s: float | None
    device: str
    why: str
    memory: int
    disk: int


def of(config: Config, plan: RunPlan, outline: Outlined) -> Needs:
    """Try out steps of the run's trainings here, and reckon with them. Raises UserError where a step fails."""
    memory, disk = sizes(config, plan)
    try:
        device = choose_device(config.device)
    except UserError as error:
        return Needs(None, None, config.device, str(error), memory, disk)
    if config.cluster.gpus_per_worker > 0 and device.type != "cuda":
        why = f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g}, and this machine has no GPU: plan it there"
        return Needs(None, None, device.type, why, memory, disk)
    trainings = first_step.trainings(config.dense, config.retrain)
    if not trainings:
        return Needs(None, None, device.type, "nothing is trained", memory, disk)
    configure_process(config.threads, config.reproducible)
    paces = {name: per_image_s(config, name, each, plan.counts.classes) for name, each in trainings.items()}
    workers = config.cluster.min_workers
    both = {"dense": 0.0, "retrain": 0.0} | paces
    rounds = outline.rounds or len(plan.rounds)
    retrained = rounds * outline.round * (share_left(config, plan) + outline.control)
    looked = outline.scan * SCANNED * max(both.values())
    seconds = (outline.dense * both["dense"] + retrained * both["retrain"] + looked) / workers
    return Needs(seconds, max(both.values()), device.type, "", memory, disk)


def share_left(config: Config, plan: RunPlan) -> float:
    """The share of the dense network's work that a round's retraining takes, as a mean over the rounds.

    With prune.shrink_between_rounds it is that of the FLOPs, for steps of half of the FLOPs took half of the time; else
    the masked network is trained, which takes as long as the dense one.
    """
    if not config.prune.shrink_between_rounds or not plan.rounds:
        return 1.0
    return statistics.fmean(row.flops for row in plan.rounds) / sum(plan.flops.values())


def per_image_s(config: Config, name: str, settings: Train, classes: int) -> float:
    """Seconds that a step takes for each of a worker's images, on this machine."""
    device = choose_device(config.device)
    share = max(first_step.SAMPLES, settings.batch_size // settings.accumulate // config.cluster.min_workers)
    images = min(first_step.SAMPLES, share)
    while True:
        tries = first_step.Tries(1 + STEPS, PATIENCE_S)
        batch = first_step.zeros(config.data, images)
        first_step.attempt(config, name, settings, classes, batch, device, tries)
        typical = statistics.median(tries.taken[1:])
        if typical >= ENOUGH_S or images >= share:
            return typical / images
        images = min(share, 4 * images)


def sizes(config: Config, plan: RunPlan) -> tuple[int, int]:
    """Bytes of memory in a worker, and of disk; see `Needs`."""
    prunable = sum(tensor.weights for tensor in plan.prunable)
    everything = prunable + sum(math.prod(tensor.shape) for tensor in plan.left_out)
    slots = 2 if "adamw" in (config.dense.optimizer, config.retrain.optimizer) else 1
    teacher = isinstance(config.retrain, Retrain) and config.retrain.distill > 0
    memory = 4 * everything * (2 + slots + teacher) + prunable
    rounds = max(1, len(plan.rounds))
    kept = 1 + rounds * (1 + config.prune.dense_control)  # the dense network, those of rounds and of the control
    steps = 2 * (1 + slots)  # of the training that goes on
    return memory, 4 * everything * (kept + steps + 1) + rounds * prunable // 8
