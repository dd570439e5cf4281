"""What a model is shown, and what it is asked to learn."""

from itertools import pairwise

import datasets
import pytest
import torch
from chat_templates import CONVERSATION, FAMILIES
from conftest import tiny_configs
from transformers import LlamaConfig, LlamaForCausalLM

from medai_nb.callbacks import sample_answers
from medai_nb.config import DataConfig, EvaluationConfig
from medai_nb.evaluator import ClinicalEvaluator
from medai_nb.examples import (
    PLAIN_TEMPLATE,
    Collator,
    ExamplesError,
    assign_rows,
    build_examples,
    cut_middle,
    pack,
    packs_in_isolation,
    render_prompt,
    stop_tokens,
    supports_labelled_head,
)
from medai_nb.fast_layers import fast_layers

LABELS = ["Circulatory system", "Skin"]
SETTINGS = DataConfig(instruction="Which chapter?", max_length=128, max_truncated_fraction=1)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def classified(texts, label="Skin"):
    return datasets.Dataset.from_list(
        [{"id": str(index), "text": text, "label": label} for index, text in enumerate(texts)]
    )


NOTES = classified(["Rash on both arms.", "Itching.", "Corns and callosities, left foot; trimmed.", "Acne."])


def test_the_end_of_sequence_is_learnt_although_it_is_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples, _ = build_examples(NOTES, tokenizer, SETTINGS, LABELS)
    batch = Collator(tokenizer.pad_token_id)(list(examples))
    for labels in batch["labels"]:
        learnt = labels[labels != -100]
        assert tokenizer.decode(learnt) == "Skin" + tokenizer.eos_token


def test_training_prefix_is_exactly_the_served_prompt(tokenizer):
    long = classified(["Rash. " * 200, "Itching."])
    examples, summary = build_examples(long, tokenizer, SETTINGS, LABELS)
    assert summary["truncated"] == 1
    for record, example in zip(long, examples):
        start = example["labels"].count(-100)
        assert example["input_ids"][:start] == render_prompt(record, tokenizer, SETTINGS, LABELS)
        assert all(label == -100 for label in example["labels"][:start])
        assert example["length"] == len(example["input_ids"]) <= 128


def test_the_answer_is_never_cut(tokenizer):
    record = {
        "id": "1",
        "messages": [
            {"role": "user", "content": "Tell me. " * 100},
            {"role": "assistant", "content": "word " * 60 + "end"},
        ],
    }
    examples, summary = build_examples(datasets.Dataset.from_list([record]), tokenizer, SETTINGS)
    learnt = [label for label in examples[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt) == "word " * 60 + "end" + tokenizer.eos_token
    assert summary["truncated"] == 1


def test_an_answer_that_cannot_fit_loses_its_end_and_the_end_of_sequence(tokenizer):
    """Learning to stop where the text was cut would teach the model to stop in the middle."""
    turns = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "word " * 400}]
    records = datasets.Dataset.from_list([{"id": "1", "messages": turns}])
    examples, summary = build_examples(records, tokenizer, SETTINGS)
    learnt = [label for label in examples[0]["labels"] if label != -100]
    assert examples[0]["length"] == 128 and tokenizer.eos_token_id not in learnt
    assert summary["answers_cut"] == 1 and "their ends are not learnt" in summary["warnings"][-1]


