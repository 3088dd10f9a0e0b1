"""Masked all-reduce: gradients of pruned weights do not travel.

All ranks hold the same masks, so the entries of kept weights are the same on each of them. A DDP communication
hook gathers these entries from a bucket, all-reduces only them, and puts them back among zeros.
At density d the bytes on the wire are d times those of plain DDP, and the gradients are those of plain
DDP multiplied by the masks.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

WORTH_IT = 0.5  # above this density, gathering and scattering cost more than the bytes they save


class MaskedAllReduce:
    """The state of the hook: for each bucket, which of its entries travel.

    `masks` maps parameters to bool tensors of their shape, True where a weight is kept; parameters without
    a mask travel whole. Entries travel, and are added, in `dtype` if it is given. `sent` and `dense` count the gradient
    entries of the last step, and what plain DDP would have sent.
    """

    def __init__(self, masks: Mapping[nn.Parameter, Tensor], dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.masks = {id(parameter): mask for parameter, mask in masks.items()}
        self.indices: dict[tuple[int, ...], Tensor] = {}
        self.sent = self.dense = 0

    def kept_entries(self, bucket: dist.GradBucket) -> Tensor:
        """Positions, in the bucket's flat buffer, of the entries that travel; int64, rising."""
        parameters = bucket.parameters()
        key = tuple(id(parameter) for parameter in parameters)
        if key not in self.indices:
            # The buffer holds the parameters' gradients one after the other, each in its own memory order.
            kept = [
                torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
                if (mask := self.masks.get(id(parameter))) is None
                else _in_memory_order(mask.to(parameter.device), parameter)
                for parameter in parameters
            ]
            self.indices[key] = torch.cat(kept).nonzero().flatten()
        return self.indices[key]


# No `from __future__ import annotations` here: DDP checks the annotations of a hook as objects.
def masked_hook(state: MaskedAllReduce, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """All-reduce the kept entries of a bucket; the mean over ranks, as DDP's own."""
    buffer, entries = bucket.buffer(), state.kept_entries(bucket)
    if bucket.index() == 0:
        state.sent = state.dense = 0
    state.sent += len(entries)
    state.dense += len(buffer)
    kept = buffer[entries].div_(dist.get_world_size())
    kept = kept if state.dtype is None else kept.to(state.dtype)

    def put_back(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        return buffer.zero_().index_copy_(0, entries, reduced.value()[0].to(buffer.dtype))

    future: torch.futures.Future[Tensor] = dist.all_reduce(kept, async_op=True).get_future().then(put_back)
    return future


def wrapped(model: nn.Module, masks: Mapping[nn.Parameter, Tensor], precision: str = "fp32") -> DistributedDataParallel:
    """The model as DDP trains it: gradients lie in the buckets that travel, and only their kept entries do.

    Gradients travel in a precision: bf16 halves the bytes, and adds ranks' gradients with 8 bits of mantissa. With fp32
    they travel as they are.
    """
    made = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if use_masks(made, masks, precision) is None and precision == "bf16":
        made.register_comm_hook(None, bf16_compress_hook)
    return made


def use_masks(
    made: DistributedDataParallel, masks: Mapping[nn.Parameter, Tensor], precision: str = "fp32"
) -> MaskedAllReduce | None:
    """Register the hook on a DDP model if the masks keep few enough weights; returns its state, or None."""
    total = sum(mask.numel() for mask in masks.values())
    if not total or sum(int(mask.sum()) for mask in masks.values()) > WORTH_IT * total:
        return None
    state = MaskedAllReduce(masks, torch.bfloat16 if precision == "bf16" else None)
    made.register_comm_hook(state, masked_hook)
    return state


def _in_memory_order(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask's entries in the memory order of its parameter (channels_last differs from C order)."""
    laid_out = torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
    order = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
    return laid_out.permute(order).reshape(-1)
