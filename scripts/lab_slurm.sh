#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, for tests: slurmctld, a slurmd per node and munged, with all files in one
# folder.
#
#   ./scripts/lab_slurm.sh start DIR     then export SLURM_CONF=DIR/slurm.conf, and use sbatch, srun, squeue as usual
#   ./scripts/lab_slurm.sh status DIR
#   ./scripts/lab_slurm.sh stop DIR      ends all jobs and daemons; the logs stay in DIR
#
# LAB_NODES=4 makes four nodes. LAB_GPUS=2 gives each node two simulated GPUs, to test how tasks are bound to them.
# Debian, Ubuntu: apt-get install slurm-wlm munge. Nothing outside of DIR is changed. Partitions: `main`, and `urgent`,
# whose jobs pre-empt those of main (requeued, after 60 s to save). The nodes, lab1, lab2 ..., are this machine and have
# its host name; time limits, signals, requeueing and exit codes are those of Slurm.
set -euo pipefail

stop_here() { printf 'lab: %s\n' "$*" >&2; exit 2; }

find_programs() {
    PATH=$PATH:/usr/sbin:/sbin
    local program
    for program in slurmctld slurmd munged srun sbatch scontrol; do
        command -v "$program" >/dev/null || stop_here "$program is not installed; Debian, Ubuntu: apt-get install slurm-wlm munge"
    done
}

is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

are_free() {
    local number
    for ((number = $1; number <= $1 + nodes; number++)); do
        is_free "$number" || return
    done
}

# Finds consecutive free ports, one for the controller and one per node; the first one depends on the folder.
find_ports() {
    local try
    port=$((10000 + $(cksum <<<"$lab" | cut -d' ' -f1) % 4000))
    for ((try = 0; try < 100; try++)); do
        are_free "$port" && return
        port=$((port + nodes + 1))
    done
    stop_here "no $((nodes + 1)) consecutive free ports below $port"
}

write_config() {
    local host user gres=
    host=$(hostname -s)
    user=$(id -un)
    if [[ ${LAB_GPUS:-0} == 2 ]]; then # Slurm requires files for devices, and no more
        printf 'NodeName=lab[1-%d] Name=gpu File=%s\n' "$nodes" /dev/null "$nodes" /dev/zero >"$lab/gres.conf"
        gres=Gres=gpu:2
    fi
    cat >"$lab/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$lab/munge/socket
CredType=cred/munge
StateSaveLocation=$lab/state
SlurmctldPidFile=$lab/slurmctld.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdPidFile=$lab/slurmd_%n.pid
SlurmdLogFile=$lab/log/%n.log
SlurmdSpoolDir=$lab/spool_%n
# Without cgroups; the nodes have the resources given below, whatever this machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1
NodeName=lab[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=4 RealMemory=8000 $gres
PartitionName=main Nodes=lab[1-$nodes] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=lab[1-$nodes] PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    [[ ! -e $lab/slurm.conf ]] || stop_here "$lab already has a cluster; stop it and remove the folder"
    mkdir -p "$lab"/{munge,state,log}
    chmod 700 "$lab/munge"
    (umask 077 && head -c 128 /dev/urandom >"$lab/munge/key")
    find_ports
    write_config
    munged --force --key-file="$lab/munge/key" --socket="$lab/munge/socket" --pid-file="$lab/munge/pid" \
        --log-file="$lab/munge/log" --seed-file="$lab/munge/seed"
    export SLURM_CONF=$lab/slurm.conf
    slurmctld -f "$SLURM_CONF"
    local waited node
    for ((node = 1; node <= nodes; node++)); do
        mkdir "$lab/spool_lab$node"
        slurmd -N "lab$node" -f "$SLURM_CONF"
    done
    for ((waited = 0; waited < 300; waited++)); do
        if [[ $(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null) == "$nodes" ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    stop_here "the nodes are not ready after 30 s; see $lab/log"
}

stop() {
    export SLURM_CONF=$lab/slurm.conf
    timeout 10 scancel --state=PENDING --user="$(id -un)" || true
    timeout 10 scancel --full --signal=KILL --user="$(id -un)" || true
    sleep 1
    local file
    for file in "$lab"/slurmd_lab*.pid "$lab/slurmctld.pid" "$lab/munge/pid"; do
        [[ -s $file ]] && kill "$(<"$file")" 2>/dev/null
        rm -f "$file"
    done
    rm -f "$SLURM_CONF"
}

status() {
    export SLURM_CONF=$lab/slurm.conf
    sinfo
    squeue
}

case ${1:-} in
    start | stop | status)
        [[ $# == 2 ]] || stop_here "$1 needs the folder of the cluster"
        find_programs
        lab=$(realpath -m "$2")
        nodes=${LAB_NODES:-2}
        [[ $1 == start || -e $lab/slurm.conf ]] || stop_here "there is no cluster in $lab"
        "$1"
        ;;
    *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; [[ ${1:-} == -h || ${1:-} == --help ]] || exit 2 ;;
esac
