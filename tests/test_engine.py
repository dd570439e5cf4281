"""What may be served, how a prompt is rendered, and answers that do not depend on who else is asking."""

import asyncio
import json
import os
import signal

import httpx
import pytest
import torch
from releases import all_figures, tiny_release, tuned_model, write_run
from transformers import AutoTokenizer

from medai_nb import engine
from medai_nb.engine import (
    Batch,
    EngineDown,
    EngineFull,
    Job,
    LocalEngine,
    NotServed,
    OpenAIBackend,
    PromptTooLong,
    ReleaseModel,
    Row,
    Worker,
    check_base,
    check_release,
    fit_request,
)
from medai_nb.examples import apply_template, build_examples, render_prompt
from medai_nb.release_files import write_checksums
from medai_nb.run_folder import read_json, write_json_atomic
from medai_nb.serving_config import ServingError, load_serving_config

NOTE = "Chest pain radiating to the left arm since this morning."


@pytest.fixture(scope="module")
def tuned(tiny_llama):
    return tuned_model(tiny_llama)


@pytest.fixture(scope="module")
def release(tmp_path_factory, tiny_llama, tuned):
    """A release for instructions."""
    return tiny_release(tmp_path_factory.mktemp("serve"), tiny_llama, tuned, system_prompt="Be careful.")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, tiny_llama, tuned):
    """A release with two labels."""
    folder = tmp_path_factory.mktemp("labelled")
    return tiny_release(
        folder, tiny_llama, tuned, ["Ear", "Eye"], instruction="Which chapter?", max_length=96
    )


@pytest.fixture(scope="module")
def served(release):
    return ReleaseModel(load_serving_config(release))


@pytest.fixture(scope="module")
def chooser(labelled):
    return ReleaseModel(load_serving_config(labelled))


@pytest.fixture
def changed(release, tmp_path):
    """A copy of the release, and what changes its settings as an export would have written them."""
    import shutil

    shutil.copytree(release, tmp_path / "release")

    def change(**settings):
        file = tmp_path / "release" / "serving_config.json"
        write_json_atomic(file, read_json(file) | settings)
        write_checksums(tmp_path / "release")
        return load_serving_config(tmp_path / "release")

    return change


def test_the_export_writes_what_serving_needs(release, labelled, tiny_llama):
    settings = json.loads((release / "serving_config.json").read_text())
    assert settings["leakage_gate"] == "passed" and settings["gates_opened"] == []
    assert list(settings["base_weights"]) == ["model.safetensors"]
    assert check_release(load_serving_config(release)).startswith("sha256:")
    assert check_release(load_serving_config(release)) != check_release(load_serving_config(labelled))


def test_temperature_and_threshold_of_the_run_are_in_its_release(tmp_path, tiny_llama, tuned):
    from medai_nb.export import export_release

    figures = all_figures()
    config = write_run(tmp_path / "run", tiny_llama, tuned, figures)
    export_release(config, tmp_path / "run", tmp_path / "release")
    served = load_serving_config(tmp_path / "release")
    assert served.calibration_temperature == figures["calibration"]["temperature"]["temperature"] > 0
    assert served.abstention_threshold == figures["selective"]["at_threshold"]["threshold"] > 0


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_release_whose_files_are_others_is_never_served(changed, change):
    config = changed(gates_opened=["x"]).model_copy(update={"allow_open_gates": True})
    file = config.adapter / "tokenizer_config.json"
    if change == "removed":
        file.unlink()
    else:
        (file if change == "changed" else file.with_name("new.bin")).write_text("{}")
    with pytest.raises(ServingError, match=f"was {change}|is missing"):
        check_release(config)


def test_a_gate_that_did_not_pass_is_opened_twice_or_not_at_all(changed):
    for opened, allowed in [([], False), ([], True), (["by hand"], False)]:
        config = changed(leakage_gate="failed", gates_opened=opened, allow_open_gates=allowed)
        with pytest.raises(ServingError, match="leakage gate says 'failed'"):
            check_release(config)
    check_release(changed(leakage_gate="failed", gates_opened=["by hand"], allow_open_gates=True))


