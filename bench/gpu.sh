#!/usr/bin/env bash
# Benches and tests on a machine with a GPU, in at most 8 minutes: bash bench/gpu.sh [FOLDER]
#
# Needs torch, transformers and peft, and the packages of trimtab's core; parts that need vLLM run where it is installed. A part
# that fails or takes too long does not stop the others. The folder gets a JSON file and a log of each part, and the page gpu.md.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu-results}"
python="${PYTHON:-python}"
export PYTHONPATH="$PWD/platform${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

# part NAME SECONDS COMMAND...
part() {
    local name="$1" seconds="$2" status=0
    shift 2
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "$name: exit code $status"
    echo "$name $status" >>"$out/parts.txt"
}

rm -f "$out/parts.txt"
part align-1b 50 "$python" bench/align.py --quick --shape 1b --device cuda --json "$out/align-1b.json"
part align-7b 70 "$python" bench/align.py --quick --shape 7b --device cuda --json "$out/align-7b.json"
part align-13b 90 "$python" bench/align.py --quick --shape 13b --device cuda --json "$out/align-13b.json"
part heads 60 "$python" bench/heads.py --device cuda --json "$out/heads.json"
part tests 40 "$python" -m pytest -q -p no:cacheprovider tests/unit/model/test_layer_transforms.py
part capture 160 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/integration/engine/test_capture.py
"$python" bench/peers/gpu_page.py "$out"
