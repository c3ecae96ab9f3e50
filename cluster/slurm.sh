#!/bin/bash
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 --rdzv-backend c10d \
    --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" train.py "$@" --resume