def test_another_base_model_is_not_served(changed):
    with pytest.raises(ServingError, match="another model.safetensors"):
        check_base(changed(base_weights={"model.safetensors": "sha256:0"}))
    with pytest.raises(ServingError, match="does not say which base weights"):
        check_release(changed(base_weights=None))


def test_serving_renders_the_ids_that_training_rendered(served, chooser):
    import datasets

    for model, record, job in [
        (served, {"messages": [{"role": "user", "content": NOTE}]}, Job("1", "text", NOTE)),
        (
            served,
            {"messages": [{"role": "user", "content": NOTE}]},
            Job("2", "chat", [{"role": "user", "content": NOTE}]),
        ),
        (chooser, {"text": NOTE, "label": "Ear", "messages": None}, Job("3", "text", NOTE)),
    ]:
        data = model.config.data()
        if record["messages"]:
            record = record | {"messages": [*record["messages"], {"role": "assistant", "content": "Call."}]}
        examples, _ = build_examples(
            datasets.Dataset.from_list([record]), model.tokenizer, data, ["Ear", "Eye"]
        )
        labels = examples[0]["labels"]
        trained = examples[0]["input_ids"][: labels.count(-100)]
        assert model.prompt(job).ids == trained and len(trained) > 20


def test_a_text_is_cut_where_training_cut_it_or_refused(chooser):
    long = "Cough and fever since Monday. " * 40
    with pytest.raises(PromptTooLong):
        chooser.prompt(Job("1", "text", long))
    cutting = chooser.config.model_copy(update={"long_text": "cut"})
    fitted = fit_request(Job("1", "text", long), chooser.tokenizer, cutting, chooser.room)
    trained = render_prompt({"text": long}, chooser.tokenizer, cutting.data(), ["Ear", "Eye"])
    assert fitted.cut and fitted.ids == trained


def test_the_served_model_is_the_trained_one(served, tuned):
    assert served.merged is (served.model.dtype == torch.float32), "in bf16 the adapter would be rounded away"
    ids = torch.tensor([served.tokenizer(NOTE)["input_ids"]])
    with torch.inference_mode():
        expected, got = tuned(ids).logits, served.model(ids).logits.float()
        base = tuned.get_base_model()
        with tuned.disable_adapter():
            untouched = base(ids).logits
    scale = (expected - untouched).abs().max()
    assert (got - expected).abs().max() < 0.1 * scale, "bf16 rounds; the adapter matters more"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_token_after_a_prompt_is_that_of_the_trained_adapter(release, tuned, monkeypatch, precision):
    monkeypatch.setattr("medai_nb.models.choose_precision", lambda *_, **__: precision)
    monkeypatch.setattr("medai_nb.models.pick_precision", lambda *_: precision)
    served = ReleaseModel(load_serving_config(release))
    assert served.facts()["precision"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    batch, row = served.batch(), served.row(Job("1", "text", NOTE, max_new_tokens=9))
    batch.join([row])
    run(batch)
    ids = torch.tensor([row.prompt + row.tokens])
    with torch.inference_mode():
        logits = tuned(ids).logits[0, len(row.prompt) - 1 : -1]
    best, chosen = logits.max(dim=-1).values, logits.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
    assert len(row.tokens) == 9 and (best - chosen).max() <= {"fp32": 1e-3, "bf16": 0.3}[precision]


def rows_of(served, texts, **sampling):
    jobs = [Job(str(n), "text", text, max_new_tokens=6 + n, **sampling) for n, text in enumerate(texts)]
    return [served.row(job) for job in jobs]


def run(batch):
    while batch.rows:
        batch.leave(lambda row: row.finish_reason is not None)
        if batch.rows:
            batch.step()


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5}]
)
def test_company_does_not_change_an_answer(release, sampling):
    config = load_serving_config(release)
    exact = ReleaseModel(config)
    exact.model.float()  # in bf16 the order of a sum may decide between two tokens
    texts = [NOTE, "Cough.", "No known allergies. " * 6, "Fever since Monday, 39.2 °C."]
    alone = []
    for row in rows_of(exact, texts, **sampling):
        batch = Batch(exact.model, 0)
        batch.join([row])
        run(batch)
        alone.append(row.tokens)
    batch, rows = exact.batch(), rows_of(exact, texts, **sampling)
    batch.join(rows[:1])
    batch.step()
    batch.join(rows[1:3])
    batch.step()
    batch.join(rows[3:])
    run(batch)
    assert [row.tokens for row in rows] == alone
    assert batch.reused_tokens > 0, "the system prompt was read once"


