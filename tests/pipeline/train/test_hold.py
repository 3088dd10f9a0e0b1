"""Masks that are held in loops of others' making: pruned weights stay 0, the rest is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.base.errors import UserError
from pipeline.train.hold import hold

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def half(model: nn.Module) -> dict[str, Tensor]:
    """Masks of both matrices that keep about half."""
    draw = torch.Generator().manual_seed(1)
    names = ("0.weight", "2.weight")
    return {name: torch.rand(model.get_parameter(name).shape, generator=draw) < 0.5 for name in names}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = torch.randn(16, 6)
    loss = nn.functional.cross_entropy(model(inputs), inputs.argmax(1) % 3)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zeros(model: nn.Module, masks: dict[str, Tensor]) -> bool:
    """Whether all pruned weights, and hardly any other, are 0."""
    weights = {name: model.get_parameter(name).detach() for name in masks}
    return all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("trained", [False, True])
def test_pruned_weights_stay_0_and_the_others_are_trained(kind: str, trained: bool) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(5 if trained else 0):
        step(model, optimizer)
    masks = half(model)
    held = hold(model, masks, optimizer)
    assert zeros(model, masks)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.ndim == 2:
                mask = next(mask for mask in masks.values() if mask.shape == value.shape)
                assert not value[~mask].any()
    before = model.get_parameter("0.weight").detach().clone()
    for _ in range(10):
        step(model, optimizer)
        assert zeros(model, masks)
    kept = masks["0.weight"]
    assert (model.get_parameter("0.weight")[kept] != before[kept]).all()
    held.release()
    for _ in range(3):
        step(model, optimizer)
    assert not zeros(model, masks)


def test_it_is_masked_sgd_to_the_bit() -> None:
    """Without momentum the held loop is w <- m (w - lr g), worked out beside it."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 4.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with hold(model, {"weight": torch.tensor([[True, False]])}, optimizer):
        for expected in (1.0, 0.0, -1.0):  # the gradient of the sum over the input (2, 8) is (2, 8)
            optimizer.zero_grad()
            model(torch.tensor([[2.0, 8.0]])).sum().backward()
            optimizer.step()
            assert model.weight.tolist() == [[expected, 0.0]]


def test_an_optimizer_of_some_of_the_masked_weights_can_still_be_saved() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    hold(model, half(model), optimizer)
    assert optimizer.state_dict()["state"] == {}
    step(model, optimizer)
    assert optimizer.state_dict()["state"].keys() == {0, 1}


def test_a_wrapped_model_is_held_by_the_names_of_the_plain_one() -> None:
    model = network()
    masks = half(model)
    wrapped = nn.DataParallel(model)
    optimizer = OPTIMIZERS["momentum"](wrapped.parameters())
    hold(wrapped, masks, optimizer)
    step(wrapped, optimizer)
    assert zeros(model, masks)


def test_a_model_that_changes_its_type_is_still_held() -> None:
    model = network()
    masks, optimizer = half(model), OPTIMIZERS["momentum"](model.parameters())
    hold(model, masks, optimizer)
    model.double()
    inputs = torch.randn(4, 6, dtype=torch.float64)
    model(inputs).sum().backward()
    optimizer.step()
    assert zeros(model, masks)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({}, "masks is empty"),
        ({"fc.weight": torch.ones(1, dtype=torch.bool)}, "has fc.weight, and the model has no parameter"),
        ({"0.weight": torch.ones(8, 6)}, r"is \(8, 6\) of torch.float32: give a bool tensor .* \(8, 6\)"),
        ({"0.weight": torch.ones(6, 8, dtype=torch.bool)}, r"is \(6, 8\) of torch.bool"),
    ],
)
def test_masks_that_do_not_fit_are_one_sentence(masks: dict[str, Tensor], said: str) -> None:
    model = network()
    with pytest.raises(UserError, match=said):
        hold(model, masks, OPTIMIZERS["adam"](model.parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = network()
    with pytest.raises(UserError, match="holds none of the masked parameters"):
        hold(model, half(model), OPTIMIZERS["adam"](network().parameters()))


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        inputs = torch.randn(6, generator=torch.Generator().manual_seed(number))
        return {"inputs": inputs, "labels": inputs.argmax() % 3}


def test_lightning_trains_what_is_left() -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pip install pytorch-lightning")
    model = network()
    masks = half(model)

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch["inputs"]), batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = OPTIMIZERS["adamw"](self.parameters())
            hold(self.model, masks, optimizer)
            return optimizer

    before = model.get_parameter("0.weight").detach().clone()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Rows(), batch_size=16))
    assert trainer.global_step == 12
    assert zeros(model, masks)
    kept = masks["0.weight"]
    assert (model.get_parameter("0.weight")[kept] != before[kept]).all()


def test_hugging_faces_trainer_trains_what_is_left(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="pip install accelerate")
    model = network()
    masks = half(model)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model(inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    before = model.get_parameter("0.weight").detach().clone()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    hold(model, masks, optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=16, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = transformers.Trainer(Classifier(), arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.state.global_step == 12
    assert zeros(model, masks)
    kept = masks["0.weight"]
    assert (model.get_parameter("0.weight")[kept] != before[kept]).all()
