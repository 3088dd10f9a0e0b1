"""The MLflow compose file: parsed by an implementation of the Compose specification, and what it promises."""

from __future__ import annotations

import configparser
import json
import re
from typing import Any

import mlflow
import pytest
import yaml
from compose_spec import PyCompose
from infra_files import INFRA
from mlflow.cli import cli
from support import ROOT

FOLDER = INFRA / "mlflow"
TEXT = (FOLDER / "compose.yaml").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
EXAMPLE = dict(
    line.split("=", 1) for line in (FOLDER / ".env.example").read_text().splitlines() if line and line[0] != "#"
)
SECRETS = {name for name, value in EXAMPLE.items() if not value}
FILLED = {name: value or f"secret-{name.lower()}" for name, value in EXAMPLE.items()}


def interpolated(values: dict[str, str]) -> dict[str, Any]:
    """The file as compose reads it with such an .env; raises KeyError where a required variable is empty."""

    def fill(match: re.Match[str]) -> str:
        name, sign, default = match.groups()
        if values.get(name):
            return values[name]
        if sign == "-":
            return str(default)
        raise KeyError(name)

    return dict(yaml.safe_load(VARIABLE.sub(fill, TEXT)))


COMPOSE = interpolated(FILLED)
SERVICES = COMPOSE["services"]


def test_it_follows_the_specification() -> None:
    parsed = PyCompose.from_yaml(yaml.safe_dump(COMPOSE, width=10_000))
    assert sorted(parsed.service_names()) == ["bucket", "mlflow", "postgres", "store"]


@pytest.mark.parametrize(("key", "value"), [("imge", "x"), ("ports", ["70000:1"]), ("healthcheck", {"tset": "x"})])
def test_the_parser_refuses_mistakes(key: str, value: Any) -> None:
    broken = {**COMPOSE, "services": {**SERVICES, "mlflow": {**SERVICES["mlflow"], key: value}}}
    with pytest.raises(ValueError):
        PyCompose.from_yaml(yaml.safe_dump(broken, width=10_000))


def test_the_example_names_each_variable_and_holds_no_secret() -> None:
    assert {match[0] for match in VARIABLE.findall(TEXT)} == set(EXAMPLE)
    assert {
        "POSTGRES_PASSWORD",
        "MLFLOW_ADMIN_PASSWORD",
        "MLFLOW_SESSION_KEY",
        "STORE_ACCESS_KEY",
        "STORE_SECRET_KEY",
    } == SECRETS
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_it_does_not_start_without_a_secret(missing: str) -> None:
    with pytest.raises(KeyError, match=missing):
        interpolated({**FILLED, missing: ""})


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_pinned_and_hardened(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+", service["image"])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    if service["restart"] != "no":
        assert service["healthcheck"]["test"][0] == "CMD"
    if "build" in service:
        context = (FOLDER / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).is_file()


def test_only_mlflow_is_published_and_only_on_loopback() -> None:
    assert {name for name in SERVICES if "ports" in SERVICES[name]} == {"mlflow"}
    assert SERVICES["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {name for name in SERVICES if "outside" in SERVICES[name]["networks"]} == {"mlflow"}


def test_each_service_gets_only_its_own_secrets_and_none_in_a_command() -> None:
    def held(value: Any) -> set[str]:
        return {name for name in SECRETS if FILLED[name] in json.dumps(value)}

    store = {"STORE_ACCESS_KEY", "STORE_SECRET_KEY"}
    assert {name: held(service.get("environment", {})) for name, service in SERVICES.items()} == {
        "postgres": {"POSTGRES_PASSWORD"},
        "store": set(),
        "bucket": store,
        "mlflow": {"POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SESSION_KEY", *store},
    }
    assert not any(held(service.get("command", [])) for service in SERVICES.values())
    assert held(COMPOSE["configs"]["identities"]) == store
    (identity,) = json.loads(COMPOSE["configs"]["identities"]["content"])["identities"]
    assert identity["credentials"] == [
        {"accessKey": FILLED["STORE_ACCESS_KEY"], "secretKey": FILLED["STORE_SECRET_KEY"]}
    ]


def test_the_server_asks_for_a_password_and_knows_its_names() -> None:
    program, command, *options = SERVICES["mlflow"]["command"]
    assert program == "mlflow"
    server = cli.commands[command]
    given = server.make_context(command, list(options), resilient_parsing=True).params
    assert given["app_name"] == "basic-auth"
    assert given["allowed_hosts"] == EXAMPLE["MLFLOW_ALLOWED_HOSTS"]
    assert "*" not in given["allowed_hosts"]
    assert given["serve_artifacts"] is True
    assert given["artifacts_destination"].startswith("s3://")
    assert SERVICES["mlflow"]["image"].endswith(f":{mlflow.__version__}")


def test_users_live_in_the_same_database_without_a_password_in_the_file() -> None:
    auth = configparser.ConfigParser()
    auth.read(FOLDER / "basic_auth.ini")
    backend = next(o for o in SERVICES["mlflow"]["command"] if o.startswith("--backend-store-uri="))
    assert backend == f"--backend-store-uri={auth['mlflow']['database_uri']}"
    assert "admin_password" not in auth["mlflow"]


def test_requirements_are_in_its_lock() -> None:
    lock = (FOLDER / "requirements.lock").read_text()
    for line in (FOLDER / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pinned = line if "==" in line else f"{line}=="
            assert re.search(rf"^{re.escape(pinned)}", lock, re.MULTILINE | re.IGNORECASE), line
