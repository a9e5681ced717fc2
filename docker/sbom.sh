#!/usr/bin/env bash
# Lists what an image holds. Needs docker or podman, and cyclonedx-py (pip install cyclonedx-bom).
#
#   docker/sbom.sh IMAGE FOLDER
#
# Writes into FOLDER:
#   python.cdx.json   the Python packages, in CycloneDX
#   licences.tsv      the same with their licences, to read
#   debian.tsv        the packages of the base image
#
# DOCKER="podman --runtime runc" chooses the program. No network is used.
set -euo pipefail

if [ "$#" -ne 2 ]; then
    sed -n '4,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
image=$1
folder=$2
command -v cyclonedx-py >/dev/null || { echo "cyclonedx-py is not installed: pip install cyclonedx-bom" >&2; exit 2; }
if [ -z "${DOCKER:-}" ]; then
    DOCKER=$(command -v docker || command -v podman) || { echo "neither docker nor podman is installed" >&2; exit 2; }
fi
read -r -a docker <<<"$DOCKER"

inside() {
    "${docker[@]}" run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
        --entrypoint "$1" "$image" "${@:2}"
}

mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The metadata alone, and a stand-in for Python that says where they are: cyclonedx-py asks one for its search path.
mkdir -p "$work/site-packages" "$work/bin"
# shellcheck disable=SC2016
inside sh -c 'cd "$(python -c "import sysconfig; print(sysconfig.get_path(\"purelib\"))")" && tar -cf - ./*.dist-info' |
    tar -C "$work/site-packages" -xf -
printf '#!/bin/sh\nprintf '\''["%%s"]'\'' "%s"\n' "$work/site-packages" >"$work/bin/python"
chmod +x "$work/bin/python"
cyclonedx-py environment --output-format JSON --output-file "$folder/python.cdx.json" "$work/bin/python"

inside python -c '
from importlib.metadata import distributions

def licence(metadata):
    stated = metadata.get("License-Expression") or metadata.get("License", "")
    lines = [line.strip() for line in stated.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if text[:7] == "License"]
    return ", ".join(classifiers) or (lines[0] if lines else "not stated")

for name, version, words in sorted((d.metadata["Name"], d.version, licence(d.metadata)) for d in distributions()):
    print(name, version, words, sep="\t")
' >"$folder/licences.tsv"

# shellcheck disable=SC2016
inside dpkg-query --show --showformat '${Package}\t${Version}\n' >"$folder/debian.tsv"
wc -l "$folder/licences.tsv" "$folder/debian.tsv"
