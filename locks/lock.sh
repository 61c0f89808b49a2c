#!/bin/sh
# Renews both lists. Arguments go to uv: --upgrade takes newer versions than those listed now.
set -eu
cd "$(dirname "$0")/.."

PATH="$PATH:$PWD/.venv/uv/bin"
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"; fi

# A wheel folder may hold a +cpu torch, so the GPU list never sees it; uv parts several places by commas, pip by spaces.
links="${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | tr ' ' ',')}"
unset UV_FIND_LINKS

pin() {
    echo "lock: locks/$1.txt"
    list="$1"
    shift
    uv pip compile --quiet pyproject.toml --python-version 3.11 --extra "$list" --extra dev \
        --override locks/overrides.txt --no-annotate --no-header --generate-hashes -o "locks/$list.txt" "$@" >/dev/null
}

(
    if [ -n "$links" ]; then export UV_FIND_LINKS="$links"; else set -- --torch-backend cpu "$@"; fi
    pin cpu --override locks/cpu-overrides.txt "$@"
)
pin gpu "$@"

# The wheels of torch for the CPU are not on the package index: a folder of wheels has only the one of this machine.
awk '/^[^ ]/ { is_torch = /^torch==/ } is_torch && /--hash/ { next } is_torch { sub(/ \\$/, "") } 1' \
    locks/cpu.txt >locks/cpu.txt.part
mv locks/cpu.txt.part locks/cpu.txt
