"""The mixing of a text in a terminal: a map of layers x experts, and without colour a letter under each token.

Takes numbers, names and styles; knows nothing of models or of what is written.
Letters: L layers, then sites outside of them  C columns: the experts, then the base
"""

import unicodedata
from collections.abc import Sequence
from string import ascii_letters

from rich.cells import cell_len
from rich.console import Console, Group, OverflowMethod
from rich.table import Table
from rich.text import Text
from torch import Tensor

from xloom.seeing.sites import Groups
from xloom.seeing.statistics import mean_by_group
from xloom.trace.shares import BLOCKS, DIGITS, bands, bars

BASE_KEY = "-"
_SHARES = len("share ") + len("leads")


def has_colour(console: Console) -> bool:
    """Whether colours reach the reader: not without a terminal, nor where NO_COLOR is set."""
    return console.record or (console.color_system is not None and not console.no_color)


def keys(names: Sequence[str]) -> list[str]:
    """A letter for every expert, "?" when they run out, and a sign for the base, which comes last."""
    return [*(ascii_letters.swapcase() + "?" * len(names))[: len(names) - 1], BASE_KEY]


def mixing_map(
    share_SC: Tensor,
    layers: Groups,
    names: Sequence[str],
    styles: Sequence[str],
    led: Sequence[float],
    console: Console,
) -> Group:
    """Every expert in a line: its share in each layer as a bar, in all, and the part of the tokens that it leads.

    Neighbouring layers share a column where the console is narrow. The base has a line if it has a share.

    Args:
        share_SC: mean shares at each site.
        layers: of the sites; what is outside of them follows the layers.
    """
    marks = DIGITS if console.options.ascii_only else BLOCKS
    share_LC = mean_by_group(share_SC, layers.of_S, len(layers.labels))
    depth = sum(label.isdigit() for label in layers.labels)
    outside = len(layers.labels) - depth
    plain = not has_colour(console)
    width = min(max(map(len, names)), max(6, console.width // 4))
    room = console.width - width - 2 * plain - _SHARES - 2 - (outside + 1 if outside else 0)
    band_KC = bands(share_LC[:depth], max(room, 1))
    highest = max([*band_KC.flatten().tolist(), *share_LC[depth:].flatten().tolist()], default=0.0)
    said = _caption(layers.labels[:depth], layers.labels[depth:], len(band_KC), f"{marks[-1]} is {highest:.0%}")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    if plain:
        table.add_column("", no_wrap=True)
    cut: OverflowMethod = "crop" if console.options.ascii_only else "ellipsis"
    table.add_column("expert", no_wrap=True, max_width=width, overflow=cut)
    table.add_column("", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("leads", justify="right", no_wrap=True)
    share_C = share_SC.mean(dim=0).tolist()
    for place, (key, name, style) in enumerate(zip(keys(names), names, styles, strict=True)):
        if place == len(names) - 1 and share_C[place] < 5e-4 and led[place] == 0:
            continue
        line = bars(band_KC[:, place].tolist(), highest, marks)
        if outside:
            line = f"{line} {bars(share_LC[depth:, place].tolist(), highest, marks)}".lstrip(" ")
        first = [key] if plain else []
        numbers = [f"{share_C[place]:.0%}", f"{led[place]:.0%}"]
        table.add_row(*first, Text(name, style=style), Text(line, style=style), *numbers)
    return Group(Text(said, style="dim"), table)


def ribbon(pieces: Sequence[str], leads: Sequence[str], width: int) -> list[str]:
    """The text in lines of at most so many cells, each followed by a line with a letter under each character.

    Args:
        pieces: what each token adds to the text.
        leads: the letter of each token.
    """
    out: list[str] = []
    text = under = ""
    for piece, lead in zip(pieces, leads, strict=True):
        for character in piece:
            size = cell_len(character)
            if character == "\n" or (text and cell_len(text) + size > width):
                out += [text, under]
                text = under = ""
            if character == "\n":
                continue
            if unicodedata.category(character) in ("Cc", "Cs"):
                character, size = " ", 1
            text, under = text + character, under + lead * size
    return out + ([text, under] if text else [])


def _caption(layers: Sequence[str], outside: Sequence[str], columns: int, scale: str) -> str:
    """`layers 0-29, 2 to a column, lm_head; █ is 62%`"""
    words = []
    if layers:
        words.append(f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}")
        if columns < len(layers):
            words.append(f"{-(-len(layers) // columns)} to a column")
    return f"{', '.join([*words, *outside])}; {scale}"
