"""What a config from somebody else may not decide: which code is run, and which server gets the user's credentials.

From somebody else are a config read from a URL, and that of a run's folder. A local file of the user's own, given as
CONFIG, and what is typed on the command line are the user's word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.hiding import hide
from pipeline.settings.cluster import Tracking
from pipeline.settings.model import Model

# A name right in a public module of torchvision.models: nothing that such a module merely imports by a longer way.
_TORCHVISION = re.compile(r"torchvision\.models(\.[A-Za-z]\w*)*[.:][A-Za-z]\w*")
_OF_A_RUN = ("run.json", "lease.json", "result.json", "data.json", "test_looks.jsonl", "report.html")
# What MLflow and its databases take from the environment, and send to whichever server they are told of.
_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_CLIENT_CERT_PATH", "PGPASSWORD", "MYSQL_PWD",
)  # fmt: skip


def is_foreign(config: str | Path) -> bool:
    """Whether a config's path is a URL, or of a file that lies among a run's own."""
    if not storage.is_local(config):
        return True
    file = storage.local_path(config)
    folders = {file.absolute().parent, Path(os.path.realpath(file)).parent}
    return any(os.path.lexists(folder / name) for folder in folders for name in _OF_A_RUN)


def is_torchvisions(factory: str) -> bool:
    """Whether model.factory names something in torchvision.models."""
    return _TORCHVISION.fullmatch(factory) is not None


def needs_trust(model: Model) -> bool:
    """Whether the network is an import path that is not torchvision's."""
    factory = model.factory
    return ("." in factory or ":" in factory) and not is_torchvisions(factory)


def require_known_code(model: Model, origin: str, trust_code: bool) -> None:
    """Raise UserError where the network is an import path that is not torchvision's, unless that code is trusted."""
    if not trust_code and needs_trust(model):
        raise UserError(
            f"{origin} names the network model.factory='{model.factory}', and to build it would run that code: if you "
            "trust whoever wrote it, add --trust-code"
        )


def require_named_server(tracking: Tracking, origin: str, remedy: str) -> None:
    """Raise UserError where a remote tracking.uri would get credentials of this environment.

    MLFLOW_TRACKING_URI names a server that may have them. `remedy` says how to name one for a single command.
    """
    if held := sent(tracking):
        raise UserError(
            f"{origin} names the server tracking.uri={tracking.uri}, which would be sent your credentials "
            f"({', '.join(held)}): if it is a server of yours, {remedy}, or set MLFLOW_TRACKING_URI to it"
        )


def sent(tracking: Tracking) -> list[str]:
    """Where this environment has credentials that tracking.uri would get, though MLFLOW_TRACKING_URI is another."""
    uri = tracking.uri
    if uri is None or not _is_remote(uri) or _same(uri, os.environ.get("MLFLOW_TRACKING_URI", "")):
        return []
    return _credentials()


def is_named(setting: str, overrides: Sequence[str]) -> bool:
    """Whether a setting is among those of the command line."""
    return any(override.partition("=")[0] == setting for override in overrides)


def _credentials() -> list[str]:
    """Where this environment has credentials for a tracking server: names of variables, and MLflow's file."""
    found = [name for name in _CREDENTIALS if os.environ.get(name)]
    file = Path("~/.mlflow/credentials").expanduser()
    return [*found, str(file)] if file.is_file() else found


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith(("sqlite:", "file:"))


def _same(uri: str, named: str) -> bool:
    return hide(uri).rstrip("/") == hide(named).rstrip("/")
