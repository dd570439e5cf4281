"""Targets and adapters."""

import pytest
import torch
from conftest import tiny_configs

from medai_nb.config import LoRAConfig, ModelConfig, RunConfig, UserError
from medai_nb.lora import apply_lora, count_parameters, layers_of, linear_layers, resolve_targets
from medai_nb.models import skeleton

LLAMA_NAMES = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPECTED = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "mistral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "self_attn.dense", "fc1", "fc2"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"},
}


def test_names_written_for_llama_reach_every_layer_of_each_architecture(tiny_config):
    bones = skeleton(tiny_config, "fp32")
    targets, notes = resolve_targets(bones, LLAMA_NAMES)
    assert set(targets) == EXPECTED[tiny_config.model_type]
    layers = linear_layers(bones)
    reached = {name for target in targets for name in layers_of(target, layers)}
    assert reached == set(layers), "the seven names of Llama are all of its linear layers"
    changed = set(targets) - set(LLAMA_NAMES)
    assert all(any(target in note for note in notes) for target in changed), "every replacement is said"


def test_all_linear_leaves_out_the_output_head(tiny_config):
    bones = skeleton(tiny_config, "fp32")
    targets, notes = resolve_targets(bones, "all-linear")
    assert notes == []
    assert "lm_head" not in targets
    assert {name for target in targets for name in layers_of(target, linear_layers(bones))} == set(
        linear_layers(bones)
    )


def test_targets_with_no_counterpart_are_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"gpt2 has none of convolution; it has c_attn, c_proj, c_fc"):
        resolve_targets(skeleton(tiny_configs()["gpt2"], "fp32"), ["convolution"])


def test_gate_is_left_out_and_said_where_the_model_has_none():
    _, notes = resolve_targets(skeleton(tiny_configs()["opt"], "fp32"), ["gate_proj", "fc1"])
    assert notes == ["gate_proj left out: the feed-forward part of opt has no gate"]


def test_output_head_is_left_out_and_said():
    targets, notes = resolve_targets(skeleton(tiny_configs()["llama"], "fp32"), ["lm_head", "q_proj"])
    assert targets == ["q_proj"]
    assert "output head" in notes[0]


def test_longer_spelling_of_a_chosen_layer_is_not_counted_twice():
    bones = skeleton(tiny_configs()["llama"], "fp32")
    targets, notes = resolve_targets(bones, ["down_proj", "mlp.down_proj"])
    assert targets == ["down_proj"]
    assert "chosen already" in notes[0]


@pytest.mark.parametrize("requested", [r".*layers\.1\..*q_proj", "q_proj, v_proj"])
def test_expressions_and_lists_in_one_string_are_understood(requested):
    bones = skeleton(tiny_configs()["llama"], "fp32")
    targets, _ = resolve_targets(bones, requested)
    layers = linear_layers(bones)
    reached = [name for target in targets for name in layers_of(target, layers)]
    assert len(reached) == (1 if "layers" in requested else 4)


def test_plain_name_is_not_taken_as_an_expression_for_a_part_of_it():
    with pytest.raises(UserError):
        resolve_targets(skeleton(tiny_configs()["llama"], "fp32"), "proj")


def test_adapter_equals_the_base_model_at_first_and_only_the_adapter_learns(tiny_config):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config).eval()
    tokens = torch.arange(8).unsqueeze(0)
    before = model(tokens).logits
    adapted = apply_lora(model, LoRAConfig(r=4), seed=1).eval()
    assert torch.equal(adapted(tokens).logits, before)
    learning = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert learning and all("lora_" in name for name in learning)


def test_equal_seeds_give_equal_adapters_and_the_callers_random_state_is_kept():
    from transformers import AutoModelForCausalLM

    def first_weights(seed, noise):
        torch.manual_seed(noise)
        model = AutoModelForCausalLM.from_config(tiny_configs()["llama"])
        state = torch.get_rng_state()
        adapted = apply_lora(model, LoRAConfig(r=4), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([w.flatten() for n, w in adapted.named_parameters() if "lora_A" in n])

    assert torch.equal(first_weights(7, noise=1), first_weights(7, noise=2))
    assert not torch.equal(first_weights(7, noise=1), first_weights(8, noise=1))


def test_skeleton_counts_the_same_adapter_as_the_loaded_model(tiny_config):
    from transformers import AutoModelForCausalLM

    lora = LoRAConfig(r=4)
    with torch.device("meta"):
        planned = apply_lora(skeleton(tiny_config, "fp32"), lora, seed=0)
    loaded = apply_lora(AutoModelForCausalLM.from_config(tiny_config), lora, seed=0)
    assert count_parameters(planned) == count_parameters(loaded)


def test_rslora_and_dora_reach_the_layers(tiny_llama):
    from medai_nb.models import load_model

    base = load_model(ModelConfig(name=str(tiny_llama), precision="fp32"), for_training=True)
    adapted = apply_lora(base, LoRAConfig(r=16, alpha=32, use_rslora=True, use_dora=True), seed=0)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 32 / 16**0.5
    length = layer.lora_magnitude_vector["default"].weight
    assert length.requires_grad
    assert torch.allclose(length, layer.base_layer.weight.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("rank", [4, 16])
def test_loftq_begins_nearer_to_the_unquantized_weights(tiny_llama, rank):
    from bitsandbytes.functional import dequantize_4bit

    from medai_nb.models import load_model

    whole = load_model(ModelConfig(name=str(tiny_llama), precision="fp32")).model.layers[0].mlp.up_proj.weight
    quantized = ModelConfig(name=str(tiny_llama), precision="fp32", use_4bit=True)
    adapted = apply_lora(
        load_model(quantized, for_training=True), LoRAConfig(r=rank, alpha=4 * rank, init="loftq"), seed=0
    )
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    kept = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    lost = whole - kept
    left = lost - layer.get_delta_weight("default")
    best = torch.linalg.svdvals(lost)[rank:].norm()  # Eckart, Young: no matrix of this rank comes nearer
    assert best * 0.999 < left.norm() < best * 1.05
    assert left.norm() < 0.95 * lost.norm()


def test_loftq_without_quantization_is_refused(tiny_llama):
    from medai_nb.config_check import config_problems
    from medai_nb.models import load_model

    base = load_model(ModelConfig(name=str(tiny_llama), precision="fp32"), for_training=True)
    with pytest.raises(
        UserError, match="lora.init: loftq makes up for 4-bit quantization: set model.use_4bit"
    ):
        apply_lora(base, LoRAConfig(init="loftq"), seed=0)
    settings = {"lora": {"init": "loftq"}, "model": {"use_4bit": True}}
    for changes, message in (
        ({"model": {}}, "use_4bit false"),
        ({"training": {"zero_stage": 3}}, "stage 3"),
        ({"lora": {"init": "loftq", "use_dora": True}}, "use_dora"),
    ):
        (problem,) = config_problems(RunConfig.load(settings | changes))
        assert "loftq" in problem and message in problem
    assert config_problems(RunConfig.load(settings)) == []
