"""The cache of shards on a node's disk, and shards on S3: pushed, read, verified."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from web_server import Quiet, serving

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import cache as caching
from pipeline.data import loader, push, shards
from pipeline.data.cache import Cache, Entry
from pipeline.data.loader import Batch
from pipeline.settings.config import Config
from pipeline.storage import s3 as boto

Tiny = Callable[..., Config]
CONTENT = {name: name.encode() * 1000 for name in ("a", "b", "c")}  # 1,000 bytes each


@pytest.fixture
def entries(s3: str) -> dict[str, Entry]:
    """Three objects on S3, as a manifest would describe them."""
    made = {}
    for name, data in CONTENT.items():
        url = f"{s3}/{name}.tar"
        storage.write_bytes(url, data)
        version = storage.stat(url).version  # type: ignore[union-attr]
        made[name] = Entry(url, version, len(data), storage.sha256(url))
    return made


def read(cache: Cache, entry: Entry) -> bytes | None:
    stream = cache.open(entry.url, 0, None)
    if stream is None:
        return None
    with stream:
        return stream.read()


def kept(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.tar"))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would begin."""
    monkeypatch.setattr(caching, "_checked", set())


def test_a_shard_is_fetched_once_and_the_one_used_longest_ago_goes(entries: dict[str, Entry], tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 2500, entries.values())
    for name in ("a", "b"):
        assert read(cache, entries[name]) == CONTENT[name]
    for name in ("a", "b"):
        storage.write_bytes(entries[name].url, b"replaced")  # only what is kept can still be read
    for name in ("b", "a", "c"):
        assert read(cache, entries[name]) == CONTENT[name]
    assert {path.read_bytes() for path in tmp_path.glob("*.tar")} == {CONTENT["a"], CONTENT["c"]}


