"""How few rows does a head need? Heads on 10 to 2,000 rows of each domain, and what they lose on validation rows.

    python scripts/make_curve.py runs/curve docs/curve        # writes docs/curve.json and docs/curve.svg

The single-pass head of the suite, which is all start from labels; domains with a right expert only. A run that was
stopped goes on.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from xloom.training.head import train_head
from xloom.training.recipe import HeadRecipe, load_head_recipe
from xloom.training.recipe_fields import Domain

_DRAWS = 1.5  # of every row, so that nearly all are seen
RECIPE = Path(__file__).parents[1] / "recipes/suite/single-pass.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 50, 250, 1000, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    points = [point(given.folder.absolute(), rows, seed) for rows in given.rows for seed in given.seeds]
    given.picture.with_suffix(".json").write_text(json.dumps({"what": "rows curve", "rows": points}, indent=1) + "\n")
    draw(points, given.picture.with_suffix(".svg"))


def point(folder: Path, rows: int, seed: int) -> dict[str, Any]:
    """One head, and its means over the domains."""
    shipped = load_head_recipe(RECIPE)
    fields = shipped.model_dump(include=set(shipped.model_fields_set) - {"output", "data", "valid", "experts"})
    names = list(shipped.experts)
    made = train_head(
        HeadRecipe(
            **fields
            | {
                "output": str(folder / f"{rows}-{seed}"),
                "experts": {name: shipped.expert_source(name) for name in names},
                "data": {name: Domain(files=shipped.data[name].files, rows=rows) for name in names},
                "valid": {name: shipped.valid[name] for name in names},
                "valid_rows": 24,
                "label_steps": max(shipped.max_steps, math.ceil(_DRAWS * rows * len(names) / shipped.batch_size)),
                "seed": seed,
            }
        )
    )
    found = json.loads((made / "training.json").read_text())
    losses = found["validation"]
    return {
        "rows_per_domain": rows,
        "seed": seed,
        "loss": fmean(losses[f"loss_{name}"] for name in names),
        "right_expert_loss": fmean(found["references"][f"single:{name}"][f"loss_{name}"] for name in names),
        "uniform_loss": fmean(found["references"]["uniform"][f"loss_{name}"] for name in names),
        "routing_accuracy": losses["routing_accuracy"],
    }


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over rows, with the lines of the right expert and of a uniform mix."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = sorted({point["rows_per_domain"] for point in points})
    means = [fmean(p["loss"] for p in points if p["rows_per_domain"] == count) for count in rows]
    axes.plot(rows, means, color="#2a6fbb", marker="o", label="X-LoRA, one pass")
    axes.scatter([p["rows_per_domain"] for p in points], [p["loss"] for p in points], color="#2a6fbb", s=12, alpha=0.5)
    axes.axhline(points[0]["right_expert_loss"], color="#e07b00", ls="--", lw=1, label="the right expert")
    axes.axhline(points[0]["uniform_loss"], color="#9aa0a6", ls="--", lw=1, label="uniform mix")
    axes.set_xscale("log")
    axes.set_xticks(rows, [str(count) for count in rows])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training rows of each domain")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
