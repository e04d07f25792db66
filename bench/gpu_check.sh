#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in about fifteen minutes:
#   bench/gpu_check.sh [FOLDER]     PYTHON=... names an interpreter with torch, triton, ninja, pytest, pytest-benchmark,
#                                   hypothesis and matplotlib; FOLDER gets the logs and the report (else
#                                   bench/results/<gpu>-<date>). Without nvcc the parts of the cuda backend fail.
# Each part has a time limit and the parts do not depend on each other; a part that fails is named at the end.
# ONLY='build|tests' runs the parts whose names match, for machines that are lent for less time.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-$(CONVFAST_NO_NATIVE=1 "$python" -c 'from bench import machine; print("bench/results/" + machine.slug(machine.describe("cuda")))')} || exit 1
mkdir -p "$out"
failed=()

part() {  # NAME SECONDS COMMAND...: an interrupt at the limit, so that pytest still reports
  local name=$1 limit=$2
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  echo "== $name"
  timeout -k 20 -s INT "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 3 "$out/$name.log"
  [ $status -eq 0 ] || failed+=("$name ($([ $status -eq 124 ] && echo "stopped after $limit s" || echo "exit status $status"), $out/$name.log)")
}

ops="tests/test_lstm_gates.py tests/test_conv_lstm.py tests/test_conv1d.py tests/test_lstm.py"
cores=$(nproc)
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $((cores < 12 ? cores : 12))")  # compiling takes longest

# The schemas are in the CPU library, so it is built too.
part build 300 "$python" -c 'from convfast import native; native.load("cuda")'
part info 60 "$python" -m convfast.info
for backend in triton cuda; do
  part "tests-$backend" 180 "$python" -m pytest -q $workers $ops tests/test_${backend}_*.py -k "$backend and not compiled"
done
if command -v compute-sanitizer >/dev/null; then
  for backend in triton cuda; do
    for tool in memcheck racecheck synccheck; do
      part "$tool-$backend" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q $ops -k "$backend and float32 and contiguous and (plain or lengths-)"
    done
  done
else
  echo "== compute-sanitizer is not installed"
fi
part bench 300 "$python" -m pytest bench --device cuda --short -q --out "$out"

if [ ${#failed[@]} -ne 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed; report in $out"
