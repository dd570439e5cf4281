"""Small files of records that several test files write."""

import json
from pathlib import Path


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def labelled_rows(count: int, **more) -> list[dict]:
    return [
        {"text": f"note {number}", "label": "ab"[number % 2], "patient_id": f"p{number // 2}", **more}
        for number in range(count)
    ]


def as_json(path: Path, rows: list) -> str:
    return write(path, json.dumps(rows))
