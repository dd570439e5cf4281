"""Targets, adapters and the plan that is made before any weight is read."""

import json

import pytest
import torch
from conftest import tiny_configs

from medai_nb.config import ConfigError, LoRAConfig, RunConfig, UserError
from medai_nb.lora import (
    apply_lora,
    count_parameters,
    layers_of,
    linear_layers,
    memory_table,
    parameter_table,
    plan_lora,
    plot_plan,
    resolve_targets,
)
from medai_nb.models import activation_bytes, body_of, skeleton

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


def test_dry_run_counts_the_activations_that_packed_rows_keep(tiny_config):
    from transformers import AutoModelForCausalLM

    model = apply_lora(
        AutoModelForCausalLM.from_config(tiny_config, dtype=torch.float32), LoRAConfig(r=4), seed=0
    ).train()
    body = body_of(model)
    own = {tensor.untyped_storage()._cdata for tensor in [*body.parameters(), *body.buffers()]}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        restarting = torch.arange(64).repeat(2, 2)  # two records in each row
        body(input_ids=torch.zeros(2, 128, dtype=torch.long), position_ids=restarting, use_cache=False)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert activation_bytes(body, 2, 128) == pytest.approx(measured, rel=0.05)


def test_plan_is_json_and_adds_up(tiny_llama):
    config = RunConfig.load({"model_name": str(tiny_llama), "lora_r": 8, "precision": "fp32"})
    plan = plan_lora(config)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["parameters"]["trainable"] == sum(
        row["parameters"] for row in plan["parameters"]["by_target"]
    )
    assert plan["parameters"]["total"] == plan["base_model"]["parameters"] + plan["parameters"]["trainable"]
    assert plan["memory"]["parts"]["weights"] == plan["base_model"]["parameters"] * 4
    assert plan["base_model"]["weights_hash"].startswith("sha256:")
    assert plan["training"]["estimated_steps"] is None
    assert parameter_table(plan)[-1]["parameters"] == plan["parameters"]["trainable"]
    assert memory_table(plan)[-1]["part"] == "all"
    assert plot_plan(plan).axes


def test_plan_reads_no_weights(tiny_llama, monkeypatch):
    import safetensors
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    assert plan_lora(RunConfig.load({"model_name": str(tiny_llama)}))["memory"]["fits"]


def test_steps_follow_from_rows_batch_and_epochs(tiny_llama):
    settings = {
        "model_name": str(tiny_llama),
        "packing": False,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_accelerators": 2,
        "num_train_epochs": 3,
    }
    summary = {"examples": 100, "tokens": 5000, "labelled_tokens": 500}
    steps = plan_lora(RunConfig.load(settings), summary)["training"]
    assert steps["rows_per_step"] == 16
    assert steps["estimated_steps"] == 7 * 3
    limited = plan_lora(RunConfig.load(settings | {"max_steps": 5}), summary)["training"]
    assert limited["estimated_steps"] == 5


def test_packed_rows_are_as_long_as_the_longest_record_needs(tiny_llama):
    def row_length(longest, **settings):
        summary = {"examples": 10, "tokens": 1000, "labelled_tokens": 100, "longest": longest}
        return plan_lora(RunConfig.load({"model_name": str(tiny_llama), **settings}), summary)["training"][
            "row_length"
        ]

    assert row_length(100) == 256
    assert row_length(400) == 400
    assert row_length(100, packing=False) == 100


def test_zero_stages_share_out_the_parts_that_they_say(tiny_llama):
    def parts(stage):
        settings = {
            "model_name": str(tiny_llama),
            "zero_stage": stage,
            "num_accelerators": 2,
            "precision": "fp32",
        }
        return plan_lora(RunConfig.load(settings))["memory"]["parts"]

    one, two, three = parts(1), parts(2), parts(3)
    assert one["gradients"] == 2 * two["gradients"]
    assert two["weights"] == 2 * three["weights"]
    assert one["optimizer"] == three["optimizer"] == parts(0)["optimizer"] * 12 // 8 // 2
    assert one["activations"] == three["activations"]


def test_checkpointing_and_quantization_lower_the_estimate(tiny_llama):
    def parts(**settings):
        return plan_lora(RunConfig.load({"model_name": str(tiny_llama), **settings}))["memory"]["parts"]

    plain = parts()
    assert parts(gradient_checkpointing=True)["activations"] < plain["activations"]
    assert parts(use_4bit=True)["weights"] < parts(use_8bit=True)["weights"] < plain["weights"]


def test_plan_that_does_not_fit_says_what_to_change(tiny_llama, monkeypatch):
    small = {"kind": "cpu", "devices": 0, "accelerator": None, "host": 2**20, "host_available": 2**20}
    monkeypatch.setattr("medai_nb.lora.machine_memory", lambda: small)
    memory = plan_lora(RunConfig.load({"model_name": str(tiny_llama)}))["memory"]
    assert not memory["fits"]
    assert "gradient_checkpointing: true" in memory["verdict"] and "use_4bit" in memory["verdict"]


def test_rows_longer_than_the_context_are_announced(tiny_llama):
    plan = plan_lora(RunConfig.load({"model_name": str(tiny_llama), "data.max_length": 4096}))
    assert any("1024 tokens" in note for note in plan["notes"])


def test_fp16_on_a_cpu_stops_the_plan(tiny_llama):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(ConfigError, match="fp16 does not train on a CPU"):
        plan_lora(RunConfig.load({"model_name": str(tiny_llama), "fp16": True}))