def test_an_answer_ends_at_the_end_of_a_turn_and_at_a_stop_that_tokens_divide(served):
    tokenizer = served.tokenizer
    row = Row(Job("1", "raw", "", stop=("allergies",)), [1], 50, served.stops, tokenizer)
    pieces = [
        row.add(token)
        for token in tokenizer("No known allergies at all")["input_ids"]
        if not row.finish_reason
    ]
    assert "".join(pieces) == "No known " and row.finish_reason == "stop"
    row = Row(Job("1", "raw", ""), [1], 50, served.stops, tokenizer)
    row.add(tokenizer("Yes")["input_ids"][0])
    assert row.add(served.stops[0]) == "" and row.finish_reason == "stop"


def collect(worker, told):
    while not worker.idle:
        worker.work()
    return {name: [kind for job, kind, _ in told if job == name] for name in {job for job, _, _ in told}}


def told_by(served, jobs):
    told = []
    worker = Worker(served, told.extend)
    for job in jobs:
        worker.take(("job", job))
    while not worker.idle:
        worker.work()
    return told


def test_a_whole_answer_is_told_at_its_beginning_and_its_end(served):
    jobs = [Job(name, "text", NOTE, max_new_tokens=8, whole=name == "whole") for name in ("whole", "pieces")]
    told = told_by(served, jobs)
    kinds = {job.id: [kind for name, kind, _ in told if name == job.id] for job in jobs}
    assert kinds["whole"] == ["begun", "piece", "piece", "done"] and kinds["pieces"].count("piece") == 8
    texts = {
        job.id: "".join(v for name, kind, v in told if (name, kind) == (job.id, "piece")) for job in jobs
    }
    assert texts["whole"] == texts["pieces"] != ""


def test_running_answers_go_on_while_long_prompts_are_read(served, monkeypatch):
    monkeypatch.setattr(engine, "PROMPT_TOKENS", 100)
    jobs = [Job(str(n), "text", NOTE + " Cough." * 20 * n, max_new_tokens=9) for n in range(4)]
    assert all(len(served.prompt(job).ids) > 50 for job in jobs[1:])
    told = [(name, kind) for name, kind, _ in told_by(served, jobs)]
    begun = [told.index((job.id, "begun")) for job in jobs]
    assert begun == sorted(begun)
    assert ("0", "piece") in told[begun[2] : begun[3]], "a token between two prompts"


def test_a_failure_costs_the_requests_it_belongs_to_and_names_no_text(served, monkeypatch):
    told = []
    worker = Worker(served, told.extend)
    step = Batch.step
    failing = iter([True, False])

    def careless(self):
        if next(failing, False):
            raise ValueError(f"cannot read {NOTE}")
        return step(self)

    monkeypatch.setattr(Batch, "step", careless)
    worker.take(("job", Job("a", "text", NOTE, max_new_tokens=4)))
    worker.work()
    worker.take(("job", Job("b", "text", NOTE, max_new_tokens=4)))
    kinds = collect(worker, told)
    assert kinds["a"][-1] == "failed" and kinds["b"][-1] == "done"
    message = next(value for job, kind, value in told if kind == "failed")
    assert message.startswith("ValueError in ") and "Chest" not in message


def test_a_model_that_computes_no_numbers_ends_after_three_failures(served, monkeypatch):
    worker = Worker(served, lambda told: None)
    monkeypatch.setattr(
        Batch, "_forward", lambda self, ids, *rest: torch.full((ids.shape[0], 5), float("nan"))
    )
    with pytest.raises(FloatingPointError):
        for n in range(5):
            worker.take(("job", Job(str(n), "text", NOTE)))
            worker.work()
    assert n == engine.FAILURES_IN_A_ROW - 1


