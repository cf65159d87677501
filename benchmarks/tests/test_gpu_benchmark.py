"""The benchmarks of steps, of planners and of GPU tests, on a CPU: what they run, what they write, what they say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cpu
import gpu
import gpu_tests
import memory
import planners
import pytest
import waits
from conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
TIMES = {"train_ms": [20.0, 19.0, 21.0], "infer_ms": [5.0, 4.0, 6.0], "train_gib": 2.0, "first_step_s": 9.0}


class Row:
    """A row that is done at once."""

    def __init__(self, case, name, mode, size, caches):
        self.job = {"case": case, "network": name, "mode": mode, "size": size}

    def compiled(self, seconds):
        pass

    def result(self):
        if self.job["size"] == 1024:
            return {**self.job, "failed": "out of memory"}
        half = 2 if self.job["network"] == "plain" else 1
        times = TIMES | {"train_ms": [half * ms for ms in TIMES["train_ms"]]}
        about = {"device": "a card", "versions": {"torch": "2"}, "parameters": 1e6, "input": [2, self.job["size"] or 8]}
        return {**self.job, **times, **about}


def test_rows_of_a_run_and_of_earlier_ones_are_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Row", Row)
    words = ["--networks", "lgmsnet", "plain", "--modes", "trained", "--output", str(tmp_path)]
    assert gpu.main(words) == gpu.main([*words, "--cases", "2d"]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [(r["case"], r["network"], r["mode"]) for r in rows] == [
        ("3d", "lgmsnet", "graphs"),
        ("3d", "plain", "compiled"),
        ("2d", "lgmsnet", "graphs"),
        ("2d", "plain", "compiled"),
    ]
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "| 2d | lgmsnet | graphs | 1.00 M | 8 | 20.0 (19.0 to 21.0) | 0.50 | 5.0 (4.0 to 6.0) | 1.00 | 2.00 |" in text
    )
    assert not (tmp_path / "gpu.png").exists()


def test_a_sweep_has_a_picture_and_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "Row", Row)
    words = ["--sweep", "--cases", "2d", "--networks", "lgmsnet", "plain", "--out", str(tmp_path)]
    assert gpu.main(words) == 0
    sizes = [r["size"] for r in json.loads((tmp_path / "gpu_sweep.json").read_text()) if r["network"] == "plain"]
    assert sizes == [128, 256, 512, 1024]
    assert (tmp_path / "gpu_sweep.md").read_text().count("| out of memory |") == 2
    assert (tmp_path / "gpu_sweep.png").stat().st_size > 5000


@pytest.mark.slow
def test_rows_are_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    """On a CPU; ``graphs`` are steps like others there. The row that is given no time to compile is stopped."""
    monkeypatch.setattr(gpu, "SIZES", {"2d": (32,)})
    words = ["--sweep", "--cases", "2d", "--networks", "lgmsnet", "--output", str(tmp_path)]
    assert gpu.main([*words, "--compile-seconds", "500"]) == 0
    (row,) = json.loads((tmp_path / "gpu_sweep.json").read_text())
    assert row["input"] == [16, 3, 32, 32] and row["size"] == 32 and row["device"] == "cpu"
    assert 0 < row["infer_ms"][0] < row["train_ms"][0] and row["parameters"] == 2_321_393
    assert gpu.main([*words, "--compile-seconds", "0"]) == 0
    (row,) = json.loads((tmp_path / "gpu_sweep.json").read_text())
    assert row["failed"] == "not compiled in time"


@pytest.mark.parametrize("name", ["gpu", "gpu_sweep"])
def test_the_tables_of_steps_are_made_from_their_results(name, tmp_path):
    gpu.write_rows(json.loads((RESULTS / f"{name}.json").read_text()), tmp_path, name, sweep=False)
    assert (tmp_path / f"{name}.md").read_text() == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("name, benchmark", [("cpu", cpu), ("memory", memory), ("planned", planners), ("waits", waits)])
def test_other_tables_are_made_from_their_results(name, benchmark):
    assert (
        benchmark.markdown(json.loads((RESULTS / f"{name}.json").read_text())) == (RESULTS / f"{name}.md").read_text()
    )


def test_planners_are_asked_for_every_fingerprint(tmp_path, monkeypatch, capsys):
    size = {"patch": [64, 64], "batch": 4}
    planned = {"2d": {"unet": size, "lgmsnet": size | {"batch": 6}, "gib": 3.25, "limited_by_the_dataset": True}}
    monkeypatch.setattr(planners, "planned", lambda fingerprint, dataset, name, vram: planned if vram == 11 else None)
    assert planners.main(["--vram", "11", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "planned.md").read_text()
    assert text.count("| 2d | 4 × 64x64 | 6 × 64x64 * | 1.50 | 3.2 |") == 8 and text in capsys.readouterr().out


def test_what_came_of_gpu_tests_is_written(tmp_path, monkeypatch, capsys):
    """pytest's workers run where there is no GPU, too, and skip what needs one."""
    with pytest.raises(SystemExit):
        gpu_tests.main([])
    assert "PyTorch finds none" in capsys.readouterr().err
    test = tmp_path / "test_x.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert 0\n")
    monkeypatch.setattr(gpu_tests.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_tests.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_tests, "signal", SimpleNamespace(SIGTERM=None, signal=lambda *_: None))
    assert gpu_tests.main([str(test), "--output", str(tmp_path)]) == 1
    about, failed, passed, summary = (tmp_path / "gpu_tests.txt").read_text().splitlines()[:4]
    assert "a card, Python 3" in about and "1 failed, 1 passed" in summary
    assert failed.startswith("FAILED") and failed.endswith("test_x.py::test_b")
    assert passed.startswith("PASSED") and passed.endswith("test_x.py::test_a")
