"""A stand-in for Slurm's srun: starts the tasks of a step with the variables that srun sets.

fake_srun.py --ntasks-per-node=2 ... COMMAND
"""

import os
import subprocess
import sys

words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][: next(i for i, w in enumerate(words) if w[:2] != "--")]
num_tasks = next(int(word.partition("=")[2]) for word in options if word.startswith("--ntasks-per-node="))
tasks = []
for task in range(num_tasks):
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task),
    }
    tasks.append(subprocess.Popen(words[len(options) :], env={**os.environ, **step}))
sys.exit(max(task.wait() for task in tasks))
