"""Shared values, after the last round: k-means, fine-tuning of the centroids, and what the network then answers.

SPMD, as `pipeline.rounds.method`. The network that shares values lies in rounds/codebook, and is the one handed over.
A branch still begins at a round, whose weights are not shared.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.base.errors import Agreed
from pipeline.network import dead, dropout
from pipeline.network.survey import Prunable
from pipeline.prune import codebook, masks
from pipeline.rounds import attempts, before_retraining, branch
from pipeline.rounds.subject import Subject
from pipeline.run.events import Noted, Warned
from pipeline.run.layout import CODEBOOK, round_folder
from pipeline.run.records import CodebookMetrics, Epoch, SharedTensor
from pipeline.run.state import Run, now_ms
from pipeline.settings.config import Config
from pipeline.settings.training import Retrain
from pipeline.train import checkpoint, recipe
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.loop import Training
from pipeline.train.session import Session
from pipeline.train.tied import Sharing, put

RATE = 0.1  # of the retraining's learning rate, at which the weights were not at rest yet


def bits(config: Config, model: nn.Module, prunable: list[Prunable]) -> dict[str, int]:
    """Bits of each tensor's codebook, by name. Raises UserError for a pattern that matches no tensor."""
    kinds: dict[str, str | None] = {n: None for n, value in model.named_parameters() if value.is_floating_point()}
    return codebook.bits_of(config.export.codebook_bits, kinds | {tensor.name: tensor.kind for tensor in prunable})


def fine_tuning(config: Config) -> Retrain | None:
    """The recipe of the fine-tuning, None where there is none: the retraining's for other epochs and a lower rate."""
    if not (config.export.codebook_bits and config.export.codebook_epochs):
        return None
    rate = recipe.resolve(config.retrain, config.dense).lr
    changes = {"epochs": config.export.codebook_epochs, "steps": None, "lr": RATE * rate, "lr_scale": None}
    return config.retrain.model_copy(update=changes | {"warmup_epochs": 0.0, "phases": ("all",)})


def trainings(config: Config, run: Run) -> list[Retrain]:
    """The recipe of each training since the dense network: of all accepted rounds, and of the fine-tuning."""
    last = fine_tuning(config) if run.has(CODEBOOK, "metrics.json") else None
    return [*branch.retrainings(config.retrain, run), *([last] if last is not None else [])]


def share(subject: Subject) -> None:
    """With export.codebook_bits, let the network that stands share values, and write it to rounds/codebook."""
    session, model = subject.session, subject.model
    config, run, clock = session.config, session.run, time.monotonic()
    if not config.export.codebook_bits or run.has(CODEBOOK, "metrics.json"):
        return
    wanted = bits(config, model, subject.prunable)
    kept = subject.load(attempts.standing_checkpoint(run, subject.prunable, config))
    silenced, notes = dead.silence(model, session.feed.zeros(2, session.world.device))
    for note in notes:
        session.progress(Warned(f"export.codebook_bits: biases of dead units stay as they are: {note}"))
    before = session.evaluate(model, "val").metrics()
    parameters = dict(model.named_parameters())
    found = {name: clusters(parameters[name], kept.get(name), wanted[name]) for name in wanted}
    books = {name: agreed(session, *each) for name, each in found.items() if len(each[1])}
    shared = {name: sharing for name, (sharing, _) in books.items()}
    for name, (sharing, values) in books.items():
        put(parameters[name].data, sharing, values)
    unshared = session.evaluate(model, "val").metrics()
    text = f"{CODEBOOK}: {len(books)} tensors share values, val {before.top1:.2%} before, {unshared.top1:.2%} now"
    text += f"; {silenced} biases of dead units are 0" if silenced else ""
    session.progress(Noted(text))
    history: list[Epoch] = []
    steps = 0
    settings = fine_tuning(config)
    if settings is not None:
        teacher = before_retraining.teacher(session, settings)
        order = round_folder(len(branch.retrainings(config.retrain, run)) + 1)
        names = [tensor.name for tensor in subject.prunable]
        training = Training(session, model, settings, CODEBOOK, order, names, kept, teacher=teacher, shared=shared)
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        with dropout.use(model, before_retraining.dropout_rates(session, model, counts)):
            position = training.fit()
        training.applier.clean()
        history, steps = position.history, position.step
    tensors = [settle(parameters[name], sharing, name, wanted[name]) for name, sharing in shared.items()]
    require_equal(session, [parameters[name] for name in shared])
    val = session.evaluate(model, "val").metrics()
    if session.world.first:
        checkpoint.save(run, f"{CODEBOOK}/checkpoint", Checkpoint(dict(model.state_dict()), kept))
        seconds = round(time.monotonic() - clock, 3)
        metrics = CodebookMetrics(
            val_before=before,
            val_shared=unshared,
            val=val,
            tensors=tuple(tensors),
            history=tuple(history),
            steps=steps,
            seconds=seconds,
            finished_ms=now_ms(),
            data=session.manifest.identity,
        )
        run.commit(metrics, CODEBOOK, "metrics.json")
        checkpoint.keep_last(run, CODEBOOK, 0)
    session.world.barrier()


def clusters(weight: Tensor, mask: Tensor | None, bits: int) -> tuple[Sharing, Tensor]:
    """The clusters of a tensor's kept weights, and their centroids. Without a mask all that are not 0 are kept."""
    flat = weight.detach().cpu().contiguous().reshape(-1)
    there = np.flatnonzero(masks.as_bool(flat != 0 if mask is None else mask))
    centroids, places = codebook.share(masks.as_array(flat)[there], 2**bits)
    order = np.argsort(places, kind="stable")
    sharing = Sharing(torch.from_numpy(there[order]), torch.from_numpy(np.bincount(places, minlength=len(centroids))))
    return sharing, torch.from_numpy(centroids.astype(np.float32))


def agreed(session: Session, sharing: Sharing, centroids: Tensor) -> tuple[Sharing, Tensor]:
    """What rank 0 found, on every rank's device: another processor may add up in another order."""

    def sent(part: Tensor) -> Tensor:
        data = session.world.broadcast(part.numpy().tobytes() if session.world.first else None)
        return torch.from_numpy(np.frombuffer(data, part.numpy().dtype).copy()).to(session.world.device)

    return Sharing(sent(sharing.members), sent(sharing.sizes)), sent(centroids)


def settle(parameter: nn.Parameter, sharing: Sharing, name: str, bits: int) -> SharedTensor:
    """Round a tensor's centroids as codebooks store them (`codebook.rounded`)."""
    values = parameter.detach().contiguous().view(-1)[sharing.first]
    final = codebook.rounded(values.float().cpu().numpy())
    put(parameter.data, sharing, torch.from_numpy(final).to(values.device))
    return SharedTensor(name, bits, len(np.unique(final)), int(sharing.sizes.sum()))


def require_equal(session: Session, parameters: list[nn.Parameter]) -> None:
    """Raise Agreed, on every rank, if the ranks do not hold the same values, to the bit."""
    total = hashlib.sha256()
    for parameter in parameters:
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not session.world.same(int.from_bytes(total.digest()[:8], "little") >> 1):
        raise Agreed(f"{CODEBOOK}: the ranks hold different values after the fine-tuning (their hashes differ)")
