"""Ray around `pipeline`: trainings on Ray Train, the scan on Ray Tune, jobs, and the command line."""

import importlib.util as _find
import os as _os
import sys as _sys


def _refuse_another_pipeline() -> None:
    """End the process where a user's own package hides ours: what follows would fail with an error of no use."""
    found = _find.find_spec("pipeline")
    file = found.origin if found is not None else None
    if found is None or (file is not None and _os.path.isfile(_os.path.join(_os.path.dirname(file), "stages.py"))):
        return
    where = _os.path.dirname(file) if file is not None else next(iter(found.submodule_search_locations or ("?",)))
    _sys.stderr.write(
        f"error: the package 'pipeline' in {where} hides secateur's, which has that name too: give yours another name, "
        "or take its folder off PYTHONPATH\n"
    )
    raise SystemExit(2)


_refuse_another_pipeline()
