"""The server says no in clear words, loses nothing, and writes no text anywhere; one real process is started, killed and drained."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
from releases import tiny_release, tuned_model

from medai_nb import serve
from medai_nb.access import KeyStore
from medai_nb.cli import main
from medai_nb.config import UserError
from medai_nb.engine import EngineDown, EngineFull, EngineState, NotServed, PromptTooLong
from medai_nb.hosts import free_port
from medai_nb.phi.audit import AuditLog, verify_audit
from medai_nb.release_files import write_checksums
from medai_nb.run_folder import write_json_atomic
from medai_nb.serve import OPEN_ROUTES, ROUTE_ROLES, create_app, setup_model_serving
from medai_nb.serving_config import load_serving_config

SECRET = "Zebulon Quackenbush"
NOTE = f"Mr. {SECRET}, MRN 4471023, coughs."
SAFE = "Rest. If it gets worse, call your doctor."


LABELS = {
    "label": None,
    "probability": 0.6,
    "probabilities": {"Ear": 0.6, "Eye": 0.4},
    "abstained": True,
    "calibrated": True,
}


class Scripted:
    """An engine that does what a test says."""

    def __init__(self, answer=SAFE, error=None, delay=0.0):
        self.state = EngineState(ready=True, problem=None)
        self.answer, self.error, self.delay = answer, error, delay
        self.jobs, self.active, self.suspected = [], 0, 0
        self.unusable = self.when_unusable = None

    async def start(self):
        pass

    async def stop(self):
        pass

    def suspect(self):
        self.suspected += 1

    async def generate(self, job):
        self.jobs.append(job)
        self.active += 1
        try:
            yield "begun", 7
            await asyncio.sleep(self.delay)
            if self.error:
                raise self.error
            if job.kind == "classify":
                yield "labels", LABELS
                return
            for word in re.findall(r"\S+\s*", self.answer):
                yield "piece", word
            yield "done", {"finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 9, "cut": False}
        finally:
            self.active -= 1


@pytest.fixture
def folder(tmp_path):
    """A release that only the scripted engine can serve."""
    (tmp_path / "release").mkdir()
    settings = {"leakage_gate": "passed", "base_weights": {"model.safetensors": "sha256:0"}}
    write_json_atomic(tmp_path / "release" / "serving_config.json", settings)
    write_checksums(tmp_path / "release")
    return tmp_path / "release"


class Running:
    """An application in this process, with a client and a key for each role."""

    def __init__(self, folder, engine, **settings):
        self.engine = engine
        self.app = create_app(load_serving_config(folder, overrides=settings), engine)
        self.service = self.app.state.service
        self.keys = {role: self.service.keys.add(role, role) for role in ("predict", "metrics", "admin")}
        self.audit_file = self.service.config.state / "audit.jsonl"

    def __call__(self, scenario):
        """Run a coroutine function that gets the client; its result."""

        async def run():
            async with self.app.router.lifespan_context(self.app):
                transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                    client.headers["Authorization"] = f"Bearer {self.keys['admin']}"
                    return await scenario(client)

        return asyncio.run(run())

    def all_lines(self):
        """The audit log."""
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]

    def lines(self):
        """The audit lines of requests."""
        return [line for line in self.all_lines() if line["event"] == "request"]

    def figure(self, name):
        """A figure of /metrics."""
        text = self.service.metrics.text().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found.group(1)) if found else 0.0


def predict(text=NOTE, **more):
    async def scenario(client):
        return await client.post("/predict", json={"text": text, **more})

    return scenario


def test_every_route_but_one_needs_a_key_and_has_a_role(folder):
    running = Running(folder, Scripted())
    routes = {
        (route.path, method)
        for route in running.app.routes
        for method in getattr(route, "methods", None) or {"GET"}
    }
    assert {path for path, _ in routes} == {*ROUTE_ROLES, *OPEN_ROUTES}, (
        "a new route needs a role in the table"
    )
    assert OPEN_ROUTES == ("/health/live",)

    async def scenario(client):
        found = {}
        for path, method in sorted(routes) + [("/nothing", "GET"), ("/docs/", "GET"), ("/", "POST")]:
            for name, header in [
                ("no", None),
                ("wrong", "Bearer medai_x_y"),
                ("odd", "Basic ???"),
                ("none", "Bearer "),
            ]:
                client.headers.pop("Authorization", None)
                headers = {"Authorization": header} if header else {}
                answer = await client.request(method, path, headers=headers, content=b"{broken")
                found[path, name] = answer.status_code
        return found

    found = running(scenario)
    assert {status for (path, _), status in found.items() if path != "/health/live"} == {401}
    assert {found["/health/live", name] for name in ("no", "wrong")} == {200}


def test_a_route_that_nobody_gave_a_role_is_for_admin_only(folder):
    running = Running(folder, Scripted())

    @running.app.get("/new")
    async def new():
        return {}

    async def scenario(client):
        statuses = {}
        for role, key in running.keys.items():
            for path in ("/new", "/metrics", "/v1/models", "/health"):
                answer = await client.get(path, headers={"Authorization": f"Bearer {key}"})
                statuses[role, path] = answer.status_code
        return statuses

    statuses = running(scenario)
    assert {pair for pair, status in statuses.items() if status == 403} == {
        ("predict", "/new"),
        ("metrics", "/new"),
        ("predict", "/metrics"),
        ("metrics", "/v1/models"),
    }
    assert set(statuses.values()) == {200, 403}


def test_a_key_that_is_revoked_stops_working_at_once(folder):
    running = Running(folder, Scripted())

    async def scenario(client):
        client.headers["Authorization"] = f"Bearer {running.keys['predict']}"
        before = await client.get("/v1/models")
        KeyStore(running.service.keys.path).revoke(running.keys["predict"].split("_")[1])
        return before.status_code, (await client.get("/v1/models")).status_code

    assert running(scenario) == (200, 401)
    assert running.figure('medai_refused_total{reason="auth"}') == 1


def test_predict_says_what_happened_to_identifiers(folder):
    running = Running(folder, Scripted(f"{SAFE} Signed, {NOTE}"))
    answer = running(predict())
    content = answer.json()
    assert answer.status_code == 200 and SECRET not in answer.text and "4471023" not in answer.text
    assert SECRET not in running.engine.jobs[0].content, "the model does not see it either"
    assert content["phi_protected"] is True and content["checks"]["phi_input"]["found"] >= 2
    assert content["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
    assert running.figure('medai_phi_found_total{where="input"}') >= 2
    assert running.figure('medai_phi_found_total{where="output"}') >= 1
    allowed = Running(folder, Scripted(), phi_input="allow")(predict())
    assert allowed.json()["phi_protected"] is False and SECRET in allowed.json()["input"]


def test_identifiers_can_be_refused_on_both_sides(folder):
    coming = Running(folder, Scripted(), phi_input="refuse")
    answer = coming(predict())
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "phi" and not coming.engine.jobs
    assert coming.lines()[0]["status"] == 422 and coming.figure('medai_refused_total{reason="phi"}') == 1
    going = Running(folder, Scripted(f"Ask {SECRET}, MRN 4471023."), phi_output="refuse")
    answer = going(predict("Cough."))
    assert answer.status_code == 422 and SECRET not in answer.text


HARMFUL = "You do not need a doctor. Do not go to the emergency room, it is nothing."


def test_an_answer_that_breaks_a_grave_rule_is_withheld(folder):
    request = "Crushing chest pain radiating to my left arm, I cannot breathe."
    running = Running(folder, Scripted(HARMFUL))
    content = running(predict(request)).json()
    assert content["output"] == serve.WITHHELD and content["finish_reason"] == "content_filter"
    rules = content["checks"]["safety"]["rules"]
    assert rules and running.lines()[0]["safety"] == rules and running.lines()[0]["withheld"] is True
    assert all(running.figure(f'medai_safety_flagged_total{{rule="{rule}"}}') == 1 for rule in rules)
    flagged = Running(folder, Scripted(HARMFUL), safety="flag")(predict(request)).json()
    assert flagged["output"] == HARMFUL and flagged["checks"]["safety"]["rules"] == rules
    off = Running(folder, Scripted(HARMFUL), safety="off")(predict(request)).json()
    assert off["checks"]["safety"] == {"action": "off", "rules": [], "withheld": False}


def test_one_audit_line_for_each_request_says_who_and_what_but_no_text(folder):
    running = Running(folder, Scripted(f"{SAFE} {NOTE}"))
    running(predict())
    (line,) = running.lines()
    assert line["who"] == "admin" and line["route"] == "/predict" and line["status"] == 200
    assert line["model_hash"] == running.service.release_hash and line["completion_tokens"] == 9
    assert line["phi"]["input"]["NAME"] == 1
    content = running.audit_file.read_text()
    assert verify_audit(running.audit_file)["valid"]
    assert not any(word in content for word in ("Quackenbush", "4471023", "cough", "Rest", "doctor"))


@pytest.mark.parametrize(
    "body",
    [
        b"{broken",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": null}',
        b'{"text": "a", "temperature": "hot"}',
        b'{"text": "a", "temperature": 1e999}',
        b'{"text": "a", "unknown": "Zebulon Quackenbush"}',
        b'{"text": ["Zebulon Quackenbush"]}',
        b"\xff\xfe{}",
        b'{"text": "\\ud800"}',
        b"[" * 50_000,
    ],
)
def test_a_body_that_is_no_request_gets_422_and_is_not_repeated(folder, body, caplog):
    running = Running(folder, Scripted())

    async def scenario(client):
        return await client.post("/predict", content=body, headers={"Content-Type": "application/json"})

    with caplog.at_level(logging.DEBUG):
        answer = running(scenario)
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]
    assert "Zebulon" not in answer.text and "Quackenbush" not in caplog.text and not running.engine.jobs


@pytest.mark.parametrize(
    "text", ["咳嗽和发烧", "Fièvre 39,2 °C 🤒", "a\u0000b\u202e\u200b", "é" * 5000, "\r\n\t x"]
)
def test_any_unicode_is_a_text(folder, text):
    answer = Running(folder, Scripted())(predict(text))
    assert answer.status_code == 200 and answer.json()["output"] == SAFE


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_while_it_arrives(folder, declared):
    running = Running(folder, Scripted(), max_body_bytes=1000)
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(100):
            sent += 100
            yield b"x" * 100

    async def scenario(client):
        return await client.post("/predict", content=b"x" * 2000 if declared else chunks())

    answer = running(scenario)
    assert answer.status_code == 413 and sent <= 1100
    assert running.figure('medai_refused_total{reason="size"}') == 1


@pytest.mark.parametrize(
    "error, status, retry",
    [
        (PromptTooLong(900, 500), 400, False),
        (NotServed("labels only"), 400, False),
        (EngineFull(), 429, True),
        (EngineDown("gone"), 503, True),
        (RuntimeError(NOTE), 500, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_failure_of_the_engine_has_its_status_and_its_line(folder, caplog, error, status, retry, stream):
    running = Running(folder, Scripted(error=error))

    async def scenario(client):
        body = {"messages": [{"role": "user", "content": NOTE}], "stream": stream}
        return await client.post("/v1/chat/completions", json=body)

    with caplog.at_level(logging.DEBUG):
        answer = running(scenario)
    assert answer.status_code == status and ("retry-after" in answer.headers) == retry
    assert SECRET not in answer.text + caplog.text + running.audit_file.read_text()
    assert [line["status"] for line in running.lines()] == [status]
    assert running.engine.active == 0


def test_a_request_that_takes_too_long_is_given_up(folder):
    running = Running(folder, Scripted(delay=5), request_timeout=0.2)
    answer = running(predict("Cough."))
    assert answer.status_code == 503 and answer.headers["retry-after"] and running.engine.active == 0
    assert running.engine.suspected == 1 and running.lines()[0]["status"] == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_disk_lets_no_answer_out(folder, monkeypatch, stream):
    running = Running(folder, Scripted(), phi_output="allow", safety="flag")

    async def scenario(client):
        def full(self, events):
            raise OSError(errno.ENOSPC, "No space left on device")

        body = {"messages": [{"role": "user", "content": "Cough."}], "stream": stream}
        with monkeypatch.context() as patch:
            patch.setattr(AuditLog, "_write", full)
            refused = await client.post("/v1/chat/completions", json=body)
            not_ready = await client.get("/health/ready")
        while not running.service.warm:
            await asyncio.sleep(0.02)
        ready = await client.get("/health/ready")
        return refused, not_ready, await client.post("/v1/chat/completions", json=body), ready

    refused, not_ready, answered, ready = running(scenario)
    assert refused.status_code == 503 and "Rest" not in refused.text and "audit log" in refused.text
    assert not_ready.status_code == 503 and "audit log" in not_ready.text
    assert ready.status_code == 200
    assert running.figure("medai_audit_failures_total") >= 1
    assert answered.status_code == 200 and "Rest" in answered.text, "it goes on when there is room again"
    assert verify_audit(running.audit_file)["valid"]


def test_ready_means_that_an_answer_can_come_now(folder):
    running = Running(folder, Scripted())

    async def scenario(client):
        for _ in range(3000):
            if running.service.warm:
                break
            await asyncio.sleep(0.02)
        statuses = []
        for state in (True, False):
            running.engine.state.ready = state
            statuses.append(
                [
                    (await client.get(path)).status_code
                    for path in ("/health/live", "/health/ready", "/health")
                ]
            )
        health = (await client.get("/health")).json()
        return statuses, health

    statuses, health = running(scenario)
    assert statuses == [[200, 200, 200], [200, 503, 200]]
    assert health["model_loaded"] is False and health["status"] == "unhealthy"


def test_classify_shows_probabilities_and_may_abstain(folder):
    running = Running(folder, Scripted())

    async def scenario(client):
        return await client.post("/classify", json={"text": NOTE})

    content = running(scenario).json()
    assert {name: content[name] for name in LABELS} == LABELS and content["phi_protected"] is True
    assert running.lines()[0]["route"] == "/classify"


def test_settings_decide_what_a_client_does_not_say(folder):
    running = Running(
        folder, Scripted(), temperature=0.7, top_p=0.9, repetition_penalty=1.2, max_new_tokens=33
    )

    async def scenario(client):
        await client.post("/predict", json={"text": "Cough."})
        await client.post("/predict", json={"text": "Cough.", "do_sample": True, "max_length": 100})
        await client.post("/predict", json={"text": "Cough.", "do_sample": False, "temperature": 0.5})
        await client.post(
            "/v1/completions", json={"prompt": "Cough.", "temperature": 1.5, "max_tokens": 3, "stop": "x"}
        )

    running(scenario)
    settings = [(job.temperature, job.max_new_tokens, job.max_length) for job in running.engine.jobs]
    assert settings == [(0.0, 33, None), (0.7, None, 100), (0.0, 33, None), (1.5, 3, None)]
    assert {(job.top_p, job.repetition_penalty) for job in running.engine.jobs} == {(0.9, 1.2)}
    assert running.engine.jobs[-1].stop == ("x",)


def test_a_stream_leaves_as_it_is_written_only_where_nothing_may_be_taken_back(folder):
    body = {"messages": [{"role": "user", "content": "Cough."}], "stream": True}

    async def scenario(client):
        return (await client.post("/v1/chat/completions", json=body)).text

    checked = Running(folder, Scripted(f"{SAFE} {NOTE}"))(scenario)
    assert SECRET not in checked and checked.endswith("data: [DONE]\n\n")
    running = Running(folder, Scripted(), phi_output="allow", safety="flag")
    events = [json.loads(line[6:]) for line in running(scenario).splitlines() if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") for event in events]
    assert pieces[:-1] == re.findall(r"\S+\s*", SAFE)
    assert [line["event"] for line in running.all_lines()][-4:-1] == ["start", "answer begins", "request"]


@contextlib.contextmanager
def listening(app):
    """The address of an application that a thread of this process serves."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the application did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_route_breaks_its_own_description(folder, mode):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    running = Running(folder, Scripted())
    headers = {"Authorization": f"Bearer {running.keys['admin']}"}
    limits = settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    tested = set()
    with listening(running.app) as url:
        schema = schemathesis.openapi.from_dict(serve.described_interface(running.app))
        for result in schema.get_all_operations():
            operation = result.ok()

            @limits
            @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
            def check(case):
                response = case.call(base_url=url, headers=headers)
                case.validate_response(
                    response,
                    headers=headers,
                    transport_kwargs={"base_url": url},
                    # That the last message is the user's cannot be said in a schema.
                    excluded_checks=[positive_data_acceptance],
                )
                tested.add(case.operation.path)

            with contextlib.suppress(Unsatisfiable):  # a route without body has nothing to get wrong
                check()
    posts = {"/predict", "/classify", "/v1/chat/completions", "/v1/completions"}
    assert tested >= (posts if mode == "NEGATIVE" else {*ROUTE_ROLES, *OPEN_ROUTES})


