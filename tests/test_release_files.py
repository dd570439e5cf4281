"""`medai verify` finds whatever was changed in a release, and whoever signed it."""

import json
import re
import shutil

import minisign
import pytest
import torch
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator
from releases import opened, tuned_model, write_run
from safetensors.torch import load_file, save_file

from medai_nb import export, release_files
from medai_nb.cli import main
from medai_nb.release_files import ExportError, check_release, verify_release, write_checksums
from medai_nb.run_folder import read_json, write_json_atomic

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with a pair of keys, one of another person, and the first one's secret key under a password."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        pair = minisign.KeyPair.generate()
        (folder / f"{name}.key").write_bytes(bytes(pair.secret_key))
        (folder / f"{name}.pub").write_bytes(bytes(pair.public_key))
    locked = minisign.SecretKey.from_file(folder / "own.key")
    locked.encrypt(PASSWORD, opslimit=minisign.OPSLIMIT // 1024, memlimit=minisign.MEMLIMIT // 1024)
    (folder / "locked.key").write_bytes(bytes(locked))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_llama, keys):
    """(config, run folder); the export is to be signed."""
    folder = tmp_path_factory.mktemp("run")
    key = {"signing_key": str(keys / "own.key")}
    return write_run(folder, small_llama, tuned_model(small_llama), export=key), folder


@pytest.fixture(scope="module")
def signed(run, tmp_path_factory):
    """A signed release, to copy from."""
    folder = tmp_path_factory.mktemp("signed") / "release"
    export.export_release(*run, folder)
    return folder


@pytest.fixture
def release(signed, tmp_path):
    return shutil.copytree(signed, tmp_path / "release")


def signing_with(config, key):
    return config.model_copy(update={"export": config.export.model_copy(update={"signing_key": str(key)})})


def make_whole(folder) -> None:
    """What someone does who changes a file and knows of the checksums: writes all hashes anew. Only the signature cannot be."""
    metadata = read_json(folder / "metadata.json")
    metadata["files"] = release_files.file_hashes(
        folder, without=("metadata.json", release_files.CHECKSUMS, release_files.SIGNATURE)
    )
    write_json_atomic(folder / "metadata.json", metadata)
    write_checksums(folder)


def change_json(path, **changes) -> None:
    write_json_atomic(path, read_json(path) | changes)


def failed(folder, key=None) -> dict[str, list[str]]:
    """Name of a check -> its problems, of those that found any."""
    return {check.name: check.problems for check in check_release(folder, key) if check.problems}


def test_a_release_as_it_was_written_verifies_in_every_respect(signed, keys):
    checks = check_release(signed, keys / "own.pub")
    assert [check.name for check in checks] == [
        "checksums", "metadata", "adapter", "sbom", "cards", "serving", "signature",
    ]  # fmt: skip
    assert [check for check in checks if check.problems] == []
    assert "file:SHA256SUMS" in checks[-1].note, "the trusted comment"


def flip_byte(folder):
    path = folder / "lora_adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change, found",
    [
        (flip_byte, ["lora_adapter/adapter_model.safetensors was changed"]),
        (lambda folder: (folder / "sbom.cdx.json").unlink(), ["sbom.cdx.json is missing"]),
        (lambda folder: (folder / "notes.csv").write_text("x"), ["notes.csv was added"]),
        (lambda folder: change_json(folder / "metadata.json", seed=7), ["metadata.json was changed"]),
        (lambda folder: (folder / "SHA256SUMS").unlink(), ["SHA256SUMS is missing"]),
        (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\xfe"), ["\ufffd\ufffd"]),
    ],
    ids=["a byte", "missing", "added", "metadata", "no checksums", "damaged checksums"],
)
def test_what_was_changed_missing_or_added_is_named(release, change, found):
    change(release)
    problems = failed(release)["checksums"]
    assert problems == found if "\ufffd" not in found[0] else len(problems) > 5


def test_checksums_written_anew_do_not_agree_with_the_metadata(release):
    (release / "README.md").write_text((release / "README.md").read_text() + "Better than it is.")
    write_checksums(release)
    assert failed(release) == {"metadata": ["metadata.json has another hash of README.md than SHA256SUMS"]}


