"""Keys are stored as hashes, end when they should, and change in one piece; an audit line that cannot be written is an error."""

import asyncio
import errno
import json
import threading

import pytest

from medai_nb import access
from medai_nb.access import AccessError, AuditFailure, AuditWriter, KeyStore
from medai_nb.phi.audit import AuditLog, verify_audit


@pytest.fixture
def store(tmp_path):
    return KeyStore(tmp_path / "state" / "keys.json")


def test_the_file_holds_no_key_and_only_its_owner_reads_it(store):
    key = store.add("ward-7", "metrics")
    identity = store.holder(key)["id"]
    assert store.holder(key) == {"id": identity, "name": "ward-7", "role": "metrics"}
    assert key.split("_", 2)[2] not in store.path.read_text()
    assert store.path.stat().st_mode & 0o777 == 0o600
    assert len(key.split("_", 2)[2]) == 43, "256 bits"


@pytest.mark.parametrize("wrong", ["", "medai", "medai_x_y", "medai__", "\udcff_\x00_é", "a" * 100_000])
def test_anything_else_opens_nothing(store, wrong):
    key = store.add("ward-7")
    assert store.holder(wrong) is None
    assert store.holder(key + wrong[:5]) is None or not wrong
    assert store.holder(key.replace(key[-3:], "AAA")) is None


def test_a_key_ends_on_its_day_and_when_it_is_revoked(store):
    ending, lasting = store.add("a", days=1), store.add("b")
    content = json.loads(store.path.read_text())
    content["keys"][ending.split("_")[1]]["ends"] = "2020-01-01T00:00:00+00:00"
    store.path.write_text(json.dumps(content))
    assert store.holder(ending) is None and store.holder(lasting)
    other = KeyStore(store.path)  # another process
    other.revoke(lasting.split("_")[1])
    assert store.holder(lasting) is None, "without a restart"


def test_keys_added_at_the_same_time_are_all_kept(store):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(KeyStore(store.path).add("ward"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.keys()) == 8 and all(store.holder(key) for key in made)


@pytest.mark.parametrize(
    "arguments", [("", "predict"), ("x", "root"), ("x" * 65, "admin"), ("a\nb", "admin"), ("x", "admin", -1)]
)
def test_a_key_that_cannot_be_made_is_not_made(store, arguments):
    with pytest.raises(AccessError):
        store.add(*arguments)
    assert store.keys() == {}


def test_a_damaged_file_opens_nothing_and_is_not_overwritten(store):
    store.add("ward-7")
    store.path.write_text('{"keys": [')
    for use in (lambda: store.holder("medai_a_b"), lambda: store.add("x"), lambda: store.revoke("a")):
        with pytest.raises(AccessError, match="damaged"):
            use()
    assert store.path.read_text() == '{"keys": ['


def test_a_full_disk_leaves_the_old_keys(store, monkeypatch):
    key = store.add("ward-7")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(access.os, "fsync", full)
    with pytest.raises(OSError):
        store.add("other")
    assert store.holder(key) and len(store.keys()) == 1
    assert [path.name for path in store.path.parent.iterdir() if path.suffix == ".tmp"] == []


def test_only_admin_may_everything():
    table = {(role, need): access.may(role, need) for role in access.ROLES for need in access.ROLES}
    assert {pair for pair, allowed in table.items() if allowed} == {
        ("predict", "predict"),
        ("metrics", "metrics"),
        ("admin", "predict"),
        ("admin", "metrics"),
        ("admin", "admin"),
    }


def test_lines_handed_in_together_are_all_in_one_chain(tmp_path):
    async def run():
        writer = AuditWriter(tmp_path / "audit.jsonl")
        await asyncio.gather(*(writer.submit({"event": "request", "number": n}) for n in range(200)))
        await writer.close()

    asyncio.run(run())
    assert verify_audit(tmp_path / "audit.jsonl")["lines"] == 200


def test_a_full_disk_fails_the_lines_it_does_not_take_and_no_others(tmp_path, monkeypatch):
    async def run():
        writer = AuditWriter(tmp_path / "audit.jsonl")
        await writer.submit({"event": "first"})

        def full(self, events):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(AuditLog, "_write", full)
            with pytest.raises(AuditFailure):
                await writer.submit({"event": "lost"})
        broken = writer.broken
        await writer.submit({"event": "third"})
        return broken, writer.broken

    assert asyncio.run(run()) == (True, False)
    events = [json.loads(line)["event"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert events == ["first", "third"] and verify_audit(tmp_path / "audit.jsonl")["valid"]


def test_text_is_not_taken_into_the_log(tmp_path):
    async def run():
        writer = AuditWriter(tmp_path / "audit.jsonl")
        with pytest.raises(AuditFailure):
            await writer.submit({"event": "request", "text": "John Smith"})

    asyncio.run(run())
    assert not (tmp_path / "audit.jsonl").exists()