def test_the_interface_page_asks_no_other_host(folder):
    async def scenario(client):
        return (await client.get("/docs")).text, (await client.get("/openapi.json")).json()

    page, schema = Running(folder, Scripted())(scenario)
    assert "/v1/chat/completions" in page and not re.search(r"https?://|<script|src=", page)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation["security"] == ([] if path in OPEN_ROUTES else [{"key": []}])


def test_what_cannot_be_served_is_said_before_anything_listens(folder, tmp_path):
    (folder / "extra.bin").write_text("x")
    with pytest.raises(UserError, match="extra.bin was added"):
        setup_model_serving(folder)
    (folder / "extra.bin").unlink()
    state = load_serving_config(folder).state
    state.mkdir()
    (state / "audit.jsonl").write_text('{"line": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        setup_model_serving(folder)
    (state / "audit.jsonl").unlink()
    assert setup_model_serving(folder, port=9000).state.service.config.port == 9000


# --- one real process ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("real")
    return tiny_release(
        folder, tiny_llama, tuned_model(tiny_llama), ["Ear", "Eye"], instruction="Which chapter?"
    )


class Server:
    """A `medai serve` process and what it wrote."""

    def __init__(self, release, **settings):
        self.port = free_port()
        file = release.parent / f"serving-{self.port}.json"
        write_json_atomic(file, settings)
        self.state = release.parent / f"state-{self.port}"
        self.key = KeyStore(self.state / "keys.json").add("test", "admin")
        self.log = (release.parent / f"log-{self.port}.txt").open("w+")
        program = "from medai_nb.cli import main; raise SystemExit(main())"
        command = [sys.executable, "-c", program, "serve", str(release), "--config", str(file)]
        command += ["--port", str(self.port), "--state_folder", str(self.state)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120
        )

    def ready(self, seconds=240):
        until = time.time() + seconds
        while time.time() < until:
            assert self.process.poll() is None, self.said()
            with contextlib.suppress(httpx.HTTPError):
                if self.client.get("/health/ready").status_code == 200:
                    return self
            time.sleep(0.1)
        raise AssertionError(self.said())

    def said(self):
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def worker(self):
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))

    def lines(self):
        lines = (self.state / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines if '"event": "request"' in line]

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.client.close()
        self.log.close()