def test_only_the_signature_finds_whoever_writes_every_hash_anew(release, keys):
    (release / "README.md").write_text((release / "README.md").read_text() + "Better than it is.")
    make_whole(release)
    assert failed(release) == {}
    assert failed(release, keys / "own.pub") == {
        "signature": ["SHA256SUMS.minisig: signature verification failed"]
    }


def tensors(change):
    def damage(folder):
        path = folder / "lora_adapter" / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


@pytest.mark.parametrize(
    "change, check, problem",
    [
        (
            tensors(lambda found: {name: one * torch.nan for name, one in found.items()}),
            "adapter",
            "not finite",
        ),
        (tensors(lambda found: {}), "adapter", "no tensors"),
        (
            lambda folder: (folder / "lora_adapter" / "adapter_model.safetensors").write_bytes(b"torn"),
            "adapter",
            "cannot be read",
        ),
        (
            lambda folder: change_json(
                folder / "lora_adapter" / "adapter_config.json", base_model_name_or_path="another"
            ),
            "adapter",
            "the adapter fits another",
        ),
        (lambda folder: change_json(folder / "metadata.json", format=1), "metadata", "format 1"),
        (lambda folder: (folder / "sbom.cdx.json").write_text("{}"), "sbom", "no CycloneDX"),
        (lambda folder: (folder / "sbom.cdx.json").write_text("{"), "sbom", "no JSON"),
        (lambda folder: (folder / "README.md").write_text("# Fine"), "cards", "no front matter"),
        (lambda folder: (folder / "applied_model_card.xml").write_text("<a>"), "cards", "not well-formed"),
        (lambda folder: change_json(folder / "serving_config.json", labels=["Eye"]), "serving", "labels"),
        (lambda folder: change_json(folder / "serving_config.json", base_model="x"), "serving", "base_model"),
        (
            lambda folder: change_json(folder / "serving_config.json", leakage_gate="x"),
            "serving",
            "leakage_gate",
        ),
    ],
)
def test_a_release_that_is_unfit_is_found_although_every_hash_is_right(release, change, check, problem):
    change(release)
    make_whole(release)
    found = failed(release)
    assert list(found) == [check] and problem in found[check][0]


def test_metadata_without_its_parts_is_named(release):
    metadata = read_json(release / "metadata.json")
    del metadata["leakage"]
    write_json_atomic(release / "metadata.json", metadata)
    write_checksums(release)
    assert failed(release) == {"metadata": ["metadata.json says nothing of leakage"]}


def test_a_card_that_hides_an_opened_gate_is_found(run, tmp_path):
    config, folder = run
    export.export_release(opened(config), folder, tmp_path)
    assert verify_release(tmp_path) == []
    for name in ("README.md", "applied_model_card.xml"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("phi.allow_unprotected", "nothing"))
    make_whole(tmp_path)
    assert failed(tmp_path)["cards"] == [
        f"{name} does not say that phi.allow_unprotected opened a gate"
        for name in ("README.md", "applied_model_card.xml")
    ]


def test_the_signature_is_checked_by_the_key_that_is_given(release, keys):
    assert failed(release, keys / "other.pub") == {
        "signature": ["SHA256SUMS.minisig: incompatible key identifiers"]
    }
    file = release / "SHA256SUMS.minisig"
    good = file.read_text()
    file.write_text(good.replace("file:SHA256SUMS", "file:SHA512SUMS"))
    assert failed(release, keys / "own.pub") == {
        "signature": ["SHA256SUMS.minisig: signature verification failed"]
    }, "the trusted comment is signed as well"
    file.write_text("not a signature")
    assert list(failed(release)) == ["signature"], "also without a key"
    file.unlink()
    assert failed(release) == {}
    assert "was not signed" in failed(release, keys / "own.pub")["signature"][0]


def test_the_signature_is_one_that_the_minisign_program_reads(signed, keys):
    lines = (signed / "SHA256SUMS.minisig").read_text().split("\n")
    assert len(lines) == 5 and lines[4] == ""
    assert lines[0].startswith("untrusted comment: ")
    assert re.fullmatch(r"trusted comment: timestamp:\d+\tfile:SHA256SUMS\thashed", lines[2])
    public = minisign.PublicKey.from_file(keys / "own.pub")
    public.verify_file(signed / "SHA256SUMS")  # the file beside it, as `minisign -V` does
    with pytest.raises(minisign.VerifyError):
        public.verify(b"other bytes", minisign.Signature.from_file(signed / "SHA256SUMS.minisig"))


