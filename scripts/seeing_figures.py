"""What the mixing does, on the suite: figures for docs/seeing.md and one JSON of all numbers.

    python scripts/seeing_figures.py docs/seeing --json benchmarks/results/seeing.json --rows 24 --worth-rows 12

Rows are those of validation, in the order of their files, of every domain, of the families that have any and of the
general questions. Their right answers are read, not written anew, so that domains are compared on text that is known.
`--against FOLDER` measures the mixing of a second model on the same rows.
Letters: T tokens  S sites  N experts  C columns: the experts, then the base  L layers
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xloom import XLoraForCausalLM
from xloom.cli.common import load_tokenizer, quiet
from xloom.errors import XLoomError
from xloom.hub.shipped import model_folder
from xloom.seeing import Summary, plots, trace_rows, worth
from xloom.seeing.sites import by_layer
from xloom.seeing.statistics import effective_number, mean_by_group
from xloom.seeing.summary import ALL, ANSWER, BASE, summarise, token_classes
from xloom.suite.composite import FAMILIES
from xloom.suite.domains import DOMAINS
from xloom.suite.shelf import rows_of
from xloom.trace import Trace
from xloom.trace.shares import leaders, shares
from xloom.training.rows import Row, read_rows

ALONE = 1.5  # effective number of experts below which one acts nearly alone
EDGES = torch.linspace(0, 1, 11, dtype=torch.float64)  # of the histogram of the largest share
PERMUTATIONS = 100
GENERAL = "general"
SYSTEM, OPENING, CLOSING = "system message", "opening of the question", "opening of the answer"
QUESTION = {"question 1-4": 4, "question 5-8": 8, "question 9-16": 16, "question 17-": 10**6}  # tokens, up to which
RECIPE = (
    "init",
    "label_steps",
    "max_steps",
    "learning_rate",
    "routing_weight",
)  # of a second model, what tells it apart
DIGITS = 6


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

    Where all sites mix alike nothing is dealt: it would change nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    layer_S = by_layer(trace.sites).of_S
    layers = int(layer_S.max()) + 1
    shares_TSC = shares(trace.scalings[trace.known])
    T, S, _ = shares_TSC.shape
    if float((shares_TSC - shares_TSC[:, :1]).abs().max()) < 10**-DIGITS:
        return {name: torch.zeros(1 + permutations) for name in ("sites", "layers")}
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
    own, *_ = rounded = distances.double().round(decimals=DIGITS)  # sites that mix alike differ by rounding
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


def places(trace: Trace) -> list[str | None]:
    """Where each token of a row with a single question stands: a class for `summarise`.

    The template opens a question with three tokens, and closes it with two, which go with the opening of the answer.
    """
    out: list[str | None] = [SYSTEM] * len(trace)
    question = trace.turns[1]
    first, last = question.start + 3, question.stop - 2
    out[question.start :] = [OPENING] * (first - question.start) + [CLOSING] * (len(trace) - first)
    out[first:last] = [next(name for name, up_to in QUESTION.items() if at < up_to) for at in range(last - first)]
    return [ANSWER if kind == ANSWER else place for kind, place in zip(token_classes(trace), out, strict=True)]


def along(traces: Mapping[str, list[Trace]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each domain with an expert of its name, by place: the shares of that expert, of the base and of all others."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, some in traces.items():
        if name not in some[0].experts:
            continue
        summary = summarise(some, places)
        found[name] = {}
        for place in (SYSTEM, OPENING, *QUESTION, CLOSING, ANSWER):
            if place in summary.classes:
                share = summary.share(of=place)
                right, base = share[ALL, name], share[ALL, BASE]
                found[name][place] = {"right": right, "base": base, "others": 1 - right - base}
    mean = {
        place: {key: sum(one[place][key] for one in found.values()) / len(found) for key in ("right", "base", "others")}
        for place in next(iter(found.values()), {})
        if all(place in one for one in found.values())
    }
    return {"mean": mean} | found


def own_expert(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """Of each domain with an expert of its name: that expert's share, and the part of places that it leads."""
    return {
        name: {
            of: {"share": one.share(of=of)[ALL, name], "leads": one.dominance(of=of)[ALL, name]} for of in (ALL, ANSWER)
        }
        for name, one in summaries.items()
        if name in one.experts
    }


def mixing(traces: Mapping[str, list[Trace]]) -> dict[str, Any]:
    """All numbers of one model, by set of rows where they differ between sets."""
    every = [trace for some in traces.values() for trace in some]
    together, summaries = summarise(every), {name: summarise(some) for name, some in traces.items()}
    apart = {name: [distances(trace, seed=seed) for seed, trace in enumerate(some)] for name, some in traces.items()}
    return {
        "tokens": {of: together.tokens(of) for of in (ALL, ANSWER)},
        "experts": list(together.columns),
        "share": {of: {name: shares_of(one, of) for name, one in summaries.items()} for of in (ALL, ANSWER)},
        "own_expert": own_expert(summaries),
        "along": along(traces),
        "mixedness": {name: mixedness(one) for name, one in {ALL: together, **summaries}.items()},
        "by_layer": {"share": together.share("layer").as_json(), "mixedness": together.mixedness("layer").as_json()},
        "by_kind": {"share": together.share("kind").as_json(), "mixedness": together.mixedness("kind").as_json()},
        "co_use": {within: together.co_use(within=within).values.tolist() for within in ("site", "token")},
        "sparse": {ALL: sparsity(every)} | {name: sparsity(some) for name, some in traces.items()},
        "heterogeneous": {ALL: heterogeneity([one for some in apart.values() for one in some])}
        | {name: heterogeneity(some) for name, some in apart.items()},
        "switching": {ALL: switching(every)} | {name: switching(some) for name, some in traces.items()},
    }