def test_a_damaged_entry_is_never_used(
    entries: dict[str, Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(str(tmp_path), 10**6, entries.values())
    read(cache, entries["a"])
    (path,) = tmp_path.glob("*.tar")
    path.write_bytes(b"a" * 999 + b"!")
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged; .* is fetched again"):
        assert read(cache, entries["a"]) == CONTENT["a"]
    path.write_bytes(b"a" * 500)
    assert read(cache, entries["a"]) == CONTENT["a"]


def test_what_is_not_as_the_manifest_says_is_not_kept(entries: dict[str, Entry], tmp_path: Path) -> None:
    wrong = Entry(entries["a"].url, entries["a"].version, 1000, "0" * 64)
    with pytest.raises(UserError, match="another SHA-256"):
        read(Cache(str(tmp_path), 10**6, [wrong]), wrong)
    storage.write_bytes(entries["b"].url, b"replaced")
    with pytest.raises(UserError, match="was changed"):
        read(Cache(str(tmp_path), 10**6, entries.values()), entries["b"])
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith("lock")] == []


def test_shards_of_one_name_do_not_stand_in_for_each_other(s3: str, tmp_path: Path) -> None:
    made = []
    for folder, data in (("train", b"1" * 10), ("val", b"2" * 10), ("train", b"3" * 10)):
        url = f"{s3}/{folder}/0.tar"
        storage.write_bytes(url, data)
        entry = Entry(url, storage.stat(url).version, 10, storage.sha256(url))  # type: ignore[union-attr]
        assert read(Cache(str(tmp_path), 10**6, [entry]), entry) == data
        made.append(entry)
    assert kept(tmp_path) == 3


def test_a_shard_over_the_limit_is_not_kept(entries: dict[str, Entry], tmp_path: Path) -> None:
    assert read(Cache(str(tmp_path), 999, entries.values()), entries["a"]) is None


def test_a_folder_that_cannot_be_used_is_one_message(entries: dict[str, Entry], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*cannot be used"):
        read(Cache(str(tmp_path / "file" / "x"), 10**6, entries.values()), entries["a"])


def _worker(folder: str, entries: list[Entry], seed: int, failed: list[str]) -> None:
    cache = Cache(folder, 2500, entries)
    for number in np.random.default_rng(seed).integers(0, 3, 40).tolist():
        if read(cache, entries[number]) != "abc"[number].encode() * 1000:
            failed.append(entries[number].url)


def test_several_processes_share_it(entries: dict[str, Entry], tmp_path: Path) -> None:
    """Three processes, and room for two of three shards: each read is right, and the limit holds in the end."""
    context = multiprocessing.get_context("fork")
    boto.client.cache_clear()  # connections are not shared with children
    failed = context.Manager().list()
    workers = [
        context.Process(target=_worker, args=(str(tmp_path), list(entries.values()), seed, failed)) for seed in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert list(failed) == []
    assert kept(tmp_path) == 2
    assert not list(tmp_path.glob(".*"))


def test_several_threads_share_it(entries: dict[str, Entry], tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 2500, entries.values())
    names = [*"abc"] * 20
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: read(cache, entries[name]), names)) == [CONTENT[name] for name in names]
    assert kept(tmp_path) == 2


def test_a_killed_process_leaves_no_lock(entries: dict[str, Entry], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    cache, inside = Cache(str(tmp_path), 10**6, entries.values()), context.Event()

    def hold() -> None:
        with cache._lock("lock"):
            inside.set()
            time.sleep(600)

    holder = context.Process(target=hold)
    holder.start()
    assert inside.wait(60)
    holder.kill()
    holder.join(60)
    assert read(cache, entries["a"]) == CONTENT["a"]


@pytest.fixture
def pushed(tiny: Tiny, s3: str, tmp_path: Path) -> str:
    """Shards of the digits on S3."""
    config = tiny(**{"data.shard_samples": 300})
    shards.build(config.data, 0, str(tmp_path / "shards"))
    assert push.push(str(tmp_path / "shards"), f"{s3}/shards") == (8, 0)
    return f"{s3}/shards"


def test_push_sends_what_is_missing_and_nothing_else(pushed: str, tmp_path: Path, tiny: Tiny) -> None:
    source = str(tmp_path / "shards")
    assert shards.load_manifest(pushed).identity == shards.load_manifest(source).identity
    assert push.push(source, pushed) == (0, 8)
    names = [name for name in storage.list_files(pushed) if name.endswith(".tar")]
    storage.remove(f"{pushed}/{names[2]}")
    storage.write_bytes(f"{pushed}/{names[3]}", b"another")
    storage.remove(f"{pushed}/manifest.json")
    assert push.push(source, pushed) == (2, 6)
    for number in range(3):
        storage.write_bytes(f"{pushed}/manifest-{number:016d}.columns", b"older")
    push.push(source, pushed)
    assert len([name for name in storage.list_files(pushed) if name.endswith(".columns")]) == 1
    other = str(tmp_path / "other")
    shards.build(tiny().data, 1, other)
    with pytest.raises(UserError, match="belongs to other shards"):
        push.push(other, pushed)
    with pytest.raises(UserError, match="is not on S3"):
        push.push(source, other)


def test_push_refuses_a_shard_that_was_harmed(pushed: str, tmp_path: Path, s3: str) -> None:
    shard = next((tmp_path / "shards").glob("val-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=rf"{shard.name}' has another SHA-256"):
        push.push(str(tmp_path / "shards"), f"{s3}/again")
    assert "manifest.json" not in storage.list_files(f"{s3}/again")


def test_verify_names_what_differs(pushed: str) -> None:
    assert shards.verify(pushed) == []
    names = [name for name in storage.list_files(pushed) if name.endswith(".tar")]
    storage.remove(f"{pushed}/{names[0]}")
    data = bytearray(storage.read_bytes(f"{pushed}/{names[1]}"))
    data[data.index(b"IEND") + 6] ^= 1  # within an image
    storage.write_bytes(f"{pushed}/{names[1]}", bytes(data))
    problems = shards.verify(pushed)
    assert f"shard '{pushed}/{names[0]}' is missing" in problems
    assert f"shard '{pushed}/{names[1]}' has another SHA-256 than the manifest says" in problems


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_from_s3_is_the_stream_from_disk(pushed: str, tiny: Tiny, tmp_path: Path, cached: bool) -> None:
    def batches(root: str) -> list[bytes]:
        changes = {"data.cache_dir": str(tmp_path / "cache")} if cached else {}
        config = tiny(**{"data.source": "shards", "data.root": root, "data.cache_bytes": 0, **changes}).data
        split = loader.open_split(config, root, shards.load_manifest(root), "train")
        epoch = loader.TrainLoader(split, config, batch_size=64, seed=0, rank=0, world=1).epoch(0)
        return [batch.images.numpy().tobytes() + batch.indices.numpy().tobytes() for batch in epoch]

    assert batches(pushed) == batches(str(tmp_path / "shards"))
    assert (tmp_path / "cache").exists() == cached


class Slow(Quiet):
    """Serves the files of a folder, whole or in ranges, each answer after a while; counts those under way."""

    folder: Path
    under_way: set[int] = set()
    most = 0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.under_way.add(threading.get_ident())
        type(self).most = max(self.most, len(self.under_way))
        time.sleep(0.05)
        self._answer(body=True)
        self.under_way.discard(threading.get_ident())

    def _answer(self, body: bool) -> None:
        file = self.folder / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, start = file.read_bytes(), 0
        stop = len(content)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(stop, int(wanted[2] or stop) + 1)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Content-Length", str(stop - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[start:stop])


def test_lanes_of_a_distant_root_wait_for_their_requests_side_by_side(tiny: Tiny, tmp_path: Path) -> None:
    shards.build(tiny(**{"data.shard_samples": 20}).data, 0, str(tmp_path / "shards"))
    before = set(threading.enumerate())

    def batches(root: str) -> Generator[Batch, None, None]:
        config = tiny(**{"data.source": "shards", "data.root": root, "data.cache_bytes": 0}).data
        split = loader.open_split(config, root, shards.load_manifest(root), "train")
        epoch = loader.TrainLoader(split, config, batch_size=64, seed=0, rank=0, world=1).epoch(0)
        assert isinstance(epoch, Generator)
        return epoch

    Slow.folder = tmp_path / "shards"
    with serving(Slow) as root:
        far = [batch.indices.tolist() for batch in batches(root)]
        assert Slow.most > 4  # of 8 lanes
        stopped = batches(root)
        next(stopped)
        stopped.close()
    assert far == [batch.indices.tolist() for batch in batches(str(tmp_path / "shards"))]
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_shard_of_the_right_size_and_other_content_is_found_out(pushed: str, tiny: Tiny) -> None:
    """A flipped bit in an image's data leaves tar and labels whole; only its CRC-32 tells."""
    name = next(name for name in storage.list_files(pushed) if name.startswith("test"))
    data = bytearray(storage.read_bytes(f"{pushed}/{name}"))
    data[data.index(b"IEND") + 6] ^= 1
    storage.write_bytes(f"{pushed}/{name}", bytes(data))
    config = tiny(**{"data.source": "shards", "data.root": pushed}).data
    split = loader.open_split(config, pushed, shards.load_manifest(pushed), "test")
    with pytest.raises(UserError, match=rf"{name}' holds other bytes in the image"):
        list(loader.EvalLoader(split, config).batches(0, 1))


def test_a_shard_of_another_size_is_found_at_once(pushed: str, tiny: Tiny) -> None:
    name = next(name for name in storage.list_files(pushed) if name.startswith("test"))
    storage.write_bytes(f"{pushed}/{name}", b"short")
    config = tiny(**{"data.source": "shards", "data.root": pushed}).data
    with pytest.raises(UserError, match=rf"{name}' has 5 bytes where the manifest says"):
        loader.open_split(config, pushed, shards.load_manifest(pushed), "test")
