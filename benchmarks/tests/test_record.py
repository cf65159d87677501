"""What benchmarks write is whole, and says which code it was measured with, wherever that lies."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import record
import torch
from conftest import ROOT
from timing import median_ms, milliseconds


def test_the_code_of_a_commit_is_found():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    head = record._digest_at("HEAD")
    assert record.commit_of(head) is not None
    assert record.commit_of("0" * 64) is None
    rows = [{"code": head, "commit": None}, {"code": head, "commit": "of then"}]
    for indent in (None, 1):
        text = json.dumps({"rows": rows, "unknown": {"code": "0" * 64, "commit": None}}, indent=indent)
        filled = record.fill(text)
        (missing, known), unknown = json.loads(filled).values()
        assert missing["commit"] == record.commit_of(head) and known["commit"] == "of then"
        assert unknown["commit"] is None and record.fill(filled) == filled != text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("inside", [True, False], ids=["in a checkout of something else", "before these folders"])
def test_a_folder_without_these_commits_has_no_commit(tmp_path, monkeypatch, inside):
    """An unpacked archive in another project's checkout once ended in "ReadError: empty file"."""
    record._digest_at.cache_clear()

    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "x")
    ours = tmp_path / "unpacked" if inside else tmp_path
    (ours / "nnunet_lgms").mkdir(parents=True)
    (ours / "nnunet_lgms" / "x.py").write_text("")
    monkeypatch.setattr(record, "ROOT", ours)
    assert record.provenance("cpu")["commit"] is None


def test_results_are_written_whole(tmp_path):
    record.write(tmp_path / "new", "x", {"a": 1}, "# x\n", lambda file: file.write_bytes(b"png"))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["x.json", "x.md", "x.png"]
    with pytest.raises(ValueError):
        record.write(tmp_path / "new", "x", {"a": 2}, "", lambda file: (_ for _ in ()).throw(ValueError()))
    assert (tmp_path / "new" / "x.png").read_bytes() == b"png" and (tmp_path / "new" / "x.md").read_text() == "# x\n"


def test_medians_are_of_the_calls_that_count():
    calls = []
    device = torch.device("cpu")
    median, low, high = median_ms(lambda: calls.append(1), device, seconds=0, warmup=3, least=5)
    assert len(calls) == 8 and 0 <= low <= median <= high < 1000
    assert milliseconds(lambda: calls.append(1), device) >= 0 and len(calls) == 9
