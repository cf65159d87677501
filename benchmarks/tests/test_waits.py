"""The benchmark of waiting: what it reads off stock nnU-Net and trainings, and what it makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import waits

HOOKS = Path(waits.__file__).parent / "hooks"


def test_stages_of_stock_nnunet_are_noted_in_every_process(tmp_path):
    """Also in a process that nnU-Net's own process starts."""
    said = tmp_path / "stages"
    read = "from nnunetv2.imageio.nibabel_reader_writer import NibabelIO\n"
    read += "try: NibabelIO().read_images(['none'])\nexcept Exception: pass"
    script = f"import subprocess, sys; exec({read!r}); subprocess.run([sys.executable, '-c', {read!r}], check=True)"
    environment = {"PYTHONPATH": str(HOOKS), "WAITS_STAGES": str(said), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["read", "read"] and all(line["seconds"] > 0 for line in lines)


@pytest.mark.slow
def test_every_stage_exists_in_this_nnunet():
    import importlib

    sys.path.insert(0, str(HOOKS))
    try:
        stages = importlib.import_module("sitecustomize")
        stages = stages if hasattr(stages, "STAGES") else importlib.reload(stages)
    finally:
        sys.path.remove(str(HOOKS))
    if not hasattr(stages, "STAGES"):
        pytest.skip("the system has a sitecustomize of its own, which was loaded first")
    for module, names in stages.STAGES.items():
        for name in names:
            owner = importlib.import_module(module)
            for part in name.split("."):
                owner = getattr(owner, part)


def test_writing_is_not_counted_as_export(tmp_path):
    lines = [
        {"stage": "all", "begin": 12.0, "seconds": 9.0},
        {"stage": "write", "begin": 15.0, "seconds": 1.0},
        {"stage": "export", "begin": 13.0, "seconds": 4.0},
        {"stage": "network", "begin": 13.0, "seconds": 2.5},
        {"stage": "network", "begin": 14.0, "seconds": 0.5},
    ]
    file = tmp_path / "said"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = waits.stock_stages(file, 10.0)
    assert found == {"start": 2.0, "read": 0, "preprocess": 0, "network": 3.0, "export": 3.0, "write": 1.0}


def test_a_training_falls_into_its_parts():
    """Start 5 s, a first epoch of 20 s, then epochs of 4 s, of them 3.75 steps and validation; 2 s at the end."""
    measured = {"times": [105.0, 125.0, 129.0, 133.0], "seconds": [18.0, 3.0, 3.0, 3.0]}
    measured["validating"] = [1.5, 0.75, 0.75, 0.75]
    found = waits.training_parts(measured, {"begin": 100.0, "seconds": 38.0}, 4)
    later = {"steps": 3.0, "validation": 0.75, "between": 0.25}
    assert found["stages"] == {"start": 5.0, "first epoch": 20.0, **later, "end": 2.0}
    assert found["epoch_s"] == 4.0 and found["hundred_epochs_s"] == 5 + 20 + 99 * 4
    assert waits.until_it_runs(found) == 5 + 20 - 4


def test_memory_counts_children():
    child = "import time, numpy; x = numpy.ones(50_000_000 // 8); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert process.pid in commands.family(os.getpid())
        assert commands.resident(process.pid) > 45e6
        process.kill()
    assert commands.resident(process.pid) == 0


@pytest.mark.slow
@pytest.mark.parametrize("network", [waits.UNET, waits.OURS])
def test_models_are_ones_that_nnunet_loads(tmp_path, network):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    row = waits.Row("tiny", 2, (8, 40, 36), (2.0, 1.0, 1.0), (2.0, 1.5, 1.5), 3, ())
    waits.write_images(row, tmp_path / "images")
    waits.write_model(row, network, "torch", tmp_path / "model")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "model"), (0,))
    assert predictor.configuration_manager.patch_size == [40, 56, 40]
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(tmp_path / "images" / "case_000_0000.nii.gz")])
    assert image.shape == (1, 8, 40, 36) and np.allclose(properties["spacing"], row.spacing)


