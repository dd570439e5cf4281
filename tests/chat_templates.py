"""Chat templates in the forms that are published with the models, on the embedded tokenizer with their special tokens."""

from dataclasses import dataclass

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (
    '{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}'
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    '{{- bos_token }}{%- for message in loop_messages %}{%- if message["role"] == "user" %}'
    "{%- if loop.last and system_message is defined %}"
    '{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}'
    '{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}'
    '{%- elif message["role"] == "assistant" %}{{- " " + message["content"] + eos_token}}{%- endif %}{%- endfor %}'
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens of its models, and what becomes of `CONVERSATION`."""

    template: str | None
    asked: str
    "The conversation up to its last answer, written out."
    learnt: str
    "What is learnt of it."
    eos: str
    bos: str | None = None
    stops: tuple[str, ...] = ()
    "Where generation stops; none: at `eos`."
    more: tuple[str, ...] = ()
    "Further special tokens."

    def tokenizer(self, folder):
        """The tokenizer of a folder with these tokens; like the models' own, it begins a text by `bos` unless it is told not to."""
        from tokenizers import AddedToken
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = dict.fromkeys([self.eos, *([self.bos] if self.bos else []), *self.stops, *self.more])
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = self.bos, self.eos, self.eos
        tokenizer.chat_template = self.template
        if self.bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.bos_token_id)]
            )
        return tokenizer


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rash?"},
    {"role": "assistant", "content": "Where?"},
    {"role": "user", "content": "Arm."},
    {"role": "assistant", "content": "Eczema."},
]

_CHATML_ASKED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRash?<|im_end|>\n<|im_start|>assistant\nWhere?<|im_end|>\n"
    "<|im_start|>user\nArm.<|im_end|>\n<|im_start|>assistant\n"
)
_LLAMA_3_ASKED = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nRash?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nWhere?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nArm.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_LLAMA_3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
_PLAIN_ASKED = "{bos}Be brief.\n\n### Instruction:\nRash?\n\n### Response:\nWhere?{eos}\n\n### Instruction:\nArm.\n\n### Response:\n"

FAMILIES = {
    "SmolLM2": Family(SMOLLM2, _CHATML_ASKED, "Eczema.<|im_end|>", eos="<|im_end|>"),
    "Qwen": Family(CHATML, _CHATML_ASKED, "Eczema.<|im_end|>", eos="<|im_end|>"),
    "Qwen, base model": Family(
        CHATML,
        _CHATML_ASKED,
        "Eczema.<|im_end|>\n<|endoftext|>",
        eos="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "Llama-2": Family(
        LLAMA_2,
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nRash? [/INST] Where? </s><s>[INST] Arm. [/INST]",
        " Eczema. </s>",
        bos="<s>",
        eos="</s>",
    ),
    "Llama-3": Family(
        LLAMA_3,
        _LLAMA_3_ASKED,
        "Eczema.<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        more=_LLAMA_3_TOKENS,
    ),
    "Llama-3, eos of the base model": Family(
        LLAMA_3,
        _LLAMA_3_ASKED,
        "Eczema.<|eot_id|><|end_of_text|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        stops=("<|eot_id|>", "<|end_of_text|>"),
        more=_LLAMA_3_TOKENS,
    ),
    "Mistral": Family(
        MISTRAL,
        "<s>[INST] Be brief.\n\nRash? [/INST]Where?</s>[INST] Arm. [/INST]",
        "Eczema.</s>",
        bos="<s>",
        eos="</s>",
    ),
    # It moves the system text once the answer is known: the answer stands behind the prompt that is served.
    "Mistral 0.3": Family(
        MISTRAL_3,
        "<s>[INST] Rash?[/INST] Where?</s>[INST] Be brief.\n\nArm.[/INST]",
        "Eczema.</s>",
        bos="<s>",
        eos="</s>",
        more=("[INST]", "[/INST]"),
    ),
    "Phi-3": Family(
        PHI_3,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nRash?<|end|>\n<|assistant|>\nWhere?<|end|>\n<|user|>\nArm.<|end|>\n<|assistant|>\n",
        "Eczema.<|end|>\n<|endoftext|>",
        bos="<s>",
        eos="<|endoftext|>",
        stops=("<|end|>", "<|endoftext|>"),
        more=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "Gemma": Family(
        GEMMA,
        "<bos><start_of_turn>user\nBe brief.\n\nRash?<end_of_turn>\n<start_of_turn>model\nWhere?<end_of_turn>\n"
        "<start_of_turn>user\nArm.<end_of_turn>\n<start_of_turn>model\n",
        "Eczema.<end_of_turn>\n<eos>",
        bos="<bos>",
        eos="<eos>",
        stops=("<end_of_turn>", "<eos>"),
        more=("<start_of_turn>",),
    ),
    "Zephyr": Family(
        ZEPHYR,
        "<|system|>\nBe brief.</s>\n<|user|>\nRash?</s>\n<|assistant|>\nWhere?</s>\n<|user|>\nArm.</s>\n<|assistant|>\n",
        "Eczema.</s>",
        bos="<s>",
        eos="</s>",
    ),
    "Alpaca, no template": Family(None, _PLAIN_ASKED.format(bos="", eos="</s>"), "Eczema.</s>", eos="</s>"),
    "DialoGPT, no template": Family(
        None,
        _PLAIN_ASKED.format(bos="<|endoftext|>", eos="<|endoftext|>"),
        "Eczema.<|endoftext|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "OPT, no template": Family(
        None, _PLAIN_ASKED.format(bos="</s>", eos="</s>"), "Eczema.</s>", bos="</s>", eos="</s>"
    ),
}
