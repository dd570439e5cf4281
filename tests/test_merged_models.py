"""The merged model computes what base and adapter compute together, and its GGUF files say so to other programs."""

import json

import gguf
import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from medai_nb import merged_models
from medai_nb.config import RunConfig
from medai_nb.merged_models import gguf_tokenizer, split_name, write_gguf, write_merged
from medai_nb.release_files import ExportError

TEXTS = (
    "Größe 1,75 m – naïve café 😀 µg ½",
    "BP 120/80\n\n120 mg  5 x",
    "  two  spaces\n\ttab and 1314151",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, small_llama, tuned_adapter):
    folder = tmp_path_factory.mktemp("merged")
    config = RunConfig(model={"name": str(small_llama), "precision": "bf16"})
    described = write_merged(config, tuned_adapter, folder)
    assert described == {"precision": "fp32", "bytes": (folder / "model.safetensors").stat().st_size}
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, merged):
    folder = tmp_path_factory.mktemp("gguf")
    written = write_gguf(merged, folder)
    assert {kind: folder / one["file"] for kind, one in written.items()} == {
        kind: folder / f"model-{kind}.gguf" for kind in ("F16", "Q8_0")
    }
    return folder


def read_model(folder, kind="F16"):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=f"model-{kind}.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()


def logits(model, ids=tuple(range(3, 40))):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


def test_merged_weights_need_no_adapter_and_compute_the_same(merged, tuned):
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert not isinstance(model, PeftModel) and model.dtype == torch.float32
    assert (logits(model) - logits(tuned)).abs().max() < 1e-4
    with tuned.disable_adapter():
        assert (logits(model) - logits(tuned)).abs().max() > 1e-2, "the adapter matters"


def test_transformers_reads_the_files_and_computes_the_same_within_their_rounding(merged, files):
    expected = logits(AutoModelForCausalLM.from_pretrained(merged).eval())
    spread = float(expected.std())
    differences = {
        kind: float((logits(read_model(files, kind)) - expected).abs().max()) for kind in ("F16", "Q8_0")
    }
    assert 0 < differences["F16"] < 0.02 * spread < differences["Q8_0"] < 0.5 * spread


def test_the_tokenizer_of_a_file_gives_the_same_ids_for_unicode_digits_and_line_breaks(merged, files):
    own = AutoTokenizer.from_pretrained(merged)
    read = AutoTokenizer.from_pretrained(files, gguf_file="model-Q8_0.gguf")
    assert [read(text).input_ids for text in TEXTS] == [own(text).input_ids for text in TEXTS]
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (
        own.bos_token_id,
        own.eos_token_id,
        own.pad_token_id,
    )
    assert read.chat_template == own.chat_template


def test_a_file_says_what_llama_cpp_asks_for(merged, files, small_llama):
    reader = gguf.GGUFReader(files / "model-Q8_0.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if len(field.data) < 10}
    assert said["general.architecture"] == "llama" and said["general.file_type"] == 7
    assert (said["llama.block_count"], said["llama.embedding_length"], said["llama.context_length"]) == (
        2,
        64,
        1024,
    )
    assert (said["llama.attention.head_count"], said["llama.attention.head_count_kv"]) == (4, 2)
    assert (said["llama.rope.dimension_count"], said["llama.rope.freq_base"]) == (16, 10000.0)
    assert said["tokenizer.ggml.add_bos_token"] is False and said["tokenizer.ggml.pre"] == "gpt-2"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["blk.1.attn_k.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32" and "output.weight" not in types, "the head is the embedding"


def test_a_mistral_with_a_window_and_a_head_of_its_own_is_written(tmp_path, small_llama):
    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            **shape, num_key_value_heads=2, head_dim=16, vocab_size=len(tokenizer) + 3, sliding_window=64
        )
    ).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path)
    for kind in ("F16", "Q8_0"):
        assert (logits(read_model(tmp_path, kind)) - logits(model)).abs().max() < 0.01
    reader = gguf.GGUFReader(tmp_path / "model-Q8_0.gguf")
    assert reader.fields["llama.context_length"].contents() == 64, "beyond the window llama.cpp sees more"
    assert reader.fields["tokenizer.ggml.tokens"].contents(-1) == f"[PAD{len(tokenizer) + 2}]"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == "F16", "48 columns are no multiple of 32"
    assert types["blk.0.attn_output.weight"] == "Q8_0"


