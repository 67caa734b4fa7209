from pathlib import Path

import pytest
import yaml

from tiny import make_expert, tiny_base
from xloom.errors import RecipeError
from xloom.training.recipe import ExpertRecipe, HeadRecipe, load_expert_recipe, load_head_recipe

EXPERT = {"base": "base", "output": "out", "train": ["up.jsonl"], "max_steps": 5}


def expert_file(project: Path, **changes: object) -> Path:
    path = project / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (EXPERT | changes).items() if v != "-"}, sort_keys=False))
    return path


def head_file(project: Path, **changes: object) -> Path:
    for name in ("up", "down"):
        if not (project / "experts" / name).exists():
            make_expert(tiny_base("llama"), project / "experts" / name, r=2, target_modules=["q_proj"])
    recipe = {
        "base": "base",
        "output": "out",
        "max_steps": 5,
        "experts": {"up": "experts/up", "down": "experts/down"},
        "data": {"up": ["up.jsonl"], "mixed": {"files": "down.jsonl", "expert": None}},
    }
    path = project / "head.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (recipe | changes).items() if v != "-"}, sort_keys=False))
    return path


def test_defaults_and_relative_paths(project: Path) -> None:
    recipe = load_expert_recipe(expert_file(project, train="up.jsonl", learning_rate="2e-3"))
    assert (recipe.batch_size, recipe.learning_rate, recipe.lora.r, recipe.train) == (16, 2e-3, 8, ("up.jsonl",))
    assert recipe.output_folder == project / "out"
    assert recipe.base_source == str(project / "base")
    head = load_head_recipe(head_file(project))
    assert (head.learning_rate, head.routing_weight, head.init) == (5e-3, 1.0, "zero")
    assert list(head.experts) == ["up", "down"]
    assert head.data["mixed"].files == ("down.jsonl",)
    assert head.right_experts() == {"up": "up"}


def test_from_keywords_paths_start_here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    recipe = ExpertRecipe(**EXPERT)
    recipe.check()
    assert recipe.path("up.jsonl") == project / "up.jsonl"
    with pytest.raises(RecipeError, match=r"^unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)$"):
        ExpertRecipe(**EXPERT, learning_rat=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_step": 3}, "unknown key 'max_step' (did you mean 'max_steps'?)"),
        ({"lora": {"alfa": 3}}, "unknown key 'lora.alfa' (did you mean 'alpha'?)"),
        ({"base": "-"}, "base: expected a value, found nothing"),
        ({"batch_size": 0}, "batch_size: expected greater than or equal to 1, found 0"),
        ({"batch_size": "many"}, "batch_size: expected a valid integer, found 'many'"),
        ({"dtype": "float16"}, "dtype: expected 'float32' or 'bfloat16', found 'float16'"),
        ({"lora": {"targets": "linear"}},
         "lora.targets: expected 'all-linear' or a list of module names, found 'linear'"),
        ({"train": "upp.jsonl"},
         "train: {project}/upp.jsonl: expected a data file, a dataset's folder or its hub id, found nothing "
         "(did you mean 'up.jsonl'?)"),
        ({"early_stopping": 2}, "early_stopping: expected eval_every beside it, found none"),
        ({"lora": {"layers_to_transform": []}},
         "lora.layers_to_transform: expected at least 1 item, found []"),
        ({"quantisation": "8bit", "lora": {"use_dora": True}},
         "lora.use_dora: expected false with an 8-bit base (bitsandbytes), or quantisation: 4bit, found true"),
        ({"train": []}, "train: expected at least 1 item, found []"),
        ({"train": ""}, "train.0: expected at least 1 character, found ''"),
        ({"base": "./nowhere"},
         "base: expected a folder, a hub id or the built-in base, "
         "found nothing at {project}/nowhere"),
        ({"eval_every": 5}, "eval_every: expected validation files under 'valid', found none"),
    ],
)  # fmt: skip
def test_problems_of_an_expert_recipe(project: Path, changes: dict[str, object], message: str) -> None:
    path = expert_file(project, **changes)
    with pytest.raises(RecipeError) as caught:
        load_expert_recipe(path)
    assert str(caught.value) == f"{path}: {message.format(project=project)}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"xlora_dept": 2}}, "head: unknown field 'xlora_dept' (did you mean 'xlora_depth'?)"),
        ({"head": {"xlora_depth": 0}}, "head: xlora_depth must be at least 1, found 0"),
        ({"head": {"sites": []}}, "head: sites: follows from the base and the experts; leave it out"),
        ({"experts": {"up": "experts/gone"}},
         "experts.up: expected a LoRA folder or a hub id, found nothing at {project}/experts/gone"),
        ({"valid": {"up": ["q/zz.jsonl"]}},
         "valid.up: {project}/q/zz.jsonl: expected a data file, a dataset's folder or its hub id, found nothing"),
        ({"valid": {"dwn": "up.jsonl"}}, "valid: expected domains of data (up, mixed), found 'dwn'"),
        ({"data": {"upp": "up.jsonl"}},
         "data.upp: expected an expert's name (up, down), or 'expert: NAME' or 'expert: null' below it, "
         "found 'upp' (did you mean 'up'?)"),
        ({"data": {"all": {"files": "up.jsonl", "expert": "dwn"}}},
         "data.all.expert: expected one of up, down, 'base' or null, found 'dwn' (did you mean 'down'?)"),
        ({"data": {"all": {"files": "up.jsonl", "expert": "base"}}},
         "data.all.expert: expected head.null_expert: true beside 'base', found no null expert"),
        ({"data": {"up": {"file": "up.jsonl"}}},
         "data.up.files: expected a value, found nothing; unknown key 'data.up.file' (did you mean 'files'?)"),
        ({"data": {"up": 3}}, "data.up: expected files, or keys with values, found 3"),
        ({"data": {"all": {"files": "up.jsonl", "expert": None}}, "soft_labels": "off"},
         "soft_labels: expected 'row' or 'token' (or no routing term) where no domain has an expert, found 'off'"),
        ({"head": {"use_trainable_adapters": True}},
         "head.use_trainable_adapters: expected experts_learning_rate, which trains the experts, found none"),
        ({"experts_learning_rate": 1e-3, "dtype": "bfloat16"},
         "dtype: expected float32 where experts are trained, found bfloat16"),
        ({"drop_sites_below_gate": True}, "drop_sites_below_gate: expected head.gate_at_layer beside it, found none"),
        ({"label_steps": 9}, "label_steps: expected init: labels beside it, and max_steps=5 or more, found 9"),
        ({"init": "arrow", "head": {"enable_softmax": False}},
         "init: expected a head with enable_softmax, found enable_softmax: false"),
        ({"start_temperature": 2, "head": {"enable_softmax": False}},
         "start_temperature: expected a head with enable_softmax, found enable_softmax: false"),
    ],
)  # fmt: skip
def test_problems_of_a_head_recipe(project: Path, changes: dict[str, object], message: str) -> None:
    path = head_file(project, **changes)
    with pytest.raises(RecipeError) as caught:
        load_head_recipe(path)
    assert str(caught.value) == f"{path}: {message.format(project=project)}"


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"expected a recipe, found No such file or directory$"):
        load_head_recipe(path)
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match=r"expected keys and values, found list$"):
        load_head_recipe(path)
    path.write_text("a: [1\n")
    with pytest.raises(RecipeError) as caught:
        load_head_recipe(path)
    assert str(caught.value).startswith(f"{path}: expected YAML, found ")
    assert "\n" not in str(caught.value)


