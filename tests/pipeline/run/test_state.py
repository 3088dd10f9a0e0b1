"""The run directory: one writer, no changed settings, orphans cannot commit."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from few_samples import run_in

from pipeline.base.errors import RunStopped, UserError
from pipeline.rounds.idle import idle
from pipeline.run import lease
from pipeline.run.state import as_begun, config_of, fingerprint, open_run, run_root
from pipeline.settings.config import Config


def test_a_second_writer_is_refused_while_the_first_lives(tiny: Callable[..., Config]) -> None:
    with open_run(tiny()), pytest.raises(UserError, match="is being written by process"), open_run(tiny()):
        pass


def test_a_run_that_is_over_is_held_by_none_though_its_process_lives(tiny: Callable[..., Config]) -> None:
    """As in a notebook."""
    root = run_root(tiny())
    with open_run(tiny()):
        assert lease.holder(root) == f"process {os.getpid()} on this machine"
        assert not lease.over(root)
    assert lease.holder(root) is None
    assert lease.over(root)
    with open_run(tiny()):
        shutil.rmtree(root)
    assert not os.path.exists(root)  # what was removed is not made again


def test_a_killed_writer_is_followed_at_once_though_a_child_of_it_lives(tiny: Callable[..., Config]) -> None:
    context = multiprocessing.get_context("fork")
    children = context.SimpleQueue()

    def write() -> None:
        with open_run(tiny()):
            child = os.fork()
            if child:
                children.put(child)
            time.sleep(600)

    writer = context.Process(target=write)
    writer.start()
    child = children.get()
    writer.kill()
    writer.join()  # a time limit would wait for a pipe that the child holds, too
    try:
        with open_run(tiny()) as here:
            assert here.fence == 2
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_earlier_writer_cannot_commit_after_a_later_one(tiny: Callable[..., Config]) -> None:
    with open_run(tiny()) as first:
        first.commit({"a": 1}, "x.json")
    with open_run(tiny()) as second:
        assert second.fence == first.fence + 1
        with pytest.raises(RunStopped, match="taken over"):
            first.commit({"a": 2}, "x.json")
        assert second.read("x.json") == {"a": 1}


def test_a_writer_of_a_folder_that_was_made_anew_cannot_commit(tiny: Callable[..., Config]) -> None:
    with open_run(tiny()) as first:
        shutil.rmtree(first.root)
        with pytest.raises(RunStopped, match=r"has no lease\.json any more"):
            first.commit({}, "x.json")
        with open_run(tiny()) as second:
            assert second.fence == first.fence
            with pytest.raises(RunStopped, match="taken over"):
                first.commit({}, "x.json")
            second.commit({}, "x.json")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE, errno.EIO])
def test_a_file_system_without_locks_is_one_message(
    tiny: Callable[..., Config], tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    words = rf"runs_dir={tmp_path}/runs: '.*/\.lock' cannot be used as a lock \({os.strerror(number)}\): .*flock"
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(UserError, match=words), open_run(tiny()):
            pass
    with monkeypatch.context() as patch:  # O_EXCL, by which the lock's file is made
        (tmp_path / "runs/tiny/.lock").unlink(missing_ok=True)
        patch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match=words), open_run(tiny()):
            pass
    with open_run(tiny()):
        pass


def test_a_lock_that_cannot_be_given_back_is_a_warning(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fcntl.flock

    def keep(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor, operation)

    with pytest.warns(UserWarning, match=r"could not be given back: Input/output error"), open_run(tiny()):
        monkeypatch.setattr(fcntl, "flock", keep)
    monkeypatch.undo()


def test_a_lease_that_cannot_be_read_is_one_message(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tiny()) as run:
        monkeypatch.setattr(Path, "read_bytes", _stale)
        with pytest.raises(UserError, match=r"its lease\.json cannot be read or written \(Stale file handle\)"):
            run.commit({}, "x.json")
        monkeypatch.undo()


def _stale(_: Path) -> bytes:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_changed_settings_stop_with_the_keys_that_differ(tiny: Callable[..., Config]) -> None:
    with open_run(tiny()) as here:
        here.commit({}, "dense", "something.json")
    with pytest.raises(UserError, match=r"seed: 0 -> 5.*use another name"), open_run(tiny(seed=5)):
        pass
    with open_run(tiny(**{"cluster.workers": 2})):
        pass


def test_a_run_that_has_made_nothing_takes_other_settings(tiny: Callable[..., Config]) -> None:
    """As one that was refused before its first stage, or where its shards showed what was wrong."""
    with open_run(tiny()) as first:
        first.commit({}, "shards", "manifest.json")
        first.commit({}, "log", "driver-0001.jsonl")
        uid = first.read("run.json")["uid"]
    with open_run(tiny(**{"cluster.workers": 2})) as same:
        assert same.has("shards", "manifest.json")
    with open_run(tiny(seed=5)) as other:
        assert not other.has("shards", "manifest.json")
        assert other.read("run.json")["uid"] == uid
        assert config_of(other.root).seed == 5


def test_a_run_whose_folder_was_renamed_is_the_same_run(tiny: Callable[..., Config]) -> None:
    with open_run(tiny()) as here:
        here.commit({}, "dense", "something.json")
    moved = Path(here.root).rename(Path(here.root).with_name("moved"))
    with open_run(config_of(moved)) as again:
        assert again.has("dense", "something.json")


def test_a_run_keeps_the_decoder_that_it_began_with(tiny: Callable[..., Config]) -> None:
    config, other = tiny(), tiny(**{"data.decoder": "pillow"})
    assert as_begun(config) is config  # there is no such run yet
    with open_run(config) as here:
        here.commit({}, "dense", "something.json")
    file = Path(run_root(config), "config.yaml")
    assert as_begun(config) == config
    with pytest.raises(UserError, match=r"data\.decoder: 'turbo' -> 'pillow'"), open_run(as_begun(other)):
        pass
    older = [text for text in file.read_text().splitlines() if "decoder:" not in text]
    file.write_text("\n".join(older))
    assert config_of(file.parent).data.decoder == "pillow"
    assert as_begun(config).data.decoder == "pillow"
    with open_run(as_begun(config)):
        pass
    given = tiny(**{"data.decoder": "turbo"})
    with pytest.raises(UserError, match=r"data\.decoder: 'pillow' -> 'turbo'"), open_run(as_begun(given)):
        pass
    assert not [text for text in idle(as_begun(config)) if "decoder" in text]
    branch = tiny(name="branch", **{"start.from": f"{config.name}:0"})
    assert as_begun(branch).data.decoder == "pillow"


def test_a_stage_counts_as_finished_only_for_what_it_was_made_from(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    assert not run.finished("dense", "abc")
    run.finish("dense", "abc", 1.0)
    assert run.finished("dense", "abc")
    assert not run.finished("dense", "other")


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_runs_dir_that_cannot_be_made_is_one_message(tiny: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="runs_dir="), open_run(tiny(runs_dir=str(tmp_path / "file" / "x"))):
        pass