@pytest.fixture(scope="module")
def server(release):
    running = Server(release, max_queue=60, safety="flag")
    yield running.ready()
    running.close()


def figure(server, name):
    found = re.search(rf"^{re.escape(name)} (\S+)$", server.client.get("/metrics").text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def test_the_official_client_gets_answers_and_streams(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
    model = client.models.list().data[0].id
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Cough since Monday."}],
        "max_tokens": 6,
    }
    whole = client.chat.completions.create(**asked)
    stream = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens <= 6
    assert stream[-1].usage == whole.usage
    assert client.completions.create(model=model, prompt="Cough", max_tokens=3).usage.completion_tokens <= 3
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "other"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": "cough " * 3000}]})
    assert caught.value.code == "context_length_exceeded"


def test_a_server_says_where_it_listens_and_when_it_is_ready(server):
    said = server.said()
    assert f"{server.url}: the model is being loaded" in said and "ready: LlamaForCausalLM in" in said


def test_an_address_that_another_server_has_is_refused_before_a_key_is_made(
    server, release, tmp_path, capsys
):
    state = tmp_path / "state"
    assert main(["serve", str(release), "--port", str(server.port), "--state_folder", str(state)]) == 2
    assert f"127.0.0.1:{server.port} cannot be listened at" in capsys.readouterr().err
    assert not state.exists()


def test_a_real_release_classifies(server):
    content = server.client.post("/classify", json={"text": f"{NOTE} The left ear hurts."}).json()
    assert content["label"] in ("Ear", "Eye") and sum(content["probabilities"].values()) == pytest.approx(1)


def test_200_clients_at_once_get_an_answer_or_a_clear_no(server):
    before = len(server.lines())

    async def scenario():
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, timeout=300, limits=limits
        ) as client:
            body = {"messages": [{"role": "user", "content": "Cough."}], "max_tokens": 8}
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(200)))

    answers = asyncio.run(scenario())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 16
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
    texts = {
        answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200
    }
    assert texts, "answers"
    lines = server.lines()[before:]
    assert sorted(line["status"] for line in lines) == sorted(statuses), "each has its line"
    assert figure(server, "medai_running_requests") == figure(server, "medai_queue_requests") == 0


