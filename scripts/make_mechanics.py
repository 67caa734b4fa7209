"""Make src/xloom/suite/data/mechanics.json: short protein chains and what it takes to pull them apart.

python scripts/make_mechanics.py [FILE]        (needs openmm; about five minutes on one core)

Chains are pieces of modlAMP's peptides, and made-up ones, each out of a few residues with its own share of hydrophobic
ones, so that weak and strong chains occur. Of either only as many are kept as spread the forces evenly; the few beyond
the range of force or energy are left out. Labels come from the model in `xloom.suite.pulling` and are no measurements.
Nothing reserved is used: no reserved sequence, and no piece of one.
"""

import csv
import io
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from xloom.hub.fetch import MODLAMP, fetch, read_member
from xloom.suite import peptides, pulling
from xloom.suite.reserved import is_reserved
from xloom.suite.sequences import is_plain

TABLE = Path(__file__).parents[1] / "src/xloom/suite/data/mechanics.json"
SEED = 1
SHORTEST, LONGEST = 12, 18  # residues
PIECES, INVENTED = 1200, 2000  # chains that are tried
HYDROPHOBIC, OTHERS = "CFILMVWY", "ADEGHKNPQRST"
WEAKEST, STRONGEST, WIDTH = 55.0, 220.0, 15.0  # pN: the range, and a bin of it
EACH = 220  # chains kept in a bin
COSTLIEST = 280.0  # kJ/mol: of the kept chains, those beyond are left out at last


def main(table: Path) -> None:
    random_ = random.Random(SEED)
    modlamp = read_member(fetch(MODLAMP), peptides.MEMBER)
    kept: dict[str, pulling.Pull] = {}
    bins: Counter[int] = Counter()
    for number, sequence in enumerate(chain(pieces(modlamp, random_), invented(random_)), 1):
        label = pulling.pull(sequence)
        place = int((label.force - WEAKEST) // WIDTH)
        if WEAKEST <= label.force < STRONGEST and bins[place] < EACH and sequence not in kept:
            kept[sequence] = label
            bins[place] += 1
        if number % 500 == 0:
            print(f"{number} chains, kept {len(kept)}: {sorted(bins.items())}", file=sys.stderr, flush=True)
    labels = [[sequence, round(pull.force, 1), round(pull.energy, 1)] for sequence, pull in sorted(kept.items())]
    rows = ",\n".join(json.dumps(label) for label in labels if label[2] < COSTLIEST)
    about = "computed with the coarse-grained pulling model of xloom.suite.pulling; not measured"
    columns = '["sequence", "largest smoothed force in pN", "work in kJ/mol"]'
    table.parent.mkdir(exist_ok=True)
    table.write_text(f'{{"about": "{about}",\n"columns": {columns},\n"rows": [\n{rows}\n]}}\n', encoding="utf-8")


def pieces(table: bytes, random_: random.Random) -> Iterator[str]:
    """One piece of 12 to 18 residues out of each of `PIECES` sequences of modlAMP's table."""
    found = {row[0].strip() for row in list(csv.reader(io.StringIO(table.decode("utf-8"))))[1:]}
    sources = sorted(source for source in found if is_plain(source, SHORTEST, 200) and not is_reserved(source))
    random_.shuffle(sources)
    wanted = PIECES
    for source in sources:
        length = random_.randint(SHORTEST, min(LONGEST, len(source)))
        start = random_.randint(0, len(source) - length)
        piece = source[start : start + length]
        if wanted and not is_reserved(piece):
            wanted -= 1
            yield piece


def invented(random_: random.Random) -> Iterator[str]:
    """`INVENTED` chains of three hydrophobic and four other residues, mixed in a random proportion."""
    wanted = INVENTED
    while wanted:
        share = random_.betavariate(0.4, 0.4)
        first, second = random_.sample(HYDROPHOBIC, 3), random_.sample(OTHERS, 4)
        length = random_.randint(SHORTEST, LONGEST)
        sequence = "".join(random_.choice(first if random_.random() < share else second) for _ in range(length))
        if not is_reserved(sequence):
            wanted -= 1
            yield sequence


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE)
