"""Passwords and signatures of URLs are taken out of texts; everything else stays."""

from __future__ import annotations

import pytest

from pipeline.base.hiding import hide


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://ann:pw@host:5000/x", "http://host:5000/x"),
        ("http://ann:p@w/d@host/x", "http://host/x"),
        ("https://token@host", "https://host"),
        ("postgresql+psycopg2://ann:pw@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("no answer from 'http://ann:pw@host', 'http://bob:pw@host'", "no answer from 'http://host', 'http://host'"),
        ("https://h/x?X-Amz-Signature=ab12&X-Amz-Date=1", "https://h/x?X-Amz-Signature=***&X-Amz-Date=1"),
        ("https://h/x?a=1&X-Amz-Security-Token=q%2Fz, then", "https://h/x?a=1&X-Amz-Security-Token=*** then"),
        ("https://h/x?sv=2&sig=abc#top", "https://h/x?sv=2&sig=***#top"),
        ("https://h/x?AWSAccessKeyId=A&Signature=b", "https://h/x?AWSAccessKeyId=***&Signature=***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert hide(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/x@y",
        "http://127.0.0.1:5000, mail me@host",
        "s3://bucket/runs/a:b@c",
        "postgresql://mlflow@db/mlflow",
        "sqlite:////data/a@b/mlflow.db",
        "https://host/x?page=2&design=3",
        "me@host, lr=0.1, token=x",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide(text) == text
