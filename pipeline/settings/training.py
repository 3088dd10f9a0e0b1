"""Settings of trainings: the dense network's, and the retraining of a round."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.settings.base import Count, Fraction, Positive, Section

# Numbers that float32, which networks compute with, still holds: it ends at 3.4e38.
_Strength = Annotated[float, Field(ge=0.0, le=1e30)]
_Above0 = Annotated[float, Field(gt=0.0, le=1e30)]


class Train(Section):
    """How weights are updated, in dense training or in the retraining of a round."""

    epochs: Count = Field(10, description="Passes over train; 0 trains nothing.")
    steps: Positive | None = Field(None, description="Ends a training early, after so many updates.")
    batch_size: Positive = Field(128, description="Samples in an update, over all workers; a multiple of data.lanes.")
    accumulate: Annotated[int, Field(ge=1, le=2**16)] = Field(
        1,
        description="Parts that a worker's share of an update is computed in, one after the other, where memory is "
        "short. The samples are the same; batch norm sees each part by itself.",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (with momentum) or adamw.")
    lr: _Above0 = Field(0.1, description="Learning rate at the start (after warm-up).")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="SGD's momentum; AdamW's beta1.")
    nesterov: bool = Field(False, description="Nesterov's form of the momentum (sgd).")
    weight_decay: _Strength = Field(
        0.0, description="L2 regularisation of all parameters, biases included, as Caffe does (adamw: decoupled)."
    )
    l1: _Strength = Field(
        0.0,
        description="L1 regularisation of the prunable weights only. The paper's L1 then L2 is dense.l1 with "
        "retrain.weight_decay.",
    )
    clip_norm: _Above0 | None = Field(
        None,
        description="Scale an update's gradient down to this Euclidean norm if it is larger: for high learning "
        "rates in networks without batch norm. The gradients of pruned weights do not count.",
    )
    schedule: Literal["constant", "cosine", "step", "inv"] = Field(
        "cosine",
        description="cosine falls to 0; step multiplies by `gamma` at `milestones`; inv is Caffe's "
        "lr*(1 + gamma*step)^-power.",
    )
    warmup_epochs: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Epochs of linear warm-up from 0.")
    milestones: tuple[Fraction, ...] = Field((0.5, 0.75), description="Shares of the training at which `step` acts.")
    gamma: Annotated[float, Field(gt=0.0)] = Field(0.1, description="Factor of `step`, or gamma of `inv`.")
    power: float = Field(0.75, description="Power of `inv`.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of a label spread over all classes."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs forward and loss under autocast.")
    channels_last: bool = Field(False, description="Memory format of weights and images, faster on GPUs.")
    checkpoint_steps: Positive = Field(500, description="Updates between checkpoints; one is also kept at each end.")
    checkpoint_minutes: Annotated[float, Field(ge=0.0, le=1e6)] = Field(
        5.0,
        description="Also save where the last checkpoint is so many minutes old, as a training of few or slow updates "
        "needs; 0 saves by checkpoint_steps alone. It changes no result.",
    )


class Retrain(Train):
    """How the kept weights are retrained in each round; the dense control is trained alike."""

    lr: _Above0 | None = Field(  # type: ignore[assignment]  # see recipe.resolve
        None, description="Learning rate at the start (after warm-up); by default lr_scale * dense.lr, or else 0.01."
    )
    lr_scale: _Above0 | None = Field(
        None,
        description="Learning rate as a factor of dense.lr, instead of lr; the paper's are 0.1 for the LeNets and 0.01 "
        "for AlexNet.",
    )
    dropout_correction: bool = Field(
        False,
        description="The paper's section 3.2: a dropout rate D becomes D*sqrt(kept / all connections) for the layer "
        "whose outputs it drops: 0.5 becomes 0.15 at 9% density. The dense control keeps the dense rates.",
    )
    distill: Fraction = Field(
        0.0,
        description="Share of the loss that compares the outputs with the dense network's on the same images (Hinton "
        "et al. 2015) instead of with the labels. The dense control learns from the dense network too.",
    )
    temperature: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        4.0, description="distill: both networks' logits are divided by this before the softmax."
    )
    phases: Annotated[tuple[Literal["fc", "conv", "all"], ...], Field(min_length=1)] = Field(
        ("all",),
        description="Which layers are updated, phase after phase, while the others are held fixed. Phases get equal "
        "shares of a round's steps; the last takes the remainder. The paper's AlexNet: [fc, conv, all]. A norm goes "
        "with the layer defined before it. The learning rate schedule runs on; momentum starts anew in each phase.",
    )

    @model_validator(mode="after")
    def _one_rate(self) -> Retrain:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError(f"lr={self.lr:g} and lr_scale={self.lr_scale:g} both set the learning rate: leave one out")
        return self
