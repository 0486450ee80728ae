# shellcheck shell=bash
# What is peculiar to a cluster. Sourced by the scripts in this folder, at submission and on the nodes; works as it is.
# Everything here is optional: take away the # of what this cluster needs.

# --- Software: modules, then the Python that has this project's packages (default: .venv of this checkout).
# module load gcc/13 cuda/12.8
# export LLAVA_NEXT_PYTHON=/path/to/venv/bin/python
# export LLAVA_NEXT_STORES=/path/to/stores LLAVA_NEXT_MODELS=/path/to/models

# --- More options for every srun: a container, for example. LLAVA_NEXT_PYTHON is then the container's.
# SITE_SRUN=(--container-image=/path/to/image.sqsh --container-mounts="$PWD" --container-workdir="$PWD")

# --- Network: the interface that nodes reach each other by, where the first one is not it.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# --- Defaults of sbatch (its manual, "input environment variables"); options on its command line win. two_stage.sh
#     reads them here; before a plain sbatch: source scripts/slurm/site.sh
# export SBATCH_ACCOUNT=project SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=8 SBATCH_TIMELIMIT=24:00:00
