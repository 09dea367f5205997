"""Submit a run with NeMo-Run: one task a node and no launcher of its own, so that exit codes survive."""

import nemo_run as run

CONFIG = "slurm/train.yaml"

resources = {"nodes": 2, "ntasks_per_node": 1, "gpus_per_node": 8, "time": "24:00:00"}
tunnel = run.LocalTunnel(job_dir="nemo_run_logs")
executor = run.SlurmExecutor(account="lm", partition="gpu", tunnel=tunnel, **resources)
run.run(run.Script(inline=f"exec megamask launch node {CONFIG}"), executor=executor, name="dense-8b", detach=True)
