#!/bin/sh
# run.sh [--rehearse] [STEP ...]: unpacks the kit and runs its steps on this machine's GPU, each within its own time, with one log a step
# and a summary in $OUT (default: out, beside the parts). Wants coreutils and a python3 with torch. Steps: doctor tests ranks bench
# memcheck racecheck; --rehearse runs what needs no GPU, emulated. Variables: STEP_SECONDS (e.g. BENCH_SECONDS=200), BENCH_ARGS,
# SANITIZED (test files of the sanitizer).
set -u
start=$(cd "$(dirname "$0")" && pwd)
kit=$(dirname "$start")
rehearse=
[ "${1:-}" = --rehearse ] && rehearse=1 && shift
all="doctor tests ranks bench memcheck racecheck"
steps=${*:-$all}
OUT=${OUT:-$kit/out}
tree=$kit/unpacked
mkdir -p "$OUT"
begun=$(date +%s)
sh "$start/unpack.sh" "$tree" || exit 1
export PATH="$tree/.node/bin:$PATH:/usr/local/cuda/bin"
export VIADUCT_BENCH_PYTHON="${VIADUCT_BENCH_PYTHON:-$(command -v python3)}"
# NVIDIA's libraries: the packed NCCL first, then those of Python's wheels.
VIADUCT_CUDA_LIBRARIES=$("$VIADUCT_BENCH_PYTHON" - "$tree" "${VIADUCT_CUDA_LIBRARIES:-}" <<'PYTHON'
import glob
import os
import site
import sys
import sysconfig

tree, named = sys.argv[1:]
places = dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])
folders = glob.glob(os.path.join(tree, ".deps/cuda/nvidia/*/lib"))
folders += [folder for place in places for folder in sorted(glob.glob(os.path.join(place, "nvidia/*/lib")))]
print(":".join(filter(None, [named, *folders])))
PYTHON
)
export VIADUCT_CUDA_LIBRARIES
failed=0

note() { printf '%-10s %s\n' "$1" "$2" | tee -a "$OUT/summary.txt"; }

# limited NAME SECONDS COMMAND...: a log keeps its last 8 MB.
limited() {
  name=$1 limit=$2
  shift 2
  from=$(date +%s)
  (cd "$tree" && timeout -k 10 "$limit" "$@") >"$OUT/$name.log" 2>&1
  rc=$?
  if [ "$(stat -c %s "$OUT/$name.log")" -gt 8000000 ]; then
    tail -c 8000000 "$OUT/$name.log" >"$OUT/cut" && mv "$OUT/cut" "$OUT/$name.log"
  fi
  case $rc in
  0) told=passed ;;
  124 | 137) told="ended at its limit" failed=1 ;;
  *) told="FAILED ($rc)" failed=1 ;;
  esac
  note "$name" "$told, $(($(date +%s) - from)) s of $limit"
  [ $rc = 0 ] && [ "$name" != bench ] || tail -n "${TAIL:-40}" "$OUT/$name.log"
}

vitest() { echo node node_modules/vitest/vitest.mjs run --reporter=default; }

sanitizer() {
  if [ -n "$rehearse" ]; then
    note "$1" "left out: a rehearsal has no GPU"
  elif ! command -v compute-sanitizer >/dev/null; then
    note "$1" "left out: no compute-sanitizer here"
    failed=1
  else
    # One process of tests, so that what it finds is in one log.
    limited "$1" "$2" env VIADUCT_TEST_GPU=1 compute-sanitizer --tool "$1" --target-processes all --error-exitcode 99 \
      --print-limit 50 $(vitest) --no-file-parallelism ${SANITIZED:-test/cuda/ops.test.ts test/cuda/kernels.test.ts}
  fi
}

rm -f "$OUT/summary.txt"
note unpacked "$(($(date +%s) - begun)) s, $(cat "$tree/packed.json")"
for step in $steps; do
  case $step in
  doctor) limited doctor "${DOCTOR_SECONDS:-60}" node --import tsx lib/cli/main.ts doctor ;;
  tests)
    if [ -n "$rehearse" ]; then
      limited tests "${TESTS_SECONDS:-300}" $(vitest) ${REHEARSED:-test/cuda/ops.test.ts test/cuda/routing.test.ts test/cuda/optimizer.test.ts}
    else # what tests the emulation, or rehearses on it, says nothing about a GPU
      limited tests "${TESTS_SECONDS:-300}" env VIADUCT_TEST_GPU=1 $(vitest) test/cuda --exclude test/cuda/emulation.test.ts \
        --exclude test/cuda/cudnnPlans.test.ts --exclude test/cuda/bench.test.ts
    fi
    ;;
  ranks)
    if [ -n "$rehearse" ]; then
      note ranks "left out: a rehearsal has no GPU"
    elif [ -e "$tree/.unpacked-nccl" ]; then
      limited ranks "${RANKS_SECONDS:-180}" env VIADUCT_TEST_GPU=1 NCCL_MULTI_RANK_GPU_ENABLE=1 $(vitest) \
        test/cuda/training.test.ts test/cuda/collectives.test.ts
    else
      note ranks "left out: the kit's NCCL is not here (several GPUs: tests has them)"
    fi
    ;;
  bench)
    if [ -n "$rehearse" ]; then
      limited bench "${BENCH_SECONDS:-300}" node --import tsx bench/cuda.ts --rehearse --results "$OUT" ${BENCH_ARGS:-}
    else
      limited bench "${BENCH_SECONDS:-420}" node --import tsx bench/cuda.ts --results "$OUT" ${BENCH_ARGS:---steps 20}
    fi
    ;;
  memcheck) sanitizer memcheck "${MEMCHECK_SECONDS:-180}" ;;
  racecheck) sanitizer racecheck "${RACECHECK_SECONDS:-180}" ;;
  *)
    echo "run.sh: expected steps among $all, got $step" >&2
    exit 2
    ;;
  esac
done
echo
cat "$OUT/summary.txt"
exit $failed
