"""The model card says what the run found, and the code in it loads the network that the run made."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_files import config, whole
from tiny_run import carry_out

from pipeline.base.errors import UserError
from pipeline.export.bench import bench_run
from pipeline.network.build import build_network
from pipeline.network.weights import load_weights
from pipeline.results import card, final
from pipeline.run.events import StageBegun
from pipeline.run.result import Result, Scores
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config

HOSTILE = "<script>alert(1)</script>|`x`\n# title"
TESTS = Path(__file__).parents[2]


def front(text: str) -> dict[str, Any]:
    """The front matter of a card."""
    loaded = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_a_card_says_what_the_run_found(tmp_path: Path) -> None:
    text = card.render(whole(config(tmp_path)))
    assert r"# lenet: lenet\_300\_100, pruned 13.7×" in text
    assert "Drop against the dense control, paired by image: " in text
    assert "Verdict: **no loss**" in text
    assert "| `model.safetensors` | 7 kB |" in text
    assert "Not measured: `secateur bench` measures it" in text
    assert "Licence of the weights: not stated." in text
    assert "license" not in front(text)
    assert "compact.pt2" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("licence", "matter"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ('Ours: "no use"', {"license": "other", "license_name": 'Ours: "no use"'}),
    ],
)
def test_the_licence_is_as_the_user_gave_it(licence: str, matter: dict[str, str], tmp_path: Path) -> None:
    text = card.render(whole(config(tmp_path, model={"licence": licence})))
    assert front(text).items() >= matter.items()
    assert f"Licence of the weights: {licence}." in text


def test_an_accuracy_has_wilsons_interval() -> None:
    # 9 of 10: (0.9 + 3.8415/20 -+ 1.96 sqrt(0.9*0.1/10 + 3.8415/400)) / (1 + 3.8415/10)
    assert card.accuracy(Scores(top1=0.9, top5=None, loss=0.1), 10) == "90.00% (95%: 59.58% to 98.21%)"


def test_hostile_names_are_text() -> None:
    assert card.text(HOSTILE) == r"\<script\>alert(1)\</script\>\|\`x\` \# title"


@pytest.mark.parametrize("factory", ["lenet_5", "secateur:given", "pipeline.network.paper_networks:lenet_5"])
def test_networks_that_only_secateur_can_build_have_no_code(factory: str, tmp_path: Path) -> None:
    model = config(tmp_path, model={"factory": factory}).model
    assert card.fitting_code(model, "is not", "opened") is None


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    run = whole(config(tmp_path, model={"factory": "small:network"}))
    (run / "final/compact.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"compact\.safetensors' is damaged"):
        card.render(run)


def test_the_code_in_a_card_loads_the_compact_network(tiny: Callable[..., Config], tmp_path: Path) -> None:
    network = {"model.factory": "small:network", "model.kwargs": {"norm": True, "dropout": 0.1}}
    more = {"prune.pattern": "channels", "prune.allocation": "uniform", "prune.rounds": 1, "prune.dense_control": False}
    run_config = tiny(**network, **more, **{"dense.epochs": 1, "target.compression": 2})
    carry_out(run_config)
    root = Path(run_root(run_config))
    before = (root / "final/README.md").read_text()
    assert "Not measured" in before
    found = bench_run(root, repeats=3, trust_code=True)
    with open_run(run_config) as here:
        final.update(here, latency_ms=found.summary)
    text = (root / "final/README.md").read_text()
    assert found.verdict in text
    assert "| compact | 1 |" in text
    images = torch.randn(6, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    whole_model = build_network(run_config.model, 10).eval()
    load_weights(whole_model, root / "final/model.safetensors")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        images_in = f"import torch\nimages = torch.load({str(tmp_path / 'images.pt')!r}, weights_only=True)\n"
        use = "logits = model(images)" if "model =" in block else "logits = torch.from_numpy(logits)"
        images_in += "images = images.numpy()\n" if "onnxruntime" in block else ""
        script = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{images_in}{block}\n{use}\n"
        script += f"torch.save(logits.detach(), {str(tmp_path / f'{number}.pt')!r})\n"
        script += "assert 'pipeline' not in sys.modules\n"
        subprocess.run([sys.executable, "-I", "-c", script], cwd=root / "final", check=True)
        logits = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert torch.allclose(logits, whole_model(images), atol=1e-4), block


def test_a_licence_that_is_given_later_gets_into_the_card(tiny: Callable[..., Config]) -> None:
    more = {"prune.allocation": "uniform", "prune.rounds": 1, "prune.dense_control": False, "dense.epochs": 1}
    plain = tiny(**more)
    carry_out(plain)
    root = Path(run_root(plain))
    before = (root / "final/model.safetensors").read_bytes()
    events: list[Any] = []
    carry_out(tiny(**more, **{"model.licence": "mit"}), events)
    assert [event.stage for event in events if isinstance(event, StageBegun) and not event.skipped] == ["final"]
    assert "Licence of the weights: mit." in (root / "final/README.md").read_text()
    assert (root / "final/model.safetensors").read_bytes() == before
    Result.from_json(Run(str(root), 0).read("result.json"), "result.json")
