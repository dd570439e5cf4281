"""Fixtures that several test files share: tiny models, and no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test files run side by side: threads that wait for each other actively would slow both down many times.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from pathlib import Path

import pytest
from filelock import FileLock

# Minutes each, by launchers and processes of their own: begun first, so that no worker is left with one of them at the end. Of those that
# continue from the completed run one stands among the first three: the others would wait for it.
LONG_FILES = [
    "test_faults.py",
    "test_trainer.py",
    "test_encoder.py",
    "test_two_nodes.py",
    "test_jobs.py",
    "test_pipeline.py",
    "test_training_loop.py",
    "test_launchers.py",
    "test_foreign_configs.py",
    "test_wheel.py",
    "test_plan.py",
    "test_checkpoints.py",
]


def pytest_collection_modifyitems(items):
    """Long files first; within a file the order stays."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="module")
def collected_once():
    """A training collects garbage several times, and looks at every object of torch and transformers each time."""
    gc.freeze()


def shared_folder(tmp_path_factory) -> Path:
    """A folder that all workers of one run of pytest see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def embedded_folder():
    """The embedded model as safetensors; converted once in a cache that tests share."""
    from medai_nb.models import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, embedded_folder):
    """A folder with a random Llama of 3.3 M parameters and the embedded model's tokenizer: usable as `model.name`."""
    folder = shared_folder(tmp_path_factory) / "tiny-llama"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_tiny_llama(folder, embedded_folder)
    return folder


@pytest.fixture(scope="session")
def completed_run(tmp_path_factory, tiny_llama):
    """A sandbox in which all six stages have completed, made once for all workers: continue from a copy of it."""
    from sandbox import Sandbox

    sandbox = Sandbox(shared_folder(tmp_path_factory) / "completed", tiny_llama)
    output = sandbox.folder / "output.txt"
    with FileLock(f"{sandbox.folder}.lock"):
        if not output.is_file():
            sandbox.folder.mkdir()
            sandbox.prepare()
            code, shown = sandbox.execute()
            assert code == 0, shown
            output.write_text(shown)
    return sandbox


LLAMA_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def write_tiny_llama(folder, embedded_folder):
    """Model and tokenizer, whole or not at all."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    partial = folder.with_name(f"{folder.name}.partial")
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    config = LlamaConfig(
        **LLAMA_SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """A folder with a random Llama whose byte-level tokenizer has 314 tokens: what is written and read with it takes no time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=314,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sentences = ["the patient denies chest pain and fever", "blood pressure and cough since this morning"]
    pieces.train_from_iterator(sentences * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )
    config = LlamaConfig(
        **LLAMA_SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned(small_llama):
    """A PEFT model on `small_llama` whose adapter says something else than the base. Not to be changed."""
    from releases import tuned_model

    return tuned_model(small_llama)


@pytest.fixture(scope="session")
def tuned_adapter(tmp_path_factory, small_llama, tuned):
    """The adapter of `tuned` with its tokenizer, as training leaves it. Not to be changed."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("adapters") / "lora_adapter"
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink()
    AutoTokenizer.from_pretrained(small_llama).save_pretrained(folder)
    return folder


def tiny_configs() -> dict:
    """Architecture -> configuration of a random model with a few thousand parameters."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, PhiConfig, Qwen2Config

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    grouped = {"intermediate_size": 64, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**shape, **grouped),
        "mistral": MistralConfig(**shape, **grouped),
        "qwen2": Qwen2Config(**shape, **grouped),
        "phi": PhiConfig(**shape, intermediate_size=64),
        "opt": OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32),
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96),
    }


@pytest.fixture(params=["llama", "mistral", "qwen2", "phi", "opt", "gpt2"])
def tiny_config(request):
    """The configuration of each architecture in turn."""
    return tiny_configs()[request.param]


@pytest.fixture
def restored_environment(monkeypatch):
    """Training makes a world of one in the environment and in transformers: later tests must not inherit it."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, os.environ[name]) if name in os.environ else monkeypatch.delenv(
            name, raising=False
        )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    unset_hf_deepspeed_config()