def test_what_cannot_be_served_is_refused_by_name(served, chooser):
    told = []
    for worker, job in [
        (Worker(served, told.extend), Job("labels", "classify", NOTE)),
        (Worker(served, told.extend), Job("long", "text", NOTE * 200)),
        (
            Worker(served, told.extend),
            Job("order", "chat", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        ),
        (Worker(chooser, told.extend), Job("long text", "classify", NOTE * 20)),
    ]:
        worker.take(("job", job))
    kinds = {job: (kind, type(value)) for job, kind, value in told}
    assert kinds == {
        "labels": ("refused", NotServed),
        "long": ("refused", PromptTooLong),
        "order": ("refused", NotServed),
        "long text": ("refused", PromptTooLong),
    }


def test_labels_have_the_probabilities_of_the_evaluator_at_the_temperature(chooser):
    from medai_nb.calibration import apply_temperature

    likelihoods = chooser.evaluator.log_probabilities_of(chooser.evaluator.predict([{"text": NOTE}]))
    warm = ReleaseModel(
        chooser.config.model_copy(update={"calibration_temperature": 3.0, "abstention_threshold": 0.9999}),
        chooser.model,
        chooser.tokenizer,
    )
    decision = warm.label([NOTE])[0]
    assert list(decision["probabilities"].values()) == pytest.approx(apply_temperature(likelihoods, 3.0)[0])
    assert decision["label"] is None and decision["abstained"] and decision["calibrated"]
    plain = chooser.label([NOTE])[0]
    assert plain["label"] in ("Ear", "Eye") and not plain["abstained"] and not plain["calibrated"]


async def answer(local, job):
    return [event async for event in local.generate(job)]


async def until(condition, seconds=60):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen in time")


def test_the_worker_answers_cancels_dies_and_comes_back_a_bounded_number_of_times(release):
    config = load_serving_config(release, overrides={"max_running": 2, "max_queue": 2, "max_restarts": 1})

    async def scenario():
        local = LocalEngine(config)
        with pytest.raises(EngineDown):
            await answer(local, Job("early", "text", NOTE))
        await local.start()
        await local.wait()
        events = await answer(local, Job("a", "text", NOTE, max_new_tokens=5))
        assert events[0][0] == "begun" and events[-1][1]["completion_tokens"] <= 5
        stream = local.generate(Job("b", "text", NOTE, max_new_tokens=400))
        await anext(stream)
        await stream.aclose()
        assert local.state.running == local.state.queued == 0, "whoever leaves frees the slot"
        os.kill(local.process.pid, signal.SIGSTOP)  # so that requests wait
        waiting = [
            asyncio.create_task(answer(local, Job(str(n), "text", NOTE, max_new_tokens=400)))
            for n in range(4)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineFull):
            await answer(local, Job("full", "text", NOTE))
        os.kill(local.process.pid, signal.SIGKILL)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, EngineDown) for result in results), "nobody waits for ever"
        assert not local.state.ready
        await until(lambda: local.state.ready)
        assert local.state.restarts == 1
        assert (await answer(local, Job("c", "text", NOTE, max_new_tokens=3)))[-1][0] == "done"
        os.kill(local.process.pid, signal.SIGKILL)
        await until(lambda: local.process is None)
        assert not local.state.ready and "ended 2 times" in local.state.problem
        with pytest.raises(EngineDown):
            await answer(local, Job("late", "text", NOTE))
        await local.stop()

    asyncio.run(scenario())


def sse(*chunks):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def backend(release, answers, **overrides):
    """An OpenAIBackend in front of a function from request to response."""
    seen = []

    def handle(request):
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "tuned"}]})
        seen.append(json.loads(request.content))
        return answers(request)

    config = load_serving_config(
        release, overrides={"backend": "openai", "url": "http://backend/v1", **overrides}
    )
    return OpenAIBackend(config, httpx.MockTransport(handle)), seen


