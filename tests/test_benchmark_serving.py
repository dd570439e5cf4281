"""The benchmark of serving: real servers with one set of weights answer the same conversations."""

import pytest

from medai_nb.config import RunConfig, UserError
from medai_nb.hosts import free_port
from medai_nb.serving_speed import (
    OURS,
    SERVERS,
    Server,
    ask,
    benchmark_serving,
    conversations,
    make_servers,
    running,
    serving_table,
)

OTHER = SERVERS[1]


@pytest.fixture
def config(tiny_llama):
    return RunConfig(model={"name": str(tiny_llama), "precision": "fp32"}, lora={"r": 4})


def test_servers_are_asked_the_same_and_all_is_measured(config):
    result = benchmark_serving(config, [OURS, OTHER], (1, 2), turns=1, tokens=4, requests=20)
    assert list(result["servers"]) == [OURS, OTHER]
    for levels in result["servers"].values():
        assert list(levels) == [1, 2]
        for level in levels.values():
            assert (
                0 < level["p50"] <= level["p95"]
                and level["tokens_per_second"] > level["requests_per_second"] > 0
            )
    ours, theirs = (result["tokens"][name] for name in (OURS, OTHER))
    assert ours == theirs and ours[1] == 4, "the same prompts, token by token, and answers of one length"
    assert list(result["check_seconds"]) == [1, 2]
    assert all(
        0 < seconds < result["servers"][OURS][n]["p95"] for n, seconds in result["check_seconds"].items()
    )
    assert [count for count, _ in result["memory"]] == list(range(1, 21))
    assert all(memory > 100 for _, memory in result["memory"])
    lines = serving_table(result)
    assert {f"{count}, {name}" for count in (1, 2) for name in (OURS, OTHER)} <= set(lines)
    assert f"{ours[0]:.0f} + 4" in lines[f"1, {OTHER}"]


def test_what_is_not_installed_is_named_and_left_out(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    servers = make_servers(config, tmp_path, SERVERS, slots=2)
    assert [server.name for server in servers] == [OURS]
    said = capsys.readouterr().out
    assert "llama-server is not on the PATH" in said and "pip install 'medai_nb[baselines]'" in said


def test_a_server_that_does_not_start_or_refuses_is_named_with_what_it_said(tmp_path):
    broken = Server("broken", ["python3", "-c", "raise SystemExit('no such model')"], 1)
    with pytest.raises(UserError, match=r"^broken did not start: no such model$"), running(broken, tmp_path):
        raise AssertionError("it never ran")
    program = (
        "import http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "  def do_GET(self): self.send_response(200); self.end_headers()\n"
        "  def do_POST(self): self.send_response(400); self.end_headers(); self.wfile.write(b'too long')\n"
        "h.HTTPServer(('127.0.0.1', {port}), H).serve_forever()"
    )
    port = free_port()
    server = Server("refusing", ["python3", "-c", program.format(port=port)], port)
    texts = conversations(RunConfig(), 2)
    with (
        running(server, tmp_path),
        pytest.raises(UserError, match="refusing answered with status 400: too long"),
    ):
        ask(server, texts, 4, 2)
    assert server.process.poll() is not None, "it is stopped afterwards"
