"""The table of docs/export.md is what bench/export.py measured, line by line."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_table_is_the_benchs():
    spec = importlib.util.spec_from_file_location("bench_export", ROOT / "bench/export.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    page = (ROOT / "docs/export.md").read_text("utf-8")
    rows = [json.loads(line) for line in (ROOT / "bench/results/export.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 15 and "\n".join([bench.HEAD, "|" + "---|" * (bench.HEAD.count("|") - 1), *map(bench.line, rows)]) in page
    assert {row["run"] for row in rows} == {"lora", "qlora"} and not [
        row for row in rows if row["state"] not in ("verified", "warned")
    ]
    assert all(row["conversations"] == 64 and not row["conversations_different"] for row in rows)
