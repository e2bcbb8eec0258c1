"""Tables of text, against tables written by hand."""

import pytest

from flix_jax.adapters import text_tables

ROWS = [["", "a", "long"], ["first", "12", "3"], ["x", "1", "10"]]


def test_plain():
    assert text_tables.plain(ROWS) == (
        "        a  long\n-----  --  ----\nfirst  12     3\nx       1    10"
    )


def test_markdown():
    assert text_tables.markdown(ROWS) == (
        "|       |  a | long |\n|-------|---:|-----:|\n| first | 12 |    3 |\n| x     |  1 |   10 |"
    )


@pytest.mark.parametrize("form", [text_tables.plain, text_tables.markdown])
def test_a_header_alone_is_a_table_and_ragged_rows_are_none(form):
    assert "only" in form([["only"]])
    with pytest.raises(ValueError):
        form([["a", "b"], ["c"]])