def test_tables_and_picture_say_what_failed(tmp_path):
    stages = dict.fromkeys(waits.STAGES, 1.0)
    run = {"row": "ct", "title": "a CT", "network": "x", "plans": "default", "stages": stages, "peak_gib": 2.0}
    training = {"row": "training", "title": "training", "network": "x", "tool": "t", "plans": "default", "epochs": 4}
    later = {"steps": 3.0, "validation": 0.25, "between": 0.25}
    training |= {"stages": {"start": 1.0, "first epoch": 4.0, **later, "end": 1.0}, "seconds": 9.0}
    results = {"date": "", "device": "", "cores": 2, "versions": {"torch": "", "nnunetv2": ""}}
    results["runs"] = [
        run | {"tool": "nnUNetv2_predict", "seconds": 10.0},
        run | {"tool": "ours", "seconds": 2.0},
        {key: run[key] for key in ("row", "title", "network", "plans")} | {"tool": "broken", "failed": "no memory"},
        training | {"epoch_s": 3.5, "hundred_epochs_s": 350.0},
        training | {"epoch_s": 1.5, "hundred_epochs_s": 175.0, "network": "y"},
    ]
    text = waits.markdown(results)
    assert "| 2.0 | 0.20 |" in text and "failed: no memory" in text and "| 3.5 | 2.33 | 175 | 0.50 |" in text
    waits.draw(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_runs_that_are_not_measured_again_stay(tmp_path, monkeypatch):
    stages = dict.fromkeys(waits.STAGES, 1.0)
    here = {"device": "cpu", "cores": 2, "versions": {"nnunetv2": "2.8.1", "torch": "2"}, "date": "now", "code": "b"}
    run = {"title": "a CT", "plans": "default", "stages": stages, "seconds": 10.0}
    ct, small = waits.ROWS["ct"], waits.ROWS["classes_small"]
    per_logit = 6e-9  # GiB, and 2 GiB that are always there
    peaks = {name: 2 + per_logit * row.classes * np.prod(row.shape) for name, row in (("ct", ct), ("small", small))}
    stock = {"network": waits.UNET, "tool": "nnUNetv2_predict"}
    ours = {"network": waits.OURS, "tool": "nnunet_lgms"}
    before = here | {"date": "before", "code": "a"}
    before["runs"] = [run | stock | {"row": "ct", "peak_gib": peaks["ct"]}, run | ours | {"row": "ct", "peak_gib": 1.0}]
    (tmp_path / "waits_cpu.json").write_text(json.dumps(before))

    def measured(name, device, work, tools, done):
        assert tools == ["nnunet_lgms"]
        done(run | ours | {"row": name, "peak_gib": 2.0, "seconds": 2.0})
        if name == "classes":
            done(run | stock | {"row": "classes_small", "peak_gib": peaks["small"]})

    monkeypatch.setattr(waits, "provenance", lambda device: {k: v for k, v in here.items() if k != "cores"})
    monkeypatch.setattr(waits.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(waits, "measure_row", measured)
    rows = ["--rows", "ct", "classes", "--tools", "nnunet_lgms", "--keep"]
    words = [*rows, "--device", "cpu", "--output", str(tmp_path)]
    assert waits.main(words) == 0
    runs = json.loads((tmp_path / "waits_cpu.json").read_text())["runs"]
    assert [(r["row"], r["tool"], r.get("kept")) for r in runs] == [
        ("ct", "nnUNetv2_predict", "before"),
        ("ct", "nnunet_lgms", None),
        ("classes", "nnunet_lgms", None),
        ("classes_small", "nnUNetv2_predict", None),
    ]
    text = (tmp_path / "waits_cpu.md").read_text()
    assert "| 2.0 | 0.20 |" in text and "| 2.0 | – |" in text
    assert "Of an earlier run on such a machine: a CT, nnUNetv2_predict, before." in text
    stock_s = 2 + per_logit * waits.ROWS["classes"].classes * np.prod(ct.shape)
    assert f"would be {stock_s:.0f} GiB" in text and f"2.0 GiB are {2 / stock_s:.2f} of it" in text
    monkeypatch.setattr(waits.os, "sched_getaffinity", lambda process: {0})
    with pytest.raises(SystemExit, match="the file that is there is of 2, this machine of 1"):
        waits.main(words)
