"""What the Triton kernels take of GPUs: the table that benchmarks/offline_kernels.py made, and a part of it anew."""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import offline_kernels  # noqa: E402
from offline_kernels import CARDS, Version, compiling_for  # noqa: E402

from nnunet_lgms.ops import backend  # noqa: E402
from nnunet_lgms.ops import triton as kernels  # noqa: E402

TABLE = json.loads((ROOT / "benchmarks/results/offline_kernels.json").read_text())
SMALLEST = min(card.shared_memory for card in CARDS.values())
# Bytes of a thread into which registers may spill, of 255 registers of 4 bytes each. Those of the bottleneck's gradient
# lie outside of its loop, but for 8 loads of 2,336 instructions on an RTX 50; those of the sweep, on a B200, are at
# most 6 loads of 691 instructions.
MOST_STACK = {
    "_depthwise_weight_gradient_kernel": 256,
    "_bottleneck_backward_kernel": 160,
    "_layer_norm_backward_kernel": 16,
    "_moments_kernel": 16,
    "_gradient_sums_kernel": 8,
    "_conv_sweep_kernel": 24,
    "_conv_weight_gradient_kernel": 8,
    "_conv_weight_reduce_kernel": 8,
    "_softmax_sums_backward_kernel": 8,
}
NONE_ON_B200 = {"_depthwise_weight_gradient_kernel", "_bottleneck_backward_kernel"}


def _largest(kernel: str, target: str) -> dict:
    """The version of a kernel that takes most shared memory."""
    entries = [e for e in TABLE["compiled"] if e["kernel"].endswith(f":{kernel}") and target in e["needs"]]
    return max(entries, key=lambda entry: entry["needs"][target]["shared"])


def _kernels() -> set[str]:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize("target", CARDS)
def test_every_kernel_fits_the_card(target: str):
    entries = [entry for entry in TABLE["compiled"] if target in entry["needs"]]
    assert {entry["kernel"].rpartition(":")[2] for entry in entries} == _kernels()
    for entry in entries:
        name, needs = entry["kernel"].rpartition(":")[2], entry["needs"][target]
        assert needs["shared"] <= CARDS[target].shared_memory, name
        may_spill = target != "sm_100" or name not in NONE_ON_B200
        assert needs["stack"] <= may_spill * MOST_STACK.get(name, 0), (name, entry["call"])


def test_the_page_is_made_from_the_table():
    page = ROOT / "benchmarks" / "results" / "offline_kernels.md"
    assert offline_kernels.markdown(TABLE) == page.read_text("utf-8")


def test_the_gate_asks_for_what_the_largest_kernel_takes():
    small = [target for target, card in CARDS.items() if card.shared_memory == SMALLEST]
    taken = [
        entry["needs"][target]["shared"] for entry in TABLE["compiled"] for target in small if target in entry["needs"]
    ]
    assert max(taken) == backend.SHARED_MEMORY
    assert SMALLEST >= backend.SHARED_MEMORY > 64 << 10  # of a T4


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90"])
def test_the_largest_kernel_still_takes_what_the_table_says(target: str, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entry = _largest("_conv_sweep_kernel", target)
    with compiling_for(target):
        needs = offline_kernels.needs(Version(entry["kernel"], entry["call"]))
    assert needs["shared"] <= entry["needs"][target]["shared"] and needs["stack"] <= entry["needs"][target]["stack"]


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
def test_the_widest_convolutions_are_those_of_the_table(target: str):
    """New tiles, or wider ones, are compiled before they are tried on somebody's card."""
    known = {(e["kernel"], e["call"]) for e in TABLE["compiled"] if target in e["needs"]}
    major = offline_kernels.capability(target) // 10
    versions = offline_kernels.widest_versions(CARDS[target].shared_memory, major)
    assert {(version.kernel, version.call) for version in versions} <= known


def test_the_tile_that_was_measured_stays_and_a_b200_has_its_own():
    key = ":_bottleneck_backward_kernel"
    warps = {t: json.loads(_only(key, t)["call"])[1][-1] for t in CARDS}
    assert warps == {t: ["num_warps", 8 if t == "sm_100" else 4] for t in CARDS}


def _only(kernel: str, target: str) -> dict:
    (entry,) = (e for e in TABLE["compiled"] if e["kernel"].endswith(kernel) and target in e["needs"])
    return entry


def test_a_t4_has_no_use_for_the_kernels():
    """What docs/reference/requirements.md says of it."""
    compiled = json.loads((ROOT / "benchmarks/results/offline_turing.json").read_text())["compiled"]
    assert not any(entry["needs"].get("tensor_cores") for entry in compiled)
    does_not = {entry["kernel"].rpartition(":")[2] for entry in compiled if "error" in entry["needs"]}
    assert "_attention_forward_kernel" in does_not
    whole = [
        (entry["kernel"].rpartition(":")[2], entry["needs"]) for entry in compiled if "error" not in entry["needs"]
    ]
    assert any(name == "_conv_sweep_kernel" and needs["shared"] > 64 << 10 for name, needs in whole)
    for name in ("_conv_flat_kernel", "_conv_weight_gradient_kernel", "_depthwise_forward_kernel"):
        assert max(needs["stack"] for kernel, needs in whole if kernel == name) > 1000
    plain = [needs for name, needs in whole if not needs["multiplies"]]
    assert plain and all(needs["shared"] <= 64 << 10 and not needs["stack"] for needs in plain)
