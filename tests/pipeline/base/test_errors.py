"""A mistake is one message on one line, however long or broken the values in it are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import MOST_TEXT, UserError, one_line


def test_a_short_message_stays_as_it_is() -> None:
    text = "data.root='/a  b/c' does not exist: set it to a folder"
    assert str(UserError(text)) == text


def test_the_setting_and_the_remedy_stay_of_a_long_value() -> None:
    said = one_line(f"cluster.workers={'x' * 9000}: must be a number: give a number")
    assert said.startswith("cluster.workers=xxx")
    assert said.endswith("xxx: must be a number: give a number")
    assert len(said) < 600


def test_lines_become_one() -> None:
    assert one_line("seed=a0: &a0\n  [x,\r\n x]: must be a number") == "seed=a0: &a0 [x, x]: must be a number"


@given(st.text(max_size=5000))
def test_any_text_is_one_line_of_bounded_length(text: str) -> None:
    said = one_line(text * 3)
    assert len(said) <= MOST_TEXT
    assert not set(said) & set("\n\r\v\f\x85\u2028\u2029")
