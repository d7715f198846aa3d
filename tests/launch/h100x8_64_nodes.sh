# estimate: 512 ranks, 8 to a sequence (parallel.strands=1 parallel.context=8), with 1 sequence a step, 16,384 bases at a time each; 7.73M parameters, 34 MB sent a step; unmeasured estimate for H100: 0.015 s a step, 3.0 GB
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --constraint=ib
#SBATCH --cpus-per-task=12
#SBATCH --exclude='bad[1-2]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=ph-131k
#SBATCH --mail-type=END
#SBATCH --mem=0
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/home/lab/runs/ph-131k/logs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=week
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
module load cuda
export NCCL_SOCKET_IFNAME='^lo,docker'
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_DEBUG=WARN
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export PYTHONPATH=/home/lab/runs/ph-131k/code${PYTHONPATH:+:$PYTHONPATH}
RUN=/home/lab/runs/ph-131k
[ -e "$RUN/STOP" ] && exit
trap 'python -m launch.requeue "$RUN" TERM' TERM  # the time may be up while the processes still save
srun() { command srun "$@" & while wait $!; s=$?; kill -0 $! 2>/dev/null; do :; done; return $s; }  # traps need wait

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /home/lab/runs/ph-131k/logs/%j_%t_log.out --kill-on-bad-exit=1 --container-image=caduceus.sqsh python -u -m submitit.core._submit /home/lab/runs/ph-131k/logs


# teardown
status=$?
trap '' TERM
python -m launch.requeue "$RUN" $status