def test_another_server_gets_the_prompt_of_training_and_its_answer_comes_back_as_events(release):
    text = sse(
        {"choices": [{"delta": {"content": "Rest"}}]},
        {"choices": [{"delta": {"content": "."}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}},
    )
    server, seen = backend(release, lambda request: httpx.Response(200, text=text))

    async def scenario():
        await server.start()
        await server.wait()
        events = await answer(server, Job("a", "text", NOTE, max_new_tokens=7, stop=("END",)))
        with pytest.raises(NotServed):
            await answer(server, Job("b", "classify", NOTE))
        await server.stop()
        return events

    events = asyncio.run(scenario())
    assert [value for kind, value in events if kind == "piece"] == ["Rest", "."]
    assert events[-1][1] == {
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "cut": False,
    }
    assert seen[0]["messages"] == [
        {"role": "system", "content": "Be careful."},
        {"role": "user", "content": NOTE},
    ]
    assert (seen[0]["max_tokens"], seen[0]["stop"], seen[0]["model"]) == (7, ["END"], "tuned")


@pytest.mark.parametrize(
    "response, error",
    [
        (httpx.Response(429), EngineFull),
        (httpx.Response(503), EngineDown),
        (httpx.Response(500, text=NOTE), EngineDown),
        (httpx.Response(400, text=NOTE), NotServed),
        (httpx.Response(200, text="data: {broken\n\n"), EngineDown),
        (httpx.Response(200, text=sse({"choices": [{"delta": {"content": "half"}}]})), EngineDown),
    ],
)
def test_a_failing_backend_has_one_clear_meaning_and_is_not_quoted(release, response, error):
    server, _ = backend(release, lambda request: response)

    async def scenario():
        await server.start()
        await server.wait()
        try:
            with pytest.raises(error) as caught:
                await answer(server, Job("a", "text", NOTE))
            assert "Chest" not in str(caught.value)
            assert server.state.running == 0
        finally:
            await server.stop()

    asyncio.run(scenario())


def test_a_backend_is_asked_no_more_than_the_release_was_measured_with(release):
    """`max_length` holds for prompt and answer together, wherever the model runs."""
    text = sse({"choices": [{"delta": {"content": "Rest."}, "finish_reason": "stop"}]})
    server, seen = backend(release, lambda request: httpx.Response(200, text=text))
    cutting, cut = backend(release, lambda request: httpx.Response(200, text=text), long_text="cut")
    long = "cough " * 3000

    async def scenario():
        for started in (server, cutting):
            await started.start()
            await started.wait()
        with pytest.raises(PromptTooLong):
            await answer(server, Job("a", "text", long))
        with pytest.raises(PromptTooLong):
            await answer(server, Job("b", "raw", long))
        events = await answer(server, Job("c", "text", NOTE)), await answer(cutting, Job("d", "text", long))
        for started in (server, cutting):
            await started.stop()
        return events

    (short, shortened) = asyncio.run(scenario())
    limit = server.config.max_length
    assert [event[1]["cut"] for event in (short[-1], shortened[-1])] == [False, True]
    assert len(seen) == 1 and seen[0]["max_tokens"] == limit - short[-1][1]["prompt_tokens"]
    prompt = apply_template(cut[0]["messages"], cutting._tokenizer, answer_follows=True)
    assert limit // 4 < len(prompt) == shortened[-1][1]["prompt_tokens"] < limit


def test_the_tokenizer_of_the_release_is_used(release, served):
    own = AutoTokenizer.from_pretrained(release / "lora_adapter")
    assert served.tokenizer.chat_template == own.chat_template


def test_a_backend_that_is_away_and_comes_is_told_once_and_by_no_address(release, caplog):
    caplog.set_level("INFO", logger="medai_nb")
    answers = [
        httpx.Response(503),
        httpx.Response(503),
        httpx.Response(200, json={"data": [{"id": "tuned"}]}),
    ]
    config = load_serving_config(
        release, overrides={"backend": "openai", "url": "http://me:secret@backend/v1"}
    )
    server = OpenAIBackend(config, httpx.MockTransport(lambda request: answers.pop(0)))

    async def scenario():
        await server.start()
        await server.wait()
        await server.stop()

    asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("medai_nb")]
    assert said == [
        "the backend does not answer (HTTPStatusError): it is asked again every second",
        "ready: tuned of the backend",
    ]
