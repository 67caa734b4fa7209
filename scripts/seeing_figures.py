"""What the mixing does, on the suite: figures for docs/seeing.md and one JSON of all numbers.

    python scripts/seeing_figures.py docs/seeing --json benchmarks/results/seeing.json --rows 40 --worth-rows 20

Rows are those of validation, in the order of their files, of every domain and of the families that have any. Their
right answers are read, not written anew, so that domains are compared on text that is known.
Letters: T tokens  S sites  N experts  C columns: the experts, then the base  D domains  L layers
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xloom import XLoraForCausalLM
from xloom.cli.common import load_tokenizer, quiet
from xloom.errors import XLoomError
from xloom.seeing import Summary, plots, summarise_by, trace_rows, worth
from xloom.seeing.sites import by_layer
from xloom.seeing.statistics import effective_number, mean_by_group
from xloom.seeing.summary import ALL, ANSWER, summarise
from xloom.suite.composite import FAMILIES
from xloom.suite.domains import DOMAINS
from xloom.suite.shelf import rows_of
from xloom.suite.shipped import model_folder
from xloom.trace import Trace
from xloom.trace.shares import leaders, shares
from xloom.training.rows import Row, read_rows

ALONE = 1.5  # effective number of experts below which one acts nearly alone
EDGES = torch.linspace(0, 1, 11, dtype=torch.float64)  # of the histogram of the largest share
PERMUTATIONS = 100


def rows_by_domain(domains: Sequence[str], count: int, split: str) -> dict[str, list[Row]]:
    """The first rows of each set's split; sets without any are left out."""
    found = {}
    for name in domains:
        path: Path = getattr(rows_of(name), split)
        if rows := list(islice(read_rows(path), count)):
            found[name] = rows
    return found


def sparsity(traces: Iterable[Trace]) -> dict[str, Any]:
    """How much of the mixing is one expert, over all tokens with scalings and all sites.

    `alone` is the part of them with fewer than `ALONE` effective experts, `largest` a histogram of the largest share.
    """
    histogram, alone, effective, total = torch.zeros(len(EDGES) - 1, dtype=torch.float64), 0, 0.0, 0
    for trace in traces:
        for block in trace.blocks():
            shares_TSC = shares(block.scalings[block.known])
            number_TS = effective_number(shares_TSC)
            largest = shares_TSC.max(dim=-1).values.flatten().clamp(max=1)
            histogram += torch.histogram(largest, EDGES).hist
            alone += int((number_TS < ALONE).sum())
            effective += float(number_TS.sum())
            total += number_TS.numel()
    return {
        "places": total,
        "alone": alone / total,
        "effective": effective / total,
        "largest": {"edges": EDGES.tolist(), "part": (histogram / total).tolist()},
    }


def distances(trace: Trace, *, permutations: int = PERMUTATIONS, seed: int = 0) -> dict[str, Tensor]:
    """How far sites, and how far layers, are from each other in a text [1 + permutations]: as it is, then by chance.

    A distance is half the sum of |difference of mean shares| of two sites or layers, their mean over the tokens of the
    text: 0 if they mix alike, 1 if they share no expert. Taken is the mean over pairs.

        sites    by chance: at each token shares are dealt to the sites anew, so that none has a taste of its own
        layers   by chance: the sites, with their mean shares, are dealt to the layers anew; where that gives no less,
                 layers differ only as their sites do
    """
    generator = torch.Generator().manual_seed(seed)
    layer_S = by_layer(trace.sites).of_S
    layers = int(layer_S.max()) + 1
    shares_TSC = shares(trace.scalings[trace.known])
    T, S, _ = shares_TSC.shape
    mean_SC = shares_TSC.mean(dim=0)
    sites, grouped = [_spread(mean_SC)], [_spread(mean_by_group(mean_SC, layer_S, layers))]
    for _ in range(permutations):
        order_TS = torch.rand(T, S, generator=generator).argsort(dim=1)
        sites.append(_spread(shares_TSC.take_along_dim(order_TS[..., None], dim=1).mean(dim=0)))
        order_S = torch.randperm(S, generator=generator)
        grouped.append(_spread(mean_by_group(mean_SC[order_S], layer_S, layers)))
    return {"sites": torch.tensor(sites), "layers": torch.tensor(grouped)}


