# shellcheck shell=bash
# Settings of one cluster, all of them optional: remove the # of those that this cluster needs. Sourced by the scripts in
# this folder, at submission and on the nodes.

# --- Software: modules, then the Python with this project's packages (default: .venv of this checkout).
# module load gcc/13 cuda/12.8
# export LLAVA_NEXT_PYTHON=/path/to/venv/bin/python
# export LLAVA_NEXT_STORES=/path/to/stores LLAVA_NEXT_MODELS=/path/to/models

# --- Options for every srun, such as a container, whose Python LLAVA_NEXT_PYTHON then names.
# SITE_SRUN=(--container-image=/path/to/image.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

# --- Network: the interface between the nodes, if it is not the first one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# --- Defaults of sbatch (its manual, "input environment variables"); options on its command line take precedence.
#     two_stage.sh reads them here; before a plain sbatch: source scripts/slurm/site.sh
# export SBATCH_ACCOUNT=project SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=8 SBATCH_TIMELIMIT=24:00:00
