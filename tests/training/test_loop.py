import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments

from xloom.errors import DivergedError
from xloom.training.data import Example, collate
from xloom.training.head import mean_over_tokens, routing_losses
from xloom.training.loop import CompletionTrainer, last_checkpoint, row_losses, train

EXAMPLES = [Example(tuple(range(5, 5 + n)), start) for n, start in [(9, 6), (4, 3), (12, 2), (6, 5)]]


def outputs(model: PreTrainedModel, batch: dict, keep: int):
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    return model(**inputs, logits_to_keep=keep).logits


def test_padded_rows_lose_as_single_ones_and_as_all_logits_do(llama: PreTrainedModel) -> None:
    model = llama.double()
    batch = collate(EXAMPLES, pad_id=0)
    losses_B, tokens_B = row_losses(outputs(model, batch, batch["keep"]), batch["labels"])
    assert tokens_B.tolist() == [e.completion_tokens for e in EXAMPLES]
    for example, loss in zip(EXAMPLES, losses_B, strict=True):
        ids = torch.tensor([example.input_ids])
        all_logits = model(ids).logits[0, :-1]
        start = example.completion_start
        alone = F.cross_entropy(all_logits[start - 1 :], ids[0, start:], reduction="sum")
        torch.testing.assert_close(loss, alone, rtol=1e-9, atol=1e-9)


def trainer_for(model: PreTrainedModel, folder: Path, size: int, accumulation: int, rate: float) -> CompletionTrainer:
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=rate,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return CompletionTrainer(model, settings, EXAMPLES, [], pad_id=0)


def test_accumulated_small_batches_are_one_large_batch(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Completions differ in length, so a mean of the batches' means would be another step."""
    at_once, in_parts = copy.deepcopy(llama).double(), copy.deepcopy(llama).double()
    train(trainer_for(at_once, tmp_path, size=4, accumulation=1, rate=0.1), None)
    train(trainer_for(in_parts, tmp_path, size=1, accumulation=4, rate=0.1), None)
    for (name, a), b in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
    assert not torch.equal(at_once.lm_head.weight, llama.double().lm_head.weight)


def test_a_loss_that_is_not_finite_names_the_step(llama: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        llama.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"^step 1: the loss is nan"):
        train(trainer_for(llama, tmp_path, size=2, accumulation=1, rate=0.1), None)


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in [(9, "{}"), (10, "{}"), (11, '{"cut'), (12, None)]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_shares_leave_padding_out() -> None:
    scalings_BTSN = torch.tensor([[[[1.0, 0.0]], [[0.2, 0.8]], [[0.4, 0.6]]]])
    shares_BN = mean_over_tokens(scalings_BTSN, torch.tensor([[0, 1, 1]]))
    torch.testing.assert_close(shares_BN, torch.tensor([[0.3, 0.7]]))
    torch.testing.assert_close(routing_losses(shares_BN, torch.tensor([1])), -torch.tensor([0.7]).log())
    assert routing_losses(torch.zeros(1, 2), torch.tensor([1])).isfinite().all()
