#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in about eight minutes:
#   bench/gpu_check.sh [FOLDER]     PYTHON=... names an interpreter with torch, triton, pytest, pytest-benchmark, hypothesis
#                                   and matplotlib; FOLDER gets the logs and the report (else bench/results/<gpu>-<date>)
# Each part has a time limit and the parts do not depend on each other; a part that fails is named at the end.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-$($python -c 'from bench import machine; print("bench/results/" + machine.slug(machine.describe("cuda")))')} || exit 1
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

small='plain or lengths or channels_17_5 or hidden_70 or features_33'
ops='tests/test_lstm_gates.py tests/test_conv_lstm.py tests/test_conv1d.py tests/test_lstm.py'

part info 30 "$python" -m convfast.info
part tests 150 "$python" -m pytest -q -x $ops tests/test_triton_*.py -k "triton and not compiled" --durations 10
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name regex:. \
      "$python" -m pytest -q -x $ops -k "triton and float32 and contiguous and ($small)"
  done
else
  echo "== compute-sanitizer is not installed"
fi
part bench 270 "$python" -m pytest bench --device cuda --short -q --out "$out"

if [ ${#failed[@]} -ne 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all passed; report in $out"
