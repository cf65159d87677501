"""Chooses the demo's 30 hippocampus cases from the full set, and copies them, bytes unchanged.

Every 7th of the 230 cases in order of name, the first 30 of these; every 5th of the 30 (the 5th, 10th, …) is a test
case. No image or label was looked at for the choice. Only needed to make ``demo/data/hippocampus`` again.

    python demo/select_cases.py path/to/hippocampus demo/data/hippocampus
"""

import argparse
import json
import shutil
from pathlib import Path


def select(names: list[str]) -> tuple[list[str], list[str]]:
    """Training and test cases: 24 and 6 of at least 204 ``names``."""
    chosen = sorted(names)[::7][:30]
    test = chosen[4::5]
    return [name for name in chosen if name not in test], test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the full set: imagesTr, labelsTr, dataset.json")
    parser.add_argument("target", type=Path, help="where to: a folder that does not exist yet")
    args = parser.parse_args()
    training, test = select([path.name.removesuffix(".nii.gz") for path in (args.source / "labelsTr").glob("*.nii.gz")])
    for part, names in (("Tr", training), ("Ts", test)):
        for folder, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (args.target / f"{folder}{part}").mkdir(parents=True)
            for name in names:
                source = args.source / f"{folder}Tr" / f"{name}{ending}"
                shutil.copyfile(source, args.target / f"{folder}{part}" / source.name)
    description = json.loads((args.source / "dataset.json").read_text("utf-8"))
    description["numTraining"] = len(training)
    (args.target / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
