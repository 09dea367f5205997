#!/usr/bin/env bash
# gpu_check.sh OUT [--rehearse] [--within SECONDS] [LEG ...]
#
# Everything that a machine with a GPU has to show, in legs of their own: each has a limit, its own folder and a leg.json;
# none stops the next. A leg that passed is not run again unless it is named, so that the same command goes on where the
# last one ended. Results: OUT/summary.json, OUT/LEG/..., and all of it in OUT/results.tar.gz.
#
#   --rehearse        tiny shapes on the CPU; the figures are meaningless
#   --within SECONDS  begin only legs whose limit fits into what is left of this time
#   LEG ...           these legs only, finished or not
#
# It needs Python with torch, megatron-core, numpy, pyyaml and pytest, and for FP8 Transformer Engine. PYTHON names the
# interpreter (default python3). The leg `cli` needs what `megamask train` needs, and is skipped where that is missing.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
legs=(machine tests formats_1.7b formats_8b parts ablate te trace cli)

usage() { sed -n '2,14p' "$0" | cut -c3-; printf 'legs: %s\n' "${legs[*]}"; }

out='' is_rehearsal=0 within=1000000 named=()
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --rehearse) is_rehearsal=1 ;;
    --within) within=${2:?--within needs seconds}; shift ;;
    -*) echo "gpu_check.sh: $1: unknown option; allowed: --rehearse, --within SECONDS. Nothing was run." >&2; exit 2 ;;
    *)
      if [ -z "$out" ]; then out=$1
      elif [[ " ${legs[*]} " == *" $1 "* ]]; then named+=("$1")
      else echo "gpu_check.sh: $1: no such leg; allowed: ${legs[*]}. Nothing was run." >&2; exit 2; fi ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

export PY=${PYTHON:-python3} OUT=$out ROOT=$root PYTHONUNBUFFERED=1 NVTE_FRAMEWORK=pytorch
export PYTHONPATH="$root/platform:$root/pipelines:$root/tests:$root/tools${PYTHONPATH:+:$PYTHONPATH}"
if [ $is_rehearsal = 1 ]; then
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' REHEARSE=--rehearse FORMATS='--quick' SHAPE_17='' SHAPE_8=''
else
  export REHEARSE='' FORMATS='' SHAPE_17='--shape 1.7b' SHAPE_8='--shape 8b'
fi

# Seconds that a leg may take. On a GPU the sum is under 27 minutes; a rehearsal may share its processors with others.
limit_of() {
  local seconds
  case $1 in
    machine) seconds=75 ;; tests | formats_1.7b | formats_8b) seconds=240 ;; parts) seconds=130 ;; te) seconds=150 ;;
    ablate) seconds=300 ;; trace) seconds=110 ;; cli) seconds=120 ;;
  esac
  echo $((seconds * (is_rehearsal ? 8 : 1)))
}

# The commands of a leg, run by bash -e in the checkout with LEG_OUT as its folder. Status 77 is "skipped"; the last line
# of output says why.
bench='"$PY" tools/bench_gpu.py --json "$LEG_OUT/bench.json" --markdown "$LEG_OUT/bench.md" $FORMATS'
commands_of() {
  case $1 in
    machine) cat <<'EOF'
"$PY" -m pip list --format=freeze >"$LEG_OUT/packages.txt" 2>&1 || true
if command -v nvidia-smi >/dev/null; then nvidia-smi -q >"$LEG_OUT/nvidia-smi.txt" 2>&1 || true; fi
status=0
"$PY" -m megamask_pipelines.cli.main doctor --folder "$LEG_OUT" --json >"$LEG_OUT/doctor.txt" || status=$?
tail -n 1 "$LEG_OUT/doctor.txt" >"$LEG_OUT/doctor.json"
cat "$LEG_OUT/doctor.json"
if [ -n "$REHEARSE" ] && [ $status = 70 ]; then status=0; fi  # a laptop need not be fit
exit $status
EOF
      ;;
    tests) cat <<'EOF'
