"""Numbers in the environment: a mistake is one message."""

from __future__ import annotations

import pytest

from pipeline.base.environment import number
from pipeline.base.errors import UserError


def test_a_number_or_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_X", raising=False)
    assert number("SECATEUR_X", 12) == 12
    monkeypatch.setenv("SECATEUR_X", "0.5")
    assert number("SECATEUR_X", 12) == 0.5


@pytest.mark.parametrize("text", ["", "abc", "-1", "nan", "inf"])
def test_what_is_no_number_is_named_with_its_remedy(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_X", text)
    with pytest.raises(UserError, match=f"SECATEUR_X={text} is not a number from 0 up: set it as in SECATEUR_X=12"):
        number("SECATEUR_X", 12)
