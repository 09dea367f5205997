"""The verdict file and the code that a job's nodes agree on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megamask.launch.verdict import (
    Verdict,
    job_code,
    launch_folder,
    read_codes,
    read_meeting,
    read_verdict,
    write_codes,
    write_meeting,
    write_verdict,
)


def test_verdict_is_one_line_that_bash_reads_without_a_child_process(tmp_path: Path) -> None:
    folder = launch_folder(tmp_path / "run", "slurm-7.1")
    assert folder == tmp_path / "run.launch" / "slurm-7.1"
    assert read_verdict(folder) is None
    verdict = Verdict(code=75, step=120, attempt=3, node="node-7")
    write_verdict(folder, verdict)
    assert read_verdict(folder) == verdict
    script = f'read -r code step attempt node < {folder}/verdict; echo "$code|$step|$attempt|$node"'
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout == "75|120|3|node-7\n"


def test_meeting_and_codes_travel_through_the_folder(tmp_path: Path) -> None:
    assert read_meeting(tmp_path) is None and read_codes(tmp_path, 1) is None
    write_meeting(tmp_path, "node1", 4711)
    write_codes(tmp_path, 1, [0, 75])
    assert read_meeting(tmp_path) == ("node1", 4711)
    assert read_codes(tmp_path, 1) == [0, 75]
    (tmp_path / "verdict").write_text("75 1")
    (tmp_path / "node-2").write_text("{")
    assert read_verdict(tmp_path) is None and read_codes(tmp_path, 2) is None


@pytest.mark.parametrize(
    ("own", "others", "recorded", "code"),
    [
        (0, [[0]], [], 0),
        (75, [[75]], [], 75),
        (75, [None], [], 1),
        (0, [None], [], 1),
        (71, [None], [], 71),
        (1, [[66]], [], 66),
        (1, [[1]], [66], 66),
        (2, [None], [], 2),
        (93, [[1]], [], 93),
        (75, [[71]], [], 71),
        (1, [[-9]], [], 1),
    ],
)
def test_job_leaves_with_the_most_specific_code_of_all_nodes(
    own: int, others: list[list[int] | None], recorded: list[int], code: int
) -> None:
    assert job_code(own, others, recorded) == code
