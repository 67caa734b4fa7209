"""Whatever ends a run, the next one goes on from a whole checkpoint and ends as an unbroken run does."""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from xloom.errors import CheckpointError, DivergedError
from xloom.hub.files import read_tensors
from xloom.training import checkpoint as files
from xloom.training.expert import train_expert
from xloom.training.head import train_head
from xloom.training.loop import CompletionTrainer, last_checkpoint
from xloom.training.progress import Curves
from xloom.training.recipe import load_expert_recipe, load_head_recipe
from xloom.training.run import Run

Recipes = Callable[..., Path]
Breaking = Callable[..., None]


def expert(path: Path, progress: bool = False) -> Path:
    return train_expert(load_expert_recipe(path), progress=progress)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


def assert_same(a: Path, b: Path, file: str = "adapter_model.safetensors") -> None:
    assert (a / file).read_bytes() == (b / file).read_bytes()
    for key in ("losses", "parts", "learning_rates", "validations", "validation", "stopped_early", "best_step"):
        assert record_of(a)[key] == record_of(b)[key], key


def step_kept(project: Path, output: str = "out") -> int | None:
    last = last_checkpoint(project / f"{output}.work")
    return files.step_of(last) if last else None


def test_a_checkpoint_holds_no_pickles(project: Path, recipe_file: Recipes, breaking: Breaking) -> None:
    breaking(6)
    with pytest.raises(RuntimeError, match="power cut"):
        expert(recipe_file("expert", eval_every=2, early_stopping=9))
    names = [str(p.relative_to(project / "out.work")) for p in (project / "out.work").rglob("*") if p.is_file()]
    parts = (
        "best.safetensors", "optimizer.json", "optimizer.safetensors", "random.json", "random.safetensors",
        "trained.safetensors", "trainer_state.json",
    )  # fmt: skip
    assert sorted(names) == [*(f"checkpoint-4/{name}" for name in parts), "recipe.json"]
    for path in (project / "out.work").rglob("*.json"):
        json.loads(path.read_text())


# --- signals ---


def signal_once(number: int = signal.SIGTERM) -> Callable[..., None]:
    waiting = [number]
    return lambda *_: os.kill(os.getpid(), waiting.pop()) if waiting else None


