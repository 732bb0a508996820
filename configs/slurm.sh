#!/usr/bin/env bash
# Any qmx command on several machines under SLURM, which goes on by itself after a preemption:
#
#   sbatch configs/slurm.sh --config=configs/imagenet.py --workdir=/shared/runs/imagenet --config.data.path=...
#
# Change the lines below to your cluster, or override them: sbatch --nodes=2 --gpus-per-node=4 configs/slurm.sh ...
# The workdir must be on a file system that all machines see.
#SBATCH --job-name=qmx
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the time is up every process gets SIGTERM: it ends its step, saves, and returns 75. So it does where a
# target that is elsewhere does not answer: after a hundred times somebody should look at it.
#SBATCH --signal=TERM@300

srun --kill-on-bad-exit=0 "${PYTHON:-python}" -m qmx.main "$@"
status=$?
if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
