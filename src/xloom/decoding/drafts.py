"""Tokens that are likely to come, found in the text itself. Knows nothing of models."""

from collections.abc import Sequence


def lookup(tokens: Sequence[int], count: int, longest: int = 3) -> list[int]:
    """Up to `count` tokens that followed the last place where the text ended as it does now (prompt lookup).

    The longest match of at most `longest` tokens counts, and of equally long ones the latest.
    """
    if count < 1:
        return []
    end = len(tokens)
    for length in range(min(longest, end - 1), 0, -1):
        ending = list(tokens[end - length :])
        for start in range(end - length - 1, -1, -1):
            if tokens[start] == ending[0] and list(tokens[start : start + length]) == ending:
                follows = start + length
                return [tokens[follows + i % (end - follows)] for i in range(count)]
    return []
