"""Bytes that kernels move, counted on tensors without content."""

import json

import pytest
import torch

pytest.importorskip("triton")

import bounds

from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.ops.triton.layout import to_channels_last


def test_a_kernel_moves_each_of_its_tensors_once():
    a, b = torch.empty(4, 4, device="meta"), torch.empty(4, 4, device="meta")
    with bounds.Traffic() as traffic:
        (a + b).view(16).detach()  # three tensors, and two views
        a + a
        a.add_(b)
        torch.empty(4, 4, device="meta")
    assert traffic.bytes == {"aten::add": 5 * 64, "aten::add_": 2 * 64}
    assert traffic.launches == {"aten::add": 2, "aten::add_": 1}


def test_kernels_of_triton_are_counted_by_their_names():
    x = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.float16)
    with as_on_gpu(), bounds.Traffic() as traffic:
        to_channels_last(x)
    assert traffic.bytes == {"_transpose_kernel": 2 * x.numel() * 2}


def test_the_table_has_a_line_for_each_step(tmp_path, monkeypatch):
    case = {"input": (2, 3, 64, 64), "classes": 1, "n_stages": 5}
    monkeypatch.setattr(bounds, "CASES", {"2d": case})
    monkeypatch.setattr(bounds, "RESULTS", tmp_path)
    row = {"case": "2d", "network": "lgmsnet", "mode": "graphs", "train_ms": [2.0, 1, 3], "infer_ms": [1.0, 1, 1]}
    (tmp_path / "gpu.json").write_text(json.dumps([row, row | {"network": "plain", "train_ms": [9.0, 9, 9]}]))
    assert bounds.main(["--output", str(tmp_path)]) == 0
    prediction, training = json.loads((tmp_path / "bounds.json").read_text())["rows"]
    assert (prediction["step"], prediction["ms"], training["step"], training["ms"]) == (
        "prediction",
        1.0,
        "training step",
        2.0,
    )
    assert sum(training["bytes"].values()) > 2 * sum(prediction["bytes"].values())
    assert training["bytes"]["update of the weights"] == 20 * 2_321_393
    assert {"nnunet_lgms::multi_kernel_depthwise", "_norm_act_forward_kernel"} < prediction["bytes"].keys()
    assert "| 2D training step |" in (tmp_path / "bounds.md").read_text()
