"""What some criteria need to know of each weight besides its value, measured on train samples without augmentation.

Every rank sums over its share of the batches, the sums are all-reduced, and all ranks go on with rank 0's bits. To add
a statistic, write its functions and put it into STATISTICS.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.calibrate import layer_inputs
from pipeline.data.loader import Batch
from pipeline.network.layers import layers_by_tensor
from pipeline.network.modes import evaluating
from pipeline.prune import criteria
from pipeline.settings.pruning import Prune
from pipeline.task.feed import Feed
from pipeline.train.session import Session
from pipeline.train.world import World

GROUP = 8  # samples in one mean loss, of which the gradient is taken
DAMPING = 0.01  # share of the diagonal's mean that is added to the diagonal (Frantar et al. 2022 and others)
REMEDY = "choose another criterion, or name the tensor in prune.exclude"

Batches = Callable[[], Iterable[Batch]]  # this rank's share; called once for each pass


@dataclass(frozen=True)
class Statistic:
    """A number for each weight that a criterion may need (`criteria.Criterion.statistic`).

    measure(model, names, batches, feed, world): the numbers by tensor, shaped like it; the network is in evaluation
    mode. require(model, names, criterion): raises UserError, naming the criterion, for a tensor that has none.
    `of_layers`: it is of what layers are given, so a weight that is also used outside of its layer has none.
    """

    measure: Callable[[nn.Module, Sequence[str], Batches, Feed, World], dict[str, Tensor]]
    require: Callable[[nn.Module, Sequence[str], str], None]
    of_layers: bool = False


def measure(
    criterion: str, model: nn.Module, names: Sequence[str], batches: Batches, feed: Feed, world: World
) -> dict[str, Tensor]:
    """The statistic that a criterion needs for the named tensors, shaped like them, the same on every rank.

    gradient: mean |g|, g the gradient of the mean cross-entropy over GROUP samples in a row, in evaluation mode.
    curvature: 1 / [H⁻¹]_jj, where j is an input of the layer (of the group, in a grouped convolution) and H is
    X Xᵀ / samples, damped. It is the growth of the squared error of the layer's output, over its positions, for each w²
    that is removed while the other weights of the row compensate for it. If several layers share a tensor, X holds the
    inputs of all of them. Unreadable images are left out.
    """
    kind = criteria.CRITERIA[criterion].statistic
    assert kind is not None, f"criterion {criterion} needs no statistic"
    chosen = STATISTICS[kind]
    chosen.require(model, names, criterion)
    with evaluating(model):
        found = chosen.measure(model, names, batches, feed, world)
    return {name: world.from_first(statistic) for name, statistic in found.items()}


def statistics_for(session: Session, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The statistic that prune.criterion needs for the named tensors, the same bits on every rank; {} if none."""
    config = session.config
    kind = criteria.of(config.prune).statistic
    if kind is None:
        return {}

    def share() -> Iterator[Batch]:
        return session.calibration(config.prune.statistics_samples, share=True)

    return measure(config.prune.criterion, model, names, share, session.feed, session.world)


def require(model: nn.Module, names: Sequence[str], prune: Prune, outside: Collection[str] = ()) -> None:
    """Raise UserError if the statistic that the criterion needs cannot be measured for these tensors.

    `outside` names tensors that are used outside of a call of their layer (`cost.Counted`).
    """
    kind = criteria.of(prune).statistic
    if kind is None:
        return
    STATISTICS[kind].require(model, names, prune.criterion)
    found = [name for name in names if name in outside] if STATISTICS[kind].of_layers else []
    if found:
        raise UserError(
            f"prune.criterion={prune.criterion}: {few(found)} is used outside of a layer of its own (by attention, or "
            f"by F.linear), where its inputs are not measured: {REMEDY}"
        )


def _require_curvature(model: nn.Module, names: Iterable[str], criterion: str) -> None:
    """Raise UserError for a tensor whose layer is too large, or computes in a way of its own, for the curvature."""
    layers = layers_by_tensor(model)
    for name in names:
        if name not in layers:
            raise UserError(
                f"prune.criterion={criterion}: {name} is a weight of attention, whose inputs are not measured: {REMEDY}"
            )
        for layer in layers[name]:
            if not layer_inputs.is_plain(layer):
                raise UserError(
                    f"prune.criterion={criterion}: {name} belongs to a {type(layer).__name__}, which computes in a way "
                    f"of its own: {REMEDY}"
                )
        if layer_inputs.gram_bytes(layers[name][0]) > layer_inputs.LARGEST_BYTES:
            raise UserError(
                f"prune.criterion={criterion}: {name} has so many inputs that their products with each other take more "
                f"than {layer_inputs.LARGEST_BYTES / 2**30:g} GiB: {REMEDY}"
            )


