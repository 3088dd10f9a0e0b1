"""Schedules: the density after each round, and from it the number of weights to keep.

To add one, write a function from (settings, final density, density at the start) to densities and put it into
SCHEDULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.settings.pruning import Prune


def _one_shot(prune: Prune, final: float, start: float) -> list[float]:
    return [final]


def _geometric(prune: Prune, final: float, start: float) -> list[float]:
    """Each round keeps the same share of what the round before kept."""
    return [start * (final / start) ** (k / prune.rounds) for k in range(1, prune.rounds)] + [final]


def _cubic(prune: Prune, final: float, start: float) -> list[float]:
    return [cubic_density(start, final, k / prune.rounds) for k in range(1, prune.rounds)] + [final]


def _listed(prune: Prune, final: float, start: float) -> list[float]:
    """prune.list as it is: its last density is the final one."""
    assert prune.list, "axes.require_fitting refuses schedule=list without prune.list"
    return [*prune.list]


@dataclass(frozen=True)
class Schedule:
    """How the density falls over the rounds, and what others ask of it.

    densities(prune, final, start): the density after each round.
    fixes_densities: it fixes how much is pruned in each round. A run that finds its own densities cannot use it.
    from_list: the densities are those of prune.list. Its last one ends the run, not target.compression.
    """

    densities: Callable[[Prune, float, float], list[float]]
    fixes_densities: bool = True
    from_list: bool = False


SCHEDULES: dict[str, Schedule] = {
    "one-shot": Schedule(_one_shot),
    "geometric": Schedule(_geometric, fixes_densities=False),  # the same share in each round, whatever the end
    "cubic": Schedule(_cubic),
    "list": Schedule(_listed, from_list=True),
}


def of(prune: Prune) -> Schedule:
    """The schedule that the settings name. Raises UserError for an unknown one."""
    return lookup(SCHEDULES, prune.schedule, "prune.schedule")


def densities(prune: Prune, final_density: float, start: float = 1.0) -> list[float]:
    """Density (kept / prunable, 0..1) after each round, falling from `start`, at which the first round begins.

    Ends at `final_density`; a schedule from a list ends at the list's last density. Raises UserError for an unknown
    schedule.
    """
    assert 0.0 < final_density <= 1.0, final_density
    return of(prune).densities(prune, final_density, start)


def cubic_density(before: float, after: float, share: float) -> float:
    """Zhu and Gupta 2017, equation 1: from `before` to `after`, fast at the start and slow at the end.

    `share` (0..1) is how much of the way is done.
    """
    return after + (before - after) * (1.0 - share) ** 3


def budgets(densities: list[float], total: int, compression: float | None) -> list[int]:
    """Weights kept after each round, of `total` prunable ones: exact integers that never rise.

    Each is the largest integer whose density is not above the planned one. With `compression`, the last is the largest
    integer with total / kept >= compression. Raises UserError where a budget would be 0 weights.
    """
    assert densities
    assert total > 0
    if compression is None:
        last = at_most(densities[-1], total)
    else:
        last = compressed(total, compression)
    if last < 1:
        wanted = f"prune.list={densities[-1]}" if compression is None else f"target.compression={compression:g}"
        raise UserError(
            f"{wanted} keeps less than one of the network's {total:,} prunable weights; the most is a compression of "
            f"{total:,}"
        )
    kept: list[int] = []
    for density in densities[:-1]:
        ceiling = kept[-1] if kept else total
        kept.append(min(ceiling, max(last, at_most(density, total))))
    return [*kept, last]


def at_most(density: float, total: int) -> int:
    """The largest count with count / total <= density, as floats compare (0.1 of 10 is 1)."""
    count = min(total, int(density * total) + 1)
    while count > 0 and count / total > density:
        count -= 1
    return count


def compressed(total: int, compression: float) -> int:
    """The largest count with total / count >= compression."""
    count = min(total, int(total / compression) + 1)
    while count > 0 and total / count < compression:
        count -= 1
    return count
