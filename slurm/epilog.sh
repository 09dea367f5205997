#!/bin/bash
# EpilogSlurmctld of slurm.conf: runs on the controller as SlurmUser after each job, also before a requeued one starts
# again. A megamask job that ended with 17 or 70 names the node it suspects in its comment; this drains that node, so
# that an operator looks at it. No other job is touched.
#
#   EpilogSlurmctld=/etc/slurm/megamask/epilog.sh
set -u
comment=${SLURM_JOB_COMMENT:-}
[[ $comment =~ ^megamask:\ exit\ code\ (17|70),\ suspect\ ([A-Za-z0-9_.-]+)$ ]] || exit 0
scontrol update "NodeName=${BASH_REMATCH[2]}" State=DRAIN \
  "Reason=megamask: job ${SLURM_JOB_ID:-?} ended with ${BASH_REMATCH[1]} here"
