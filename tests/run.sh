#!/usr/bin/env bash
# Runs every test of the project on a fresh Debian or Ubuntu with Rust and Python >= 3.11. Installs what it needs and says so.
# Everything it makes stays below target/. Ends with the runners' own summary lines; stops at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
say() { printf '\n==> [%4d s] %s\n' "$((SECONDS - started))" "$*"; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
need=()
command -v cc >/dev/null || need+=(gcc libc6-dev)
python=${DAGORAMA_PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $python is older: set DAGORAMA_PYTHON"; exit 1; }
"$python" -c 'import ensurepip' 2>/dev/null || need+=(python3-venv)
if [ ${#need[@]} -gt 0 ]; then
    say "installing system packages: ${need[*]}"
    as_root apt-get update -q </dev/null
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q "${need[@]}" </dev/null
fi

venv=target/venv
if [ ! -x "$venv/bin/pytest" ]; then
    say "installing Python tools into $venv (pytest, mypy, pyright, ruff)"
    mkdir -p target
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check 'mypy>=1.11' 'pyright[nodejs]' ruff pytest pytest-timeout
fi
export DAGORAMA_PYTHON=$PWD/$venv/bin/python
export PYTHONPATH=$PWD/python/src

say "formatting and lints"
cargo fmt --all --check
cargo clippy --workspace --all-targets -q -- -D warnings

say "building everything that is tested"
cargo build --workspace --all-targets

say "Rust tests, with what each suite counted"
cargo test --workspace -- --show-output

say "Python: ruff, mypy --strict, pyright"
(
    cd python
    export PATH="$PWD/../$venv/bin:$PATH"
    ruff check . ../examples ../benches
    mypy src tests ../examples/pages.py ../benches/bench_actions.py --exclude 'typing/wrong.py'
    (cd ../examples/crawl && mypy --config-file ../../python/pyproject.toml crawl.py verdict.py)
    pyright src tests/*.py ../examples/pages.py ../examples/crawl/*.py ../benches/bench_actions.py
)

say "the demo, and its checker on tampered evidence"
target/debug/dagorama demo --json
# It must say no, and for the reason that was planted: any other failure is one.
for planted in 'lose "lost":1' 'twice "applied_twice":1' 'alter "output_equal":false'; do
    read -r tamper said <<<"$planted"
    if verdict=$(target/debug/dagorama demo --json --no-kill --pages 40 --tamper "$tamper"); then
        echo "the checker did not notice: $tamper"
        exit 1
    fi
    echo "$verdict"
    grep -qF "$said" <<<"$verdict" || { echo "the checker said no to $tamper, but not for that: $said was expected"; exit 1; }
done

say "Python tests against the real broker"
(cd python && DAGORAMA_BIN=$PWD/../target/debug/dagorama "../$venv/bin/pytest")
