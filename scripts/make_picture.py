"""Draw docs/generate.svg: what `xloom generate` prints for one held-out prompt of each demo domain.

python scripts/make_picture.py runs/demo docs/generate.svg        (after `xloom demo`)
"""

import io
import sys
from pathlib import Path

from rich.console import Console

from xloom.cli.demo import SHOWN
from xloom.cli.text import Sampling, generate_texts
from xloom.suite.domains import build_suite
from xloom.training.rows import read_rows


def main(demo: Path, picture: Path) -> None:
    prompts = []
    for files in build_suite(only=SHOWN).values():
        row = next(read_rows(files.test))
        assert not isinstance(row.prompt, str)
        prompts.append(row.prompt[-1]["content"])
    console = Console(record=True, width=72, file=io.StringIO(), force_terminal=False)
    generate_texts(
        str(demo / "model"),
        prompts,
        base=None,
        router="xlora",
        sampling=Sampling(max_new_tokens=4),
        raw=False,
        json_path=None,
        console=console,
    )
    picture.write_text(console.export_svg(title="xloom generate"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
