"""A study before its first job: its file, its graph, its locks, what it says it will cost."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("snakemake", reason="the extra [study] needs Python 3.11")

from nnunet_lgms.cli import main
from nnunet_lgms.cli.study import describe
from nnunet_lgms.study import gpus
from nnunet_lgms.study.estimate import epochs_of, estimate_hours
from nnunet_lgms.study.graph import Graph
from nnunet_lgms.study.pictures import pareto_front
from nnunet_lgms.study.profiles import Profile, check_profile
from nnunet_lgms.study.schema import OWN_PLANS, PLANNERS, Study, find_study, packaged, schema_table
from nnunet_lgms.study.steps import _readable

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = "name: a\nconfigurations: [2d]\ndatasets: {Dataset101_B: {}}\nvariants: {a: {}}\n"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders, and this package's trainers."""
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def raw_data(folders: Path, name: str = "Dataset101_B", n_cases: int = 5, ending: str = ".nii.gz", **more) -> Path:
    """A raw data set as far as a study's check looks at it: no image is read."""
    folder = folders / "nnUNet_raw" / name
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for case in range(n_cases):
        (folder / "imagesTr" / f"case_{case}_0000{ending}").touch()
        (folder / "labelsTr" / f"case_{case}{ending}").touch()
    labels = {"background": 0, "lesion": 1}
    content = {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ending, "numTraining": n_cases} | more
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def written(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: a\n", "", "name is missing: give letters"),
        ("[2d]", "[2d]\nfoldz: [1]", "foldz is not known; did you mean 'folds' or 'folder'?"),
        ("[2d]", "[2d]\nfolds: [1, 1]", "folds is [1, 1]: allowed is a list of fold numbers, 0 to 999, each once"),
        ("[2d]", "[4d]", "configurations is ['4d']: allowed is a list of 2d, 3d_fullres"),
        ("[2d]", "[3d_cascade_fullres]", "Dataset101_B has 3d_cascade_fullres, which needs 3d_lowres"),
        ("Dataset101_B", "Data1", "'Data1' cannot be a name under datasets: allowed is a name such as Dataset101_BUSI"),
        ("B: {}", "B: {convert: {name: busy, source: x}}", "convert.name is 'busy': allowed is busi, tnscui"),
        ("B: {}", "B: {convert: {name: busi}}", "datasets.Dataset101_B.convert.source is missing: give a path"),
        ("B: {}", "B: {zeroshot: [Dataset102_X]}", "zeroshot names Dataset102_X: it must be another data set"),
        ("B: {}", "B: {}, Dataset101_C: {}", "Dataset101_B and Dataset101_C have the same number"),
        ("a: {}", "a: {plans: mine}", "variants.a.plans is 'mine': allowed is nnUNetPlans, nnUNetResEncUNetMPlans"),
        ("a: {}", "a: {overide: x}", "variants.a.overide is not known; did you mean 'override'?"),
        ("a: {}", "a__b: {}", "'a__b' cannot be a name under variants"),
        ("a: {}", "a: {}, b: {}", "variants a and b are the same training"),
        ("a: {}", "a: {}, A: {epochs: 2}", "the variants a and A differ in capitals only"),
        ("a: {}", "a: {override: k.json}, b: {override: y/K.json}", "k.json and y/K.json would name the same plans"),
        ("a: {}", "a: {override: x/k.json}, b: {override: y/k.json}", "would name the same plans"),
        (SMALLEST, "- a", "is list, not a table"),
        (SMALLEST, "a: [", "is not YAML"),
        (SMALLEST, "[" * 3000, "is nested too deeply"),
        ("name: a", "name: a\nname: b", "'name' appears twice: keep one"),
        ("a: {}", "1: {}, '1': {epochs: 2}", "'1' appears twice"),
        ("name: a", "name: null", "name is None: allowed is letters"),
        ("name: a", "name: 2024-99-99", "a date or a number that cannot be (month must be in 1..12): correct or quote"),
        ("name: a", f"name: {'1' * 5000}", "a date or a number that cannot be (Exceeds the limit (4300 digits)"),
        ("name: a", f"name: {'a' * 3000}", "aaa...: allowed is letters"),
        ("a: {}", "null: {}", "'null' cannot be a key: put it in quotes"),
        ("a: {}", "2024-01-02: {}", "'2024-01-02' cannot be a key: put it in quotes"),
        ("a: {}", "[a]: {}", "a list or table cannot be a key"),
        ("B: {}", "B: {5: 1}", "datasets.Dataset101_B.5 is not known; known are convert"),
        ("[2d]", "[2d]\n7: 3", "7 is not known; known are name"),
        ("[2d]", "[2d]\nfolds: [11111111111111111111]", "allowed is a list of fold numbers, 0 to 999, each once"),
        ("[2d]", "[2d]\nseeds: [4294967296]", "seeds is [4294967296]: allowed is a list of whole numbers below 2^32"),
        ("[2d]", "[2d]\nthreads: 99999999", "threads is 99999999: allowed is a whole number, 1 to 1024"),
        ("[2d]", "[2d]\nnsd_tolerance: .inf", "nsd_tolerance is inf: allowed is a number, 0 to 1000"),
    ],
)
def test_what_is_wrong_in_a_study_is_one_sentence(folders, capsys, old: str, new: str, said: str) -> None:
    path = written(folders, SMALLEST.replace(old, new))
    assert main(["study", "check", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_smallest_study_has_the_defaults(folders: Path) -> None:
    study = Study.read(written(folders, SMALLEST))
    assert (study.trainer, study.plans, study.folds) == ("nnUNetTrainerLGMSNet", "nnUNetPlans", [0, 1, 2, 3, 4])
    assert (study.device, study.seeds) == ("cuda", [])


def test_documentation_has_the_schema() -> None:
    assert schema_table() in (ROOT / "docs" / "how-to" / "study.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_that_come_along_are_valid_and_found_by_name(folders: Path, path: Path) -> None:
    from nnunet_lgms.planning.plans_files import read_override

    assert find_study(path.stem).read_text("utf-8") == path.read_text("utf-8")  # installed, or the checkout's
    graph = Graph(path.stem)
    assert len(graph.jobs()["train"]) == len(set(graph.jobs()["train"])) > 0
    for variant in graph.study.variants.values():
        read_override(*map(graph.override_file, variant.overrides))


def test_overrides_of_a_variant_add_up(folders: Path) -> None:
    model = next(m for m in Graph("kernels").models("Dataset101_BUSI") if m.variant == "3-5")
    assert (model.base, model.plans) == ("nnUNetPlans", "nnUNetPlans_published_kernels_3_5")
    assert model.overrides == ("published", "kernels_3_5")


def test_unknown_study_names_those_that_come_along(folders: Path, capsys) -> None:
    assert main(["study", "check", "kernel"]) == 2
    assert "five_fold, kernels, ratio, zeroshot" in capsys.readouterr().err


# ---- the graph -------------------------------------------------------------------------------------------------------


def test_variants_share_plans_and_preprocessed_data(folders: Path) -> None:
    variants = "{k: {override: kernels_3}, u: {trainer: nnUNetTrainer}, r: {plans: nnUNetResEncUNetMPlans}}"
    text = SMALLEST.replace("{a: {}}", variants).replace("[2d]", "[2d, 3d_lowres]")
    jobs = Graph(written(folders, text + "folds: [0, 1]\nseeds: [3, 4]\n")).jobs()
    assert jobs["plan"] == [
        f"done/plan/Dataset101_B/{plans}.json" for plans in ("nnUNetPlans", "nnUNetResEncUNetMPlans")
    ]
    # nnU-Net's planners share 2d and 3d_fullres, and have low resolutions of their own
    names = ("nnUNetPlans_2d", "nnUNetPlans_3d_lowres", "nnUNetResEncUNetMPlans_3d_lowres")
    assert jobs["preprocess"] == [f"done/preprocess/Dataset101_B/{name}.json" for name in names]
    assert jobs["override"] == ["done/override/Dataset101_B/nnUNetPlans_kernels_3.json"]
    assert len(jobs["train"]) == len(jobs["validate"]) == 3 * 2 * 2 * 2
    assert jobs["train"][0] == "train/seed_3/Dataset101_B/nnUNetTrainerLGMSNet__nnUNetPlans_kernels_3__2d/fold_0.json"


def test_planners_are_nnunets(folders: Path) -> None:
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "experiment_planning"
    for planner in PLANNERS.values():
        assert recursive_find_python_class(str(folder), planner, "nnunetv2.experiment_planning")
    assert OWN_PLANS.fullmatch("nnUNetLGMSNetPlans_12G")[1] == "12"


def test_cascade_waits_for_all_folds_of_the_low_resolution(folders: Path) -> None:
    text = SMALLEST.replace("[2d]", "[3d_lowres, 3d_cascade_fullres]")
    graph = Graph(written(folders, text))
    low, cascade = graph.models("Dataset101_B")
    assert graph.previous_stage("unseeded", cascade) == graph.folds_trained("unseeded", low)
    assert cascade.data_identifier == "nnUNetPlans_3d_fullres" and graph.previous_stage("unseeded", low) == []


@pytest.mark.slow
def test_graph_of_six_datasets_five_folds_and_twenty_variants_takes_less_than_10_seconds(folders: Path) -> None:
    """As a dry run; processor time, for a machine that has other work as well."""
    overrides = sorted(path.stem for path in (ROOT / "plans").glob("*.json"))[:20]
    datasets = "".join(f"  Dataset10{i}_D{i}: {{test: true, zeroshot: [Dataset111_X]}}\n" for i in range(6))
    variants = "".join(f"  {name}: {{override: {name}}}\n" for name in overrides)
    text = f"name: big\nconfigurations: [3d_fullres]\ndatasets:\n{datasets}variants:\n{variants}"
    path = written(folders, text + "unseen: {Dataset111_X: {}}\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(packaged("workflow") / "Snakefile")]
    command += ["--profile", str(packaged("workflow") / "profiles" / "gpus"), "--config", f"study={path}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, "--dry-run", "--quiet", "rules"], capture_output=True, text=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    counts = dict(line.split() for line in output.splitlines() if line.count(" ") and len(line.split()) == 2)
    assert int(counts["total"]) == sum(map(len, Graph(path).jobs().values())) + 2  # and report and all, as check says
    assert (counts["train"], counts["preprocess"], counts["override"], counts["predict"]) == ("600", "6", "120", "120")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


# ---- what is checked and estimated before the first job --------------------------------------------------------------


@pytest.fixture
def refused(folders: Path, capsys) -> Callable[..., str]:
    """What `study check` and `study run` say of a study that both refuse: one sentence, the same."""

    def both(text: str, *options: str) -> str:
        said = []
        for action in ("check", "run"):
            assert main(["study", action, str(written(folders, text)), *options]) == 2
            said.append(capsys.readouterr())
        assert said[0] == said[1] and said[0].out == "" and said[0].err.count("\n") == 1
        return said[0].err

    return both


def accepted(text: str, folders: Path) -> bool:
    """Whether a study passes all checks but Snakemake's own, which takes seconds."""
    from nnunet_lgms.study.checks import check_study

    check_study(Graph(written(folders, text)), Profile.read("local"))
    return True


def step(folders: Path, capsys, *words: str) -> str:
    """What the job itself says, when it is started all the same."""
    from nnunet_lgms.study.__main__ import main as job

    name, *names = words
    assert job(name, str(folders / "study.yaml"), str(folders / "done.json"), *names) == 2
    return capsys.readouterr().err.partition(": ")[2]


ON_CPU = SMALLEST + "device: cpu\n"


def test_data_that_is_missing_is_named_before_the_first_job(folders: Path, refused, capsys, monkeypatch) -> None:
    assert "Dataset101_B is not in nnUNet_raw: put it there" in refused(ON_CPU)
    converted = ON_CPU.replace("Dataset101_B: {}", "Dataset101_BUSI: {convert: {name: busi, source: $THERE/x}}")
    said = refused(converted)
    assert "THERE is not set: export THERE=FOLDER" in said
    assert said.partition(": ")[2] == step(folders, capsys, "convert", "Dataset101_BUSI")
    monkeypatch.setenv("THERE", str(folders))
    assert f"made from {folders / 'x'}, which is no folder" in refused(converted)
    (folders / "x" / "benign").mkdir(parents=True)
    said = refused(converted)
    assert f"{folders / 'x'} does not look like BUSI: expected" in said
    assert said.partition(": ")[2] == step(folders, capsys, "convert", "Dataset101_BUSI")
    for name in ("benign (1).png", "benign (1)_mask.png", "benign (2).png", "benign (3).png"):
        (folders / "x" / "benign" / name).touch()
    message = refused(converted)
    assert "benign (2).png has no mask, and 1 more" in message and "is to be made, is not complete" in message
    assert "Dataset101_B is made from busi: call it Dataset101_BUSI" in refused(converted.replace("BUSI", "B"))
    (folders / "x" / "benign" / "benign (2).png").unlink()
    (folders / "x" / "benign" / "benign (3).png").unlink()
    assert "has flat images, for which nnU-Net plans 2d alone" in refused(converted.replace("[2d]", "[2d, 3d_lowres]"))
    assert "of the splits has no" in refused(converted.replace("$THERE/x", "$THERE/x, splits: paper"))
    assert "has no imagesTs" in refused(converted.replace("{convert", "{test: true, convert"))


def test_data_that_was_converted_otherwise_is_refused_as_the_job_would(
    folders: Path, refused, capsys, verify_in_threads
) -> None:
    """Also where nobody says where the download lies: the job needs that to compare."""
    from dataset_replicas import disc, grey, picture, save

    for n in range(1, 7):
        save(folders / f"x/benign/benign ({n}).png", picture(n, 3))
        save(folders / f"x/benign/benign ({n})_mask.png", grey(disc(n)))
    assert main(["convert", "busi", str(folders / "x"), "--id", "101", "--workers", "1"]) == 0
    capsys.readouterr()
    text = ON_CPU.replace("Dataset101_B: {}", "Dataset101_BUSI: {convert: {name: busi, source: $THERE/x, size: 64}}")
    assert "THERE is not set" in refused(text)
    text = text.replace("$THERE/", "")
    said = refused(text)
    assert "Dataset101_BUSI exists and was made otherwise" in said
    assert said.partition(": ")[2] == step(folders, capsys, "convert", "Dataset101_BUSI")
    text = text.replace(", size: 64", "")
    assert accepted(text, folders)
    (folders / "x/benign/benign (7).png").write_bytes((folders / "x/benign/benign (6).png").read_bytes())
    (folders / "x/benign/benign (7)_mask.png").write_bytes((folders / "x/benign/benign (6)_mask.png").read_bytes())
    assert "was made from files" in refused(text)


def test_data_that_nnunet_would_refuse_is_named_before_the_first_job(folders: Path, refused, capsys) -> None:
    raw = raw_data(folders)
    (raw / "labelsTr" / "case_3.nii.gz").unlink()
    assert "Dataset101_B has no case_3.nii.gz in labelsTr" in refused(ON_CPU)
    raw_data(folders, numTraining=9)
    assert "has numTraining 9, and there are 5 training cases" in refused(ON_CPU)
    raw_data(folders, labels={"lesion": 1})
    assert "has labels {'lesion': 1}" in refused(ON_CPU)
    raw_data(folders)
    assert "has no imagesTs" in refused(ON_CPU.replace("Dataset101_B: {}", "Dataset101_B: {test: true}"))
    (raw / "imagesTr" / "case_4_0000.nii.gz").unlink()
    raw_data(folders, numTraining=4, n_cases=4)
    assert "has 4 training case(s), of which nnU-Net makes no 5 folds" in refused(ON_CPU)
    (folders / "nnUNet_raw" / "Dataset102_P").mkdir()
    raw_data(folders, "Dataset102_P", ending=".png")
    flat = ON_CPU.replace("Dataset101_B", "Dataset102_P").replace("[2d]", "[2d, 3d_fullres]")
    assert "for which nnU-Net plans 2d alone, and is to be trained as 3d_fullres" in refused(flat)


def test_folds_plans_and_overrides_are_checked_as_their_jobs_do(folders: Path, refused, capsys) -> None:
    from tiny_plans import configuration, plans

    raw_data(folders)
    assert "Dataset101_B has 5 folds, there is no fold 7" in refused(ON_CPU + "folds: [0, 7]")
    preprocessed = folders / "nnUNet_preprocessed" / "Dataset101_B"
    preprocessed.mkdir()
    (preprocessed / "splits_final.json").write_text(json.dumps([{}, {}, {}]))
    said = refused(ON_CPU)
    assert "Dataset101_B has 3 folds, there is no fold 3: correct folds in study.yaml" in said
    text = ON_CPU + "folds: [0]\n"
    model = Graph(written(folders, text)).models("Dataset101_B")[0].name
    written(folders, ON_CPU)
    assert said.partition(": ")[2] == step(folders, capsys, "train", "unseeded", "Dataset101_B", model, "3")

    assert "no override 'kernels_4'; did you mean" in refused(text.replace("a: {}", "a: {override: kernels_4}"))
    (folders / "bad.json").write_text('{"lgmsnet": {"gms_ratio": 7}}')
    assert "gms_ratio is 7" in refused(text.replace("a: {}", "a: {override: bad.json}"))
    planned = plans(**{"2d": configuration([64, 64])})
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(planned))
    said = refused(text.replace("[2d]", "[2d, 3d_lowres]"))
    assert "nnUNetPlans of Dataset101_B has no 3d_lowres: nnU-Net planned 2d only" in said
    assert said.partition(": ")[2] == step(folders, capsys, "preprocess", "Dataset101_B", "nnUNetPlans_3d_lowres")
    (folders / "flat.json").write_text('{"lgmsnet": {"lms_kernels": [[3, 3, 3]]}}')
    overridden = text.replace("a: {}", "a: {override: flat.json}")
    said = refused(overridden)
    assert said.partition(": ")[2] == step(folders, capsys, "override", "Dataset101_B", "nnUNetPlans_flat")
    (folders / "flat.json").write_text('{"lgmsnet": {"lms_kernels": [3]}}')
    assert accepted(overridden, folders)
    (preprocessed / "nnUNetPlans_flat.json").write_text(json.dumps(planned | {"plans_name": "nnUNetPlans_flat"}))
    said = refused(overridden)
    assert "exists and says something else than nnUNetPlans with flat.json" in said
    assert said.partition(": ")[2] == step(folders, capsys, "override", "Dataset101_B", "nnUNetPlans_flat")


def test_trainers_are_those_that_nnunet_finds(folders: Path, refused, monkeypatch, capsys) -> None:
    raw_data(folders)
    missing = refused(ON_CPU.replace("a: {}", "a: {trainer: nnUNetTrainer_25epochs}"))
    assert "variants.a.trainer is nnUNetTrainer_25epochs, which is neither nnU-Net's nor in a folder" in missing
    assert "did you mean 'nnUNetTrainer_250epochs', " in missing
    assert accepted(ON_CPU + "trainer: nnUNetTrainer_250epochs", folders)
    mine = folders / "mine"
    mine.mkdir()
    monkeypatch.setenv("nnUNet_extTrainer", str(mine))
    (mine / "own.py").write_text("class nnUNetTrainer_own: pass\n")
    assert "must inherit from 'nnUNetTrainer'" in refused(ON_CPU + "trainer: nnUNetTrainer_own")
    (mine / "own.py").write_text("import nothing_of_that_name\n\n\nclass nnUNetTrainer_own: pass\n")
    assert "No module named 'nothing_of_that_name'" in refused(ON_CPU + "trainer: nnUNetTrainer_own")


@pytest.mark.slow
def test_options_that_snakemake_refuses(folders: Path, refused) -> None:
    raw_data(folders)
    assert "every quotation mark needs its partner" in refused(ON_CPU, "--snakemake='-n")
    assert "Snakemake refuses its options: MissingRuleException: No rule to produce tran" in refused(
        ON_CPU, "--snakemake=--until tran"
    )
    assert "Snakemake refuses its options: unrecognized arguments: --fast" in refused(ON_CPU, "--snakemake=--fast")
    assert "--profile gpu is no profile: give one of local, gpus, slurm" in refused(ON_CPU, "--profile", "gpu")


@pytest.mark.slow
def test_a_run_is_refused_while_another_one_goes_on_and_a_check_says_so(folders: Path, capsys) -> None:
    from nnunet_lgms.locks import locked

    raw_data(folders)
    path = str(written(folders, ON_CPU))
    lock = Graph(path).folder / ".study.lock"
    with locked(lock, "run of the study a"):
        assert main(["study", "run", path]) == 2
        assert f"Another run of the study a is running (process {os.getpid()})" in capsys.readouterr().err
        assert main(["study", "check", path]) == 0
        assert f"It is running now (process {os.getpid()})" in capsys.readouterr().out
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text("4711 elsewhere\n")  # of a run that was killed
    assert main(["study", "check", path]) == 0
    assert "To run it: nnunet_lgms study run" in capsys.readouterr().out and not lock.exists()


def test_a_study_on_gpus_needs_one(folders: Path, refused, monkeypatch) -> None:
    raw_data(folders)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "--profile gpus finds no GPU" in refused(SMALLEST, "--profile", "gpus")
    assert "study.yaml has device: cuda, and PyTorch finds no GPU here" in refused(SMALLEST)
    monkeypatch.delenv("nnUNet_results")
    assert "nnUNet_results is not set" in refused(SMALLEST + "folder: x")


SINFO = """#!/bin/sh
printf 'cpu|(null)\\nv100|gpu:v100:4\\nmixed|(null)\\nmixed|gpu:1\\n'
"""


@pytest.mark.slow
def test_partitions_and_gpus_of_a_cluster_are_there(folders: Path, refused, monkeypatch, capsys) -> None:
    """Against a stand-in for SLURM's sinfo; `tests/slurm/run.sh` has a real one."""
    raw_data(folders)
    assert "submits jobs to SLURM, and sbatch is not on this machine" in refused(SMALLEST, "--profile", "slurm")
    programs = folders / "bin"
    programs.mkdir()
    for name, text in (("sinfo", SINFO), ("sbatch", "#!/bin/sh\n"), ("squeue", "#!/bin/sh\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    said = refused(SMALLEST, "--profile", "slurm")
    assert "profile is to run in the partition gpu, and this cluster has cpu, mixed, v100: correct" in said

    shipped = (packaged("workflow") / "profiles" / "slurm" / "config.yaml").read_text("utf-8")
    own = folders / "own" / "config.yaml"
    own.parent.mkdir()
    options = ("--profile", str(own.parent))
    own.write_text(shipped.replace("slurm_partition: gpu", "slurm_partition: cpu"))
    assert "profile needs a GPU, and the partition cpu has none; there are GPUs in mixed, v100" in refused(
        SMALLEST, *options
    )
    own.write_text(shipped.replace("slurm_partition: gpu", "slurm_partition: v100, gpu: 0"))
    assert "sets gpu to 0" in refused(SMALLEST, *options)
    own.write_text(
        shipped.replace("slurm_partition: cpu, ", "").replace("slurm_partition: gpu", "slurm_partition: v100")
    )
    assert "No partition is named for convert: put slurm_partition: NAME under" in refused(SMALLEST, *options)
    own.write_text(shipped.replace("slurm_partition: gpu", "slurm_partition: 'v100,mixed'"))
    assert main(["study", "check", str(written(folders, SMALLEST)), *options]) == 0
    own.write_text(shipped.replace("slurm_partition: gpu", "slurm_partition: cpu"))
    check_profile(Graph(written(folders, ON_CPU)), Profile.read(str(own.parent)))  # no GPU is asked for


def test_gpu_hours_are_the_measured_steps_of_the_trainings_that_are_left(folders: Path, capsys, monkeypatch) -> None:
    (folders / "mine").mkdir()
    own = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n\n\n"
    own += "class nnUNetTrainer_mine(nnUNetTrainer):\n    pass\n"
    (folders / "mine" / "mine.py").write_text(own)
    monkeypatch.setenv("nnUNet_extTrainer", f"{folders / 'mine'}{os.pathsep}{ROOT / 'trainers'}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    text = SMALLEST.replace("{a: {}}", "{a: {}, u: {trainer: nnUNetTrainer}, mine: {trainer: nnUNetTrainer_mine}}")
    graph = Graph(written(folders, text))
    ours, theirs, _ = graph.models("Dataset101_B")
    assert graph.profile(ours) == graph.profile(theirs)  # the same plans
    networks = [{"batch_size": 2, "steps": {"training": {"ms": ms}, "inference": {"ms": 10}}} for ms in (100, 200)]
    profile = graph.folder / graph.profile(ours)
    profile.parent.mkdir(parents=True)
    profile.write_text(json.dumps({"networks": networks}))
    done = graph.folder / graph.trained("unseeded", "Dataset101_B", ours.name, 3)
    done.parent.mkdir(parents=True)
    done.write_text("{}")

    estimate = estimate_hours(graph)
    validation = 50 * 2 * 10
    expected = 4 * 500 * (250 * 100 + validation) + 5 * 1000 * (250 * 200 + validation)
    assert math.isclose(estimate.hours, expected / 3.6e6) and estimate.known == 9
    assert estimate.unknown == {"mine on Dataset101_B 2d": 5}  # its name does not tell how long it trains

    raw_data(folders)
    assert main(["study", "check", str(graph.path)]) == 0
    out = capsys.readouterr().out
    assert f"{expected / 3.6e6:.1f} GPU hours of training steps for 9 trainings" in out
    graph.path.write_text(text + "device: cpu\n")
    assert f"{expected / 3.6e6:.1f} hours on the CPU of training steps for 9 trainings" in describe(Graph(graph.path))
    assert "No estimate for 5 trainings (mine on Dataset101_B 2d)" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) == 3}
    assert rows["train"] == ["15", "14"] and rows["report"] == ["1", "1"]
    assert rows["together"] == [
        str(sum(int(row[i]) for name, row in rows.items() if name not in ("together", "job"))) for i in (0, 1)
    ]


def test_epochs_are_those_of_the_trainers() -> None:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    assert epochs_of("nnUNetTrainerLGMSNet_5epochs", None) == 5 and epochs_of("nnUNetTrainer_250epochs", None) == 250
    assert epochs_of("nnUNetTrainerLGMSNet_2epochs", 7) == 7 and epochs_of("other", None) is None
    assert "num_epochs = 1000" in Path(sys.modules[nnUNetTrainer.__module__].__file__).read_text("utf-8") and torch
    assert epochs_of("nnUNetTrainer", None) == 1000 and epochs_of("nnUNetTrainerLGMSNet", None) == 500


# ---- locks and GPUs --------------------------------------------------------------------------------------------------

TAKE = """
import sys
from pathlib import Path
from nnunet_lgms.study import gpus
gpus.tempfile.gettempdir = lambda: sys.argv[1]
with gpus.one_gpu(poll_seconds=0.1) as gpu:
    print(gpu, flush=True)
    sys.stdin.readline()
"""


def take(folder: Path, visible: str) -> subprocess.Popen:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PATH": "", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", TAKE, str(folder)], env=env, **pipes)


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8])
def test_no_two_jobs_hold_one_gpu_and_a_killed_job_gives_its_own_back(tmp_path: Path, n_gpus: int) -> None:
    gpus = [f"GPU-{n}" for n in range(n_gpus)]
    jobs = [take(tmp_path, ",".join(gpus)) for _ in gpus]
    try:
        held = {job.stdout.readline().strip(): job for job in jobs}
        assert set(held) == set(gpus)
        jobs.append(take(tmp_path, ",".join(gpus)))
        assert jobs[-1].stdout.readline() == f"Waiting for one of {n_gpus} GPU(s)\n"
        held[gpus[-1]].kill()
        assert jobs[-1].stdout.readline() == f"{gpus[-1]}\n"
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8])
def test_as_many_jobs_run_as_there_are_gpus(folders: Path, monkeypatch, n_gpus: int) -> None:
    from argparse import Namespace

    from nnunet_lgms.cli.study import snakemake_command

    smi = folders / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{n}, GPU-{n}'\n" for n in range(n_gpus)))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folders}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    graph = Graph(written(folders, SMALLEST))
    command = snakemake_command(graph, Profile.read("gpus"), Namespace(profile="gpus", snakemake=""))
    assert command[-2:] == ["--resources", f"gpu={n_gpus}"]


