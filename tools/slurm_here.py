#!/usr/bin/env python3
"""Run a real Slurm of three nodes on this machine until Ctrl-C, to try jobs without a cluster.

Needs root and the packages slurm-wlm, munge, iproute2 and util-linux. Each node has a network of its own; nothing in
/etc is touched. Partition `low` is the default, and `high` preempts it.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from support.slurm_cluster import slurm_cluster, why_not  # noqa: E402


def main() -> int:
    """Start the cluster, print how to reach it, and wait."""
    if (reason := why_not()) is not None:
        print(f"no Slurm can be started: {reason}", file=sys.stderr)
        return 2
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with tempfile.TemporaryDirectory(prefix="slurm-here-") as folder:
        Path(folder).chmod(0o755)
        with slurm_cluster(Path(folder) / "cluster", kill_wait=30) as cluster:
            print(f"export SLURM_CONF={cluster.base}/slurm.conf", flush=True)
            signal.sigwait(signals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
