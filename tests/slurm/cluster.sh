#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests: munge, slurmd, slurmctld, and slurmdbd with its database.
#
#   cluster.sh start FOLDER   everything of it lies in FOLDER, with links to its three files in /etc/slurm
#   cluster.sh stop FOLDER    removes the links
#
# Needs root and Debian's packages slurm-wlm, slurmdbd, munge and mariadb-server. The links are there because Snakemake's
# jobs run without SLURM_CONF: its executor takes all of SLURM's variables away from them.
# Containers have no cgroups of their own to hand out, so processes are tracked by their parents (proctrack/linuxproc).
set -euo pipefail

action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
node=$(hostname -s)
port=33960
files="slurm.conf cgroup.conf slurmdbd.conf"

wait_for() { # seconds, what, command…
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || { echo "$what did not start: see $folder/*.log" >&2; exit 1; }
        sleep 0.5
    done
}

stop() {
    if [[ $(readlink /etc/slurm/slurm.conf) == "$folder/slurm.conf" ]]; then # never a real cluster's jobs
        timeout 10 scancel --user=root || true
        sleep 3
    fi
    for name in slurmctld slurmd slurmdbd mariadb munged; do
        [[ -f $folder/$name.pid ]] && kill "$(<"$folder/$name.pid")" 2>/dev/null || true
    done
    for file in $files; do
        [[ $(readlink "/etc/slurm/$file") != "$folder/$file" ]] || rm "/etc/slurm/$file"
    done
}

configure() {
    cat >"$folder/slurm.conf" <<END
ClusterName=study
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$folder/munge.socket
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/linux
# the partitions and the memory that workflow/profiles/slurm asks for
SlurmdParameters=config_overrides
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=200000 State=UNKNOWN
PartitionName=cpu Nodes=$node Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=$node MaxTime=INFINITE State=UP
END
    # "disabled" is known from 23.11 on; before that, v1 is content with what it finds as long as nothing asks for it
    local version
    version=$(slurmd -V | cut -d' ' -f2)
    if [[ $(printf '%s\n' 23.11 "$version" | sort -V | head -n1) == 23.11 ]]; then
        echo "CgroupPlugin=disabled"
    else
        echo "CgroupPlugin=cgroup/v1"
    fi >"$folder/cgroup.conf"
    cat >"$folder/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
DbdHost=localhost
DbdPort=16819
SlurmUser=root
PidFile=$folder/slurmdbd.pid
LogFile=$folder/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$port
StorageUser=slurm
StoragePass=slurm
END
    chmod 600 "$folder/slurmdbd.conf"
    mkdir -p /etc/slurm
    for file in $files; do
        ln -s "$folder/$file" "/etc/slurm/$file" # fails where this machine is part of a cluster already
    done
}

start() {
    chmod 755 "$folder"
    mkdir -p "$folder"/{state,spool,database}
    configure
    dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 status=none
    chmod 600 "$folder/munge.key"
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    mariadb-install-db --no-defaults --user=root --datadir="$folder/database" --auth-root-authentication-method=normal \
        >"$folder/mariadb.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$folder/database" --socket="$folder/mariadb.socket" --port=$port \
        --bind-address=127.0.0.1 --skip-name-resolve --pid-file="$folder/mariadb.pid" >>"$folder/mariadb.log" 2>&1 &
    wait_for 60 mariadb mariadb --no-defaults --socket="$folder/mariadb.socket" -e "SELECT 1"
    mariadb --no-defaults --socket="$folder/mariadb.socket" -e \
        "CREATE DATABASE slurm_acct_db; CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
         GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';"
    slurmdbd
    wait_for 90 slurmdbd sacctmgr --noheader list cluster
    slurmctld
    wait_for 60 slurmctld scontrol ping
    slurmd
    wait_for 60 "the node" sh -c "sinfo --noheader --format=%T | grep -Eq 'idle|mixed|allocated'"
    sinfo
}

case $action in
start) start ;;
stop) stop ;;
*) echo "usage: cluster.sh start|stop FOLDER" >&2; exit 2 ;;
esac