def test_a_client_that_goes_away_frees_its_slot(server):
    before = len(server.lines())
    for stream in (False, True):
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "Cough."}],
                "max_tokens": 400,
                "stream": stream,
                "temperature": 1,
            }
        )
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                (
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                ).encode()
            )
            time.sleep(0.3)
    until = time.time() + 60
    while len(server.lines()) < before + 2 and time.time() < until:
        time.sleep(0.1)
    assert {line["status"] for line in server.lines()[before:]} <= {499, 200}
    assert figure(server, "medai_running_requests") == 0


def test_a_worker_that_is_killed_is_started_again_and_nobody_waits_for_ever(server):
    import concurrent.futures

    worker = server.worker()
    worker.suspend()
    body = {"messages": [{"role": "user", "content": NOTE}], "max_tokens": 200}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.client.post, "/v1/chat/completions", json=body) for _ in range(3)]
        time.sleep(1)
        worker.kill()
        answers = [task.result(timeout=120) for task in waiting]
    assert {answer.status_code for answer in answers} == {503}
    assert all(answer.headers["retry-after"] for answer in answers)
    assert server.client.get("/health/live").status_code == 200
    server.ready()
    assert server.client.post("/predict", json={"text": "Cough."}).status_code == 200
    assert figure(server, "medai_engine_restarts_total") == 1 and figure(server, "medai_engine_up") == 1


