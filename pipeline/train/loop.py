"""The training loop: plain SPMD PyTorch, the same under Ray Train, under torchrun, and alone."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.base import seeding
from pipeline.base.errors import Agreed, Leaving
from pipeline.data.loader import Batch, TrainLoader
from pipeline.prune import masks as masking
from pipeline.prune.gradual import Gradual
from pipeline.run.events import EpochEnded, Resumed, Saved, Stepped
from pipeline.run.records import Epoch
from pipeline.settings.training import Retrain, Train
from pipeline.train import allreduce, checkpoint, memory, phases, recipe
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.feeder import on_device
from pipeline.train.finite import Finite
from pipeline.train.gradients import Gradients, computed
from pipeline.train.looks import Looks
from pipeline.train.pace import Pace
from pipeline.train.session import Session, require_same_data
from pipeline.train.tally import Tally
from pipeline.train.tied import Sharing, Tied

KEPT_CHECKPOINTS = 2
TELL_EVERY_S = 5.0  # between reports of a step within an epoch; an epoch of ImageNet takes an hour


@dataclass
class Position:
    """Where a training stands; saved with every checkpoint. `earlier`: those of its seconds in earlier processes."""

    step: int = 0
    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0
    earlier: float = 0.0


class Training:
    """One training of one model: dense, or the retraining of a round.

    `phase` names its folder in the run. `order` names its stream of batches and random numbers, so that the dense
    control can get exactly those of the pruned network. `masks` stay fixed, or are those that `gradual` pruning starts
    from. The network also learns from the `teacher`'s answers, if there is one. `shared`: which weights share values.
    `cut` tells how a small network was cut out of the whole one, whose tensors step checkpoints then hold.
    """

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        settings: Train,
        phase: str,
        order: str,
        prunable: list[str],
        masks: dict[str, Tensor] | None = None,
        gradual: Gradual | None = None,
        teacher: nn.Module | None = None,
        shared: dict[str, Sharing] | None = None,
        cut: str = "",
    ) -> None:
        self.session, self.model, self.phase, self.order, self.cut = session, model, phase, order, cut
        self.world, self.config, self.feed = session.world, session.config, session.feed
        self.settings = recipe.resolve(settings, session.config.dense)
        self.phases = settings.phases if isinstance(settings, Retrain) else ("all",)
        phases.require_layers(model, self.phases)
        self.loader = TrainLoader(
            session.split("train"),
            session.config.data,
            batch_size=settings.batch_size,
            seed=seeding.derive(session.config.seed, "order", order),
            rank=session.world.rank,
            world=session.world.size,
        )
        self.computed = computed(model, session.config.compile)
        self.parameters = dict(model.named_parameters())
        self.weights = [self.parameters[name] for name in prunable]
        self.gradual = gradual
        self.tied = Tied(self.parameters, shared or {})
        self.gradients = Gradients(self.feed, self.settings, teacher, self.world)
        self._use(masks or {})
        self.trainable = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.optimizer = recipe.make_optimizer(self.settings, list(self.parameters.values()))
        self.total = recipe.total_steps(settings, self.loader.steps_per_epoch)
        self.position = Position()
        self.tally = Tally(session.world)
        self.finite = Finite(session.world.device)
        self.told = time.monotonic()
        self.pace = Pace()

    def fit(self) -> Position:
        """Train from the last whole step checkpoint, or from the start, to the end.

        Raises Leaving on every rank, after a step checkpoint is saved, when `session.leaving()` is true.
        """
        self._resume()
        name = "retrain" if isinstance(self.settings, Retrain) else "dense"
        place = f"on rank {self.world.rank}"
        with memory.remedied(
            lambda: f"{self.phase}: step {self.position.step} {place}", memory.of_training(name, self.settings)
        ):
            self._steps()
        phases.hold(self.model, "all", self.trainable)
        return self.position

    def _steps(self) -> None:
        """Make the steps that are left, and end each epoch."""
        looks = Looks(self.world, self.settings.checkpoint_minutes, self.position.step)
        wrapped: nn.Module | None = None
        entered: int | None = None
        self.model.train()
        self.applier.apply()
        self.pace = Pace()
        clock = time.monotonic()
        while self.position.step < self.total:
            epoch, first = divmod(self.position.step, self.loader.steps_per_epoch)
            for batch in self.pace.timed(self._batches(epoch, first)):
                if self.gradual and self.gradual.due(self.position.step, self.total):
                    self._prune(self.gradual.masks(self.position.step, self.total, self.masks))
                    wrapped = None  # its all-reduce has the old masks
                phase = phases.at(self.position.step, self.total, len(self.phases))
                if wrapped is None or phase != entered:
                    wrapped = None  # frees the DDP of the previous phase first
                    wrapped, entered = self._enter(phase), phase
                self._update(wrapped, batch)
                self.pace.stepped()
                self.position.step += 1
                last = self.position.step in (self.total, (epoch + 1) * self.loader.steps_per_epoch)
                due = self.position.step % self.settings.checkpoint_steps == 0
                if last or due:  # and nowhere else: where sums are cut decides their last bits
                    self.tally.collect()
                looking = looks.due(self.position.step)
                late, leaving = looking and looks.late(self.position.step), looking and self._leaving()
                save = due or late or leaving
                if last or save:
                    self._require_finite()
                    self.position.seconds += time.monotonic() - clock
                    clock = time.monotonic()
                if last:
                    self._end_epoch(epoch)
                self._tell()
                if save and self.position.step < self.total:
                    self._save()
                    looks.saved()
                    if leaving:
                        raise Leaving(f"{self.phase}: step {self.position.step} of {self.total} is saved")
                if self.position.step == self.total:
                    break
        self.position.seconds += time.monotonic() - clock

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of an epoch from step `first` on; bringing train to memory, at first, is a part of the wait."""
        yield from on_device(self.loader.epoch(epoch, first), self.world.device)

    def _use(self, masks: dict[str, Tensor]) -> None:
        """Hold these masks from now on."""
        self.masks = {name: mask.to(self.world.device) for name, mask in masks.items()}
        weights = [self.parameters[name].data for name in masks]
        self.applier = masking.Applier(weights, list(self.masks.values()))

    def _prune(self, masks: dict[str, Tensor]) -> None:
        """Go on with these masks: pruned weights and their momentum are set to 0."""
        self._use(masks)
        self.applier.apply()
        slots = recipe.momentum_buffers(self.optimizer, [self.parameters[name] for name in masks])
        for tensors in itertools.zip_longest(*slots):  # first buffers of all weights, then second ones
            self.applier.zero(tensors)

    def _enter(self, phase: int) -> nn.Module:
        """Begin a phase, or go on within it: hold the other layers fixed, and wrap what is updated for DDP."""
        if self.position.step == phases.first_step(phase, self.total, len(self.phases)):
            self.optimizer.state.clear()  # momentum from before the layers were held is out of date
        phases.hold(self.model, self.phases[phase], self.trainable)
        if self.world.size == 1:
            return self.computed
        gc.collect()  # a DDP is in a reference cycle, and its buckets are as large as the gradients
        with self.world.waiting(f"the exchange of weights before step {self.position.step} of {self.phase}"):
            updated = {name: mask for name, mask in self.masks.items() if self.parameters[name].requires_grad}
            return allreduce.wrapped(
                self.computed, {self.parameters[name]: mask for name, mask in updated.items()},
                self.config.exchange_precision,
            )  # fmt: skip

    def _update(self, wrapped: nn.Module, batch: Batch) -> None:
        """One optimizer update of a batch on this rank's device; none where the gradient is not finite.

        For that Agreed is raised on every rank: at once on the CPU, a step later on a GPU, which need not wait for it.
        """
        step = self.position.step
        self.world.at(f"step {step} of {self.phase}")
        # Dropout draws from the step alone, so a resumed training draws what the undisturbed one drew.
        self.world.seed(seeding.derive(self.config.seed, "dropout", self.order, step, self.world.rank))
        rate = recipe.finite_rate(self.settings, step, self.loader.steps_per_epoch, self.phase)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = self.gradients.of(wrapped, batch, f"the exchange of gradients in step {step} of {self.phase}")
        if self.settings.l1:
            recipe.add_l1(self.weights, self.settings.l1)
        self.tied.gather()
        if self.settings.clip_norm is not None:  # else pruned weights would count, unless the hook zeroed them
            self.applier.zero([self.parameters[name].grad for name in self.masks])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        self.optimizer.found_inf = self.finite.note(step, rate, norm)  # type: ignore[attr-defined]  # no update then
        self._require_finite(self.finite.lag)
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.settings.clip_norm, norm)
        self.world.at(f"the end of step {step} of {self.phase}")
        self.optimizer.step()
        self.applier.apply()
        self.tied.tie()
        self.tally.add(step, batch.indices.numpy(), total, batch.weights)

    def _require_finite(self, lag: int = 0) -> None:
        """Raise Agreed where a gradient was not finite, but for the last `lag` steps; so nothing of it is saved."""
        bad = self.finite.first_bad(lag)
        if bad is not None:
            raise Agreed(
                f"{self.phase}: the gradient of step {bad.step} is not finite (lr {bad.rate:.3g}); no update was made. "
                "Lower the learning rate, or look for bad inputs"
            )

    def _leaving(self) -> bool:
        with self.world.waiting("the question whether to leave"):
            return self.session.leaving()

    def _tell(self) -> None:
        """Report the step every TELL_EVERY_S seconds; costs no communication."""
        if time.monotonic() - self.told >= TELL_EVERY_S:
            self.told = time.monotonic()
            self.session.progress(Stepped(self.phase, self.position.step, self.total))
        if time.monotonic() - self.pace.recent.since >= TELL_EVERY_S:
            speed, waiting = self.pace.taken()
            pace, lr = (speed * self.settings.batch_size, waiting), self.optimizer.param_groups[0]["lr"]
            self.session.paced(self.phase, self.position.step, self.total, pace, self.tally.mean_loss(), lr)

    def _end_epoch(self, epoch: int) -> None:
        began = time.monotonic()
        speed, waiting = self.pace.epoch_ended()
        loss, samples, bad = self.tally.totals
        self.world.agree(self.session.too_many_bad("train", int(bad), int(samples + bad)))
        if self.world.size > 1:  # each rank's batch norm saw its own samples last; rank 0's statistics are saved
            for buffer in self.model.buffers():
                buffer.copy_(self.world.from_first(buffer.contiguous()))  # collectives want plain memory
        val = self.session.evaluate(self.model, "val").metrics()
        entry = Epoch(
            epoch=epoch + 1,
            step=self.position.step,
            loss=loss / max(1.0, samples),
            lr=self.optimizer.param_groups[0]["lr"],
            val_top1=val.top1,
            order=self.tally.order_text,
            seconds=round(self.position.seconds - sum(before.seconds for before in self.position.history), 3),
            images_per_s=round(speed * self.settings.batch_size, 3),
            waiting=round(waiting, 4),
        )
        self.position.history.append(entry)
        self.tally = Tally(self.world)
        self.told = time.monotonic()
        self.session.progress(EpochEnded(self.phase, entry, self.settings.epochs, self.total))
        self.pace.without(time.monotonic() - began)

    def _save(self) -> None:
        """Write a step checkpoint from rank 0 and drop all but the last ones."""
        sums = self.tally.state()
        if not self.world.first:
            return
        began = time.monotonic()
        state = {
            "phase": self.phase,
            "step": self.position.step,
            "history": [epoch.to_json() for epoch in self.position.history],
            "seconds": self.position.seconds,
            "data": self.session.manifest.identity,
            "cut": self.cut,
            **sums,
        }
        names = list(self.parameters)
        saved = Checkpoint(
            dict(self.model.state_dict()), self.masks, recipe.optimizer_tensors(self.optimizer, names), state
        )
        checkpoint.save(self.session.run, checkpoint.step_folder(self.phase, self.position.step), saved)
        checkpoint.keep_last(self.session.run, self.phase, KEPT_CHECKPOINTS)
        self.session.progress(Saved(self.phase, self.position.step, round(time.monotonic() - began, 3)))

    def _resume(self) -> None:
        saved = checkpoint.latest(self.session.run, self.phase)
        steps = saved.state["step"] if saved else 0
        if not self.world.same(steps):
            raise Agreed(f"the ranks see different checkpoints of {self.phase}: runs_dir must be a shared folder")
        if saved is None:
            return
        state, session = saved.state, self.session
        what = f"the checkpoint of {self.phase} at step {steps}"
        require_same_data(session.config, session.run, session.manifest, state.get("data"), what)
        if state.get("cut", "") != self.cut:
            raise Agreed(
                f"{what} is of {_kind(state.get('cut', ''))}, and {_kind(self.cut)} is trained: set "
                f"prune.shrink_between_rounds as it was, or remove '{session.run.path(self.phase, 'steps')}'"
            )
        if self.gradual:
            self._use(saved.masks)
        elif masking.digest(saved.masks) != masking.digest(self.masks):
            raise Agreed(f"{self.phase}: the masks of its step checkpoint are not those of its plan")
        self.model.load_state_dict(saved.weights)
        recipe.load_optimizer_tensors(self.optimizer, list(self.parameters), saved.optimizer)
        history = [Epoch.from_json(epoch, f"a step checkpoint of {self.phase}") for epoch in state["history"]]
        self.position = Position(state["step"], history, state["seconds"], earlier=state["seconds"])
        self.tally.load(state)
        self.session.progress(Resumed(self.phase, steps, self.total, self.world.size))


def _kind(cut: str) -> str:
    return f"a small network (cut {cut})" if cut else "the whole network"


def steps_per_epoch(session: Session, settings: Train) -> int:
    """Updates in one pass over train."""
    loader = TrainLoader(
        session.split("train"), session.config.data, batch_size=settings.batch_size, seed=0, rank=0, world=1
    )
    return loader.steps_per_epoch
