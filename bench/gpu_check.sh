#!/usr/bin/env bash
# All that is to be seen on a machine with a GPU, in at most eight minutes:
#   bench/gpu_check.sh [FOLDER]     PYTHON=... names an interpreter with torch, triton, ninja, pytest, pytest-benchmark,
#                                   hypothesis and matplotlib, and best of all pytest-xdist and pytest-timeout; FOLDER gets
#                                   the log and the reports (else bench/results/<gpu>-<date>). Without nvcc the build
#                                   fails, and the tests of the cuda backend are not run, which is a failure, too.
# Parts have time limits, and together eight minutes: what is left of them is the last parts' limit. One that fails keeps
# no other from running, and is named at the end; a benchmark that is stopped reports what it has.
# ONLY='build|tests' runs the parts whose names match; SCALE=3 gives all of them three times as long, and float16 its tests.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-$(CONVFAST_NO_NATIVE=1 "$python" -c 'from bench import machine; print("bench/results/" + machine.slug(machine.describe("cuda")))')} || exit 1
mkdir -p "$out"
log=$out/gpu_check.log
failed=$(mktemp)
grace=25  # seconds from the interrupt to the kill, for pytest to report in
: >"$log"

part() {  # NAME SECONDS COMMAND...: an interrupt at the limit, so that pytest still reports
  local name=$1 limit=$(($2 * ${SCALE:-1})) left=$((480 * ${SCALE:-1} - SECONDS - grace)) status began=$SECONDS said
  shift 2
  [[ $name =~ ${ONLY:-.} ]] || return 0
  [ $left -gt 0 ] || { echo "$name (not run: no time left)" >>"$failed"; return 1; }
  [ $limit -le $left ] || limit=$left
  said=$(mktemp)
  # What runs in the background starts with interrupts ignored.
  timeout -k $grace -s INT "$limit" env --default-signal=INT "$@" >"$said" 2>&1
  status=$?
  local stopped=$([[ $status == 124 || $status == 137 && $((SECONDS - began)) -ge $limit ]] && echo "stopped after $limit s")
  [[ $status -eq 0 || $stopped && $name == bench* && -s ${!#}/report.json ]] ||
    echo "$name (${stopped:-exit status $status})" >>"$failed"
  {  # parts that run side by side do not mix
    flock 9
    { echo "######## $name ($((SECONDS - began)) s, exit status $status): $*"; cat "$said"; } >>"$log"
    printf '== %s (%d s)\n%s\n' "$name" $((SECONDS - began)) "$(tail -n 3 "$said")"
  } 9>>"$log"
  rm "$said"
  return $status
}
has() { "$python" -c "import $1" 2>/dev/null; }

ops="tests/test_lstm_gates.py tests/test_conv_lstm.py tests/test_conv1d.py tests/test_lstm.py tests/test_gpu_graphs.py tests/test_tf32.py"
# Compiling takes longest. A test that hangs, or whose kernel faults, ends its worker, and another one goes on; each begins
# with a part of its own, so that all files have their turn.
workers() { has xdist && echo "-n $1 --dist worksteal"; }
hangs=$(has xdist && has pytest_timeout && echo "--timeout 60 --timeout-method thread")
without_gpu="--deselect tests/test_triton_compiled.py --deselect tests/test_triton_interpreter.py --deselect tests/test_cuda_compiled.py --deselect tests/test_cuda_emulator.py"
# Fakes are compared with the CPU's ops everywhere; here each comparison would compile kernels of its own.
wanted_triton="triton and not fakes_agree$([ "${SCALE:-1}" = 1 ] && echo ' and (bfloat16 or not float16)')"

library() { part "build-$1" 120 "$python" -c "from convfast import native; print(native.build('$1'))"; }
# The schemas are in the CPU library.
library cpu & cpu=$!
library cuda & cuda=$!
part compile-triton 120 env CONVFAST_NO_NATIVE=1 nice -n 10 "$python" -m bench.warm_up &
built=
wait $cpu && wait $cuda && built=yes || export CONVFAST_NO_NATIVE=1  # else every process would build again; the log says why it failed
wait
part info 10 "$python" -m convfast.info
part tests-triton 130 "$python" -m pytest -v $(workers $(nproc)) $hangs $without_gpu tests/test_triton_*.py $ops -k "$wanted_triton" &
if [ "$built" ]; then
  part tests-cuda 130 "$python" -m pytest -v $(workers 4) $hangs $without_gpu tests/test_cuda_*.py tests/test_nn_lstm.py $ops -k "cuda and not fakes_agree" &
elif [[ tests-cuda =~ ${ONLY:-.} ]]; then
  echo "tests-cuda (not run: a library was not built)" >>"$failed"
fi
wait
# Libraries ask for functions that a driver may not have, which is no error of a kernel.
sanitizer="compute-sanitizer --error-exitcode 9 --report-api-errors no --target-processes application-only"
if ! command -v compute-sanitizer >/dev/null; then
  echo "== compute-sanitizer is not installed"
elif ! timeout -k 5 25 $sanitizer "$python" -c 'import torch; torch.ones(1, device="cuda")' >>"$log" 2>&1; then
  echo "== compute-sanitizer does not get through a tensor of ones:"
  tail -n 5 "$log"
else
  # Small cases of every kernel. Each tensor is an allocation of its own, so that a read past its end shows.
  small_triton="triton and match_oracle and not layouts and (frame_2d-c_peephole or plain or everything) and (bfloat16 or not float16)"
  small_cuda="test_tiles_match_oracle and channels_24_lengths and not reverse or 128x64-lengths or one_buffer-float32-1"
  small_cuda+=" or plain and (registers-float32 or shared_memory or cluster_of_2-bfloat16 or cluster_of_8_one_buffer)"
  # cuDNN and the oracle run at their own speed.
  of_triton=$(printf -- '--kernel-name kns=%s ' _step _recurrence _partial_sums _zero_past conv_kernel weight_kernel dpre_kernel fold_kernel groups_kernel _forward _backward)
  for tool in memcheck racecheck $([ "${SCALE:-1}" = 1 ] || echo synccheck); do
    check="env PYTORCH_NO_CUDA_MEMORY_CACHING=1 $sanitizer --tool $tool"
    part "$tool-triton" 60 $check $of_triton "$python" -m pytest -v $ops -k "$small_triton" &
    part "$tool-cuda" 60 $check --kernel-name kns=convfast "$python" -m pytest -v tests/test_cuda_*.py $without_gpu -k "$small_cuda" &
  done
  wait
fi
# All rows without torch.compile first: compiling one opponent may take as long as all of them.
part bench 75 "$python" -m pytest bench --device cuda --short --no-compile -q --out "$out"
part bench-compiled 60 "$python" -m pytest bench --device cuda --short -q --out "$out/compiled"
rm -f "$out"/compiled/*.png  # they show what those of the other report do

if [ -s "$failed" ]; then
  echo FAILED:
  tee -a "$log" <"$failed"
  exit 1
fi
echo "all passed; reports and $log in $out"
