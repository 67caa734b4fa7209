"""Training the X-LoRA head, and the experts if asked, on a frozen base: a recipe becomes a model of ours.

Knows nothing of losses (`head_trainer`) or of checkpoint formats.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, set_seed

from xloom.architecture import meta_base
from xloom.errors import CheckpointError, XLoomError
from xloom.experts import CONFIG_FILE, WEIGHTS_FILE, Expert
from xloom.hub.fetch import cache_dir
from xloom.hub.files import fetch_folder
from xloom.model import XLoraForCausalLM
from xloom.training.base import base_options, load_tokenizer, pad_id, quiet
from xloom.training.checkpoint import why
from xloom.training.data import Example, Examples, read_examples, rows_record
from xloom.training.head_trainer import HeadTrainer
from xloom.training.loop import train
from xloom.training.recipe import HeadRecipe
from xloom.training.rows import find_source
from xloom.training.run import Run


def train_head(recipe: HeadRecipe, *, progress: bool = True) -> Path:
    """Trains the head, or goes on with an interrupted run of the same recipe; a finished one is returned at once.

    Args:
        progress: show a bar and what is being done, on stderr.

    Returns:
        The folder: a checkpoint of ours (`XLoraForCausalLM.from_pretrained`), the base's tokenizer, training.json,
        report.md and report.html.

    Raises:
        XLoomError: RecipeError, DataError, PromptError, DivergedError, or what `from_experts` finds wrong.
        KeyboardInterrupt: Ctrl-C; the step is finished and a checkpoint written first.
    """
    recipe.check()
    sources = {name: recipe.expert_source(name) for name in recipe.experts}
    run = Run(recipe, inputs=_weights(sources), progress=progress)
    if run.finished():
        return run.output
    experts = {name: Expert.from_pretrained(source) for name, source in sources.items()}
    _try_on(recipe, experts)
    for name, expert in experts.items():
        said = str(expert.config.get("base_model_name_or_path") or "")
        if said and Path(said).name != Path(recipe.base).name:
            run.say(f"expert {name}: fits the base in shape, but says that it was trained on {said}")
    checkpoint = run.open()
    with quiet(), run.bar() as callbacks:
        tokenizer = load_tokenizer(recipe.base_source)
        rows, valid = read_data(recipe, tokenizer)
        run.say(f"{run.output.name}: {rows}" + (f"; validation: {valid}" if recipe.valid else ""))
        set_seed(recipe.seed)
        model = XLoraForCausalLM.from_experts(
            recipe.base_source, experts, **base_options(recipe), **recipe.mixing_options()
        )
        trainer = HeadTrainer(
            model, run.settings(), rows, valid, recipe=recipe, pad_id=pad_id(tokenizer), callbacks=callbacks
        )
        with _naming_cache():
            trainer.prepare(run, _expert_ids(run, model.experts))
        if checkpoint is None:
            trainer.start_head()
        train(trainer, checkpoint)
        results = {"rows": rows_record(rows, valid), **trainer.summary()}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, include_experts=recipe.include_experts)
            tokenizer.save_pretrained(folder)

        return run.publish(write, results)


def _try_on(recipe: HeadRecipe, experts: Mapping[str, Expert]) -> None:
    """Raises what can be wrong between base, experts and head, before the base's weights are loaded."""
    try:
        with quiet():
            XLoraForCausalLM.from_experts(meta_base(recipe.base_source), experts, **recipe.mixing_options())
    except XLoomError as error:
        raise type(error)(f"{recipe.where}: {error}") from None


def read_data(recipe: HeadRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Examples, Examples]:
    """Training rows, and at most `valid_rows` validation rows of each domain, evenly spaced."""
    here = recipe.folder
    train: dict[str | None, list[Any]] = {
        name: [find_source(w, here) for w in domain.files] for name, domain in recipe.data.items()
    }
    rows = read_examples(train, tokenizer, recipe.max_length)
    limits = {name: domain.rows for name, domain in recipe.data.items()}
    taken: Counter[str | None] = Counter()
    some: list[Example] = []
    for item in rows.items:
        limit = limits[item.domain or ""]
        if limit is None or taken[item.domain] < limit:
            some.append(item)
            taken[item.domain] += 1
    rows.items = some
    if not recipe.valid:
        return rows, Examples()
    found: dict[str | None, list[Any]] = {n: [find_source(w, here) for w in words] for n, words in recipe.valid.items()}
    valid = read_examples(found, tokenizer, recipe.max_length)
    kept: list[Example] = []
    for domain in recipe.valid:
        items = [item for item in valid.items if item.domain == domain]
        step = max(1.0, len(items) / recipe.valid_rows)
        kept += [items[int(i * step)] for i in range(min(len(items), recipe.valid_rows))]
    valid.items = kept
    return rows, valid


def _weights(sources: dict[str, str]) -> dict[str, Path]:
    folders = {name: fetch_folder(source) for name, source in sources.items()}
    files = {f"{name}/{file}": folders[name] / file for name in folders for file in (CONFIG_FILE, WEIGHTS_FILE)}
    return {f"experts.{name}": path for name, path in files.items() if path.is_file()}


@contextmanager
def _naming_cache() -> Iterator[None]:
    """What is computed beforehand needs room in the cache."""
    try:
        yield
    except OSError as error:
        where = "XLOOM_CACHE, which may name another folder"
        raise CheckpointError(f"{cache_dir() / 'rows'}: cannot be written: {why(error)} (see {where})") from error


def _expert_ids(run: Run, names: Sequence[str]) -> dict[str, str]:
    hashes = run.identity["sha256"]
    return {n: "+".join(hashes[k] for k in sorted(hashes) if k.startswith(f"experts.{n}/")) for n in names}
