#!/bin/bash
# Looks at one node before a job: preflight.sh FOLDER [GPUS]. On all nodes of an allocation:
#
#   srun --ntasks-per-node=1 slurm/preflight.sh /shared/runs 8
#
# FOLDER is where runs are kept, GPUS the number of GPUs that the node must show (0: none are looked for).
# Ends with 0, with 74 where the storage fails, with 70 where the node does; the last line says what is wrong.
set -u
folder=${1:?usage: preflight.sh FOLDER [GPUS]} gpus=${2:-0}
node=${SLURMD_NODENAME:-$(hostname)}
fail() { echo "preflight: $node: $2" >&2; exit "$1"; }

probe=$folder/.preflight-$node-$$
trap 'rm -f "$probe"' EXIT
dd if=/dev/zero of="$probe" bs=1M count=1 conv=fsync status=none 2>/dev/null || fail 74 "$folder cannot be written"
written=$(stat -c %Y "$probe") now=$(date +%s)
(( now - written <= 30 && written - now <= 30 )) || fail 70 "its clock and that of $folder differ by more than 30 s"
free=$(df --output=avail -BG "$folder" | tail -n 1)
(( ${free//[!0-9]/} >= 1 )) || fail 74 "$folder has less than 1 GiB free"
shm=$(df --output=avail -BM /dev/shm 2>/dev/null | tail -n 1)
(( ${shm//[!0-9]/} >= 64 )) || fail 70 "/dev/shm has less than 64 MiB free"
if (( gpus > 0 )); then
  shown=$(timeout 15 nvidia-smi --query-gpu=uuid --format=csv,noheader 2>/dev/null | wc -l)
  (( shown >= gpus )) || fail 70 "$shown GPUs answer, $gpus are needed"
  broken=$(timeout 15 nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits | grep -c '^[1-9]')
  (( broken == 0 )) || fail 70 "$broken GPUs have uncorrected memory errors"
fi
echo "preflight: $node: well"
