"""Settings: merging, one message a mistake, nothing ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.base.errors import UserError
from pipeline.run.state import OPERATIONAL
from pipeline.settings.config import (
    ADDED,
    UNHASHED,
    Config,
    differences,
    dump_config,
    flatten,
    hashed,
    leaves,
    load_config,
    parse_config,
)

ROOT = Path(__file__).resolve().parents[3]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nseed: 3\ncluster: {workers: 2}\n")
    config = load_config(path, ["seed=7", "data.augment=[flip,shift]", "target.compression=20"])
    assert (config.seed, config.cluster.workers, config.prune.rounds) == (7, 2, 4)
    assert config.data.augment == ("flip", "shift")
    assert config.target.compression == 20.0


def test_settings_are_frozen() -> None:
    config = parse_config({"name": "a"})
    with pytest.raises(ValueError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sede=1"], ["unknown setting 'sede'", "did you mean 'seed'"]),
        (["data.sorce=idx"], ["unknown setting 'data.sorce'", "did you mean 'data.source'"]),
        (["seed=abc"], ["seed='abc'", "integer"]),
        (["target.compression=0.5"], ["target.compression=0.5", "greater than or equal to 1"]),
        (["prune.densities={fc1.weight: 1.5}", "prune.allocation=explicit"], ["prune.densities.fc1.weight=1.5"]),
        (["scan.levels=[0.1,0.5]"], ["levels must fall"]),
        (["dense.batch_size=100"], ["dense.batch_size=100", "multiple of data.lanes=8"]),
        (["cluster.workers=9"], ["cluster.workers=9", "data.lanes=8"]),
        (["cluster.workers=[2,9]"], ["cluster.workers=[2, 9]", "data.lanes=8"]),
        (["cluster.workers=[3,2]"], ["cluster.workers: [3, 2]", "min <= max"]),
        (["cluster.workers=[0,2]"], ["cluster.workers: [0, 2]", "1 <= min"]),
        (["cluster.gpus_per_trial=1.5"], ["cluster.gpus_per_trial: 1.5 GPUs", "below 1, or a whole number"]),
        (["cluster.workers=0"], ["cluster.workers: 0", "give 1 or more"]),
        (["nonsense"], ["override 'nonsense'", "key=value"]),
        (["a..b=1"], ["override 'a..b=1'", "empty name"]),
        ([".seed=1"], ["override '.seed=1'", "empty name"]),
        (["seed.=1"], ["override 'seed.=1'", "empty name"]),
        (["data.mean=[1,2]"], ["mean and std"]),
        (["name=../up"], ["name='../up'"]),
        (["retrain.lr=0.1", "retrain.lr_scale=0.01"], ["retrain: lr=0.1 and lr_scale=0.01", "leave one out"]),
        (["retrain.phases=[fc,cnv]"], ["retrain.phases.1='cnv'", "'fc', 'conv' or 'all'"]),
        (["retrain.phases=[]"], ["retrain.phases=[]", "at least 1"]),
        (["export.codebook_bits={fc: 9}"], ["export.codebook_bits.fc=9", "less than or equal to 8"]),
        (["export.codebook_bits={fc: 5}", "target.budget=bytes"], ["target.budget=bytes", "leave one of the two out"]),
        (["dense.phases=[fc]"], ["unknown setting 'dense.phases'"]),
    ],
)
def test_a_mistake_names_the_setting_its_value_and_the_remedy(
    tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    path = write(tmp_path, "name: a\n")
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "a: [1\n", "name: a\nname: b: c\n", "\tx: 1\n"])
def test_a_file_that_is_no_config_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        load_config(write(tmp_path, text))


def test_a_missing_file_suggests_a_near_one(tmp_path: Path) -> None:
    write(tmp_path, "name: a\n")
    with pytest.raises(UserError, match=r"did you mean .*run\.yaml"):
        load_config(tmp_path / "runn.yaml")


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    values = {"model": {"kwargs": {"inputs": 64}}, "prune": {"densities": {"x": 0.5}}, "retrain": {"lr_scale": 0.1}}
    config = parse_config({"name": "a", **values})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_differences_name_the_keys_and_leave_out_the_ignored() -> None:
    first = parse_config({"name": "a"})
    second = parse_config({"name": "a", "seed": 1, "cluster": {"workers": 2}})
    assert differences(first, second, ignore=("cluster",)) == ["seed: 0 -> 1"]


def test_what_fingerprints_are_made_of_leaves_out_a_later_setting_at_its_default() -> None:
    older = parse_config({"name": "a", "data": {"decoder": "pillow"}})
    assert flatten(older).keys() - leaves(hashed(older)).keys() == {*ADDED, *UNHASHED}
    assert hashed(parse_config({"name": "a"}))["data"]["decoder"] == "turbo"
    assert hashed(parse_config({"name": "a", "prune": {"pattern": "other"}}))["prune"]["pattern"] == "other"
    assert hashed(parse_config({"name": "a", "prune": {"pattern": "weights"}})) == hashed(parse_config({"name": "a"}))


@pytest.mark.parametrize(
    "setting", ["dense.lr", "dense.l1", "dense.weight_decay", "dense.clip_norm", "retrain.lr_scale"]
)
def test_what_float32_cannot_hold_is_refused(setting: str) -> None:
    section, leaf = setting.split(".")
    assert parse_config({"name": "a", section: {leaf: 1e30}})
    with pytest.raises(UserError, match=rf"{section}\.{leaf}=1e\+300"):
        parse_config({"name": "a", section: {leaf: 1e300}})


def test_how_often_a_training_is_saved_by_time_changes_no_fingerprint() -> None:
    plain = parse_config({"name": "a"})
    other = {"dense": {"checkpoint_minutes": 1}, "retrain": {"checkpoint_minutes": 0}}
    changed = parse_config({"name": "a", **other})
    assert hashed(changed) == hashed(plain)
    assert differences(plain, changed, ignore=OPERATIONAL) == []


def test_every_setting_has_its_sentence() -> None:
    schema = Config.model_json_schema()
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        for key, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key} has no description"


def test_the_schema_for_editors_is_up_to_date() -> None:
    assert json.loads((ROOT / "pipeline/settings/schema.json").read_text()) == json.loads(
        json.dumps(Config.model_json_schema())
    ), "run `make schema`, which writes pipeline/settings/schema.json"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_repo_loads(path: Path) -> None:
    text = yaml.safe_load(path.read_text())
    needs_root = text["data"]["source"] != "digits"
    assert load_config(path, ["data.root=/somewhere"] if needs_root else []).name


def test_two_numbers_and_a_colon_are_a_text(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "# é: a comment before\nname: ü\nprune: {pattern: 2:4, list: [0.5]}\nmodel: {kwargs: {a: [1:30, 7]}}\n"
    )
    with pytest.raises(UserError, match="name"):  # the name is wrong on purpose: characters, not bytes, are counted
        load_config(file, [])
    found = load_config(file, ["name=a"])
    assert found.prune.pattern == "2:4"
    assert found.model.kwargs == {"a": ["1:30", 7]}
    assert load_config(file, ["name=a", "prune.pattern=4:8"]).prune.pattern == "4:8"
    assert load_config(file, ["name=a", "prune={pattern: 1:2}"]).prune.pattern == "1:2"
    assert load_config(file, ["name=a", "prune.pattern=&p 1:2"]).prune.pattern == "1:2"
    file.write_text("\ufeffname: a\nprune: {pattern: &p 2:4}\nmodel: {kwargs: {a: *p, b: !!int 2:4}}\n")
    found = load_config(file, [])
    assert (found.prune.pattern, found.model.kwargs) == ("2:4", {"a": "2:4", "b": 124})
