"""XLoraConfig checks itself, survives JSON, and tells transformers how many layers a cache has."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache, PreTrainedConfig

from tiny import ARCHITECTURES, tiny_base
from xloom.config import DEFAULT_HALF_LIFE, HeadInput, XLoraConfig, check_field_names, layer_types, parse_head_input
from xloom.errors import ConfigError, DuplicateExpertError, NoExpertsError, UnsupportedArchitectureError

FLAGS = (
    "layerwise_scalings", "enable_relu_and_dropout", "use_bias", "enable_softmax", "enable_softmax_topk",
    "use_trainable_adapters", "null_expert",
)  # fmt: skip
WRONG = {
    "xlora_depth": [0, -1, 1.5, "2", True, None, math.inf],
    "xlora_size": [0, -3, 2.5, "8", False, None],
    "xlora_dropout_p": [-0.1, 1.1, math.nan, "0.1", True, None],
    "softmax_temperature": [0, -1.0, math.nan, math.inf, "1", None],
    "top_k_lora": [0, -1, 1.5, "1", True],
    "scaling_pass_value": [math.nan, math.inf, "0", False],
    "global_scaling_weight": [math.nan, -math.inf, "1", None, True],
    "gate_at_layer": [-1, 0.5, "1", True],
    "head_input": [
        "tokens",
        [],
        ["token", "token"],
        ["token", 3],
        "ema:0",
        "ema:-1",
        "ema:nan",
        "ema:inf",
        "ema:x",
        "",
    ],
} | {flag: [1, 0, "true", None] for flag in FLAGS}
RIGHT = {
    "xlora_depth": [1, 8],
    "xlora_size": [1, 4096],
    "xlora_dropout_p": [0, 0.0, 0.5, 1],
    "softmax_temperature": [1e-3, 1, 7.5],
    "top_k_lora": [None, 1, 3],
    "scaling_pass_value": [None, 0, -0.5, 2.0],
    "global_scaling_weight": [0, -1.0, 1.5],
    "gate_at_layer": [None, 0, 2],
}


def llama(**fields) -> XLoraConfig:
    return XLoraConfig(base_config=tiny_base("llama").config, experts=["a", "b", "c"], **fields)


# --- ranges ---


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_out_of_range(name, value):
    with pytest.raises(ConfigError) as caught:
        XLoraConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "must" in message
    assert repr(value) in message or (isinstance(value, list) and repr(value[-1]) in message)
    assert "\n" not in message


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in RIGHT.items() for v in values])
def test_in_range(name, value):
    config = llama(**{name: value})
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("head_input", 5), ("head_input", None), ("experts", 5), ("experts", "abc"), ("sites", "abc"),
     ("base_model_name_or_path", 5)],
)  # fmt: skip
def test_a_value_of_the_wrong_kind(name, value):
    with pytest.raises(ConfigError, match=name):
        XLoraConfig(**{name: value})


@pytest.mark.parametrize("names", [["a/b"], [".."], [".hidden"], ["a b"], [""], [3], ["ok", "-x"], ["a\n"]])
def test_expert_names_become_folders(names):
    with pytest.raises(ConfigError, match="expert name") as caught:
        XLoraConfig(experts=names)
    assert repr(names[-1]) in str(caught.value)


def test_expert_names_differ():
    with pytest.raises(DuplicateExpertError, match="more than once: a"):
        XLoraConfig(experts=["a", "b", "a"])
    with pytest.raises(NoExpertsError, match="at least one"):
        from xloom.config import check_expert_names

        check_expert_names([])


# --- contradictions ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enable_softmax_topk": True}, ["enable_softmax_topk", "top_k_lora"]),
        ({"null_expert": True, "enable_softmax": False}, ["null_expert", "softmax"]),
        ({"top_k_lora": 4}, ["top_k_lora=4", "3 experts"]),
        ({"top_k_lora": 5, "null_expert": True}, ["top_k_lora=5", "4"]),
        ({"gate_at_layer": 1, "scaling_pass_value": 0.5}, ["gate_at_layer=1", "scaling_pass_value", "0.5"]),
        ({"gate_at_layer": 1, "scaling_pass_value": None}, ["gate_at_layer=1", "scaling_pass_value", "None"]),
        ({"gate_at_layer": 3}, ["gate_at_layer=3", "0 to 2"]),
    ],
)
def test_contradictions_are_refused(fields, words):
    with pytest.raises(ConfigError) as caught:
        llama(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_only_looks_like_a_contradiction():
    assert llama(top_k_lora=4, null_expert=True).top_k_lora == 4
    assert llama(null_expert=True, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2).null_expert


# --- unknown fields ---


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("xlora_dept", "xlora_depth"), ("topk_lora", "top_k_lora"), ("softmax_temprature", "softmax_temperature")],
)
def test_unknown_fields_name_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"{name}.*did you mean '{nearest}'"):
        XLoraConfig(**{name: 1})
    with pytest.raises(ConfigError, match=f"{name}.*did you mean '{nearest}'"):
        check_field_names([name])


def test_unknown_fields_are_all_named():
    with pytest.raises(ConfigError) as caught:
        XLoraConfig(stop_token_id=3, zzz=1)
    assert "stop_token_id" in str(caught.value)
    assert "'zzz'" in str(caught.value)


def test_known_fields_pass():
    check_field_names(["xlora_depth", "head_input", "gate_at_layer"])
    with pytest.raises(ConfigError, match="experts, sites: follows from"):
        check_field_names(["xlora_depth", "experts", "sites"])


# --- head_input ---


@given(st.floats(min_value=1e-3, max_value=1e6))
def test_half_lives(tokens):
    (parsed,) = parse_head_input(f"ema:{tokens!r}")
    assert parsed == HeadInput(tokens)
    assert parsed.decay**tokens == pytest.approx(0.5)


WORDS = st.sampled_from(["token", "running_mean", "ema", "ema:8", "ema:0.5", "ema:1e3"])


@given(st.lists(WORDS, min_size=1, unique=True))
def test_lists_of_inputs(words):
    parsed = parse_head_input(words)
    assert [i.pooled for i in parsed] == [word != "token" for word in words]
    assert XLoraConfig(head_input=words).pools == tuple(i for i in parsed if i.pooled)


@given(st.text(max_size=12))
def test_any_other_word_is_refused(word):
    """Whatever comes in, the answer is one of the three kinds or a ConfigError."""
    try:
        (parsed,) = parse_head_input(word)
    except ConfigError as error:
        assert repr(word) in str(error)
    else:
        kind, colon, half_life = word.partition(":")
        assert kind in {"token", "running_mean", "ema"}
        assert not (colon and kind != "ema")
        if colon:
            assert parsed.half_life == float(half_life)


def test_an_ema_without_its_half_life():
    assert parse_head_input("ema") == (HeadInput(DEFAULT_HALF_LIFE),)
    with pytest.raises(ConfigError, match="ema:"):
        parse_head_input("ema:")


@pytest.mark.parametrize("repeated", [["ema", f"ema:{DEFAULT_HALF_LIFE}"], ["ema:8", "ema:8.0"], ["token", "token"]])
def test_the_same_input_twice(repeated):
    with pytest.raises(ConfigError, match="different"):
        parse_head_input(repeated)


def test_decay():
    assert HeadInput(math.inf).decay == 1.0
    assert HeadInput(1.0).decay == 0.5
    assert not HeadInput().pooled


# --- the layers of the cache ---


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cache_layers(kind):
    base = tiny_base(kind).config
    own = layer_types(base)
    assert len(own) == 3
    for fields, types in [
        ({}, own * 2),
        ({"gate_at_layer": 1}, own),
        ({"head_input": ["token", "ema:4", "running_mean"]}, own * 2 + ["full_attention"] * 2),
        ({"gate_at_layer": 0, "head_input": "ema"}, [*own, "full_attention"]),
    ]:
        config = XLoraConfig(base_config=base, experts=["a"], **fields)
        text = config.get_text_config(decoder=True)
        assert text.num_hidden_layers == len(types)
        assert text.layer_types == types
        assert len(DynamicCache(config=config).layers) == len(types)
    assert base.num_hidden_layers == 3, "the base's own config is left alone"
    assert layer_types(base) == own


def test_sliding_layers_stay_where_they_are():
    gemma = XLoraConfig(base_config=tiny_base("gemma3_text").config, experts=["a"], head_input="ema")
    once = ["sliding_attention", "full_attention", "sliding_attention"]
    assert gemma.get_text_config().layer_types == [*once, *once, "full_attention"]
    mistral = XLoraConfig(base_config=tiny_base("mistral").config, experts=["a"])
    assert [layer.is_sliding for layer in DynamicCache(config=mistral).layers] == [True] * 6


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["linear_attention", "full_attention"]},
        {"num_kv_shared_layers": 1},
        {"layer_types": ["mamba"] * 2},
    ],
)
def test_layers_that_keep_something_else(fields):
    config = PreTrainedConfig(num_hidden_layers=2, **fields)
    config.model_type = "odd"
    with pytest.raises(UnsupportedArchitectureError, match="odd"):
        layer_types(config)


def test_without_a_base_there_are_no_layers_to_count():
    with pytest.raises(ConfigError, match="from_experts"):
        XLoraConfig().base_text_config


# --- JSON ---


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "layerwise_scalings": st.booleans(),
            "xlora_depth": st.integers(1, 9),
            "xlora_size": st.integers(1, 9999),
            "xlora_dropout_p": st.floats(0, 1),
            "enable_relu_and_dropout": st.booleans(),
            "use_bias": st.booleans(),
            "softmax_temperature": st.floats(1e-3, 1e3),
            "top_k_lora": st.none() | st.integers(1, 3),
            "global_scaling_weight": st.floats(-1e3, 1e3),
            "use_trainable_adapters": st.booleans(),
            "null_expert": st.booleans(),
            "head_input": st.lists(WORDS, min_size=1, unique_by=lambda w: parse_head_input(w)) | WORDS,
            "gate_at_layer": st.none() | st.integers(0, 2),
        },
    )
)
def test_json_round_trip(fields):
    config = XLoraConfig(
        base_config=AutoConfig.for_model("llama", num_hidden_layers=3), experts=["a", "b", "c"], **fields
    )
    again = XLoraConfig(**json.loads(json.dumps(config.to_dict())))
    assert {key: getattr(again, key) for key in fields} == fields
    assert again.to_dict() == config.to_dict()
    assert again.get_text_config().layer_types == config.get_text_config().layer_types


def test_file_round_trip(tmp_path):
    config = llama(null_expert=True, head_input=["token", "ema:3"], top_k_lora=2, base_model_name_or_path="org/name")
    config.save_pretrained(tmp_path)
    again = XLoraConfig.from_pretrained(tmp_path)
    assert again.experts == ["a", "b", "c"]
    assert again.head_input == ["token", "ema:3"]
    assert again.base_config.model_type == "llama"
    assert again.to_dict() == config.to_dict() | {"_name_or_path": again._name_or_path}


def test_the_config_keeps_a_copy_of_the_base_config():
    base = tiny_base("llama").config
    before = base.to_dict()
    config = XLoraConfig(base_config=base, experts=["a"])
    config.base_config.num_hidden_layers = 99
    assert base.to_dict() == before
