"""A stand-in for a training process: `python -m support.rank_script SCRIPT`, where SCRIPT runs with `rank` set."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    exec(compile(sys.argv[1], "rank_script", "exec"), {"rank": int(os.environ["RANK"]), "os": os})
