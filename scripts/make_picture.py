"""Draw docs/generate.svg: what `xloom generate` prints for test questions of the suite, under the shipped model.

python scripts/make_picture.py docs/generate.svg
"""

import io
import sys
from pathlib import Path

from rich.console import Console

from xloom.cli.text import Sampling, generate_texts
from xloom.hub.shipped import model_folder
from xloom.suite.shelf import rows_of
from xloom.training.rows import read_rows

SHOWN = ("materials", "reasoning", "joined")


def main(picture: Path) -> None:
    prompts = []
    for name in SHOWN:
        row = next(read_rows(rows_of(name).test))
        assert not isinstance(row.prompt, str)
        prompts.append(row.prompt[-1]["content"])
    console = Console(record=True, width=72, file=io.StringIO(), force_terminal=False)
    generate_texts(
        str(model_folder("two-pass")),
        prompts,
        base=None,
        router="xlora",
        sampling=Sampling(max_new_tokens=12),
        raw=False,
        json_path=None,
        console=console,
    )
    picture.write_text(console.export_svg(title="xloom generate"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
