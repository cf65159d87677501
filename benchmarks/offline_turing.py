"""What the Triton kernels would take of a T4 or an RTX 20, for which they are not made: why it is so.

    nice python benchmarks/offline_turing.py          to benchmarks/results/offline_turing.{json,md}

The versions of offline_kernels.py, with the tiles of cards that have little shared memory, compiled for sm_75. Triton
does not support it any more, but still compiles most kernels.
"""

from __future__ import annotations

from typing import Any

import offline_kernels
import torch
from offline_kernels import Version, compiling_for
from record import command_line, provenance, table, write

TARGET, SHARED_MEMORY = "sm_75", 64 << 10
PRODUCTS = "mma.sync"  # of tensor cores, in PTX


def needs(version: Version) -> dict[str, Any]:
    """As offline_kernels.py has it, and products of tensor cores in the code; or the error."""
    arguments, options = version.read()
    try:
        compiled = version.function.warmup(*arguments, grid=(1,), **options)
        found = {**offline_kernels.needs(version), "tensor_cores": compiled.asm["ptx"].count(PRODUCTS)}
    except Exception as error:  # whatever a compiler that is not made for it raises
        return {"error": type(error).__name__}
    return found | {"multiplies": "tt.dot" in compiled.asm["ttir"]}


def markdown(report: dict[str, Any]) -> str:
    """A row a kernel: the worst of its versions."""
    compiled: dict[str, list[dict]] = {}
    for entry in report["compiled"]:
        compiled.setdefault(entry["kernel"].rpartition(":")[2], []).append(entry["needs"])
    rows = []
    for kernel, versions in sorted(compiled.items()):
        whole = [version for version in versions if "error" not in version]
        failed = sorted({version["error"] for version in versions if "error" in version})
        shared, stack = (max((version[what] for version in whole), default=0) for what in ("shared", "stack"))
        products = any(version["multiplies"] for version in whole)
        cores = "yes" if any(version["tensor_cores"] for version in whole) else "no" if products or failed else ""
        errors = f"{len(versions) - len(whole)} of {len(versions)}: {', '.join(failed)}" if failed else ""
        rows.append([f"`{kernel}`", f"{shared:,}", f"{stack:,}", cores, errors])
    lines = [
        "# Kernels compiled for a T4, where they do not run",
        "",
        f"`python benchmarks/offline_turing.py`, Triton {report['versions']['triton']}, {TARGET}. Bytes of shared "
        f"memory of a block, which can have {SHARED_MEMORY:,}; bytes of stack of a thread, into which registers spill; "
        "whether products go to tensor cores, of kernels that have some; versions that do not compile.",
        "",
        *table("kernel | shared memory | stack | tensor cores | does not compile", rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    with compiling_for(TARGET):
        versions = offline_kernels.collect(SHARED_MEMORY, offline_kernels.capability(TARGET) // 10)
        entries = [{"kernel": v.kernel, "call": v.call, "needs": needs(v)} for v in versions]
    report = {**provenance("cpu"), "compiled": entries}
    write(args.output, "offline_turing", report, markdown(report))


if __name__ == "__main__":
    main()