def test_only_the_last_answer_of_a_conversation_is_learnt(tokenizer):
    turns = [("user", "Rash?"), ("assistant", "Where?"), ("user", "Arm."), ("assistant", "Eczema.")]
    record = {"id": "1", "messages": [{"role": role, "content": content} for role, content in turns]}
    examples, _ = build_examples(datasets.Dataset.from_list([record]), tokenizer, SETTINGS)
    learnt = [label for label in examples[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt) == "Eczema." + tokenizer.eos_token
    assert "Where?" in tokenizer.decode(examples[0]["input_ids"])


def test_rows_without_an_answer_are_counted_and_too_many_stop_the_run(tokenizer):
    answered = [{"id": str(n), "text": "Itching.", "label": "Skin"} for n in range(19)]
    records = datasets.Dataset.from_list([*answered, {"id": "x", "text": "Rash.", "label": None}])
    settings = SETTINGS.model_copy(update={"task": "classification"})
    examples, summary = build_examples(records, tokenizer, settings, LABELS)
    assert (len(examples), summary["refused"]) == (19, 1)
    assert summary["refused_reasons"] == {"the record has no answer": 1}
    with pytest.raises(ExamplesError, match="1 of 20 records .* the record has no answer"):
        strict = settings.model_copy(update={"max_skipped_fraction": 0.01})
        build_examples(records, tokenizer, strict, LABELS)


def test_an_answer_that_leaves_no_room_for_the_question_is_refused(tokenizer):
    record = {"id": "1", "text": "Rash.", "label": "word " * 200}
    with pytest.raises(ExamplesError, match="raise data.max_length"):
        build_examples(datasets.Dataset.from_list([record]), tokenizer, SETTINGS)


def test_cut_texts_and_answers_are_counted_once_each_and_too_many_stop_the_run(tokenizer):
    def turns(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    short, long = "Tell me.", "word " * 400
    records = datasets.Dataset.from_list([turns(short, short), turns(short, long), turns(long, long)])
    _, summary = build_examples(records, tokenizer, SETTINGS)
    assert (summary["truncated"], summary["answers_cut"], summary["over_long"]) == (1, 2, 2)
    strict = SETTINGS.model_copy(update={"max_truncated_fraction": 0.6})
    with pytest.raises(ExamplesError, match="2 of 3 records are longer than data.max_length=128 tokens"):
        build_examples(records, tokenizer, strict)


def test_an_answer_of_which_nothing_is_left_is_fully_masked_counted_and_refused(tokenizer):
    empty = {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": tokenizer.eos_token},
        ]
    }
    good = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    records = datasets.Dataset.from_list([empty] + [good] * 19)
    examples, summary = build_examples(records, tokenizer, SETTINGS)
    assert (len(examples), summary["fully_masked"], summary["refused"]) == (19, 1, 1)
    assert all(any(label != -100 for label in row) for row in examples["labels"])
    with pytest.raises(ExamplesError, match="1 x no token of the answer is left to learn"):
        build_examples(records, tokenizer, SETTINGS.model_copy(update={"max_skipped_fraction": 0}))


def test_a_label_outside_the_run_is_refused(tokenizer):
    with pytest.raises(ExamplesError, match="not among the labels"):
        build_examples(classified(["Rash."], "Unknown"), tokenizer, SETTINGS, LABELS)


def test_a_model_without_chat_template_gets_the_plain_one_and_says_so(tiny_llama):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_llama)
    bare.chat_template = None
    examples, summary = build_examples(NOTES, bare, SETTINGS, LABELS)
    assert bare.chat_template == PLAIN_TEMPLATE
    assert "no chat template" in summary["warnings"][0]
    assert tokenizer_text(bare, examples[0]).endswith("### Response:\nSkin" + bare.eos_token)


def tokenizer_text(tokenizer, example):
    return tokenizer.decode(example["input_ids"])


def test_a_template_that_changes_its_prompt_is_noticed_and_the_served_prompt_kept(tiny_llama):
    from transformers import AutoTokenizer

    thinking = AutoTokenizer.from_pretrained(tiny_llama)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
    )
    examples, summary = build_examples(NOTES, thinking, SETTINGS, LABELS)
    assert "4 prompts" in summary["warnings"][0]
    assert tokenizer_text(thinking, examples[0]).endswith("<think></think>Skin<|im_end|>")


def test_a_template_without_system_role_gets_the_system_text_in_the_first_question(tiny_llama):
    from transformers import AutoTokenizer

    strict = AutoTokenizer.from_pretrained(tiny_llama)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + PLAIN_TEMPLATE
    )
    text = strict.decode(render_prompt(NOTES[0], strict, SETTINGS))
    assert "### Instruction:\nYou are a careful clinical assistant.\n\nWhich chapter?" in text


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def family_tokenizer(family, tiny_llama):
    return family.tokenizer(tiny_llama)


