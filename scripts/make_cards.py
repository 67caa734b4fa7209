"""The README of every shipped expert and model, from its training.json, its data's card and the evaluation's rows.

python scripts/make_cards.py docs/results.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from xloom.hub.shipped import expert_folders, model_folders
from xloom.suite.shelf import rows_of

HEADER = """---
library_name: {library}
base_model: smollm2-135m-instruct
license: apache-2.0
tags: [{tags}]
---

# {name}

{about}
"""


def main(results: Path) -> None:
    found = json.loads(results.read_text())
    scores = {(row["router"], row["domain"], row["task"]): row for row in found["rows"] if row["metric"] == "score"}
    for name, folder in expert_folders().items():
        (folder / "README.md").write_text(expert_card(name, folder, scores), encoding="utf-8")
    for name, folder in model_folders().items():
        (folder / "README.md").write_text(model_card(name, folder, scores), encoding="utf-8")


def expert_card(name: str, folder: Path, scores: dict[Any, Any]) -> str:
    run = json.loads((folder / "training.json").read_text())
    data = json.loads((rows_of(name).test.parent / "card.json").read_text())
    recipe, rows = run["recipe"], data["rows"]
    lora = recipe["lora"]
    packages = (
        ", ".join(f"{p['name']} {p['version']} ({p['licence']})" for p in data["packages"])
        or "a pulling model, computed"
    )
    lines = [
        HEADER.format(library="peft", tags="lora, xloom", name=name, about=data["about"]),
        f"A LoRA adapter of SmolLM2-135M-Instruct, one of the seven of xloom's suite. Again: `xloom train-expert "
        f"recipes/suite/{name}.yaml`.",
        "",
        f"- data: `suite:{name}:train`, {rows['train']} rows from {packages}; the adapter itself is Apache-2.0",
        f"- split: {rows['train']} training, {rows['valid']} validation and {rows['test']} test rows; no group "
        "(scaffold, chemical system, cluster of sequences) in two of them, reserved rows in none",
        f"- adapter: r={lora['r']}, alpha={lora['alpha']}, {lora['targets']}, {recipe['save_dtype']}; trained in "
        f"{recipe['dtype']} on a CPU, {run['steps']} steps of {recipe['batch_size']} rows, learning rate "
        f"{recipe['learning_rate']:g}, seed {recipe['seed']}",
        f"- loss per token on the validation rows: {run['validation']['loss']:.3f} (base "
        f"{run['references']['base']['loss']:.2f})",
        "",
        f"Score on the first {asked(scores)} test rows of each set at most, greedy, with 95 % intervals:",
        "",
        "| task | this expert | best constant answer | base |",
        "|---|---|---|---|",
    ]
    single = f"single:{name}"
    for task in [None, *data["tasks"]]:
        if (single, name, task) in scores:
            cells = [cell(scores, system, name, task) for system in (single, "constant", "base")]
            lines.append(f"| {task or 'all'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def model_card(name: str, folder: Path, scores: dict[Any, Any]) -> str:
    run = json.loads((folder / "training.json").read_text())
    system = "xlora" if name == "two-pass" else name
    passes = "two passes" if name == "two-pass" else "one pass"
    lines = [
        HEADER.format(
            library="xloom",
            tags="x-lora, xloom",
            name=name,
            about=f"X-LoRA over the seven experts of xloom's suite, in {passes}. The experts stay in `experts/`.",
        ),
        f"Again: `xloom train recipes/suite/{name}.yaml`. Head: `{json.dumps(run['recipe']['head'])}`, trained "
        f"on labels alone (`init: labels`, `label_steps: {run['recipe']['label_steps']}`, batches of "
        f"{run['recipe']['batch_size']}), seed {run['recipe']['seed']}, on a CPU. The head is Apache-2.0.",
        "",
        f"Score on the first {asked(scores)} test rows of each set at most, greedy, with 95 % intervals:",
        "",
        "| | this model | Oracle |",
        "|---|---|---|",
    ]
    for domain in dict.fromkeys(d for s, d, t in scores if s == system and t is None):
        cells = [cell(scores, s, domain, None) for s in (system, "oracle")]
        lines.append(f"| {domain} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def asked(scores: dict[Any, Any]) -> int:
    """Questions of the largest set."""
    return max(row["items"] for (_, domain, _), row in scores.items() if domain != "mean")


def cell(scores: dict[Any, Any], system: str, domain: str, task: str | None) -> str:
    row = scores.get((system, domain, task))
    if row is None:
        return ""
    half = (row["high"] - row["low"]) / 2
    return f"{100 * row['score']:.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
