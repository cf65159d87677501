"""``benchmarks/memory.py`` without a GPU: many steps in one go, whatever happens to some, and the table from them."""

import json
import sys
import time
from dataclasses import asdict

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def memory(monkeypatch):
    for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # the benchmark sets what is not set
        monkeypatch.setenv(variable, "1")
    import memory

    yield memory
    del sys.modules["memory"]


def test_a_step_that_fails_or_hangs_stops_no_other(memory, tmp_path):
    """What it has started itself is stopped too, and what cannot begin in time is told."""
    left = tmp_path / "left"
    child = f"import time; time.sleep(6); open({str(left)!r}, 'w')"
    slow = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    scripts = {
        "slow": slow,
        "good": "print('a warning'); print('{\"peak\": 1}')",
        "silent": "pass",
        "broken": "raise MemoryError('none left')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "long": "import time; time.sleep(60)",
        "never": "print('{}')",
    }
    commands = {name: [sys.executable, "-c", script] for name, script in scripts.items()}
    begin = time.monotonic()
    results = dict(memory.run_all(commands, workers=2, seconds=5))
    assert time.monotonic() - begin < 15
    assert results["good"] == {"peak": 1}
    assert "not done" in results["slow"]["failed"] and "not done" in results["long"]["failed"]
    assert results["silent"]["failed"] == "exit code 0: it said nothing"
    assert results["broken"]["failed"] == "exit code 1: MemoryError: none left"
    assert results["killed"]["failed"].startswith("exit code -9")
    assert results["never"]["failed"] == "not begun within 5 s"
    time.sleep(max(0, begin + 8 - time.monotonic()))
    assert not left.exists()


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(memory, tmp_path, monkeypatch):
    plans = [memory.Plan(name, (32, 32), (1, 1), 2) for name in ("done", "failed", "new")]
    measured = {"peak": 5, "s": [1.0, 0.1], "allocated": [5, 5], "reserved": [6, 6]}
    rows = [{"name": "done", "trained": measured}, {"name": "failed", "trained": {"failed": "late"}}]
    (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}), "utf-8")
    asked = []
    monkeypatch.setattr(memory, "run_all", lambda commands, *_: asked.extend(commands) or iter(()))
    monkeypatch.setattr(memory, "provenance", lambda: {"date": "today", "device": "a card", "versions": {"torch": "0"}})
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    arguments = ["--missing", "--modes", "trained", "--out", str(tmp_path)]
    assert memory.main(arguments, plans) == 0
    assert asked == [(1, "trained"), (2, "trained")]
    kept = json.loads((tmp_path / "memory.json").read_text("utf-8"))["rows"]
    assert kept[0]["trained"] == measured and "trained" not in kept[1]


def test_estimates_are_merged_with_what_was_measured(memory, tmp_path, capsys):
    for words in (["--calibrate"], ["--estimate-only"]):
        with pytest.raises(SystemExit):
            memory.main([*words, "--out", str(tmp_path)])
        assert "measure first" in capsys.readouterr().err
    plans = [memory.Plan("small", (48, 40), (1, 1), 2), memory.Plan("larger", (64, 64), (1, 1), 4, channels=3)]
    rows = [{**vars(p), "levels": p.topology().n_levels} for p in plans]
    for row in rows:
        counted = memory.estimate(row)["counted"]
        peak = counted["static"] + round(1.25 * counted["activations"]) + 10 * 2**20
        row["trained"] = {"peak": peak, "allocated": [2 * peak, peak], "reserved": [3 * peak, 2 * peak]}
        row["eager"] = {"failed": "out of memory"}
    (tmp_path / "memory.json").write_text(json.dumps({"date": "then", "device": "a card", "torch": "1", "rows": rows}))
    assert memory.main(["--estimate-only", "--output", str(tmp_path)]) == 0
    said, constants = capsys.readouterr().out, "2D: activations=1.250, fixed=10 MiB; largest deviation 0.0 %\n"
    written = (tmp_path / "memory.md").read_text()
    assert said.endswith(constants)
    (tmp_path / "memory.md").unlink()
    assert memory.main(["--calibrate", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == constants and not (tmp_path / "memory.md").exists()
    assert written in said and "a card" in written
    for row, line in zip(json.loads((tmp_path / "memory.json").read_text())["rows"], written.splitlines()[-2:]):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        peak = row["trained"]["peak"]
        assert cells[0] == row["name"] and cells[4:6] == [f"{n / 2**20:.0f}" for n in (row["estimate"], peak)]
        assert cells[6] == f"{100 * (row['estimate'] / peak - 1):+.1f} %"
        assert cells[7] == "" and cells[8:] == [f"{2 * peak / 2**20:.0f}"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("patch, batch", [((256, 256), 12), ((96, 96, 96), 2)])
def test_the_estimate_is_within_15_percent(memory, patch, batch):
    plan = memory.Plan("small", patch, (1,) * len(patch), batch, max_pool=2)
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--row", json.dumps(asdict(plan)), "--modes", "trained"]
    ((_, measured),) = memory.run_all({"small": command}, workers=1, seconds=550)
    assert memory.estimate(asdict(plan))["estimate"] == pytest.approx(measured["peak"], rel=0.15)