def test_sigterm_lets_running_requests_end_and_no_text_was_written(server):
    import concurrent.futures

    worker = server.worker()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        body = {
            "messages": [{"role": "user", "content": NOTE}],
            "max_tokens": 60,
            "temperature": 1,
            "seed": 3,
        }
        running = pool.submit(server.client.post, "/v1/chat/completions", json=body)
        time.sleep(0.2)
        os.kill(server.process.pid, signal.SIGTERM)
        assert running.result(timeout=120).status_code == 200, "it was finished"
        assert server.process.wait(timeout=120) == 0
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert verify_audit(server.state / "audit.jsonl")["valid"]
    written = server.said() + (server.state / "audit.jsonl").read_text()
    for word in ("Quackenbush", "4471023", "Cough", "cough ", server.key, "Traceback"):
        assert word not in written, word


def write_certificate(folder):
    """A certificate for 127.0.0.1 that signs itself: (certificate file, key file)."""
    import ipaddress
    from datetime import datetime, timedelta, timezone

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ward")])
    now = datetime.now(timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(address, critical=False)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoded = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(*encoded))
    return files


def test_a_model_server_starts_with_tls_answers_and_ends_with_0(release, tmp_path):
    certificate, key = write_certificate(tmp_path)
    port = free_port()
    settings = {"tls_cert": str(certificate), "tls_key": str(key), "state_folder": str(tmp_path / "state")}
    write_json_atomic(tmp_path / "serving.json", settings)
    program = (
        "from medai_nb.serve import ModelServer\n"
        "if __name__ == '__main__':\n"
        f"    server = ModelServer({str(release)!r}, {str(tmp_path / 'serving.json')!r})\n"
        f"    raise SystemExit(server.start('127.0.0.1', {port}))\n"
    )
    (tmp_path / "program.py").write_text(program)
    access = KeyStore(tmp_path / "state" / "keys.json").add("ward", "predict")
    said = tmp_path / "said.txt"
    with said.open("wb") as output:
        process = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=output, stderr=output)
    try:
        context = ssl.create_default_context(cafile=certificate)
        headers = {"Authorization": f"Bearer {access}"}
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, headers=headers) as client:
            until = time.time() + 240
            ready = False
            while not ready:
                assert process.poll() is None and time.time() < until, said.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    ready = client.get("/health/ready").status_code == 200
                time.sleep(0.1)
            assert client.post("/predict", json={"text": "Cough."}, timeout=60).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health/live")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "leaked" not in said.read_text() and "Traceback" not in said.read_text()