def conversations():
    """One question and several, with a system message of their own and without."""
    single = [CONVERSATION[1], CONVERSATION[4]]
    chats = [CONVERSATION, CONVERSATION[1:], single, [CONVERSATION[0], *single]]
    return datasets.Dataset.from_list([{"id": str(n), "messages": chat} for n, chat in enumerate(chats)])


def learnt_of(example):
    return [label for label in example["labels"] if label != -100]


@pytest.mark.parametrize("system_prompt", ["You are careful.", None])
def test_every_template_asks_what_it_was_published_to_ask_and_learns_the_answer_with_its_end(
    family, family_tokenizer, system_prompt
):
    tokenizer = family_tokenizer
    settings = SETTINGS.model_copy(update={"system_prompt": system_prompt})
    examples, summary = build_examples(conversations(), tokenizer, settings)
    assert summary["refused"] == summary["over_long"] == 0
    asked = examples[0]["input_ids"][: examples[0]["labels"].count(-100)]
    assert tokenizer.decode(asked) == family.asked
    assert tokenizer.decode(learnt_of(examples[0])) == family.learnt
    if family.bos not in (None, family.eos):
        begun = family.asked.startswith(family.bos)  # the templates of Phi-3 and Zephyr leave it out
        assert [row[:2].count(tokenizer.bos_token_id) for row in examples["input_ids"]] == [begun] * 4
    stops = [tokenizer.convert_tokens_to_ids(token) for token in family.stops or [family.eos]]
    assert stop_tokens(tokenizer) == stops
    for example in examples:
        learnt = learnt_of(example)
        assert learnt[-1] == tokenizer.eos_token_id
        first = next(index for index, token in enumerate(learnt) if token in stops)
        assert tokenizer.decode(learnt[:first]).strip() == "Eczema."


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_prompts_and_padding_are_never_learnt_and_every_token_of_the_answer_is(family_tokenizer, packed):
    tokenizer, records = family_tokenizer, conversations()
    examples, _ = build_examples(records, tokenizer, SETTINGS)
    whole = {}  # ids -> how many of them are the prompt
    for record, example in zip(records, examples):
        prompt = render_prompt(record, tokenizer, SETTINGS)
        assert example["input_ids"][: len(prompt)] == prompt
        whole[tuple(example["input_ids"])] = len(prompt)
    rows = list(pack(examples, sum(sorted(examples["length"])[-2:]))) if packed else list(examples)
    batch = Collator(tokenizer.pad_token_id, pad_to_multiple_of=8)(rows)
    seen, learnt_in_order = [], []
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert labels[row["length"] :] == [-100] * (len(labels) - row["length"])
        positions = row.get("position_ids", range(row["length"]))
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], row["length"]]):
            own = ids[start:stop]
            asked = whole[tuple(own)]
            assert labels[start:stop] == [-100] * asked + own[asked:]
            seen.append(tuple(own))
            learnt_in_order += own[asked:]
        if not packed:
            mask = [1] * row["length"] + [0] * (len(ids) - row["length"])
            assert batch["attention_mask"][len(seen) - 1].tolist() == mask
    assert sorted(seen) == sorted(whole)
    assert batch["shift_labels"].tolist() == learnt_in_order
    # The head is computed at the token before each of them.
    assert batch["labels"].roll(-1, 1)[batch["logits_to_keep"]].tolist() == learnt_in_order


class Recites(LlamaForCausalLM):
    """Says a given text, token by token, whatever it is asked; remembers what it was asked."""

    def say(self, ids):
        self.ids, self.fed = list(ids), []

    def forward(self, input_ids, **how):
        self.fed.append(input_ids[0].tolist())
        output = super().forward(input_ids, **how)
        output.logits[:] = 0
        output.logits[:, -1, self.ids[len(self.fed) - 1]] = 1
        return output