def heterogeneity(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Do sites, and do layers, differ more than by chance? Of the `distances` of several texts, their mean."""
    return {name: _against_chance(torch.stack([one[name] for one in found]).mean(dim=0)) for name in found[0]}


def _spread(mean_GC: Tensor) -> float:
    """The mean distance of pairs of groups."""
    groups = len(mean_GC)
    return float(torch.cdist(mean_GC, mean_GC, p=1).sum() / 2 / max(groups * (groups - 1), 1))


def _against_chance(distances: Tensor) -> dict[str, float]:
    """Args: `distances` as it is, then of permutations."""
    own, *_ = rounded = distances.double().round(decimals=6)  # sites that mix alike differ by rounding
    dealt = rounded[1:]
    return {
        "distance": float(own),
        "by_chance": float(dealt.mean()),
        "by_chance_high": float(dealt.quantile(0.975)),
        "p": float((1 + int((dealt >= own).sum())) / (1 + len(dealt))),
    }


def switching(traces: Iterable[Trace]) -> dict[str, float]:
    """How often neighbours have another leader: layers at the same token, and tokens at the same layer."""
    across_layers, across_tokens, layers_seen, tokens_seen = 0, 0, 0, 0
    for trace in traces:
        groups = by_layer(trace.sites)
        shares_TSC = shares(trace.scalings[trace.known])
        by_layer_LTC = mean_by_group(shares_TSC.transpose(0, 1), groups.of_S, len(groups.labels))
        led_LT = leaders(by_layer_LTC)
        across_layers += int((led_LT[1:] != led_LT[:-1]).sum())
        across_tokens += int((led_LT[:, 1:] != led_LT[:, :-1]).sum())
        layers_seen += led_LT[1:].numel()
        tokens_seen += led_LT[:, 1:].numel()
    return {
        "layer_to_layer": across_layers / max(layers_seen, 1),
        "token_to_token": across_tokens / max(tokens_seen, 1),
    }


def diagonal(summaries: Mapping[str, Summary], of: str) -> dict[str, float]:
    """Share that each domain gives the expert of its own name."""
    return {name: one.share(of=of)[ALL, name] for name, one in summaries.items() if name in one.experts}


def causal(model: XLoraForCausalLM, tokenizer: Any, rows: Mapping[str, list[Row]], count: int) -> dict[str, Any]:
    """The table of `worth` for every domain, on the first rows of each."""
    return {name: worth(model, tokenizer, some[:count]).table() for name, some in rows.items()}


def draw(folder: Path, together: Summary, summaries: Mapping[str, Summary], traces: Mapping[str, list[Trace]]) -> None:
    """The page's figures, as SVG."""
    plots.save(plots.layers(together), folder / "layers.svg")
    plots.save(plots.kinds(together), folder / "kinds.svg")
    plots.save(plots.groups(summaries), folder / "domains.svg")
    plots.save(plots.depth(together), folder / "depth.svg")
    plots.save(plots.co_use(together), folder / "co-use.svg")
    shown = next(name for name in ("conversation", "joined", *traces) if name in traces)
    plots.save(plots.timeline(traces[shown][0]), folder / "timeline.svg")
    plots.save(plots.ribbon(traces[shown][0]), folder / "ribbon.svg")


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(asked.threads)
    quiet()
    place = model_folder(asked.model)
    model = XLoraForCausalLM.from_pretrained(place)
    tokenizer = load_tokenizer(str(place), model.config.base_model_name_or_path)
    rows = rows_by_domain(asked.domain or (*DOMAINS, *FAMILIES), asked.rows, asked.split)
    if not rows:
        raise XLoomError(f"none of the sets has {asked.split} rows")
    traces = {}
    for name, some in rows.items():
        traces[name] = list(trace_rows(model, tokenizer, some, metadata={"domain": name}))
        print(f"{name}: {len(some)} rows, {sum(map(len, traces[name])):,} tokens", flush=True)
    every = [trace for some in traces.values() for trace in some]
    together, summaries = summarise(every), summarise_by(every, "domain")
    draw(asked.folder, together, summaries, traces)
    apart = {name: [distances(trace, seed=seed) for seed, trace in enumerate(some)] for name, some in traces.items()}
    found: dict[str, Any] = {
        "model": asked.model,
        "split": asked.split,
        "rows": {name: len(some) for name, some in rows.items()},
        "tokens": together.tokens(),
        "answer_tokens": together.tokens(ANSWER) if ANSWER in together.classes else 0,
        "overall": together.as_json(),
        "domains": {name: one.share().as_json() | {"answer": _share(one)} for name, one in summaries.items()},
        "own_expert": {"all": diagonal(summaries, ALL), "answer": diagonal(_with_answers(summaries), ANSWER)},
        "entropy_by_layer": together.mixedness("layer").as_json(),
        "sparse": {"all": sparsity(every)} | {name: sparsity(some) for name, some in traces.items()},
        "heterogeneous": {"all": heterogeneity([one for some in apart.values() for one in some])}
        | {name: heterogeneity(some) for name, some in apart.items()},
        "switching": {"all": switching(every)} | {name: switching(some) for name, some in traces.items()},
    }
    if asked.worth_rows:
        found["worth_rows"] = asked.worth_rows
        found["worth"] = causal(model, tokenizer, rows, asked.worth_rows)
    return found


def _with_answers(summaries: Mapping[str, Summary]) -> dict[str, Summary]:
    return {name: one for name, one in summaries.items() if ANSWER in one.classes}


def _share(summary: Summary) -> Any:
    return summary.share(of=ANSWER).as_json() if ANSWER in summary.classes else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the figures")
    parser.add_argument("--json", type=Path, help="for the numbers")
    parser.add_argument("--model", default="two-pass", help="of those that are shipped")
    parser.add_argument(
        "--domain", action="append", help="may be given more than once; default: all domains and families"
    )
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--rows", type=int, default=40, help="rows of each domain")
    parser.add_argument("--worth-rows", type=int, default=20, help="of these, rows of the causal table; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    found = measure(asked)
    if asked.json is not None:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sparse, different = found["sparse"]["all"], found["heterogeneous"]["all"]
    print(f"one expert nearly alone at {sparse['alone']:.0%} of places; {sparse['effective']:.2f} effective experts")
    for name, one in different.items():
        print(f"{name} differ by {one['distance']:.3f}, by chance {one['by_chance']:.3f}, p {one['p']:.3f}")


if __name__ == "__main__":
    main()
