"""Snakemake's profiles: where the jobs of a study run, and what a cluster has to offer for them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from nnunet_lgms.files import one_line, shown
from nnunet_lgms.study.graph import Graph
from nnunet_lgms.study.schema import packaged

PROFILES = ("local", "gpus", "slurm")
FILES = ("config.v9+.yaml", "config.v8+.yaml", "config.yaml")
"""Of a profile, the first that is there is Snakemake's choice."""

GPU_RULES = ("profile", "train", "predict", "zeroshot")
"""Rules of the workflow that ask for one GPU."""


@dataclass(frozen=True)
class Profile:
    """One profile.

    Attributes:
        name: as it was given.
        file: its YAML file.
        content: what it says.
    """

    name: str
    file: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, name: str) -> Profile:
        """A profile that comes along, or one in a folder.

        Raises:
            ValueError: there is none, or it is no YAML table.
        """
        folder = packaged("workflow") / "profiles" / name if name in PROFILES else Path(name).absolute()
        file = next((folder / file for file in FILES if (folder / file).is_file()), None)
        if file is None:
            raise ValueError(f"--profile {name} is no profile: give one of {', '.join(PROFILES)}, or a folder.")
        try:
            content = yaml.safe_load(file.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds {shown(content)}: a profile is a table of Snakemake's options.")
        return cls(name, file, content)

    @property
    def on_a_cluster(self) -> bool:
        """Whether jobs run on other machines than this one."""
        return self.content.get("executor", "local") != "local"

    def resource(self, rule: str, name: str) -> Any:
        """A resource of a rule: its own, or the default; None where the profile does not say."""
        own = _table(self.content.get("set-resources")).get(rule)
        return _table(own).get(name, _table(self.content.get("default-resources")).get(name))


def check_profile(graph: Graph, profile: Profile) -> None:
    """The machines of a profile can take a study's jobs.

    Raises:
        ValueError: there is no GPU where one is needed, or a cluster has not what the profile names.
    """
    if profile.content.get("executor") == "slurm":
        _check_slurm(graph, profile)
    elif graph.study.device == "cuda" and not profile.on_a_cluster:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                f"{graph.path.name} has device: cuda, and PyTorch finds no GPU here: see nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, set device: cpu, or give the profile of a cluster with --profile."
            )


def check_command(command: Sequence[str]) -> None:
    """Snakemake's own word on its options: a dry run in a folder where nothing is done.

    Raises:
        ValueError: it refuses them, with its reason.
    """
    with TemporaryDirectory() as folder:
        dry = [sys.executable, "-m", *command, "--nolock", "--dry-run", "--directory", folder]
        done = subprocess.run(dry, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("Using profile")]
        start = max((i for i, line in enumerate(said) if re.search(r"(rror|Exception)\b", line)), default=0)
        reason = one_line(" ".join(said[start:]).removeprefix("__main__.py: error: "))
        raise ValueError(f"Snakemake refuses its options: {reason or 'it does not say why'}")


def _check_slurm(graph: Graph, profile: Profile) -> None:
    """Every rule names a partition that there is, and those with a GPU one that has GPUs."""
    if missing := [program for program in ("sbatch", "sinfo") if shutil.which(program) is None]:
        raise ValueError(
            f"--profile {profile.name} submits jobs to SLURM, and {missing[0]} is not on this machine: run this on "
            "one that submits jobs, or choose another profile."
        )
    partitions = _slurm_partitions()
    on_gpu = GPU_RULES if graph.study.device == "cuda" else ()
    for rule in graph.jobs():
        name = profile.resource(rule, "slurm_partition")
        where = f"set-resources: {rule}: or default-resources: of {profile.file}"
        if not isinstance(name, str):
            raise ValueError(f"No partition is named for {rule}: put slurm_partition: NAME under {where}.")
        for one in name.split(","):  # SLURM takes several, too
            if one not in partitions:
                raise ValueError(
                    f"{rule} is to run in the partition {one}, and this cluster has {', '.join(sorted(partitions))}: "
                    f"correct slurm_partition under {where}"
                    + (", in a copy of its folder that --profile names." if profile.name in PROFILES else ".")
                )
            if rule in on_gpu and not partitions[one]:
                with_gpus = ", ".join(sorted(p for p, gpus in partitions.items() if gpus)) or "none"
                raise ValueError(
                    f"{rule} needs a GPU, and the partition {one} has none; there are GPUs in {with_gpus}: correct "
                    f"slurm_partition under {where}."
                )
        if rule in on_gpu and str(profile.resource(rule, "gpu")) == "0":
            raise ValueError(f"{rule} needs a GPU, and {profile.file} sets gpu to 0: remove that, or set device: cpu.")


def _slurm_partitions() -> dict[str, bool]:
    """Partition → whether it has GPUs, as SLURM tells.

    Raises:
        ValueError: SLURM does not answer.
    """
    command = ["sinfo", "--all", "--noheader", "--format=%R|%G"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise ValueError(f"SLURM does not answer: {' '.join(answer.stderr.split()) or 'sinfo failed'}")
    found: dict[str, bool] = {}
    for line in answer.stdout.splitlines():  # one for each kind of node of a partition
        name, _, resources = line.strip().partition("|")
        found[name] = found.get(name, False) or "gpu" in resources.lower()
    return found


def _table(value: Any) -> Mapping[str, Any]:
    """Snakemake's resources as a table; it takes lists of ``name=value`` and ``rule:name=value`` as well."""
    if isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for word in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
        name, _, content = str(word).partition("=")
        rule, of_rule, name = name.rpartition(":")
        content = content.strip("'\"")
        if of_rule:
            found.setdefault(rule, {})[name] = content
        else:
            found[name] = content
    return found