def test_a_password_comes_from_the_environment(run, keys, tmp_path, monkeypatch):
    config, folder = run
    monkeypatch.setenv(release_files.PASSWORD_VARIABLE, PASSWORD)
    export.export_release(signing_with(config, keys / "locked.key"), folder, tmp_path / "release")
    assert failed(tmp_path / "release", keys / "own.pub") == {}
    papers = [path for path in (tmp_path / "release").iterdir() if path.is_file()]
    assert not any(secret in path.read_text() for path in papers for secret in (PASSWORD, str(keys)))


@pytest.mark.parametrize(
    "key, password, message",
    [
        ("missing.key", None, "cannot be read"),
        ("own.pub", None, "no minisign secret key"),
        ("locked.key", None, "has a password: set it as MEDAI_SIGNING_PASSWORD"),
        ("locked.key", "wrong", "does not open"),
    ],
)
def test_a_key_that_cannot_sign_stops_the_export_before_it_begins(
    run, keys, tmp_path, monkeypatch, key, password, message
):
    config, folder = run
    monkeypatch.delenv(release_files.PASSWORD_VARIABLE, raising=False)
    if password:
        monkeypatch.setenv(release_files.PASSWORD_VARIABLE, password)
    with pytest.raises(ExportError, match=message) as caught:
        export.export_release(signing_with(config, keys / key), folder, tmp_path / "release")
    assert not (tmp_path / "release").exists() and "wrong" not in str(caught.value).partition("(")[0]


def test_the_bill_of_materials_is_cyclonedx_without_a_place_in_it(signed):
    text = (signed / "sbom.cdx.json").read_text()
    bill = json.loads(text)
    assert not re.search(r"file:|https?://(?!cyclonedx\.org)", json.dumps(bill["components"]))
    versions = {one["name"]: one.get("version") for one in bill["components"]}
    assert versions["torch"] == torch.__version__ and versions["small-llama"] is None
    assert bill["metadata"]["component"]["name"] == "tiny" and "timestamp" not in bill["metadata"]
    # The library's validator takes 60 ms for each package: a dozen of them shows the form, and all references are looked at here.
    kept = [one for one in bill["components"] if one["name"] in ("torch", "medai_nb", "small-llama", "tqdm")]
    assert len(kept) == 4
    references = {one["bom-ref"] for one in bill["components"]} | {"release"}
    assert all({one["ref"], *one.get("dependsOn", [])} <= references for one in bill["dependencies"])
    names = {one["bom-ref"] for one in kept} | {"release"}
    links = [one for one in bill["dependencies"] if {one["ref"], *one.get("dependsOn", [])} <= names]
    part = json.dumps(bill | {"components": kept, "dependencies": links})
    validate = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str
    assert validate(part) is None
    assert validate(part.replace('"machine-learning-model"', '"spell"')) is not None, "it does look"


def test_the_same_environment_gives_the_same_bill(signed):
    release_files._installed_packages.cache_clear()
    bill = release_files.bill_of_materials("tiny", "small-llama")
    assert bill == read_json(signed / "sbom.cdx.json")


def test_addresses_of_the_hospital_are_taken_out_of_the_bill(monkeypatch):
    reference = {"type": "distribution", "url": "https://packages.ward-7.example/simple"}
    component = {"type": "library", "name": "ward7", "bom-ref": "ward7==1", "externalReferences": [reference]}
    raw = {"metadata": {"tools": {"components": [component]}}, "components": [component], "dependencies": []}
    monkeypatch.setattr(release_files, "_installed_packages", lambda: json.dumps(raw))
    bill = release_files.bill_of_materials("tiny", "base")
    assert "ward-7" not in json.dumps(bill)
    assert bill["components"][0] == {"type": "library", "name": "ward7", "bom-ref": "ward7==1"}


def test_verify_prints_a_line_for_each_check_and_ends_accordingly(release, keys, tmp_path, capsys):
    assert main(["verify", str(release), "--public_key", str(keys / "own.pub")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [check.name for check in check_release(release)]
    assert all(" ok: " in line for line in lines)
    (release / "README.md").unlink()
    assert main(["verify", str(release)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(lines) and "README.md is missing" in shown[0]
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "is no release" in capsys.readouterr().err
    assert main(["verify", str(release), "--public_key", str(keys / "nobody.pub")]) == 2
    assert "no minisign public key" in capsys.readouterr().err
