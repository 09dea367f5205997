"""The sharded state on disk: canonical weights and Adam's moments, each rank writing and reading only its own ranges.

A checkpoint holds, for each canonical tensor NAME, the float32 tensors `NAME`, `optimizer.exp_avg.NAME` and
`optimizer.exp_avg_sq.NAME`. Names and shapes do not depend on the layout, so any layout loads what any other wrote, and
no rank gathers another rank's part (law 8).

    slices        which ranges of which canonical tensors this rank owns
    host_copy     a copy of them in host memory, written while training goes on
    share         what one rank writes, and the check of all files before the commit
    safetensors   one file a rank, and the reader that fills any slice from any set of files
    index         the headers of all files: where every part of every tensor lies (no torch)
    restore       loading on resume, and the weights alone
"""
