"""compile=true with torch's own compiler: the same learning, one compiled network for all rounds, one sentence."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import nn
from torch._dynamo.utils import counters

from pipeline.base.errors import UserError
from pipeline.network.groups import find
from pipeline.network.shrink import shrink
from pipeline.network.survey import survey
from pipeline.settings.training import Train
from pipeline.train import first_step
from pipeline.train.loop import Training
from pipeline.train.session import Session

NAME = "fc1.weight"
STEPS = Train.model_validate({"epochs": 1, "steps": 6, "batch_size": 64, "lr": 0.05})

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture
def compiling(small_session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    config = small_session.config.model_copy(update={"compile": True})
    monkeypatch.setattr(small_session, "config", config)
    torch._dynamo.reset()
    return small_session


def trained(session: Session, phase: str, density: float) -> nn.Module:
    """A network after six steps, of which a part was pruned; no dropout, which draws in another way when compiled."""
    torch.manual_seed(0)
    model = small.network(dropout=0.0)
    weight = dict(model.named_parameters())[NAME]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < density
    Training(session, model, STEPS, phase, "compiled", [NAME], {NAME: mask}).fit()
    return model


def test_it_learns_the_same_and_is_compiled_once_for_all_rounds(compiling: Session) -> None:
    first = trained(compiling, "first", 0.5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    trained(compiling, "second", 0.25)
    assert counters["stats"]["unique_graphs"] == graphs
    compiling.config = compiling.config.model_copy(update={"compile": False})
    for ours, eager in zip(first.parameters(), trained(compiling, "eager", 0.5).parameters(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def test_a_small_network_is_compiled_by_itself_and_learns_the_same(compiling: Session) -> None:
    torch.manual_seed(0)
    model = small.network(dropout=0.0)
    groups = find(model, torch.zeros(2, 1, 8, 8), {tensor.name: tensor.shape for tensor in survey(model)[0]})

    def learnt(phase: str, every: int) -> nn.Module:
        masks = groups.masks({name: np.arange(len(flags)) % every == 0 for name, flags in groups.whole.items()})
        cut = shrink(model, groups, masks)
        Training(compiling, cut.model, STEPS, phase, "compiled", [NAME], cut.cut(masks), cut=cut.digest).fit()
        return cut.model

    first = learnt("halved", 2)
    graphs = counters["stats"]["unique_graphs"]
    learnt("in four", 4)
    assert counters["stats"]["unique_graphs"] > graphs
    compiling.config = compiling.config.model_copy(update={"compile": False})
    for ours, eager in zip(first.parameters(), learnt("halved, eager", 2).parameters(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)


def test_a_machine_without_a_compiler_is_told_of_the_setting(
    compiling: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    config = compiling.config
    with pytest.raises(
        UserError, match=r"^compile=true: torch.compile does not take model.factory=.*set compile=false"
    ):
        first_step.require(config, 10, first_step.zeros(config.data), torch.device("cpu"))
