import copy
import errno
import io
import itertools
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import PreTrainedModel

from xloom.errors import CheckpointError, ConfigError, DivergedError
from xloom.training import checkpoint as files
from xloom.training import history
from xloom.training.data import Example, collate
from xloom.training.loop import CompletionTrainer, Settings, last_checkpoint, row_losses, train
from xloom.training.progress import ProgressBar, speed
from xloom.training.run import differences

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
    settings = Settings(
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


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(llama: PreTrainedModel, tmp_path: Path) -> None:
    """The loss is as it should be: only its derivative is not."""
    before = copy.deepcopy(llama.state_dict())
    llama.lm_head.weight.register_hook(lambda grad: grad * torch.inf)
    trainer = trainer_for(llama, tmp_path, size=2, accumulation=2, rate=0.1)
    files.write_checkpoint(tmp_path, 0, {}, {files.STATE: {}})
    with pytest.raises(
        DivergedError, match=r"^step 1: the gradient's norm is (inf|nan); lower .* \(step 0 is kept in "
    ):
        train(trainer, None)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


def test_a_model_in_pieces_is_refused(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CompletionTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        CompletionTrainer,
        "create_accelerator_and_postprocess",
        lambda self: (made(self), setattr(self, "is_deepspeed_enabled", True)),
    )
    with pytest.raises(ConfigError, match="found FSDP or DeepSpeed"):
        trainer_for(llama, tmp_path, size=2, accumulation=1, rate=0.1)


# --- checkpoints ---


def adam(groups: list[list[torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
    made = [{"params": group, "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, group in enumerate(groups)]
    optimizer = torch.optim.AdamW(made, betas=(0.8, 0.95))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_an_optimizer_of_several_groups_comes_back_to_the_bit(tmp_path: Path) -> None:
    def fresh() -> list[list[torch.nn.Parameter]]:
        torch.manual_seed(1)
        return [[torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))],
                [torch.nn.Parameter(torch.randn(2))]]  # fmt: skip

    def steps(groups: list[list[torch.nn.Parameter]], optimizer: Any, schedule: Any, count: int) -> None:
        for _ in range(count):
            for p in itertools.chain(*groups):
                p.grad = torch.randn_like(p) * 1e-3
            optimizer.step()
            schedule.step()

    whole = fresh()
    optimizer, schedule = adam(whole)
    steps(whole, optimizer, schedule, 3)
    tensors, values = files.optimizer_state(optimizer)
    parts = {files.OPTIMIZER: tensors, files.RANDOM: files.random_state()[0]}
    folder = files.write_checkpoint(
        tmp_path, 3, parts, {files.OPTIMIZER_VALUES: values | {"schedule": schedule.state_dict()}, files.STATE: {}}
    )
    kept = [p.detach().clone() for p in itertools.chain(*whole)]
    torch.manual_seed(5)
    steps(whole, optimizer, schedule, 3)

    again = fresh()
    for p, value in zip(itertools.chain(*again), kept, strict=True):
        p.data.copy_(value)
    other, other_schedule = adam(again)
    read = files.read_json(folder / files.OPTIMIZER_VALUES)
    files.set_optimizer_state(other, files.read_tensors(folder / files.OPTIMIZER), read)
    other_schedule.load_state_dict(read["schedule"])
    torch.manual_seed(5)
    steps(again, other, other_schedule, 3)
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*whole), itertools.chain(*again), strict=True))
    (here, here_values), (there, there_values) = files.optimizer_state(other), files.optimizer_state(optimizer)
    assert here_values == there_values
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    with pytest.raises(CheckpointError, match="groups are not those of this run"):
        files.set_optimizer_state(adam(fresh()[:1])[0], tensors, read)


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def test_random_states_come_back_process_by_process(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()  # leaves a second normal number waiting in Python's and NumPy's states
    mine = files.random_state()
    expected = draw()
    tensors, values = files.random_states([files.random_state(), mine])
    folder = files.write_checkpoint(tmp_path, 1, {files.RANDOM: tensors}, {files.RANDOM_VALUES: values})
    found = files.read_random_state(folder, 1)
    assert found is not None
    assert files.read_random_state(folder, 2) is None
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    files.set_random_state(*found)
    assert draw() == expected


def write(work: Path, step: int) -> Path:
    tensors = {files.WEIGHTS: {"w": torch.full((50,), float(step))}, files.OPTIMIZER: {"0.step": torch.ones(())}}
    return files.write_checkpoint(work, step, tensors, {files.STATE: {"global_step": step}, "random.json": {}})


class PowerCut(BaseException):
    """Not an error that any code handles."""


def cut_power_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """The process is gone at the n-th thing that it asks of the disk."""
    calls = itertools.count(1)

    def failing(act: Any) -> Any:
        def asked(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise PowerCut
            return act(*args, **kwargs)

        return asked

    for place, name in [(files.os, "replace"), (files.os, "fsync"), (files, "write_file"), (files.shutil, "rmtree")]:
        patch.setattr(place, name, failing(getattr(place, name)))


def test_whenever_the_power_is_cut_the_old_checkpoint_or_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for call in itertools.count(1):
        work = tmp_path / str(call)
        work.mkdir()
        write(work, 2)
        with monkeypatch.context() as patch:
            cut_power_at(call, patch)
            try:
                write(work, 4)
                break
            except PowerCut:
                pass
        last = last_checkpoint(work)
        assert last is not None
        step = files.step_of(last)
        assert files.read_tensors(last / files.WEIGHTS)["w"].tolist() == [step] * 50
        assert sorted(p.name for p in last.iterdir()) == sorted(
            [files.WEIGHTS, files.OPTIMIZER, files.STATE, "random.json"]
        )
        files.clear_leftovers(work, last)
        assert [p.name for p in work.iterdir()] == [last.name]
        found.append(step)
    assert found == sorted(found)
    assert {2, 4} == set(found)
    assert len(found) > 8
    assert [p.name for p in work.iterdir()] == ["checkpoint-4"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if path.name == files.STATE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: the disk is full; there is no earlier one$"):
        write(tmp_path, 2)
    monkeypatch.undo()
    write(tmp_path, 2)
    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}: .* the disk is full; step 2 is kept$"):
        write(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


# --- what a run tells of itself ---


def validated(*losses: float) -> list[dict[str, Any]]:
    return [{"eval_loss": loss, "eval_loss_up": 0.5, "epoch": 0.1, "step": 10 * i} for i, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "patience", "best", "stopped"),
    [
        ([], 1, None, False),
        ([3.0], 1, 10, False),
        ([3.0, 2.0], 1, 20, False),
        ([3.0, 2.0, 2.0], 1, 20, True),  # equal is not better
        ([3.0, 2.0, 2.5], 2, 20, False),
        ([3.0, 2.0, 2.5, 2.1], 2, 20, True),
        ([3.0, 2.0, 2.5, 1.9], 2, 40, False),
        ([3.0, float("nan"), 2.5], 2, 30, False),
        ([float("nan"), float("nan")], 1, 10, True),
        ([3.0, 4.0, 5.0], None, 10, False),
    ],
)
def test_stopping_early(losses: list[float], patience: int | None, best: int | None, stopped: bool) -> None:
    assert history.best_step(validated(*losses)) == best
    assert history.stopped_early(validated(*losses), patience) is stopped


def test_the_record_of_a_run() -> None:
    steps = [
        {"loss": 3.0, "learning_rate": 0.1, "part_routing": 1.0, "part_cross_entropy": 2.0, "step": 1},
        {"loss": 2.0, "learning_rate": 0.2, "part_cross_entropy": 2.0, "step": 2},
    ]
    last = {"eval_loss": 1.5, "eval_loss_up": 1.25, "num_input_tokens_seen": 300, "seconds": 2.5, "step": 2}
    assert history.record([*steps, last], 3) == {
        "steps": 2,
        "seconds": 2.5,
        "tokens": 300,
        "tokens_per_second": 120.0,
        "stopped_early": False,
        "best_step": 2,
        "losses": [[1, 3.0], [2, 2.0]],
        "parts": {"routing": [[1, 1.0]], "cross_entropy": [[1, 2.0], [2, 2.0]]},
        "learning_rates": [[1, 0.1], [2, 0.2]],
        "validations": [{"step": 2, "loss": 1.5, "loss_up": 1.25}],
    }
    assert history.record([], None)["best_step"] is None


def test_what_differs_between_two_records() -> None:
    old = {"recipe": {"seed": 0, "lora": {"r": 8, "alpha": 16}, "gone": None}, "sha256": {"data:a": "1", "data:b": "2"}}
    new = {"recipe": {"seed": 1, "lora": {"r": 8, "alpha": 8}, "new": None}, "sha256": {"data:a": "1", "data:b": "3"}}
    assert differences(old, new) == ["seed", "lora.alpha", "data:b"]
    assert differences(new, new) == []
    assert differences({}, {"recipe": {"seed": 1}, "sha256": {}}) == ["seed"]


def test_the_bar_is_one_line_of_80_columns() -> None:
    shown = io.StringIO()
    bar = ProgressBar(Console(file=shown, width=80, force_terminal=True))
    bar._bar.update(bar._task, total=10000, completed=9999, note="loss 11.234  123,456 tokens/s")
    text = Console(width=80, file=io.StringIO()).render_lines(bar._bar.get_renderable())
    assert len(text) == 1
    line = "".join(segment.text for segment in text[0])
    assert "loss 11.234  123,456 tokens/s" in line
    assert "ETA" in line
    assert "9999/10000" in line
    assert "…" not in line


def test_speed_is_that_of_the_last_steps() -> None:
    assert speed([(0.0, 100)]) == 0.0
    assert speed([(10.0, 100), (11.0, 150), (12.0, 300)]) == 100.0


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in [(9, "{}"), (10, "{}"), (11, '{"cut'), (12, None)]:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
