"""Tokens that are likely to come, found in the text itself. Knows nothing of models."""

from collections.abc import Sequence


def lookup(tokens: Sequence[int], most: int, longest: int = 8) -> list[int]:
    """Tokens that followed the last place where the text ended as it does now (prompt lookup).

    The longest match counts, up to `longest` tokens or `most`, and of equally long ones the latest. As many tokens as
    it is long, `most` at most: the more came again, the more will (docs/performance.md).
    """
    end, best, follows = len(tokens), 0, 0
    longest = min(max(longest, most), end - 1)
    for place in range(end - 1, 0, -1):
        if tokens[place - 1] == tokens[-1]:
            length = 1
            while length < min(longest, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
                length += 1
            if length > best:
                best, follows = length, place
                if best == longest:
                    break
    return [tokens[follows + i % (end - follows)] for i in range(min(best, most))]
