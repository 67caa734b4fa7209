"""Training one LoRA expert on a frozen base, with PEFT: a recipe becomes an ordinary PEFT LoRA folder.

Knows nothing of mixing: any tool that reads PEFT adapters can use the result.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from xloom.architecture import load_base
from xloom.errors import RecipeError
from xloom.training.base import base_options, load_tokenizer, pad_id, quiet
from xloom.training.data import Examples, read_examples, rows_record
from xloom.training.loop import CompletionTrainer, train
from xloom.training.recipe import ExpertRecipe
from xloom.training.recipe_fields import Lora
from xloom.training.rows import find_source
from xloom.training.run import Run


def train_expert(recipe: ExpertRecipe, *, progress: bool = True) -> Path:
    """Trains the expert, or goes on with an interrupted run of the same recipe; a finished one is returned at once.

    Args:
        progress: show a bar and what is being done, on stderr.

    Returns:
        The folder, with adapter_config.json, adapter_model.safetensors, README.md and training.json.

    Raises:
        XLoomError: RecipeError, DataError, PromptError, NotFoundError or DivergedError.
        KeyboardInterrupt: Ctrl-C; the step is finished and a checkpoint written first.
    """
    recipe.check()
    run = Run(recipe, inputs={}, progress=progress)
    if run.finished():
        return run.output
    checkpoint = run.open()
    with quiet(), run.bar() as callbacks:
        source = recipe.base_source
        tokenizer = load_tokenizer(source)
        rows, valid = (
            read_examples({None: [find_source(w, recipe.folder) for w in words]}, tokenizer, recipe.max_length)
            if words
            else Examples()
            for words in (recipe.train, recipe.valid)
        )
        run.say(f"{run.output.name}: {rows}" + (f"; validation: {valid}" if recipe.valid else ""))
        model = _adapted(load_base(source, base_options(recipe))[0], recipe)
        trainer = CompletionTrainer(
            model, run.settings(), rows.items, valid.items, pad_id=pad_id(tokenizer), callbacks=callbacks
        )
        train(trainer, checkpoint)
        with model.disable_adapter():
            references = {"references": {"base": trainer.measure()}} if valid.items else {}
        results = {"rows": rows_record(rows, valid), **trainer.summary(), **references}
        return run.publish(lambda folder: _write(model, recipe, results, folder), results)


def _adapted(base: PreTrainedModel, recipe: ExpertRecipe) -> PeftModel:
    set_seed(recipe.seed)
    lora = recipe.lora
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(base, lora),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        layers_to_transform=list(lora.layers_to_transform) if lora.layers_to_transform is not None else None,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{recipe.where}: lora: expected targets and layers of the base, found: {reason}") from None
    _check_all_found(model, recipe)
    # The recipe's own word: a path of this machine would mean nothing elsewhere.
    model.peft_config["default"].base_model_name_or_path = recipe.base
    return model


def _targets(base: PreTrainedModel, lora: Lora) -> str | list[str]:
    if lora.targets != "all-linear":
        return list(lora.targets)
    if lora.layers_to_transform is None:
        return "all-linear"
    # PEFT takes layers_to_transform with names only.
    linear = (nn.Linear, Conv1D)
    found = {name.rpartition(".")[2] for name, m in base.base_model.named_modules() if isinstance(m, linear)}
    return sorted(found)


def _check_all_found(model: PeftModel, recipe: ExpertRecipe) -> None:
    """PEFT passes over names and layers that the base has not, as long as it finds one."""
    found = [f".{name}" for name in model.base_model.targeted_module_names]
    words = recipe.lora.targets if recipe.lora.targets != "all-linear" else ()
    for word in words:
        if not any(name.endswith(f".{word}") for name in found):
            recipe.refuse("lora.targets", "modules of the base", repr(word))
    for layer in recipe.lora.layers_to_transform or ():
        if not any(f".{layer}." in name for name in found):
            recipe.refuse("lora.layers_to_transform", "layers of the base", str(layer))


def _write(model: PeftModel, recipe: ExpertRecipe, results: dict[str, Any], folder: Path) -> None:
    dtype = getattr(torch, recipe.save_dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if "lora_" in name}
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=tensors)
    losses, lora = results["losses"], recipe.lora
    valid = results["validation"].get("loss")
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {recipe.base}",
        "tags: [lora, xloom]",
        "---",
        "",
        f"# {recipe.output_folder.name}",
        "",
        "A LoRA expert trained with `xloom train-expert` on completions only.",
        "",
        f"- base: `{recipe.base}` ({recipe.dtype})",
        f"- data: {', '.join(f'`{word}`' for word in recipe.train)}, {results['rows']['train']['items']} rows",
        f"- adapter: r={lora.r}, alpha={lora.alpha}, targets={lora.targets}",
        f"- steps: {results['steps']} of {recipe.batch_size * recipe.gradient_accumulation} rows",
        f"- loss per token at the last step: {losses[-1][1]:.4f}" if losses else "- loss: not logged",
        f"- validation loss per token: {valid:.4f}" if valid is not None else "- validation: none",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
