"""bench/serve.py: the work is the same for both arms, rows are what they say, a small run goes through."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))


def test_work_and_rows():
    import serve as bench

    asked = bench.work(400, 500)
    assert asked == bench.work(400, 500) != bench.work(400, 500, seed=1)
    assert {20 <= len(p) <= 1000 and 16 <= n <= 256 for p, n in asked} == {True}
    assert min(len(p) for p, _ in asked) < 25 and max(len(p) for p, _ in asked) > 900 and max(n for _, n in asked) > 230
    row = bench.row_of([{"first": 0.1 * i, "tokens": 10} for i in range(20)], 4.0, 2.0)
    assert (row["tokens_per_s"], row["tokens_per_processor_s"], row["requests"]) == (50.0, 100.0, 20)
    assert abs(row["ttft_p50"] - 1.0) < 1e-6 and abs(row["ttft_p95"] - 1.9) < 1e-6


def test_a_call_writes_its_rows_and_the_next_one_has_nothing_to_do(tmp_path):
    command = [sys.executable, str(BENCH / "serve.py"), "--out", str(tmp_path), "--models", "tiny", "--cpu", "--arms", "tunesmith"]
    for _ in range(2):
        done = subprocess.run([*command, "--streams", "8"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (tmp_path / "serve.jsonl").read_text().splitlines()]
        assert len(rows) == 1 and not [r for r in rows if "error" in r]
    assert "| tiny | 8 |" in done.stdout and rows[0]["note"] == "lean path"


def test_the_page_has_the_table_of_what_was_measured(capsys):
    import serve as bench

    bench.table(BENCH / "results")
    table = capsys.readouterr().out.strip()
    assert table.count("\n") >= 10 and table in (BENCH.parent / "docs" / "serving.md").read_text()
