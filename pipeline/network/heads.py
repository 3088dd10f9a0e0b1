"""nn.MultiheadAttention that has lost some of its heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.network.layers import ATTENTION

PROJECTION = ("in_proj_weight", "in_proj_bias")  # to queries, keys and values


class FewerHeads(nn.MultiheadAttention):
    """Attention of a tensor to itself whose heads are not as wide together as its input.

    torch's own class takes the width of a head from that of the input, so it cannot lose one. The names and the layout
    of the parameters are torch's. Input and output are (batch, tokens, width), or (tokens, batch, width) without
    `batch_first`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As torch's, for one tensor given three times and no mask; what each token looks at is not given."""
        assert query is key is value, "attention to another tensor is not followed"
        assert key_padding_mask is attn_mask is None, "masks are not followed"
        batch = 0 if self.batch_first else 1
        joined = F.linear(query.transpose(0, batch), self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = joined.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)).transpose(0, batch), None


KINDS = (*ATTENTION, FewerHeads)


def refit(attention: nn.MultiheadAttention) -> None:
    """Set the number of heads and the width to the sizes of the tensors; a head is as wide as before."""
    rows, width = attention.in_proj_weight.shape
    attention.num_heads, attention.embed_dim = rows // (3 * attention.head_dim), width
    if not rows == 3 * width == 3 * len(attention.out_proj.weight):
        attention.__class__ = FewerHeads