def test_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '0, GPU-x\\n1, GPU-y\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible_gpus() == ["GPU-x", "GPU-y"]
    for visible, uuids in {"1": ["GPU-y"], "1,0": ["GPU-y", "GPU-x"], "": [], "MIG-7": ["MIG-7"], "-1": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus.visible_gpus() == uuids
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with gpus.one_gpu() as gpu:
        assert gpu == os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-y"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


# ---- steps -----------------------------------------------------------------------------------------------------------


def test_checkpoint_that_was_being_written_is_put_aside(tmp_path: Path) -> None:
    import torch

    checkpoint = tmp_path / "checkpoint_latest.pth"
    assert not _readable(checkpoint)
    torch.save({"network_weights": torch.zeros(1000)}, checkpoint)
    assert _readable(checkpoint)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert not _readable(checkpoint) and not checkpoint.exists()
    assert checkpoint.with_suffix(".damaged").stat().st_size == len(whole) // 2


def test_a_case_counts_once_however_often_it_was_predicted_and_missing_folds_are_told(folders: Path) -> None:
    from nnunet_lgms.evaluation.evaluate import FOREGROUND
    from nnunet_lgms.evaluation.metrics import METRICS
    from nnunet_lgms.study.report import report_html
    from nnunet_lgms.study.results import Results

    graph = Graph(written(folders, SMALLEST + "folds: [0, 1]\nseeds: [1, 2]\n"))
    (model,) = graph.models("Dataset101_B")
    # Dice of two labels; fold 1 of the second seed is missing, and one prediction lacks a label
    dice = {("seed_1", 0): {"x": (0.2, 0.6)}, ("seed_1", 1): {"<b>y": (0.4, 1.0)}, ("seed_2", 0): {"x": (0.6, None)}}
    for (run, fold), cases in dice.items():
        summary = graph.folder / graph.validated(run, model.dataset, model.name, fold)
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")
        lines = [",".join(["model", "case", "label", *METRICS])]
        for case, values in cases.items():
            for label, value in zip("ab", values):
                row = ["" if value is None else str(value) if metric == "Dice" else "0.5" for metric in METRICS]
                lines.append(",".join(["m", case, label, *row]))
        summary.with_name("cases.csv").write_text("\n".join(lines) + "\n")

    results = Results(graph, n_resamples=50)
    means = {row.label: row.mean for row in results.rows if row.metric == "Dice"}
    assert means["a"].mean == pytest.approx((0.4 + 0.4) / 2) and means["a"].n == 2
    assert means["b"].mean == pytest.approx((0.6 + 1.0) / 2)
    assert means[FOREGROUND].mean == pytest.approx(0.6)
    assert {(row.folds, row.expected) for row in results.rows} == {(3, 4)}
    assert [(worst.case, worst.dice) for worst in results.worst_cases(model, 2)] == [
        ("x", pytest.approx(0.4)),
        ("x", pytest.approx(0.6)),
    ]
    page = report_html(results)
    assert "&lt;b&gt;y" in page and "<b>" not in page  # what a file is called is text
    assert "0.600" in page and "3 of 4 folds" in page
    assert "validate: 1</summary>" in page and "train: 4</summary>" in page  # nothing was trained here


def test_pareto_front_is_what_nothing_beats() -> None:
    points = [(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8), (4, 0.9), (5, 0.95)]
    assert pareto_front(points) == [(1, 0.5), (3, 0.9), (5, 0.95)]