def _readable(batches: Iterable[Batch], world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """The images (uint8) and labels of each batch that could be read, on this rank's device."""
    for batch in batches:
        good = batch.weights > 0
        if bool(good.any()):
            yield batch.images[good].to(world.device), batch.labels[good].to(world.device)


def _gradients(model: nn.Module, names: Sequence[str], batches: Batches, feed: Feed, world: World) -> dict[str, Tensor]:
    """The means of |g| over all groups of all ranks, weighted by the samples in a group."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in names]
    frozen = [weight for weight in weights if not weight.requires_grad]
    sums = [torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device) for weight in weights]  # contiguous
    count = torch.zeros(1, dtype=torch.float64, device=world.device)
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for images, labels in _readable(batches(), world):
            for part, wanted in zip(images.split(GROUP), labels.split(GROUP), strict=True):
                with torch.enable_grad():
                    loss = feed.task.mean_loss(feed.forward(model, part), wanted)
                for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                    if gradient is not None:
                        total += gradient.abs() * len(wanted)
                count += len(wanted)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    samples = _counted(count, world)
    return {name: world.sum(total) / samples for name, total in zip(names, sums, strict=True)}


def _curvatures(
    model: nn.Module, names: Sequence[str], batches: Batches, feed: Feed, world: World
) -> dict[str, Tensor]:
    """1 / [H⁻¹]_jj for every weight, in as many passes as it takes to hold the H of a pass in LARGEST_BYTES."""
    layers = layers_by_tensor(model)
    passes: list[list[str]] = []
    held = layer_inputs.LARGEST_BYTES
    for name in names:
        size = layer_inputs.gram_bytes(layers[name][0])
        if held + size > layer_inputs.LARGEST_BYTES:
            passes.append([])
            held = 0
        passes[-1].append(name)
        held += size
    found: dict[str, Tensor] = {}
    for part in passes:
        grams, samples = _grams(model, {name: layers[name] for name in part}, batches(), feed, world)
        for name in part:
            layer: Any = layers[name][0]
            rest = _inverse_diagonal(grams.pop(name) / samples).reciprocal()
            wide = rest[:, None, :].expand_as(layer_inputs.matrix(layer, layer.weight))
            found[name] = wide.reshape(layer.weight.shape).to(layer.weight.dtype)
    return found


@torch.no_grad()
def _grams(
    model: nn.Module, layers: dict[str, list[nn.Module]], batches: Iterable[Batch], feed: Feed, world: World
) -> tuple[dict[str, Tensor], float]:
    """X Xᵀ of each tensor's inputs, (groups, inputs, inputs), over all positions and ranks; and the sample count."""
    grams: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            rows = layer_inputs.rows(layer, layer_inputs.given(args, kwargs), feed.seed)
            every = output.numel() / layer.weight.shape[0]  # all output positions; rows may be a part of them
            grams[name] += (rows.mT @ rows).double() * (every / rows.shape[1])

        return hook

    for name, users in layers.items():
        first: Any = users[0]
        groups, _, inputs = layer_inputs.matrix(first, first.weight).shape
        grams[name] = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=world.device)
    handles = [
        user.register_forward_hook(add(name), with_kwargs=True) for name, users in layers.items() for user in users
    ]
    count = torch.zeros(1, dtype=torch.float64, device=world.device)
    try:
        for images, labels in _readable(batches, world):
            feed.forward(model, images)
            count += len(labels)
    finally:
        for handle in handles:
            handle.remove()
    return {name: world.sum(gram) for name, gram in grams.items()}, _counted(count, world)


def _inverse_diagonal(gram: Tensor) -> Tensor:
    """The diagonal of (gram + damping)⁻¹: (groups, inputs) of (groups, inputs, inputs)."""
    factor = torch.linalg.cholesky(damped(gram))
    return torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)


def damped(gram: Tensor, share: float = DAMPING) -> Tensor:
    """The matrices with `share` of their diagonal's mean added to the diagonal; positive definite even if all is 0."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return gram + torch.diag_embed((share * mean)[:, None].expand(gram.shape[:2]))


def _counted(count: Tensor, world: World) -> float:
    samples = float(world.sum(count))
    world.agree(None if samples else "none of the train samples that statistics are measured on can be read")
    return samples


STATISTICS: dict[str, Statistic] = {
    "gradient": Statistic(_gradients, lambda model, names, criterion: None),
    "curvature": Statistic(_curvatures, _require_curvature, of_layers=True),
}