def test_the_evaluator_and_the_safety_callback_ask_as_trained_and_stop_at_the_end_of_the_answer(
    family_tokenizer,
):
    tokenizer, records = family_tokenizer, conversations()
    examples, _ = build_examples(records, tokenizer, SETTINGS)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Recites(LlamaConfig(**shape, vocab_size=len(tokenizer))).eval()
    evaluator = ClinicalEvaluator(
        model, tokenizer, data=SETTINGS, settings=EvaluationConfig(max_new_tokens=20)
    )
    on_and_on = tokenizer(" and so on" * 10, add_special_tokens=False)["input_ids"]
    for record, example in zip(records, examples):
        learnt = learnt_of(example)
        asked = example["input_ids"][: -len(learnt)]
        spoken = 1 + min(learnt.index(token) for token in stop_tokens(tokenizer) if token in learnt)
        model.say(learnt + on_and_on)
        assert evaluator.generate([record]) == ["Eczema."]
        assert model.fed[0] == asked and len(model.fed) == spoken
        model.say(learnt + on_and_on)
        (answer,) = sample_answers(model, tokenizer, [record], max_new_tokens=20, data=SETTINGS)
        assert model.fed[0] == asked
        question = record["messages"][-2]["content"]
        assert answer == {"prompt": question, "answer": "Eczema.", "tokens": spoken, "ended": True}


def test_a_cut_keeps_head_and_tail_and_whole_words():
    text = "Chest pain since Monday. " + "x " * 300 + "Aspirin 120 mg daily."
    for keep in range(len(text)):
        head, _, tail = cut_middle(text, keep).partition("[...]")
        assert set(head.split() + tail.split()) <= set(text.split())


@pytest.mark.parametrize("row_length", [7, 20, 64])
def test_packing_keeps_every_example_once_and_no_row_too_long(row_length):
    lengths = [(7 * index) % 23 + 1 for index in range(200)]
    rows = assign_rows(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(200))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= row_length
    lower_bound = sum(min(length, row_length) for length in lengths) / row_length
    assert len(rows) <= 11 / 9 * max(lower_bound, sum(2 * length > row_length for length in lengths)) + 1


def test_packed_logits_equal_unpacked_ones_in_batches_of_several_rows(tokenizer, model):
    examples, _ = build_examples(NOTES, tokenizer, SETTINGS, LABELS)
    packed = pack(examples, length=2 * max(examples["length"]))
    batch = Collator(tokenizer.pad_token_id, labelled_head=False)(list(packed))
    assert batch["input_ids"].shape[0] > 1
    assert all(row.count(0) > 1 for row in packed["position_ids"])
    apart = {tuple(e["input_ids"]): model(torch.tensor([e["input_ids"]])).logits[0] for e in examples}
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
    compared = 0
    for row, logits in zip(packed, together):
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], row["length"]]):
            alone = apart[tuple(row["input_ids"][start:stop])]
            torch.testing.assert_close(logits[start:stop], alone, atol=1e-4, rtol=0)
            compared += 1
    assert compared == len(examples)


def packed_architectures() -> dict:
    """Architectures of the base models, with windows shorter than the records where they have windows."""
    from transformers import Gemma2Config, Gemma3TextConfig, MistralConfig, Qwen3Config

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 96,
        "pad_token_id": 0,
    }
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return {
        **tiny_configs(),
        "mistral with a window": MistralConfig(**shape, sliding_window=4),
        "qwen3": Qwen3Config(**shape),
        "gemma2": Gemma2Config(**shape, **layers, query_pre_attn_scalar=8),
        "gemma3": Gemma3TextConfig(**shape, **layers, query_pre_attn_scalar=8),
    }


