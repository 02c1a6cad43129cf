#!/usr/bin/env bash
# What matters most on a machine with a GPU, in one command of less than ten minutes:
#
#     bash experiments/gpu_first_10_minutes.sh          # or --tiny: a rehearsal on a CPU
#
# Every part has a limit of its own, and one that fails stops no other. What is worth taking home
# goes to OUT (default experiments/out). Nothing is fetched: Python is .venv's, PYTHON, or python3;
# WHEELS names a folder of wheels to use beside it (needed: h5netcdf; the benchmark: goat-attention).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

budget=570 device=cuda tiny=() limits=(60 110 150)
benchmark=(
    --device cuda --lengths 2048 8192 16384 --forward-lengths --memory-lengths --compiled-lengths
    --steps rope goat --attention "SDPA + RoPE" "goatviz, lanes beside" "goatviz, lanes inside"
)
if [[ ${1:-} == --tiny ]]; then
    device=cpu tiny=(--tiny) benchmark=(--quick)
elif (($#)); then
    echo "usage: $0 [--tiny]" >&2
    exit 2
fi

out=${OUT:-experiments/out}
mkdir -p "$out"
exec > >(tee "$out/first.log") 2>&1
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=() failed=0
part() { # NAME SECONDS COMMAND...: run it, and say how it ended
    local name=$1 seconds=$2 start=$SECONDS status
    shift 2
    printf '\n== %s (at most %d s)\n' "$name" "$seconds"
    timeout --kill-after=10 "$seconds" "$@"
    status=$?
    case $status in
    0) summary+=("ok         $((SECONDS - start)) s  $name") ;;
    3) summary+=("unfinished $((SECONDS - start)) s  $name") ;;
    124 | 137) summary+=("TIMED OUT  $((SECONDS - start)) s  $name") failed=1 ;;
    *) summary+=("FAILED     $((SECONDS - start)) s  $name, status $status") failed=1 ;;
    esac
}

if [[ -n ${WHEELS:-} ]]; then
    site=build/experiments/site
    part "wheels of $WHEELS" 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --upgrade --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$PWD/$site"
fi
part "goatviz info" "${limits[0]}" "$python" -c 'from goatviz.environment import info; print(info())'
# Without what the other tests share, which needs more packages, and without what compiles for long.
part "tests/gpu" "${limits[1]}" "$python" -m pytest -q -rs --noconftest -p no:cacheprovider \
    -o filterwarnings=default -m gpu -k "not flex and not compiled" tests/gpu
part "attention against FlashAttention" "${limits[2]}" "$python" benchmarks/attention.py \
    "${benchmark[@]}" --out "$out"
left=$((budget - SECONDS))
minutes=$("$python" -c "print(max(0.1, ($left - 45) / 60))")
part "passkey, goat and rope" "$left" "$python" -m experiments passkey "${tiny[@]}" \
    --schemes goat rope --device "$device" --minutes "$minutes" --out "$out"

printf '\n== in %d s\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit "$failed"
