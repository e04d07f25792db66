#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in about eight minutes:
#   bench/gpu_check.sh [FOLDER]     PYTHON=... names an interpreter with torch, triton, pytest, pytest-benchmark, hypothesis
#                                   and matplotlib; FOLDER gets the logs and the report (else bench/results/<gpu>-<date>)
# Each part has a time limit and the parts do not depend on each other; a part that fails is named at the end.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export CONVFAST_NO_NATIVE=1  # the CPU library takes a minute to compile
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-$("$python" -c 'from bench import machine; print("bench/results/" + machine.slug(machine.describe("cuda")))')} || exit 1
mkdir -p "$out"
failed=()

part() {  # NAME SECONDS COMMAND...: an interrupt at the limit, so that pytest still reports
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout -k 20 -s INT "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 3 "$out/$name.log"
  [ $status -eq 0 ] || failed+=("$name ($([ $status -eq 124 ] && echo "stopped after $limit s" || echo "exit status $status"), $out/$name.log)")
}

ops="tests/test_lstm_gates.py tests/test_conv_lstm.py tests/test_conv1d.py tests/test_lstm.py"
cores=$(nproc)
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $((cores < 12 ? cores : 12))")  # compiling takes longest

part info 20 "$python" -m convfast.info
part tests 180 "$python" -m pytest -q $workers $ops tests/test_triton_*.py -k "triton and not compiled"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q $ops -k "triton and float32 and contiguous and (plain or lengths-)"
  done
else
  echo "== compute-sanitizer is not installed"
fi
part bench 220 "$python" -m pytest bench --device cuda --short -q --out "$out"

if [ ${#failed[@]} -ne 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed; report in $out"
