"""Submit a run with submitit: one task a node, each of which starts the node's ranks."""

import subprocess
import sys

import submitit

COMMAND = ["megamask", "launch", "node", "slurm/train.yaml"]


def node() -> None:
    """Run one node; its exit code is that of the job."""
    sys.exit(subprocess.run(COMMAND, check=False).returncode)


executor = submitit.AutoExecutor(folder="submitit_logs")
executor.update_parameters(nodes=2, tasks_per_node=1, gpus_per_node=8, cpus_per_task=96, timeout_min=1440)
job = executor.submit(node)
