#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in at most eight minutes:
#   bench/gpu_check.sh [FOLDER]     PYTHON=... names an interpreter with torch, triton, ninja, pytest, pytest-benchmark,
#                                   hypothesis and matplotlib; FOLDER gets the logs and the report (else
#                                   bench/results/<gpu>-<date>). Without nvcc the parts of the cuda backend fail.
# Parts have time limits, 470 s in all. One that fails keeps no other from running, and is named at the end.
# ONLY='build|tests' runs the parts whose names match; SCALE=3 gives all of them three times as long.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-$(CONVFAST_NO_NATIVE=1 "$python" -c 'from bench import machine; print("bench/results/" + machine.slug(machine.describe("cuda")))')} || exit 1
mkdir -p "$out"
failed=$out/failed.txt
rm -f "$failed"

part() {  # NAME SECONDS COMMAND...: an interrupt at the limit, so that pytest still reports
  local name=$1 limit=$(($2 * ${SCALE:-1})) status began=$SECONDS
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  # What runs in the background starts with interrupts ignored.
  timeout -k 10 -s INT "$limit" env --default-signal=INT "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '== %s (%d s)\n%s\n' "$name" $((SECONDS - began)) "$(tail -n 3 "$out/$name.log")"
  [ $status -eq 0 ] || echo "$name ($([ $status -eq 124 ] && echo "stopped after $limit s" || echo "exit status $status"), $out/$name.log)" >>"$failed"
}

ops="tests/test_lstm_gates.py tests/test_conv_lstm.py tests/test_conv1d.py tests/test_lstm.py"
cores=$(nproc)
workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $((cores / 2 < 8 ? (cores + 1) / 2 : 8))")  # compiling takes longest

# The schemas are in the CPU library, so it is built too.
part build 120 "$python" -c 'from convfast import native; native.load("cuda")'
part info 20 "$python" -m convfast.info
for backend in triton cuda; do
  part "tests-$backend" 120 "$python" -m pytest -q $workers $ops tests/test_${backend}_*.py -k "$backend and not compiled" &
done
wait
if command -v compute-sanitizer >/dev/null; then
  for backend in triton cuda; do
    for tool in memcheck racecheck synccheck; do
      part "$tool-$backend" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q $ops -k "$backend and match_oracle and not layouts and (frame_2d-c_peephole or plain or everything)" &
    done
  done
  wait
else
  echo "== compute-sanitizer is not installed"
fi
part bench 160 "$python" -m pytest bench --device cuda --short -q --out "$out"

if [ -s "$failed" ]; then
  echo FAILED:
  cat "$failed"
  exit 1
fi
echo "all passed; report in $out"
