"""Publishing sends adapter and cards to the hub, and nothing else; shown against a small hub of our own."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants
from releases import HOSPITAL_FOLDER, PATIENT_TEXT, all_figures, opened, tuned_model, write_run

from medai_nb import export
from medai_nb.cli import main
from medai_nb.config import UserError
from medai_nb.publish import publish_release
from medai_nb.release_files import ExportError
from medai_nb.run_folder import read_json


class Hub(ThreadingHTTPServer):
    """The parts of the hub's API that a commit needs: repositories, LFS by its basic transfer, commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.files, self.stored, self.requests, self.tokens = {}, {}, {}, [], set()
        self.refuses = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_PUT(self):
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.stored[oid] = content
        self.answer({})

    def do_POST(self):
        hub, content, path = self.server, self.body(), self.path.partition("?")[0]
        hub.requests.append(path)
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            return self.answer({"error": hub.refuses}, 403)
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories.setdefault(name, asked["visibility"])
            return self.answer({"url": f"{hub.url}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [one["path"] for one in json.loads(content)["files"]]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in files
            ]
            return self.answer({"files": answers})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/upload/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            name = re.fullmatch("/api/models/(.*)/commit/main", path).group(1)
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name, value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name, value["path"]] = hub.stored[value["oid"]]
            commit = {
                "commitOid": "a" * 40,
                "commitUrl": f"{hub.url}/{name}/commit/{'a' * 40}",
                "hookOutput": "",
            }
            return self.answer(commit | {"success": True})
        return self.answer({"error": f"nothing at {path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    # The xet protocol goes to servers of its own; files go by LFS where it is off.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def releases(tmp_path_factory, small_llama):
    """A folder with three releases: as it should be, with gates opened by hand, and with merged weights."""
    folder = tmp_path_factory.mktemp("published")
    config = write_run(folder / "run", small_llama, tuned_model(small_llama), all_figures())
    export.export_release(config, folder / "run", folder / "release")
    export.export_release(opened(config), folder / "run", folder / "opened")
    merging = config.model_copy(update={"export": config.export.model_copy(update={"merged": True})})
    export.export_release(merging, folder / "run", folder / "merged")
    return folder


SENT = {
    "README.md",
    "applied_model_card.xml",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_adapter_and_cards_arrive_in_one_commit_and_nothing_else(hub, releases, capsys):
    arguments = ["publish", str(releases / "release"), "--repo", "ward-7/tiny", "--url", hub.url]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"published: {hub.url}/ward-7/tiny/commit/{'a' * 40}\n"
    assert hub.repositories == {"ward-7/tiny": "private"}, "private unless asked otherwise"
    assert {name for _, name in hub.files} == SENT
    assert hub.requests.count("/api/models/ward-7/tiny/commit/main") == 1
    assert hub.tokens == {"Bearer hf_test"}
    source = releases / "release" / "lora_adapter"
    for name in SENT - {"README.md", "adapter_config.json", "applied_model_card.xml"}:
        assert hub.files["ward-7/tiny", name] == (source / name).read_bytes(), name


def test_merged_weights_stay_where_they_are(hub, releases):
    assert (releases / "merged" / "merged" / "model.safetensors").is_file()
    publish_release(releases / "merged", "ward-7/tiny", url=hub.url)
    assert {name for _, name in hub.files} == SENT


def test_what_arrives_names_no_folder_and_no_patient(hub, releases, small_llama):
    publish_release(releases / "release", "ward-7/tiny", url=hub.url)
    assert str(small_llama) in (releases / "release" / "lora_adapter" / "adapter_config.json").read_text()
    secrets = (PATIENT_TEXT, HOSPITAL_FOLDER, str(releases), str(small_llama.parent))
    for (_, name), content in hub.files.items():
        assert not any(secret.encode() in content for secret in secrets), name
    settings = json.loads(hub.files["ward-7/tiny", "adapter_config.json"])
    before = read_json(releases / "release" / "lora_adapter" / "adapter_config.json")
    assert settings == before | {"base_model_name_or_path": "small-llama"}


def test_the_published_card_loads_from_the_hub_and_says_the_same(hub, releases):
    publish_release(releases / "release", "ward-7/tiny", url=hub.url)
    text = hub.files["ward-7/tiny", "README.md"].decode()
    card = ModelCard(text)
    assert '"ward-7/tiny")' in card.text and '"lora_adapter"' not in card.text
    kept = (releases / "release" / "README.md").read_text()
    figures = kept[kept.index("## Evaluation") : kept.index("## How to load")]
    assert figures in text


def test_a_public_repository_takes_the_word(hub, releases):
    publish_release(releases / "release", "ward-7/tiny", private=False, url=hub.url)
    assert hub.repositories == {"ward-7/tiny": "public"}


def test_a_release_with_an_opened_gate_goes_out_only_by_name(hub, releases, capsys):
    arguments = ["publish", str(releases / "opened"), "--repo", "ward-7/tiny", "--url", hub.url]
    assert main(arguments) == 2
    assert "phi.allow_unprotected" in capsys.readouterr().err and hub.requests == []
    assert main([*arguments, "--allow_opened_gate"]) == 0
    assert b"A gate was opened by hand" in hub.files["ward-7/tiny", "README.md"]


def test_a_release_that_does_not_verify_stays(hub, releases, tmp_path):
    changed = shutil.copytree(releases / "release", tmp_path / "changed")
    (changed / "README.md").write_text("# Better")
    with pytest.raises(ExportError, match="README.md was changed"):
        publish_release(changed, "ward-7/tiny", url=hub.url)
    with pytest.raises(ExportError, match="is no release"):
        publish_release(tmp_path / "nowhere", "ward-7/tiny", url=hub.url)
    (tmp_path / "some.pub").write_text("untrusted comment: x\n" + "RWQ" + "A" * 53)
    with pytest.raises(ExportError, match="was not signed"):
        publish_release(releases / "release", "ward-7/tiny", url=hub.url, public_key=tmp_path / "some.pub")
    assert hub.requests == []


def test_a_hub_that_refuses_is_not_there_or_is_misnamed_gives_one_clear_error(hub, releases):
    hub.refuses = "You are not a member of ward-7"
    with pytest.raises(UserError, match="the hub refuses to publish ward-7/tiny: .*403"):
        publish_release(releases / "release", "ward-7/tiny", url=hub.url)
    with pytest.raises(UserError, match="could not be published"):
        publish_release(releases / "release", "ward-7/tiny", url="http://127.0.0.1:9")
    with pytest.raises(UserError, match="write ORG/NAME"):
        publish_release(releases / "release", "ward-7/a/b", url=hub.url)
    assert hub.files == {}


def test_the_network_is_open_for_this_call_alone(hub, releases, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    publish_release(releases / "release", "ward-7/tiny", url=hub.url)
    assert constants.HF_HUB_OFFLINE is True and hub.files
