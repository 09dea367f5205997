#!/bin/bash
# Prolog of slurm.conf: runs as root on each node before a job's processes. When it fails, Slurm drains the node and
# requeues the job. It calls no command of Slurm and takes a moment only.
#
#   Prolog=/etc/slurm/megamask/prolog.sh
set -u
fail() { echo "prolog: $1" >&2; exit 1; }

# shared memory that killed ranks of torch left behind; a node that runs several jobs at once keeps what is in use
find /dev/shm -maxdepth 1 -user "${SLURM_JOB_UID:?}" -name 'torch_*' -mmin +60 -delete 2>/dev/null
mountpoint -q /dev/shm || fail "/dev/shm is not mounted"
if [[ -n ${SLURM_JOB_GPUS:-} ]]; then
  IFS=, read -ra wanted <<< "$SLURM_JOB_GPUS"
  shown=$(timeout 20 nvidia-smi --query-gpu=uuid --format=csv,noheader 2>/dev/null | wc -l)
  (( shown >= ${#wanted[@]} )) || fail "$shown GPUs answer, the job was given ${#wanted[@]}"
fi
exit 0
