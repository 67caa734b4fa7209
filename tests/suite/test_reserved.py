import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xloom.errors import DataError
from xloom.suite.reserved import FIRST_RESERVED_SEED, check_seed, drop_reserved, is_reserved


@given(st.text())
def test_reserved_means_that_the_sha1_ends_in_7(key: str) -> None:
    assert is_reserved(key) == (hashlib.sha1(key.encode()).digest()[-1] % 16 == 7)


def test_known_keys() -> None:
    assert [n for n in range(100) if is_reserved(str(n))] == [9, 22, 46, 48, 56, 61, 63, 72, 75, 76, 92]


def test_dropping_keeps_order_and_drops_on_any_key() -> None:
    rows = [("b", "x"), ("9", "x"), ("a", "9"), ("a", "x")]
    assert drop_reserved(rows, lambda row: row[0]) == [("b", "x"), ("a", "9"), ("a", "x")]
    assert drop_reserved(rows, lambda row: row) == [("b", "x"), ("a", "x")]


def test_seeds_below_nine_million_only() -> None:
    assert FIRST_RESERVED_SEED == 9_000_000
    assert check_seed(8_999_999) == 8_999_999
    with pytest.raises(DataError, match="seed 9000000 is reserved"):
        check_seed(9_000_000)
