#!/bin/sh
# Predicts with no argument, for challenges that start one fixed command: FLARE (`sh predict.sh` in /workspace) and
# Grand Challenge (as the entry point). Arguments go on to `medmamba predict`.
#
#   /workspace/inputs -> /workspace/outputs    if something is in /workspace/inputs
#   /input            -> /output               otherwise
#   MEDMAMBA_INPUT, MEDMAMBA_OUTPUT            name other folders
#   MEDMAMBA_MODEL                             names the model package; else the only one under /models
#   MEDMAMBA_ROOT                              goes before all of these folders; for tests
set -eu
root=${MEDMAMBA_ROOT:-}

fail() {
    echo "predict.sh: $1"
    exit 2
}

# Platforms show stderr as a warning even when all went well; the exit code says whether it did.
exec 2>&1

if [ -n "$(ls -A "$root/workspace/inputs" 2>/dev/null)" ]; then
    input=$root/workspace/inputs
    output=$root/workspace/outputs
else
    input=$root/input
    output=$root/output
fi
input=${MEDMAMBA_INPUT:-$input}
output=${MEDMAMBA_OUTPUT:-$output}
[ -e "$input" ] || fail "$input does not exist; mount the images there, or set MEDMAMBA_INPUT"

# A model package is a folder with model.json: /models itself, or one below it.
find_model() {
    set --
    for description in "$root/models/model.json" "$root"/models/*/model.json; do
        [ -f "$description" ] && set -- "$@" "$(dirname "$description")"
    done
    [ "$#" -gt 0 ] || fail "no model package in /models; mount one there read-only, or set MEDMAMBA_MODEL"
    [ "$#" -eq 1 ] || fail "$# model packages in /models ($*); set MEDMAMBA_MODEL to one of them"
    model=$1
}
model=${MEDMAMBA_MODEL:-}
[ -n "$model" ] || find_model

exec medmamba predict -i "$input" -o "$output" -m "$model" "$@"
