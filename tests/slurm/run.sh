#!/usr/bin/env bash
# The tests' small study (two variants x two folds, on the CPU) on a real SLURM of one node, with the profile that is
# shipped. On the way one training is requeued, as preemption does it, and another one is killed.
#
#   sudo tests/slurm/run.sh FOLDER     leaves the study, its report and sacct.txt in FOLDER
#
# Needs root, Debian's packages (installed where missing) and PYTHON (default: .venv/bin/python) with the extra [test].
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "${1:?give a folder}"
folder=$(cd "$1" && pwd)

if ! command -v slurmctld slurmdbd munged mariadbd >/dev/null; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm slurmdbd munge mariadb-server
fi
"$root/tests/slurm/cluster.sh" start "$folder/slurm"
study=
trap '[[ -z $study ]] || kill $study 2>/dev/null; "$root/tests/slurm/cluster.sh" stop "$folder/slurm"' EXIT

source <("$python" "$root/tests/study_data.py" "$folder/data") # the data, and nnU-Net's variables
export STUDY_TEST_HOLDS=$folder/hold PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PATH=$(dirname "$python"):$PATH
touch "$STUDY_TEST_HOLDS" # fold 1 of each variant stops after its first epoch while this file is there

"$python" -m nnunet_lgms study run "$folder/data/study.yaml" --profile slurm \
    --snakemake="--slurm-init-seconds-before-status-checks 5 --jobs 10" >"$folder/study.log" 2>&1 &
study=$!

results=$nnUNet_results/Dataset801_Disc
half_trained() { # variant
    local fold=$results/nnUNetTrainerLGMSNet_2epochs__nnUNetPlans_${1}__2d/fold_1
    until [[ -f $fold/checkpoint_latest.pth ]]; do
        kill -0 $study 2>/dev/null || { tail -n 50 "$folder/study.log"; exit 1; }
        sleep 1
    done
    sleep 2 # until it is written as a whole
}

half_trained kernels_3
job=$(squeue --noheader --format="%i %k" | awk '/rule_train.*kernels_3.*_1$/ {print $1}') # the comment ends with the fold
scontrol requeue "$job"
echo "requeued job $job"
half_trained kernels_5
pid=$(pgrep -f "nnunet_lgms.study train .*kernels_5.* 1$" | tail -n 1)
kill -9 "$pid"
echo "killed process $pid, the training of fold 1 of kernels_5"
rm "$STUDY_TEST_HOLDS"

status=0
wait $study || status=$?
sacct --duplicates --allocations --noheader --parsable2 --format=JobID,Partition,State,ExitCode,Elapsed,Comment |
    sed -e 's/rule_//' -e 's/_wildcards//' -e 's/unseeded_//' -e 's/nnUNetTrainerLGMSNet_2epochs__nnUNetPlans_//' |
    column --table --separator "|" --table-columns JobID,Partition,State,Exit,Elapsed,Job >"$folder/sacct.txt"
cat "$folder/sacct.txt"
tail -n 5 "$folder/study.log"
exit $status
