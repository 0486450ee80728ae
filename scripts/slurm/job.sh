# shellcheck shell=bash disable=SC2034
# What Slurm has allocated to this job. The batch scripts source it before site.sh.
#
# Slurm's controller is asked, because `sbatch` inside a job or in a shell of salloc passes that job's variables on: tasks,
# CPUs, GPUs, array and step of another job. srun reads many of them as its options. They are unset here, like the variables
# of other launchers, and srun is given all of its options.

# job_field NAME: the values of a field in this job's record, one per line, each once.
job_field() { grep -oE " $1=[^ ]*" <<<"$job_record" | cut -d= -f2- | sort -u; }

for attempt in 1 2 3 4 5; do # a busy controller may not answer
    # The id of an array's last task is also the array's, which has a record per task. A job's name may contain anything.
    job_record=$(scontrol --details --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID " |
        sed 's/ JobName=.* UserId=/ UserId=/') && break
    ((attempt == 5)) && { echo "error: scontrol does not show the job SLURM_JOB_ID=$SLURM_JOB_ID" >&2; exit 1; }
    sleep 10
done
job_array_task=$(job_field ArrayTaskId)
job_restarts=$(job_field Restarts)
job_nodes=$(job_field NumNodes)
# CPUs of the smallest node: SLURM_JOB_CPUS_PER_NODE is a list such as 64(x3),48.
job_cpus=$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | head -n 1)
job_cpus=${job_cpus%%(*}
# --ntasks-per-node, or --ntasks if it is a multiple of the nodes; 0: neither was given.
job_tasks=$(job_field NtasksPerN:B:S:C | cut -d: -f1)
num_tasks=$(job_field NumTasks)
if ((job_tasks == 0 && num_tasks > job_nodes)); then
    if ((num_tasks % job_nodes)); then
        echo "error: --ntasks=$num_tasks is not a multiple of the $job_nodes nodes; use --ntasks-per-node" >&2
        exit 2
    fi
    job_tasks=$((num_tasks / job_nodes))
fi
# --cpus-per-task; 1 is also Slurm's default.
job_cpus_per_task=$(job_field CPUs/Task)
# GPUs of a node; 0: none. GRES=gpu:a100:2(IDX:0-1),gpu:h100:1(IDX:2) are 3.
mapfile -t gpus_of_nodes < <(job_field GRES | while read -r resources; do
    grep -oE '(^|,)gpu:([^,:(]+:)?[0-9]+' <<<"$resources" | awk -F: '{ sum += $NF } END { print sum + 0 }'
done | sort -u)
if ((${#gpus_of_nodes[@]} > 1)); then
    echo "error: nodes of this job have ${gpus_of_nodes[*]} GPUs; request the same number of each (--gpus-per-node)" >&2
    exit 2
fi
job_gpus=${gpus_of_nodes[0]:-0}

for variable in $(compgen -e); do
    case $variable in
        SLURM_CONF | SLURM_CLUSTER_NAME | SLURM_WORKING_CLUSTER | SLURM_NODE_ALIASES | SLURM_SUBMIT_DIR) ;;
        SLURM_JOB_ID | SLURM_JOB_NUM_NODES | SLURM_JOB_NODELIST) ;;
        SLURM_ARRAY_TASK_MAX) [[ -n $job_array_task ]] || unset "$variable" ;;
        SLURM_* | OMPI_* | PMI_* | PMIX_* | TORCHELASTIC_*) unset "$variable" ;;
        RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | MASTER_ADDR | MASTER_PORT) unset "$variable" ;;
    esac
done
unset attempt variable num_tasks gpus_of_nodes
