#!/usr/bin/env bash
# One training on SLURM: on one GPU or several, on one node or several. When its time is nearly up, or another job needs the
# node, it saves and goes back into the queue; started again, it goes on.
#
#   sbatch cluster/slurm.sh train flow --task celeba64
#   sbatch --nodes=2 --gpus-per-node=8 cluster/slurm.sh train flow --task celeba64
#   sbatch --array=0-4 cluster/slurm.sh train flow --task digits
#   sbatch cluster/slurm.sh nbs/04_flow_matching.ipynb -f configs/celeba64/04_flow_matching.yaml
#
# In an array each job has its number for a seed. Options of sbatch replace the lines below: --time, --partition, --account, …
#SBATCH --job-name=diffcourse
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@120
# The last line: this script, and it alone (B:), gets SIGUSR1 two minutes before the end.
set -euo pipefail

again=75                             # exit code of a training that is saved and not done
most=${MAX_RESTARTS:-50}             # then somebody should look at it
python=${PYTHON:-.venv/bin/python}   # of the project, on a disk that all nodes see
restarts=${SLURM_RESTART_COUNT:-0}
nodes=${SLURM_NNODES:-1} gpus=${SLURM_GPUS_ON_NODE:-1} seed=${SLURM_ARRAY_TASK_ID:-}
cpus=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$cpus PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=$((cpus / gpus > 0 ? cpus / gpus : 1))

if [ $# -eq 0 ]; then
    echo "slurm.sh: say what to run, such as: train flow --task celeba64" >&2
    exit 2
fi
case $1 in
*.ipynb)                             # one kernel, which starts the processes of its training itself
    page=$1
    shift
    if [ "$gpus" -gt 1 ]; then set -- "$@" -p num_processes "$gpus"; fi
    if [ -n "$seed" ]; then set -- "$@" -p seed "$seed"; fi
    command=("$python" -m papermill "$page" "$(basename "$page" .ipynb)-$SLURM_JOB_ID.ipynb" "$@" --no-progress-bar)
    ;;
*)
    page=
    if [ -n "$seed" ]; then set -- "$@" -p "seed=$seed"; fi
    command=("$python")
    if [ $((nodes * gpus)) -gt 1 ]; then    # torchrun on every node; they meet at the first one
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        first=${hosts%%$'\n'*}
        command=(srun --ntasks-per-node=1 --wait=60 "$python" -m diffcourse.processes --nnodes "$nodes" --nproc-per-node "$gpus"
            --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-$restarts" --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))")
    fi
    command+=(-m diffcourse.cli "$@")
    ;;
esac

asked=0
# shellcheck disable=SC2329  # the trap below calls it
ask() {                              # the training saves and ends
    asked=$((asked + 1))
    echo "slurm.sh: asked to stop, restart $restarts" >&2
    if [ -n "$page" ]; then          # papermill would only die; its kernel saves
        pkill -TERM --parent "$child" || true
    else
        kill -TERM "$child" || true  # srun passes it on
    fi
}
trap ask USR1 TERM
"${command[@]}" &
child=$!
while :; do                          # a signal ends `wait` too: then wait again
    before=$asked code=0
    wait "$child" || code=$?
    if [ "$asked" -eq "$before" ]; then break; fi
done

if [ "$code" -ne 0 ] && { [ "$code" -eq "$again" ] || [ "$asked" -gt 0 ]; }; then
    if [ "$restarts" -ge "$most" ]; then
        echo "slurm.sh: started $restarts times again, which is enough (MAX_RESTARTS)" >&2
        exit 1
    fi
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
