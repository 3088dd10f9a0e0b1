"""Which rank the others wait for in vain, from what they know of each other."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pipeline.train import roll
from pipeline.train.roll import Note, Seen, missing, said
from pipeline.train.world import World

LIMIT = 10.0


def seen(number: int, still: float, silent: float = 0.0, waits: bool = True, done: bool = False) -> Seen:
    return Seen(Note(number, "step 7 of dense", waits, done, 3600.0, 42, "node-b"), still, silent)


def test_the_private_name_of_torch_is_still_there() -> None:
    assert callable(distributed_c10d._get_default_store)


def test_a_rank_whose_process_is_silent_is_missing() -> None:
    ranks = {0: seen(5, 11.0), 1: seen(5, 11.0, silent=11.0), 2: seen(5, 11.0)}
    assert missing(ranks, LIMIT) == [1]
    assert missing({**ranks, 1: seen(5, 9.0, silent=9.0)}, LIMIT) is None


def test_a_rank_that_lives_but_stands_still_outside_of_waiting_is_missing() -> None:
    assert missing({0: seen(5, 11.0), 1: seen(4, 11.0, waits=False)}, LIMIT) == [1]


def test_a_slow_rank_that_goes_on_is_waited_for() -> None:
    """The others have waited longer than the limit, but the slow one moved two seconds ago."""
    assert missing({0: seen(5, 60.0), 1: seen(4, 2.0, waits=False)}, LIMIT) is None
    assert missing({0: seen(5, 60.0), 1: seen(5, 2.0)}, LIMIT) is None


def test_nobody_is_missing_where_nobody_waits() -> None:
    assert missing({0: seen(5, 60.0, waits=False), 1: seen(5, 60.0, waits=False)}, LIMIT) is None
    assert missing({0: seen(5, 60.0, waits=False), 1: seen(9, 60.0, silent=60.0, done=True)}, LIMIT) is None


def test_the_rank_that_waits_at_an_earlier_place_is_behind() -> None:
    assert missing({0: seen(5, 60.0), 1: seen(4, 60.0), 2: seen(5, 60.0)}, LIMIT) == [1]


def test_ranks_that_all_wait_at_the_same_place_have_lost_their_network() -> None:
    ranks = {0: seen(5, 60.0), 1: seen(5, 60.0)}
    assert missing(ranks, LIMIT) == []
    assert "look at the network" in said(ranks, [], LIMIT)


def test_what_is_said_names_rank_host_process_place_time_and_setting() -> None:
    text = said({0: seen(5, 11.0), 1: seen(5, 11.0, silent=11.0)}, [1], LIMIT)
    for part in ("rank 1 on node-b", "process 42", "step 7 of dense", "01:00:00 UTC", "cluster.hang_seconds=10"):
        assert part in text, text


def test_a_rank_that_does_not_come_is_found_over_a_real_store_and_a_slow_one_is_not() -> None:
    """Two ranks of one process: rank 0 waits; rank 1 goes on slowly for longer than the limit, and then no more."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    found: list[str] = []
    came = threading.Event()

    def finder(text: str) -> None:
        found.append(text)
        came.set()

    with (
        roll.called(dist.PrefixStore("t", server), 0, 2, 4.0, finder) as first,
        roll.called(dist.PrefixStore("t", server), 1, 2, 4.0, lambda _: None) as second,
    ):
        assert first is not None
        assert second is not None
        one, two = World(0, 2, torch.device("cpu"), first), World(1, 2, torch.device("cpu"), second)
        one.at("a sum", waits=True)
        for step in range(12):
            two.at(f"step {step}")
            time.sleep(0.5)
            assert not found
        assert came.wait(20)
    assert "rank 1" in found[0]
    assert "step 11" in found[0]
