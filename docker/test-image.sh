#!/usr/bin/env bash
# Runs an image as a careful hospital would and says what works. Needs docker or podman, nothing else.
#
#   docker/test-image.sh IMAGE MODEL INPUT
#
# IMAGE  e.g. medmamba:cpu
# MODEL  a model package, the folder with model.json
# INPUT  a folder of images that the model can predict
#
# DOCKER="podman --runtime runc" chooses the program. Exit code: 0 if all passed, 1 if not, 2 for wrong usage.
set -euo pipefail

if [ "$#" -ne 3 ]; then
    sed -n '4,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
image=$1
model=$(realpath -e "$2")
input=$(realpath -e "$3")
if [ -z "${DOCKER:-}" ]; then
    DOCKER=$(command -v docker || command -v podman) || { echo "neither docker nor podman is installed" >&2; exit 2; }
fi
read -r -a docker <<<"$DOCKER"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Somebody whom the image does not know.
user=$((20000 + RANDOM))
failed=0

# run NAME EXIT_CODE ARGUMENT...: medmamba ARGUMENT... in a container that may do next to nothing.
run() {
    local name=$1 expected=$2 code=0
    shift 2
    printf '%-52s ' "$name"
    "${docker[@]}" run --rm --network none --read-only --tmpfs /tmp:rw,noexec,nosuid,nodev,size=2g \
        --cap-drop ALL --security-opt no-new-privileges --shm-size 64k --pids-limit 256 --memory 4g \
        --user "$user:$user" --volume "$input:/input:ro" --volume "$model:/models/model:ro" \
        --volume "$work/output:/output" "$image" "$@" >"$work/log" 2>&1 || code=$?
    verdict "$code" "$expected"
}

verdict() {
    if [ "$1" = "$2" ]; then
        echo ok
    else
        echo "FAILED: $1 instead of $2"
        tail -n 20 "$work/log" | sed 's/^/    /'
        failed=1
    fi
}

# Of everything in the output, who owns it.
owners() {
    find "$work/output" -mindepth 1 -printf '%U:%G\n' | sort -u
}

mkdir "$work/output"
chmod 777 "$work/output"
echo "$image as user $user: no network, read-only, no capabilities, 64 KiB of shared memory, 4 GiB of RAM"
run "medmamba --help" 0 --help
run "medmamba doctor" 0 doctor
run "the model package is whole (medmamba info)" 0 info /models/model
run "the images can be predicted (medmamba check)" 0 check /input
run "all cases are predicted (medmamba predict)" 0 predict -i /input -o /output -m /models/model
run "a second run keeps them" 0 predict -i /input -o /output -m /models/model
printf '%-52s ' "the results belong to user $user"
verdict "$(owners)" "$user:$user"

if [ "$failed" -ne 0 ]; then
    echo "not everything works; the lines above say what" >&2
    exit 1
fi
echo "everything works"