def test_a_recipe_is_frozen() -> None:
    recipe = HeadRecipe(base="b", output="o", max_steps=1, experts={"a": "x"}, data={"a": "y"})
    with pytest.raises(ValueError, match="frozen"):
        recipe.max_steps = 2


def test_a_key_twice_is_refused(project: Path) -> None:
    path = head_file(project)
    path.write_text(path.read_text() + "data: {up: up.jsonl}\n")
    with pytest.raises(RecipeError, match=r"expected YAML, found key 'data' twice"):
        load_head_recipe(path)


def test_off_is_a_word_here(project: Path) -> None:
    path = head_file(project)
    path.write_text(path.read_text() + "soft_labels: off\n")
    assert load_head_recipe(path).soft_labels == "off"


def test_a_recipe_given_to_the_other_command_says_so(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"a recipe for a head, found one for an expert: see xloom train-expert$"):
        load_head_recipe(expert_file(project))
    with pytest.raises(RecipeError, match=r"expected a recipe for an expert, found one for a head: see xloom train$"):
        load_expert_recipe(head_file(project))


def test_the_record_of_a_recipe_means_the_same_when_it_is_read_again(project: Path) -> None:
    recipe = load_head_recipe(head_file(project))
    record = recipe.as_record()
    assert {name: domain["expert"] for name, domain in record["data"].items()} == {"up": "up", "mixed": None}
    path = project / "again.yaml"
    path.write_text(yaml.safe_dump(record, sort_keys=False))
    again = load_head_recipe(path)
    assert (again.as_record(), again.meaning()) == (record, recipe.meaning())


def test_the_bases_rows_are_not_those_of_nobody(project: Path) -> None:
    """Another label is another run."""
    records = [
        load_head_recipe(
            head_file(project, data={"all": {"files": "up.jsonl", "expert": expert}}, head={"null_expert": True})
        ).as_record()
        for expert in (None, "base")
    ]
    assert records[0] != records[1]
