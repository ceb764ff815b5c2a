#!/usr/bin/env bash
# What only a GPU can say, in sections, each command with its own limit of time. A quarter of an hour
# with the start of a machine holds any one of
#
#     bash tools/gpu.sh graph startup all sampling
#     bash tools/gpu.sh qlora dequantise mfu attention
#     bash tools/gpu.sh tests quick
#     bash tools/gpu.sh sft lora
#     bash tools/gpu.sh dpo compiled cudnn
#     bash tools/gpu.sh qlora65 memory
#     bash tools/gpu.sh real
#
#     PY=python3 OUT=out/gpu LIMIT= (seconds for each command, in place of its own)
#
# Sections at SmolLM2's shape read smollm2/ (make smollm2). Where the peers (requirements-dev.txt)
# are not installed, tools.bench runs ours alone. OUT/gpu.md is written as it goes: a command that
# fails or runs out of time says so in its row, and the next one runs. OUT/LOG.log is what each said.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PY=${PY:-python3} OUT=${OUT:-out/gpu}
TABLE=$OUT/gpu.md
MAKE="make --no-print-directory PY=$PY DEVICE=cuda"
BENCH="$PY -m tools.bench"
WORLD=$OUT/all/world

row() { # row LOG SECONDS COMMAND…: runs it, and writes its last line, or KEEP lines, into the table
  local log=$OUT/$1.log limit=${LIMIT:-$2} start=$SECONDS status said
  shift 2
  timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1
  status=$?
  said=$(tr '\r|' '\n/' < "$log" | grep -v '^ *$' | tail -n "${KEEP:-1}" | paste -s -d ';')
  [ $status = 0 ] || said="failed, status $status: ${said##*;}"
  [ $status != 124 ] || said="cut off after $limit s;${said#*: }"
  echo "| $(basename "$log" .log) | \`${*//$'\n'/ }\` | $((SECONDS - start)) of $limit | ${said//;/; } |" |
    tee -a "$TABLE"
}

made() { # made FILE TARGET: what a section reads, where no earlier one has made it
  [ -e "$OUT/all/$1" ] || row "made-$2" 120 $MAKE "$2" OUT="$OUT/all"
}

startup() { # of a process with a GPU; how many `all` and `quick` start, whose seconds hold it
  local all quick
  all=$($MAKE -n all OUT="$OUT/all" | grep -c "^$PY ")
  quick=$($MAKE -n quick OUT="$OUT" | grep -c "^$PY ")
  row startup 60 "$PY" -c "import subprocess, sys, time
one = [sys.executable, '-c', 'import sft, torch, torch._dynamo; torch.zeros(1).cuda()']
for times in (1, 3):
    start = time.time()
    for _ in range(times): subprocess.run(one, check=True)
took = (time.time() - start) / 3
print(f'{took:.1f} s a process: {took * $all:.0f} s of all, {took * $quick:.0f} s of quick')"
}
tests() { # the two halves side by side
  row tests-first 420 $MAKE test-first &
  row tests-second 420 $MAKE test-second
  wait
}
graph() { row graph 60 "$PY" -m pytest -q tests/test_graph.py; }
memory() { row memory 240 "$PY" -m pytest -q -rP tests/test_memory.py -k on_a_gpu; }
quick() { row quick 120 $MAKE quick OUT="$OUT"; }
all() { row all 240 $MAKE all OUT="$OUT/all"; }
real() { row real 720 $MAKE real FULL=1 OUT="$OUT"; }
cudnn() { # do changing shapes cost time because attention's cuDNN backend plans anew for each?
  local reward="torch.backends.cuda.enable_cudnn_sdp = print  # ours turns it off
sys.argv = ['reward.py', '--model', '$OUT/all/sft', '--steps', '100', '--overwrite',
    '--data', '$OUT/all/comparisons.jsonl', '--reference', '$WORLD/sft.jsonl',
    '--out', '$OUT/reward']; runpy.run_path('reward.py', run_name='__main__')"
  made comparisons.jsonl comparisons
  for on in True False; do
    row "cudnn-$on" 60 "$PY" -c \
      "import runpy, sys, torch; torch.backends.cuda.enable_cudnn_sdp($on)
$reward"
  done
}

sampling() {
  local KEEP=3
  made sft sft
  row sampling-embedded 60 $BENCH sampling --model "$OUT/all/sft" --data "$WORLD/heldout.jsonl"
  row sampling-135M 240 $BENCH sampling --data "$WORLD/heldout.jsonl" --batch 256 --tokens 128 \
    --rounds 4
}
sft() {
  local KEEP=3
  made world world
  row sft-135M 120 $BENCH sft --data "$WORLD/sft.jsonl" --batch 64
  row sft-1.1B 120 $BENCH sft --size 1.1B --rounds 4
}
lora() {
  local KEEP=3
  made world world
  row lora-135M 120 $BENCH lora --data "$WORLD/sft.jsonl" --batch 64
  row lora-1.1B 120 $BENCH lora --size 1.1B --rounds 4
}
dpo() {
  local KEEP=3
  made comparisons.jsonl comparisons
  row dpo-135M 120 $BENCH dpo --data "$OUT/all/comparisons.jsonl" --batch 32
  row dpo-1.1B 120 $BENCH dpo --size 1.1B --batch 4 --rounds 4
}
ONE="--batch 1 --length 512 --rank 64 --checkpointing" # as in QLoRA's paper
qlora() {
  local KEEP=3
  row qlora-7B 150 $BENCH qlora --size 7B $ONE
  row qlora-7B-eager 90 $BENCH qlora --size 7B $ONE --compile off
}
qlora65() { row qlora-65B 300 $BENCH qlora --size 65B $ONE --limit 48 --rounds 3; }
dequantise() {
  local KEEP=20
  row dequantise 60 $BENCH dequantise
}
mfu() {
  row mfu-135M 60 "$PY" -m tools.mfu --size 135M --compile off
  row mfu-1.1B 60 "$PY" -m tools.mfu --size 1.1B --compile off
  row mfu-1.1B-packed 60 "$PY" -m tools.mfu --size 1.1B --packed 8 --compile off
}
compiled() {
  row compiled-1.1B 120 "$PY" -m tools.mfu --size 1.1B --compile on
  row compiled-1.1B-packed 120 "$PY" -m tools.mfu --size 1.1B --packed 8 --compile on
}
attention() {
  row attention-bf16 150 "$PY" -m tools.attention --sizes 1.1B,135M --dtypes bfloat16
  row attention-fp32 90 "$PY" -m tools.attention --sizes 135M --dtypes float32
}

NAMES="startup tests quick all sampling sft lora dpo qlora qlora65 dequantise mfu compiled attention"
NAMES="$NAMES graph memory cudnn real"
[ $# -gt 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; echo "sections: $NAMES"; exit 2; }
for name in "$@"; do
  [[ " $NAMES " == *" $name "* ]] || { echo "gpu.sh: no section $name: $NAMES"; exit 2; }
done
mkdir -p "$OUT" || exit 2
[ -s "$TABLE" ] || printf '| what | command | seconds | said |\n| --- | --- | ---: | --- |\n' > "$TABLE"
row card 30 "$PY" -c \
  "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__, torch.version.cuda)"
for name in "$@"; do "$name"; done
