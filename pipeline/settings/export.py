"""Settings of the files that are handed over."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.settings.base import Count, Section, Text


class Export(Section):
    """What final/model.packed holds."""

    codebook_bits: dict[Text, Annotated[int, Field(ge=1, le=8)]] = Field(
        default_factory=dict,
        description="Share values after the last round: the kept weights of a tensor take at most 2^bits values, and "
        "model.packed stores codebooks and entropy-coded indexes. Bits by kind (conv, fc, attention), or by name or "
        "pattern, which may also be of biases (*.bias). Han et al. 2016: {conv: 8, fc: 5}. {} shares nothing.",
    )
    codebook_epochs: Count = Field(
        2,
        description="codebook_bits: epochs in which the shared values are trained further, by the recipe of `retrain` "
        "at a tenth of its learning rate; 0 leaves them as k-means found them. The dense control gets them too.",
    )