def test_sigterm_finishes_the_step(project: Path, recipe_file: Recipes, breaking: Breaking) -> None:
    whole = expert(recipe_file("expert", "whole", lora={"r": 2, "dropout": 0.1}))
    path = recipe_file("expert", lora={"r": 2, "dropout": 0.1})
    breaking(3, interrupt=True, number=signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        expert(path)
    assert step_kept(project) == 3
    breaking(None)
    assert_same(expert(path), whole)


@pytest.mark.parametrize("during", ["validation", "saving"])
def test_a_signal_during(during: str, project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is finished, and no further step is made."""
    changes = {"eval_every": 3, "max_steps": 7, "early_stopping": 5}
    whole = expert(recipe_file("expert", "whole", **changes))
    ask = signal_once()
    if during == "validation":
        monkeypatch.setattr(CompletionTrainer, "observe", lambda self, *_: ask())
    else:
        real = files.write_file
        monkeypatch.setattr(files, "write_file", lambda *args: (ask(), real(*args)))
    with pytest.raises(KeyboardInterrupt):
        expert(recipe_file("expert", **changes))
    monkeypatch.undo()
    assert step_kept(project) == (3 if during == "validation" else 4)
    assert_same(expert(recipe_file("expert", **changes)), whole)


def test_a_second_signal_interrupts_at_once(
    project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(CompletionTrainer, "terms", twice)
    with pytest.raises(KeyboardInterrupt):
        expert(recipe_file("expert"))
    assert step_kept(project) is None


def test_sigterm_outside_the_loop_is_an_interrupt_too(
    project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(CompletionTrainer, "summary", signal_once())
    with pytest.raises(KeyboardInterrupt):
        expert(recipe_file("expert"))
    assert signal.getsignal(signal.SIGTERM) == before
    assert step_kept(project) == 8
    monkeypatch.undo()
    assert record_of(expert(recipe_file("expert")))["steps"] == 8


# --- the disk ---


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses larger ones, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_a_checkpoint(
    project: Path, recipe_file: Recipes, breaking: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = expert(recipe_file("expert", max_steps=2))
    old = (done / "adapter_model.safetensors").read_bytes()
    path = recipe_file("expert")
    breaking(5)
    with pytest.raises(RuntimeError):
        expert(path)
    breaking(None)
    with (
        files_of_at_most(2000),
        pytest.raises(CheckpointError, match=r"out.work: the checkpoint of step 8 .* step 4 is kept"),
    ):
        expert(path)
    assert step_kept(project) == 4
    assert not list((project / "out.work").glob("unfinished-*"))
    assert (done / "adapter_model.safetensors").read_bytes() == old

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; step 4 is kept$"):
        expert(path)
    monkeypatch.undo()
    assert_same(expert(path), expert(recipe_file("expert", "whole")))


def test_a_disk_that_refuses_the_result(project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    done = expert(recipe_file("expert", max_steps=2))
    before = {p.name: p.read_bytes() for p in done.iterdir()}
    summary = CompletionTrainer.summary
    with files_of_at_most(10**9), monkeypatch.context() as patch:

        def shrink(self: CompletionTrainer) -> dict[str, Any]:
            found = summary(self)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return found

        patch.setattr(CompletionTrainer, "summary", shrink)
        with pytest.raises(CheckpointError, match=r"out: cannot be written: .*; step 8 is kept$"):
            expert(recipe_file("expert"))
    assert {p.name: p.read_bytes() for p in done.iterdir()} == before
    assert not [p.name for p in project.iterdir() if "out.new" in p.name or "out.old" in p.name]
    assert step_kept(project) == 8
    assert record_of(expert(recipe_file("expert")))["steps"] == 8


def test_what_a_killed_run_left_is_removed(project: Path, recipe_file: Recipes, breaking: Breaking) -> None:
    breaking(5)
    with pytest.raises(RuntimeError):
        expert(recipe_file("expert"))
    breaking(None)
    work = project / "out.work"
    for name in ("unfinished-8", "checkpoint-6"):
        (work / name).mkdir()
        (work / name / "trained.safetensors").write_bytes(b"half")
    (project / ".out.new-abc").mkdir()
    assert Run(load_expert_recipe(recipe_file("expert")), inputs={}, progress=False).open() == work / "checkpoint-4"
    assert sorted(p.name for p in work.iterdir()) == ["checkpoint-4", "recipe.json"]
    assert not (project / ".out.new-abc").exists()


def test_a_run_that_diverges_keeps_the_last_good_step(
    project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = CompletionTrainer.terms

    def bad_at_6(self: CompletionTrainer, *args: Any) -> dict[str, torch.Tensor]:
        return {
            name: term * (torch.nan if self.state.global_step == 5 else 1) for name, term in terms(self, *args).items()
        }

    monkeypatch.setattr(CompletionTrainer, "terms", bad_at_6)
    with pytest.raises(
        DivergedError, match=r"^step 6: the loss is nan; lower learning_rate \(step 4 is kept in .*out.work"
    ):
        expert(recipe_file("expert"))
    assert all(t.isfinite().all() for t in read_tensors(project / "out.work/checkpoint-4/trained.safetensors").values())


# --- early stopping ---


def losing(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation says what the test wants."""
    measure = CompletionTrainer.measure

    def told(self: CompletionTrainer) -> dict[str, Any]:
        return measure(self) | {"loss": losses.get(self.state.global_step, 9.0)}

    monkeypatch.setattr(CompletionTrainer, "measure", told)


def test_the_best_weights_are_published(project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 10: 1.0})
    changes = {"max_steps": 12, "eval_every": 2, "save_every": 3, "lora": {"r": 2, "dropout": 0.1}}
    early = expert(recipe_file("expert", "early", early_stopping=2, **changes))
    record = record_of(early)
    assert (record["steps"], record["best_step"], record["stopped_early"]) == (8, 4, True)
    assert [v["step"] for v in record["validations"]] == [2, 4, 6, 8]

    kept: dict[int, dict[str, torch.Tensor]] = {}
    log = CompletionTrainer.log

    def watch(self: CompletionTrainer, logs: dict[str, float], *rest: Any) -> None:
        if "eval_loss" in logs:
            kept[self.state.global_step] = {k: v.detach().clone() for k, v in self.trained().items()}
        log(self, logs, *rest)

    monkeypatch.setattr(CompletionTrainer, "log", watch)
    late = record_of(expert(recipe_file("expert", "late", early_stopping=3, **changes)))
    assert (late["steps"], late["best_step"], late["stopped_early"]) == (12, 10, False)
    published = read_tensors(early / "adapter_model.safetensors")
    assert all(torch.equal(published[k.replace(".default", "")], v) for k, v in kept[4].items())
    assert any(not torch.equal(published[k.replace(".default", "")], v) for k, v in kept[8].items())
    plain = record_of(expert(recipe_file("expert", "plain", **changes)))
    assert (plain["steps"], plain["best_step"], plain["stopped_early"]) == (12, None, False)


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_stops_early_alike(
    step: int, project: Path, recipe_file: Recipes, breaking: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off before, at and after the best validation; the best weights were seen by the first process alone."""
    losing(monkeypatch, {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1})
    changes = {"max_steps": 12, "eval_every": 2, "save_every": 1, "early_stopping": 2}
    whole = expert(recipe_file("expert", "whole", **changes))
    breaking(step)
    with pytest.raises(RuntimeError):
        expert(recipe_file("expert", **changes))
    breaking(None)
    assert_same(expert(recipe_file("expert", **changes)), whole)


def test_a_run_that_stopped_early_is_not_trained_on(
    project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, {2: 1.0})
    changes = {"max_steps": 12, "eval_every": 2, "early_stopping": 1}
    whole = expert(recipe_file("expert", "whole", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "publish", signal_once(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            expert(recipe_file("expert", **changes))
    monkeypatch.setattr(CompletionTrainer, "terms", lambda *_: pytest.fail("trained on"))
    assert_same(expert(recipe_file("expert", **changes)), whole)


# --- what is shown and kept ---


def test_what_changed_is_said(project: Path, recipe_file: Recipes, breaking: Breaking, capsys: Any) -> None:
    expert(recipe_file("expert", max_steps=2))
    capsys.readouterr()
    expert(recipe_file("expert", max_steps=3), progress=True)
    assert "out: training again, for what changed: max_steps\n" in capsys.readouterr().err
    breaking(5)
    with pytest.raises(RuntimeError):
        expert(recipe_file("expert"))
    breaking(None)
    with (project / "up.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "abc", "completion": "d"}) + "\n")
    capsys.readouterr()
    expert(recipe_file("expert", seed=3, lora={"r": 4}), progress=True)
    assert "out.work: starting afresh, for what changed: seed, lora.r, train:up.jsonl\n" in capsys.readouterr().err


def test_curves_go_on_and_are_kept(
    project: Path, recipe_file: Recipes, breaking: Breaking, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = recipe_file("expert", eval_every=4)
    breaking(6)
    with Run.bar(None) as callbacks:  # type: ignore[arg-type]
        monkeypatch.setattr(Run, "bar", lambda self: nullcontext([Curves(self.work / "logs"), *callbacks]))
    with pytest.raises(RuntimeError):
        expert(path)
    assert list((project / "out.work" / "logs").iterdir()), "to be watched while training"
    monkeypatch.setattr(Run, "bar", lambda self: nullcontext([Curves(self.work / "logs")]))
    found = events.EventAccumulator(str(expert(path) / "logs"))
    found.Reload()
    assert [e.step for e in found.Scalars("train/loss")] == list(range(1, 9))
    assert [e.step for e in found.Scalars("eval/loss")] == [4, 8]
    losses = [loss for _, loss in record_of(project / "out")["losses"]]
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(losses)


# --- killed ---


@pytest.mark.slow
def test_killed_again_and_again_ends_as_an_unbroken_run(
    project: Path, recipe_file: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random moments; a checkpoint is written at every second step, so that some kills hit one."""
    changes = {"max_steps": 60, "save_every": 2, "eval_every": 10, "gradient_accumulation": 2}
    recipe = load_head_recipe(recipe_file("head", **changes))
    processes = multiprocessing.get_context("forkserver")  # imports torch once, not once for each kill
    processes.set_forkserver_preload(["xloom.training.head"])
    delays, steps = random.Random(3), [0]

    def start() -> Any:
        process = processes.Process(target=train_head, args=(recipe,), kwargs={"progress": False})
        process.start()
        return process

    while len(steps) < 5:
        process = start()
        while process.is_alive() and (step_kept(project) or 0) <= steps[-1]:
            time.sleep(0.002)
        time.sleep(delays.uniform(0.0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had ended before"
        kept = step_kept(project)
        assert kept is not None
        assert kept > steps[-1]
        steps.append(kept)
    assert steps[-1] < 60
    process = start()
    process.join()
    assert process.exitcode == 0
    monkeypatch.setenv("XLOOM_CACHE", str(project / "own-cache"))  # nothing that the killed ones have computed
    whole = train_head(load_head_recipe(recipe_file("head", "whole", **changes)), progress=False)
    assert_same(project / "out", whole, "head.safetensors")
