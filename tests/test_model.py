"""What must always hold of the model: nothing changes behind its back, gradients are right, bad input has a name."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tiny import make_expert, prompt, tiny_base
from xloom import XLoraForCausalLM, architecture, errors, routers
from xloom.hub.files import read_tensors, write_tensors

FIELDS = {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0}


@pytest.fixture
def model(llama, expert_paths) -> XLoraForCausalLM:
    return XLoraForCausalLM.from_experts(llama, expert_paths, **FIELDS)


def state(model: XLoraForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- nothing changes behind its back ---


def test_forward_generate_and_backward_change_nothing(model):
    before, flags = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    ids = prompt(2, 7)
    model(ids)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    with model.routing(routers.Uniform()):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_head_has_gradients(model):
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head"}
    ids = prompt(2, 7)
    model(ids, labels=ids).loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert all(p.grad.abs().max() > 0 for p in model.head.parameters())


def test_experts_are_trained_when_asked(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths, use_trainable_adapters=True, **FIELDS)
    ids = prompt(2, 7)
    model(ids, labels=ids).loss.backward()
    graded = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert {"A_RI", "B_OR"} <= graded
    plain = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("base.weight")}
    assert not plain


def test_unload_gives_the_base_back(llama, expert_paths):
    ids = prompt(2, 7)
    modules = {name: id(module) for name, module in llama.named_modules()}
    expected = llama(ids).logits
    for fields in ({}, {"gate_at_layer": 1, "drop_sites_below_gate": True}):
        model = XLoraForCausalLM.from_experts(llama, expert_paths, **fields)
        model(ids)
        base = model.unload()
        assert base is llama
        assert {name: id(module) for name, module in base.named_modules()} == modules
        assert torch.equal(base(ids).logits, expected)


def test_a_copy_stands_alone(model):
    twin, ids = copy.deepcopy(model), prompt(1, 5)
    expected = model(ids).logits
    assert torch.equal(twin(ids).logits, expected)
    with torch.no_grad():
        for parameter in twin.head.parameters():
            parameter.add_(1.0)
    with twin.routing(routers.BaseOnly()):
        assert torch.equal(model(ids).logits, expected)


# --- states of the head, known beforehand ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "bloom", "gemma3_text", "opt", "phi3", "gpt_neox"])
@pytest.mark.parametrize("fields", [{}, {"scaling_pass_value": 0.4}, {"gate_at_layer": 0}, {"gate_at_layer": 1}])
def test_head_states_known_beforehand_change_nothing(kind, fields, tmp_path):
    base = tiny_base(kind)
    expert = make_expert(base, tmp_path / "e", r=2, target_modules="all-linear")
    options = {"head_input": ["token", "running_mean"], "drop_sites_below_gate": True, **fields}
    model = XLoraForCausalLM.from_experts(base, {"a": expert, "b": expert}, **options)
    ids, mask = prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask, use_cache=False, **model.positions(mask))
    layers = architecture.decoder_layers(base)[1]
    ran = []
    model.compute_head_states(ids, mask)  # the first call asks a layer what it returns
    for number, layer in enumerate(layers):
        inner = layer.layer if hasattr(layer, "layer") else layer
        inner.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = model.compute_head_states(ids, mask)
    gate = fields.get("gate_at_layer")
    assert ran == list(range(3 if gate is None else gate))
    ran.clear()
    again = model(ids, attention_mask=mask, head_states=states, **model.positions(mask))
    assert ran == list(range(gate or 0, 3))
    for a, b in ((again.logits, whole.logits), (again.scalings, whole.scalings)):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=0, atol=0)
    with torch.no_grad():
        other = model(ids, attention_mask=mask, head_states=states + 1.0, **model.positions(mask))
    assert not torch.allclose(other.scalings, whole.scalings)


def test_head_states_and_a_cache_exclude_each_other(model):
    ids = prompt(1, 5)
    with pytest.raises(errors.ConfigError, match="head_states belong to whole sequences"):
        model(ids, head_states=model.compute_head_states(ids), use_cache=True)


# --- gradients ---


@pytest.mark.parametrize("fields", [{}, {"head_input": ["token", "ema:3"]}, {"scaling_pass_value": 0.3}])
def test_gradient_checkpointing_changes_no_gradient(llama, expert_paths, fields):
    model = XLoraForCausalLM.from_experts(llama.double(), expert_paths, **FIELDS, **fields).train()
    ids = prompt(2, 9)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.head.parameters()]

    plain = gradients()
    assert all(g.abs().max() > 1e-9 for g in plain)
    model.gradient_checkpointing_enable()
    ran = []
    layer = model.base.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    for mine, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert len(ran) == 3  # scaling pass, mixed pass, and again in backward: it really was checkpointed
    model.gradient_checkpointing_disable()
    ran.clear()
    gradients()
    assert len(ran) == 2


def test_gradient_checkpointing_with_an_early_gate(llama, expert_paths):
    fields = {"gate_at_layer": 1, "drop_sites_below_gate": True, "head_input": "running_mean"}
    model = XLoraForCausalLM.from_experts(llama.double(), expert_paths, **fields).train()
    ids = prompt(2, 9)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.head.parameters()])
    assert all(g.abs().max() > 1e-9 for g in grads[0])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_scaling_pass_sees_no_dropout(expert_paths):
    base = tiny_base("llama", attention_dropout=0.9)
    model = XLoraForCausalLM.from_experts(base, expert_paths, **FIELDS)
    ids = prompt(1, 9)
    expected = model(ids).scalings
    model.train()
    torch.testing.assert_close(model(ids).scalings, expected)
    assert base.model.training


# --- scalings and the log ---


def test_scalings_are_what_the_sites_use(model):
    ids = prompt(2, 6)
    out = model(ids)
    assert out.scalings.shape == (2, 6, len(model.sites), 3)
    torch.testing.assert_close(out.scalings.sum(-1), torch.ones(2, 6, len(model.sites)))
    with model.routing(routers.Precomputed(out.scalings)):
        again = model(ids)
    assert torch.equal(again.logits, out.logits)
    assert torch.equal(again.scalings, out.scalings)
    with model.routing(routers.Single("mech")):
        assert model(ids).scalings.mean(dim=(0, 1, 2)).tolist() == [0.0, 1.0, 0.0]
    with model.routing(routers.BaseOnly()):
        assert not model(ids).scalings.any()


def test_the_log_is_detached_bounded_and_named(model):
    ids = prompt(1, 6)
    with model.logging_scalings() as log:
        text = model.generate(ids, max_new_tokens=5, do_sample=False)
    whole = model(text[:, :-1]).scalings
    assert [entry.shape[1] for entry in log.entries] == [6, 1, 1, 1, 1]
    assert not any(entry.requires_grad for entry in log.entries)
    torch.testing.assert_close(log.tokens(), whole.detach())
    site, expert = model.sites[4], "prot"
    torch.testing.assert_close(log[site, expert], whole[:, :, 4, 2].detach())
    shares = log.shares()
    assert list(shares) == list(model.experts)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    model(ids)
    assert len(log) == 5  # outside the block nothing is logged

    with model.logging_scalings(max_tokens=8) as short:
        model.generate(ids, max_new_tokens=5, do_sample=False)
    assert short.tokens().shape[1] == 4
    assert short.dropped_tokens == 6
    with pytest.raises(errors.UnknownExpertError, match="'biology'.*chem, mech, prot"):
        log[site, "biology"]


def test_null_expert_makes_the_base_a_choice(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths, null_expert=True)
    ids = prompt(1, 6)
    out = model(ids)
    assert out.scalings.shape[-1] == 3
    assert (out.scalings.sum(-1) < 1).all()
    with torch.no_grad():
        model.head.linears[-1].bias[3] += 1e4
    expected = tiny_base("llama")(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)


def test_one_model_serves_many_routers_in_a_row(model):
    ids = prompt(1, 6)
    first = model.generate(ids, max_new_tokens=5, do_sample=False)
    with model.routing(routers.Uniform()):
        model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), first)


def test_a_failing_forward_leaves_the_model_as_it_was(model):
    ids = prompt(1, 6)
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))
    assert model.mixture.current.call is None
    assert torch.equal(model(ids).logits, expected)


# --- bad input ---


def test_what_from_experts_refuses(llama, expert_paths, tmp_path):
    make = XLoraForCausalLM.from_experts
    with pytest.raises(errors.NoExpertsError, match="at least one expert"):
        make(llama, {})
    with pytest.raises(errors.ConfigError, match="'xlora_dept'.*'xlora_depth'"):
        make(llama, expert_paths, xlora_dept=2)
    with pytest.raises(errors.ConfigError, match="'a/b'.*folder name"):
        make(llama, {"a/b": expert_paths["chem"]})
    with pytest.raises(errors.NotFoundError, match="no/such/folder"):
        make(str(tmp_path / "no/such/folder"), expert_paths)
    with pytest.raises(errors.NotFoundError, match="nobody/nothing"):
        make("nobody/nothing", expert_paths)
    with pytest.raises(errors.NotFoundError, match="nobody/nothing"):
        make(llama, {"a": "nobody/nothing"})
    with pytest.raises(errors.ConfigError, match="hidden_size=64.*32"):
        make(llama, expert_paths, hidden_size=64)
    with pytest.raises(
        errors.ConfigError, match=r"'chem' adapts 4 modules below gate_at_layer=2.*drop_sites_below_gate"
    ):
        make(llama, expert_paths, gate_at_layer=2)
    with pytest.raises(errors.ConfigError, match="use_cache|dtype"):
        make(llama, expert_paths, dtype=torch.float32)
    with pytest.raises(errors.ConfigError, match="from_experts"):
        XLoraForCausalLM(AutoConfig.for_model("xlora"))


def test_bases_that_cannot_be_mixed(expert_paths, llama):
    class Home(LlamaForCausalLM):
        """Of a kind that no test covers, and with something beside its cache."""

        calls = 0

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            Home.calls += 1
            out.logits = out.logits + Home.calls
            return out

    config = copy.deepcopy(llama.config)
    strange = Home(config)
    strange.config.model_type = "home-made"
    with pytest.raises(
        errors.UnsupportedArchitectureError, match=r"home-made: cached and uncached logits differ by \d"
    ):
        XLoraForCausalLM.from_experts(strange, expert_paths)
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    )
    with pytest.raises(errors.UnsupportedArchitectureError, match="mamba"):
        XLoraForCausalLM.from_experts(mamba, expert_paths)
    mixed = XLoraForCausalLM.from_experts(llama, expert_paths)
    with pytest.raises(errors.UnsupportedArchitectureError, match="unload"):
        XLoraForCausalLM.from_experts(mixed.base, expert_paths)


def test_an_architecture_that_no_test_covers_is_tried_and_taken(llama, expert_paths):
    llama.config.model_type = "llama-like"
    model = XLoraForCausalLM.from_experts(llama, expert_paths)
    assert model(prompt(1, 4)).logits.shape == (1, 4, 64)


def test_inputs(model):
    ids = prompt(1, 4)
    with pytest.raises(errors.ConfigError, match="either input_ids or inputs_embeds"):
        model()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_pooled_heads_want_a_plain_mask(llama, expert_paths):
    model = XLoraForCausalLM.from_experts(llama, expert_paths, head_input="running_mean")
    ids = prompt(1, 4)
    with pytest.raises(errors.ConfigError, match=r"attention_mask as \[B, T\]"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_experts_on_embeddings_and_head(tmp_path, llama):
    expert = make_expert(llama, tmp_path / "e", r=2, target_modules=["embed_tokens", "lm_head"])
    model = XLoraForCausalLM.from_experts(llama, {"a": expert})
    assert model.sites == ("model.embed_tokens", "lm_head")
    ids = prompt(2, 5)
    uncached = model(ids, use_cache=False).logits
    assert (uncached - tiny_base("llama")(ids).logits).abs().max() > 1e-2
    first = model(ids[:, :3])
    rest = model(ids[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), uncached, rtol=0, atol=1e-5)


# --- loading leaves nothing behind and loses nothing ---


def test_a_failed_load_gives_the_base_back(model, tmp_path, llama):
    model.save_pretrained(tmp_path / "saved")
    base = model.unload()
    head = tmp_path / "saved" / "head.safetensors"
    write_tensors(head, {k: v for k, v in read_tensors(head).items() if k != "layers.0.bias"})
    for _ in range(2):
        with pytest.raises(errors.MissingTensorsError, match=r"layers\.0\.bias"):
            XLoraForCausalLM.from_pretrained(tmp_path / "saved", base=base)
    assert not any(type(module).__name__ == "Site" for module in base.modules())


def test_dtype_of_the_base(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", include_base=True)
    load = XLoraForCausalLM.from_pretrained
    assert load(tmp_path / "saved").dtype == torch.float32
    assert load(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path / "saved", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    again = load(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.head.dtype == torch.float32
    again.save_pretrained(tmp_path / "again")
    for name in model.experts:  # a 16-bit base computes in 16 bits, but does not round what is saved
        file = f"experts/{name}/adapter_model.safetensors"
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    # a head that was trained on a 16-bit base finds it in 16 bits again
    assert load(tmp_path / "again", base=str(tmp_path / "saved" / "base")).dtype == torch.bfloat16


def test_more_than_ten_experts_from_peft(llama, tmp_path):
    """PEFT sorts the keys of its file as text; the columns are in the order of the numbers."""
    paths = {f"e{i}": make_expert(llama, tmp_path / str(i), i, r=1, target_modules=["q_proj"]) for i in range(11)}
    model = XLoraForCausalLM.from_experts(llama, paths, layerwise_scalings=True)
    ids = prompt(1, 5)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "peft", format="peft")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["xloom"]
    file.write_text(json.dumps(config, sort_keys=True))
    again = XLoraForCausalLM.from_pretrained(tmp_path / "peft", base=model.unload())
    assert again.experts == tuple(map(str, range(11)))
    assert torch.equal(again(ids).logits, expected)


def test_an_early_gate_where_the_decoder_projects(tmp_path):
    base = tiny_base("opt", word_embed_proj_dim=16)
    expert = make_expert(base, tmp_path / "e", r=2, target_modules=["q_proj"])
    for fields, size in (({"gate_at_layer": 1, "drop_sites_below_gate": True}, 32), ({}, 16)):
        model = XLoraForCausalLM.from_experts(base, {"a": expert}, **fields)
        assert model.head.linears[0].in_features == size
        assert model(prompt(1, 4)).logits.shape == (1, 4, 64)
        model.unload()