def shares_of(summary: Summary, of: str) -> dict[str, float]:
    share = summary.share(of=of)
    return {column: share[ALL, column] for column in share.columns}


def mixedness(summary: Summary) -> dict[str, Any]:
    """Entropy in nats and effective numbers, at one token and site and of the mean shares, by class of tokens."""
    out: dict[str, Any] = {}
    for of in (ALL, ANSWER):
        mixed = summary.mixedness(of=of)
        out[of] = {"entropy": mixed[ALL, "entropy"], "effective": mixed[ALL, "effective"]}
        out[of]["used"] = summary.diversity(of=of)[ALL, "effective"]
    return out


def causal(model: XLoraForCausalLM, tokenizer: Any, rows: Mapping[str, list[Row]], count: int) -> dict[str, Any]:
    """The table of `worth` for every set, on the first rows of each."""
    found = {}
    for name, some in rows.items():
        start = time.perf_counter()
        found[name] = worth(model, tokenizer, some[:count]).table()
        print(f"worth, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def draw(folder: Path, traces: Mapping[str, list[Trace]]) -> None:
    """The page's figures, as SVG."""
    every = [trace for some in traces.values() for trace in some]
    plots.save(plots.layers(summarise(every)), folder / "layers.svg")
    plots.save(plots.groups({name: summarise(some) for name, some in traces.items()}), folder / "domains.svg")
    shown = traces[next(name for name in ("conversation", "joined", *traces) if name in traces)][0]
    plots.save(plots.timeline(shown), folder / "timeline.svg")
    plots.save(plots.ribbon(shown), folder / "ribbon.svg")


def opened(place: Path) -> tuple[XLoraForCausalLM, Any]:
    model = XLoraForCausalLM.from_pretrained(place)
    return model, load_tokenizer(str(place), model.config.base_model_name_or_path)


def traced(model: XLoraForCausalLM, tokenizer: Any, rows: Mapping[str, list[Row]]) -> dict[str, list[Trace]]:
    traces = {}
    for name, some in rows.items():
        start = time.perf_counter()
        traces[name] = list(trace_rows(model, tokenizer, some, metadata={"domain": name}))
        seconds = time.perf_counter() - start
        print(f"{name}: {len(some)} rows, {sum(map(len, traces[name])):,} tokens, {seconds:.0f} s", flush=True)
    return traces


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(asked.threads)
    quiet()
    rows = rows_by_domain(asked.domain or (*DOMAINS, *FAMILIES, GENERAL), asked.rows, asked.split)
    if not rows:
        raise XLoomError(f"none of the sets has {asked.split} rows")
    model, tokenizer = opened(model_folder(asked.model))
    traces = traced(model, tokenizer, rows)
    draw(asked.folder, traces)
    found: dict[str, Any] = {
        "model": asked.model,
        "split": asked.split,
        "rows": {name: len(some) for name, some in rows.items()},
        **mixing(traces),
    }
    keep(found, asked.json)
    if asked.worth_rows:
        found["worth_rows"] = asked.worth_rows
        found["worth"] = causal(model, tokenizer, rows, asked.worth_rows)
        keep(found, asked.json)
    if asked.against is not None:
        traces = traced(*opened(asked.against), rows)
        every = [trace for some in traces.values() for trace in some]
        plots.save(plots.layers(summarise(every)), asked.folder / "layers-against.svg")
        recipe = json.loads((asked.against / "training.json").read_text(encoding="utf-8"))["recipe"]
        found["against"] = {"recipe": {key: recipe.get(key) for key in RECIPE}, **mixing(traces)}
        keep(found, asked.json)
    return found


def rounded(value: Any) -> Any:
    """All its numbers with so many digits as tell something."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def keep(found: Mapping[str, Any], path: Path | None) -> None:
    """Writes what there is so far, with lists of numbers, and objects of nothing else, in a line each."""
    if path is None:
        return
    text = json.dumps(rounded(found), indent=1)
    text = re.sub(r"[\[{][^][{}]*[\]}]", lambda one: " ".join(one[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the figures")
    parser.add_argument("--json", type=Path, help="for the numbers")
    parser.add_argument("--model", default="two-pass", help="of those that are shipped")
    parser.add_argument("--domain", action="append", help="may be given more than once; default: all")
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--rows", type=int, default=40, help="rows of each domain")
    parser.add_argument("--worth-rows", type=int, default=20, help="of these, rows of the causal table; 0 for none")
    parser.add_argument("--against", type=Path, help="folder of a second model, whose mixing is measured too")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    found = measure(asked)
    sparse, different = found["sparse"]["all"], found["heterogeneous"]["all"]
    print(f"one expert nearly alone at {sparse['alone']:.0%} of places; {sparse['effective']:.2f} effective experts")
    for name, one in different.items():
        print(f"{name} differ by {one['distance']:.3f}, by chance {one['by_chance']:.3f}, p {one['p']:.3f}")


if __name__ == "__main__":
    main()
