"""The report of a study with results, in a real browser; the numbers are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("snakemake", reason="the extra [study] needs Python 3.11")

from pages import LAPTOP, PHONE, check_fits, opened

from nnunet_lgms.evaluation.metrics import METRICS
from nnunet_lgms.study import report
from nnunet_lgms.study.graph import Graph
from nnunet_lgms.study.results import Results

STUDY = """
name: everything
configurations: [2d, 3d_fullres]
datasets:
  Dataset101_A_rather_long_name: {zeroshot: [Dataset103_Unseen], test: true}
  Dataset102_B: {}
unseen: {Dataset103_Unseen: {}}
variants:
  LGMSNet: {}
  a-variant-with-a-name: {override: kernels_3}
  nnU-Net: {trainer: nnUNetTrainer}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The report of a study of which one training is missing."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(folder))
        (folder / "study.yaml").write_text(STUDY)
        graph = Graph(folder / "study.yaml")
        for rule, files in graph.jobs().items():
            for file in files:
                path = graph.folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
                if rule in ("validate", "evaluate"):
                    lines = [",".join(["model", "case", "label", *METRICS])]
                    for case in range(4):
                        for label in ("organ", "tumour"):
                            values = [f"{v:.4f}" for v in rng.uniform(0.7, 0.95, len(METRICS))]
                            lines.append(",".join(["m", f"{path.parent.name}_case_{case}", label, *values]))
                    path.with_name("cases.csv").write_text("\n".join(lines) + "\n")
                elif rule == "train":
                    curve = 0.9 - np.exp(-np.arange(60) / 15) * rng.uniform(0.5, 0.9)
                    record = {"seconds": 3600 * rng.uniform(4, 9), "ema_fg_dice": curve.tolist()}
                    path.write_text(json.dumps(record))
                elif rule == "profile":
                    network = {"parameters": int(rng.integers(1e6, 3e7)), "gmac": rng.uniform(50, 500)}
                    path.write_text(json.dumps({"networks": [network, network]}))
                elif rule == "zeroshot":
                    mean = {"mean": 0.61, "low": 0.5, "high": 0.7, "n": 8}
                    rows = [
                        {"dataset": "Dataset103_Unseen", "label": label, "metric": metric, "zero_shot": mean}
                        for label in ("organ", "foreground mean")
                        for metric in ("Dice", "HD95")
                    ]
                    path.write_text(json.dumps({"rows": rows}))
        model = graph.models("Dataset102_B", "nnU-Net")[0]
        (graph.folder / graph.trained("unseeded", model.dataset, model.name, 4)).unlink()
        report.write(graph, graph.folder / "report.html")
        assert len(Results(graph).rows) > 100
    return graph.folder / "report.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_a_report_with_results_fits_into_a_browser(written: Path, width: int) -> None:
    with opened(written, width) as page:
        for details in page.locator("details").all():
            details.evaluate("e => e.open = true")
        check_fits(page, width)
        text = page.inner_text("body")
        for part in ("Cross-validation", "Zero-shot", "Cost beside quality", "Training curves", "Worst cases"):
            assert part in text
        assert "59 of 60" in text and "train: 1" in text
        assert "everything" == page.title() == page.locator("h1").inner_text()
        # one template with evaluation's
        assert page.evaluate("getComputedStyle(document.querySelector('h2')).borderBottomWidth") == "2px"
