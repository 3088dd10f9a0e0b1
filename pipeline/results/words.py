"""Numbers for readers: percent, points, bytes, durations. A value that was not measured says so."""

from __future__ import annotations

from datetime import UTC, datetime

NOT_MEASURED = "not measured"


def percent(value: float | None, digits: int = 2) -> str:
    """0.9836 as 98.36%."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}%"


def points(value: float, sign: str = "+") -> str:
    """0.0005 as +0.05 points, of percent."""
    return f"{100 * value:{sign}.2f} points".replace("-", "−")


def better(drop: float) -> str:
    """A drop in words: -0.0028 as `0.28 points better`, 0.0028 as `0.28 points worse`."""
    if f"{100 * abs(drop):.2f}" == "0.00":
        return "as good"
    return f"{points(abs(drop), sign='')} {'worse' if drop > 0 else 'better'}"


def span(low: float, high: float) -> str:
    """An interval, in points."""
    return f"{points(low).removesuffix(' points')} to {points(high)}"


def count(value: float | None) -> str:
    """266200 as 266,200."""
    return NOT_MEASURED if value is None else f"{value:,}"


def short(value: float | None) -> str:
    """235200 as 235K, as the paper's tables have it."""
    if value is None:
        return NOT_MEASURED
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes as kB or MB (powers of ten)."""
    if value is None:
        return NOT_MEASURED
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:g} B"


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten below 100,000."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as 3 h 05 min, 4 min 10 s or 2.5 s."""
    if seconds is None:
        return NOT_MEASURED
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.3g} s"


def moment(milliseconds: int) -> str:
    """Milliseconds since 1970 as date and time in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
