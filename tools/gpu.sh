#!/usr/bin/env bash
# What only a GPU can say, in sections, each with its own limit of time:
#
#     bash tools/gpu.sh tests all sampling           a quarter of an hour
#     bash tools/gpu.sh cudnn qlora dequantise mfu   another (cudnn reads what `all` left in OUT)
#     bash tools/gpu.sh real                         another; smollm2/ must be there (make smollm2)
#
#     PY=python3 OUT=out/gpu LIMIT= (seconds for each command, in place of its own)
#
# OUT/gpu.md is written as it goes: a command that fails or runs out of time says so in its row, and
# the next one runs. OUT/LOG.log is what each said.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PY=${PY:-python3} OUT=${OUT:-out/gpu}
TABLE=$OUT/gpu.md
MAKE="make PY=$PY DEVICE=cuda"

row() { # row LOG SECONDS COMMAND…: runs it, and writes its last line into the table
  local log=$OUT/$1.log limit=${LIMIT:-$2} start=$SECONDS status said
  shift 2
  timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1
  status=$?
  said=$(grep -v '^$' "$log" | tail -n 1 | tr '\r|' '\n/' | tail -n 1)
  [ $status = 0 ] || said="failed, status $status: $said"
  [ $status != 124 ] || said="cut off after $limit s"
  echo "| $(basename "$log" .log) | \`${*//$'\n'/ }\` | $((SECONDS - start)) | $said |" | tee -a "$TABLE"
}

tests() { row tests 300 "$PY" -m pytest -q tests --ignore tests/parity --ignore tests/browser; }
quick() { row quick 120 $MAKE quick OUT="$OUT"; }
all() { row all 420 $MAKE all OUT="$OUT/all"; }
sampling() {
  row sampling 120 "$PY" -m tools.bench sampling --model "$OUT/all/sft" \
    --data "$OUT/all/world/heldout.jsonl"
}
cudnn() { # do changing shapes cost time because attention's cuDNN backend plans anew for each?
  local reward="sys.argv = ['reward.py', '--model', '$OUT/all/sft', '--steps', '100', '--overwrite',
    '--data', '$OUT/all/comparisons.jsonl', '--reference', '$OUT/all/world/sft.jsonl',
    '--out', '$OUT/reward']; runpy.run_path('reward.py', run_name='__main__')"
  for on in True False; do
    row "cudnn-$on" 60 "$PY" -c \
      "import runpy, sys, torch; torch.backends.cuda.enable_cudnn_sdp($on); $reward"
  done
}
qlora() {
  row qlora-7B 150 "$PY" -m tools.bench qlora7b
  row qlora-65B 300 "$PY" -m tools.bench qlora7b --size 65B --limit 48 --rounds 3
}
dequantise() { row dequantise 120 "$PY" -m tools.bench dequantise; }
mfu() {
  row mfu-135M 60 "$PY" -m tools.mfu --size 135M
  row mfu-1.1B 90 "$PY" -m tools.mfu --size 1.1B
  row mfu-1.1B-packed 90 "$PY" -m tools.mfu --size 1.1B --packed 8
}
real() { row real 840 $MAKE real FULL=1 OUT="$OUT"; }

NAMES="tests quick all sampling cudnn qlora dequantise mfu real"
[ $# -gt 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; echo "sections: $NAMES"; exit 2; }
for name in "$@"; do
  [[ " $NAMES " == *" $name "* ]] || { echo "gpu.sh: no section $name: $NAMES"; exit 2; }
done
mkdir -p "$OUT" || exit 2
[ -s "$TABLE" ] || printf '| what | command | seconds | said |\n| --- | --- | ---: | --- |\n' > "$TABLE"
row card 60 "$PY" -c \
  "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__, torch.version.cuda)"
for name in "$@"; do "$name"; done