"$PY" -m pytest tests/gpu -q -p no:cacheprovider --maxfail=10 --junitxml="$LEG_OUT/junit.xml" $REHEARSE
EOF
      ;;
    formats_1.7b) echo "$bench"' $SHAPE_17 --only formats --limit-s 215' ;;
    formats_8b) echo "$bench"' $SHAPE_8 --only formats --limit-s 215 --blocks 2' ;;
    parts) echo "$bench"' $SHAPE_17 --only products,attention,head,host' ;;
    ablate) echo "$bench"' $SHAPE_17 --only ablate --limit-s 275 --blocks 2 --steps 4 --warmup 2' ;;
    trace) echo "$bench"' $SHAPE_17 --only trace' ;;
    te) cat <<'EOF'
CUDA_VISIBLE_DEVICES= "$PY" -m pytest tests/parallel/test_transformer_engine_layers.py -q -p no:cacheprovider \
  --junitxml="$LEG_OUT/substitute.xml"
if ! "$PY" -c 'import torch, transformer_engine.pytorch' 2>/dev/null; then
  echo 'the substitute passed; Transformer Engine is not installed, so none of its steps ran'
  exit 77
fi
kernels=library
if [ -n "$REHEARSE" ]; then kernels=emulated; fi
"$PY" tools/te_on_cpu/check.py --kernels "$kernels" --json "$LEG_OUT/cases.json"
EOF
      ;;
    cli) echo '"$PY" tools/gpu_cli_check.py "$LEG_OUT" $REHEARSE' ;;
  esac
}

# leg.json of one leg, and summary.json of all: LEG STATUS SECONDS LIMIT
record() {
  "$PY" - "$@" <<'EOF'
import datetime, json, os, pathlib, sys
leg, status, seconds, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
out = pathlib.Path(os.environ["OUT"])
log = (out / leg / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
states = {0: "passed", 77: "skipped", 124: "timed out", 137: "timed out"}
answer = {
    "leg": leg,
    "state": states.get(status, "failed"),
    "status": status,
    "seconds": seconds,
    "limit_s": limit,
    "ended": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    "is_rehearsal": bool(os.environ["REHEARSE"]),
    "last_line": log[-1][:500] if log else "",
}
(out / leg / "leg.json").write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
legs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/leg.json"))]
(out / "summary.json").write_text(json.dumps({"legs": legs}, indent=1) + "\n", encoding="utf-8")
print(f"{answer['state']:9} {leg} ({seconds} s of {limit} s): {answer['last_line'][:120]}", flush=True)
EOF
}

is_done() { grep -qs '"state": "passed"' "$out/$1/leg.json"; }

cd "$root" || exit 2
[ ${#named[@]} -gt 0 ] && chosen=("${named[@]}") || chosen=("${legs[@]}")
failures=0
for leg in "${chosen[@]}"; do
  limit=$(limit_of "$leg")
  if [ ${#named[@]} -eq 0 ] && is_done "$leg"; then echo "done      $leg"; continue; fi
  if [ $((SECONDS + limit)) -gt "$within" ]; then echo "left out  $leg: $limit s do not fit; call again"; continue; fi
  export LEG_OUT="$out/$leg"
  rm -rf "$LEG_OUT"
  mkdir -p "$LEG_OUT"
  began=$SECONDS
  timeout --kill-after=10 "$limit" bash -euo pipefail -c "$(commands_of "$leg")" >"$LEG_OUT/log.txt" 2>&1 </dev/null
  status=$?
  record "$leg" $status $((SECONDS - began)) "$limit"
  case $status in 0 | 77) ;; *) failures=$((failures + 1)) ;; esac
  (cd "$out" && tar --exclude='*/corpus' -czf results.part summary.json */ && mv results.part results.tar.gz)
done
[ $failures -eq 0 ]