@pytest.mark.parametrize("way", ["layers of transformers", "fast layers", "beginning computed once"])
@pytest.mark.parametrize("name", [*packed_architectures()])
def test_packed_records_have_the_logits_and_gradients_that_each_has_alone(name, way):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = packed_architectures()[name]
    config.use_cache = False
    for dropout in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        attention = "eager" if name == "gemma2" else "sdpa"  # as `load_model` chooses
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in base.parameters():  # as far apart as those of a trained model, so that a leak shows
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, lora).train()
        ids = [[7, 8, *torch.randint(1, 96, (length,)).tolist()] for length in (7, 3, 12, 5, 2, 9, 4)]
    records = [{"input_ids": one, "labels": [-100] * 3 + one[3:], "length": len(one)} for one in ids]
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    alone, own_loss = {}, []
    for row in records:
        batch = Collator(0, labelled_head=False)([row])
        output = model(**batch, num_items_in_batch=torch.tensor(10))
        alone[tuple(row["input_ids"])] = output.logits[0].detach()
        output.loss.backward()
        own_loss.append(output.loss.item())
    gradients = {name: one.grad.clone() for name, one in trained.items()}
    model.zero_grad()

    isolates = packs_in_isolation(model)
    assert isolates is (name != "opt")  # OPT counts positions from the attention mask, and is not packed
    if not isolates:
        return
    fast = way != "layers of transformers"
    replaced = fast_layers(model, packed=True) if fast else {}
    one_row = "attention" in replaced
    assert one_row is (fast and name != "gemma2")  # it caps its scores
    rows = list(pack(datasets.Dataset.from_list(records), 24))
    assert 1 < len(rows) < len(records)
    once = 2 if one_row and way == "beginning computed once" else 0
    batch = Collator(0, labelled_head=False, record_bounds=one_row, share_beginning=once > 0)(rows)
    output = model(**batch, num_items_in_batch=torch.tensor(10))
    output.loss.backward()
    packed = [
        tuple(row["input_ids"][start:stop])
        for row in rows
        for start, stop in pairwise(
            [*(at for at, p in enumerate(row["position_ids"]) if p == 0), row["length"]]
        )
    ]
    assert sorted(packed) == sorted(alone)
    if one_row:
        logits = output.logits[0].detach()
        assert len(logits) == sum(map(len, ids)) - once * (len(ids) - 1)
    else:  # padding is at the end of rows
        logits = torch.cat([one[: row["length"]] for row, one in zip(rows, output.logits.detach())])
    beginning, *own = logits.split([once, *(len(one) - once for one in packed)])
    for one, found in zip(packed, own, strict=True):
        torch.testing.assert_close(found, alone[one][once:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(beginning, alone[one][:once], atol=1e-5, rtol=1e-5)
    assert output.loss.item() == pytest.approx(sum(own_loss), abs=1e-5)
    for name, one in trained.items():
        torch.testing.assert_close(one.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_an_all_ones_mask_would_mix_packed_neighbours(tokenizer, model):
    """The reason why packed batches carry no attention mask."""
    examples, _ = build_examples(NOTES, tokenizer, SETTINGS, LABELS)
    batch = Collator(tokenizer.pad_token_id, labelled_head=False)(list(pack(examples, length=400)))
    with torch.no_grad():
        right = model(**batch, use_cache=False).logits
        wrong = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits
    assert (right - wrong).abs().max() > 1e-3


def test_head_on_labelled_positions_gives_the_same_loss_and_gradients(tokenizer, model):
    examples, _ = build_examples(NOTES, tokenizer, SETTINGS, LABELS)
    rows = list(pack(examples, length=160))
    results = []
    for labelled_head in (False, True):
        batch = Collator(tokenizer.pad_token_id, labelled_head)(rows)
        model.zero_grad()
        loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(17)).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    for full, slim in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(full, slim, atol=1e-5, rtol=1e-5)


def test_architectures_are_asked_whether_they_isolate_packed_neighbours(tiny_config):
    from transformers import AutoModelForCausalLM

    isolates = packs_in_isolation(AutoModelForCausalLM.from_config(tiny_config))
    assert isolates is (tiny_config.model_type != "opt")  # OPT counts positions from the attention mask


def test_architectures_of_today_compute_their_head_on_chosen_positions(tiny_config):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config).eval()
    assert supports_labelled_head(model)
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    with torch.no_grad():
        slim = model(**Collator(0)([row])).loss
        full = model(**Collator(0, labelled_head=False)([row])).loss
    torch.testing.assert_close(slim, full)
