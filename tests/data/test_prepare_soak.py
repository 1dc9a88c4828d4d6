"""A million rows from end to end: read, rendered, clustered, split and packed in memory that hardly grows."""

import json
import subprocess
import sys

import pytest

CODE = """
import functools, json, sys
from pathlib import Path
from tunesmith.config.schema import Data
from tunesmith.data.prepare import prepare
from tunesmith.data.render import build_renderer
from tunesmith.hub import resolve_model

if __name__ == "__main__":
    rows, cache = sys.argv[1:]
    base = resolve_model("embedded").path
    data = Data(train=rows, max_length=256, workers=0)
    make = functools.partial(build_renderer, base, data, (), "2026-01-01")
    prepared = prepare(data, make, seed=0, cache_dir=Path(cache))
    # not ru_maxrss: that begins at the parent's
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak / 1024, "rows": prepared.account.rows, "examples": len(prepared.train)}))
"""


def peak_of(folder, rows: int) -> dict:
    file = folder / f"{rows}.jsonl"
    with file.open("w") as f:
        for i in range(rows):
            words = " ".join(f"w{(i * 7919 + k * 104729) % 50021}" for k in range(6))
            f.write(json.dumps({"question": f"What of {words}?", "answer": f"It is number {i} of {words[::-1]}."}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(file), str(folder / "cache")], capture_output=True, text=True, check=True
    )
    file.unlink()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_rows_stay_flat(tmp_path):
    some, many = peak_of(tmp_path, 50_000), peak_of(tmp_path, 1_000_000)
    print(f"\n50 k rows: {some['peak']:.0f} MiB at most; 1 M rows: {many['peak']:.0f} MiB")
    assert many["rows"] == 1_000_000 and many["examples"] > 900_000
    # What stays of a row is its label among the duplicates and its place in the store: some ten bytes, mapped pages included.
    assert many["peak"] < 120
    assert many["peak"] - some["peak"] < 950_000 * 50 / 2**20