@pytest.mark.parametrize(
    "settings, named",
    [
        (GPT2Config(n_embd=8, n_head=2, n_layer=1), "gpt2 models cannot be written .* Llama family"),
        (
            LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "type linear",
        ),
        (LlamaConfig(attention_bias=True), "biases"),
        (LlamaConfig(hidden_act="gelu"), "activation gelu"),
    ],
)
def test_what_a_file_could_not_say_is_refused_before_anything_is_written(tmp_path, settings, named):
    settings.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=named):
        write_gguf(tmp_path / "model", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def backend(tokenizer):
    return json.loads(tokenizer.to_str())


def byte_level(*before, regex=True):
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, words]) if before else words
    return tokenizer


def test_the_name_of_a_splitting_is_found_by_what_it_does():
    def split(name):
        return pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")

    digits = pre_tokenizers.Digits(individual_digits=True)
    assert split_name(backend(byte_level())) == "gpt-2"
    assert split_name(backend(byte_level(digits))) == "smollm"
    assert split_name(backend(byte_level(split("llama-bpe"), regex=False))) == "llama-bpe"
    assert split_name(backend(byte_level(split("tekken"), regex=False))) == "tekken"
    assert split_name(backend(byte_level(split("qwen2"), regex=False))) is None
    assert split_name(backend(byte_level(split("llama-bpe")))) is None


def test_an_unknown_splitting_is_refused_by_name(small_llama):
    odd = byte_level(pre_tokenizers.Punctuation())
    with pytest.raises(ExportError, match="BPE: Punctuation, ByteLevel"):
        gguf_tokenizer(PreTrainedTokenizerFast(tokenizer_object=odd), 10)
    with pytest.raises(ExportError, match="314 tokens and the model only 100"):
        gguf_tokenizer(AutoTokenizer.from_pretrained(small_llama), 100)


def test_a_sentencepiece_tokenizer_is_written_with_scores_that_give_its_merges(tmp_path):
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], max_token_length=9)
    sentences = ["the patient denies chest pain and the patient denies fever", "blood pressure 120 over 80"]
    pieces.train_from_iterator(sentences * 5, trainer)
    pieces.add_tokens(bytes_)  # only to be numbered: they belong to the vocabulary
    content = backend(pieces)
    content["model"]["vocab"] |= {token: pieces.token_to_id(token) for token in bytes_}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    own = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(own))).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path, ["F16"])
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-F16.gguf")
    texts = ["the patient denies fever", "pressure 120/80, Größe 😀", "  the  pain\nand"]
    assert [read(text).input_ids for text in texts] == [own(text).input_ids for text in texts]
    assert len(own("the patient denies fever").input_ids) < 12, "merges happen"
    reader = gguf.GGUFReader(tmp_path / "model-F16.gguf")
    assert reader.fields["tokenizer.ggml.model"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.token_type"].contents().count(6) == 256, "bytes are bytes"


def test_a_writing_that_fails_leaves_no_file_that_looks_whole(merged, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf, "quantize", full)
    with pytest.raises(OSError, match="No space"):
        write_gguf(merged, tmp_path / "gguf")
    assert list((tmp_path / "gguf").iterdir()) == []


def test_rows_in_the_wrong_order_would_be_read_as_another_model(merged, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_models, "rotate_pairs", lambda weights, heads: weights)
    write_gguf(merged, tmp_path, ["F16"])
    expected = logits(AutoModelForCausalLM.from_pretrained(merged).eval())
    assert (logits(read_model(tmp_path)) - expected).abs().max() > 0.1 * expected.std()
