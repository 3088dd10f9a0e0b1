"""Where in a user's own code an error arose: the lines of it that count, without ours and those of libraries."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

OURS = ("pipeline", "cluster")
_HOME = Path(__file__).resolve().parents[2]
MOST = 3  # lines that are shown


def place(error: BaseException) -> str:
    """The innermost lines of the user's own code that led to an error, in brackets, or "" where there is none.

    As in ` (at /home/me/net.py:12 in build: nn.Linear(-1, 2), called at /home/me/net.py:30 in network: build())`.
    """
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    shown = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in own[: -MOST - 1 : -1]]
    if isinstance(error, SyntaxError) and error.filename is not None and _is_users(error.filename):
        shown.insert(0, f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    return f" (at {', called at '.join(shown)})" if shown else ""


def text(error: BaseException) -> str:
    """An error and where it arose, as in `ValueError: negative size (at /home/me/net.py:12 in build: ...)`."""
    name, said = type(error).__name__, " ".join(str(error).split())
    return f"{name}: {said}{place(error)}" if said else f"{name}{place(error)}"


def clash(module: str | None) -> str:
    """What to say of a module that was looked for in vain in one of our packages: a user's own may have its name."""
    top = (module or "").partition(".")[0]
    if top not in OURS:
        return ""
    return (
        f"; '{top}' is a package of secateur's own ({_HOME / top}), and Python finds only one of that name: give your "
        "own another name"
    )


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    path = os.path.realpath(file)
    libraries = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots = [*(str(_HOME / top) for top in OURS), *(os.path.realpath(library) for library in libraries)]
    return not any(path.startswith(f"{root}{os.sep}") for root in roots)
