#!/usr/bin/env bash
# Copies a commit of this repository to ~/instructjax on all hosts and installs it in ~/venv.
#
#   tpu_setup/install.sh --name ppo --project my-project --zone us-west4-a --ref main
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --api NAME         that of create.sh; default: compute if POD_ACCELERATOR is a TPU7x, else tpus
# --ref COMMIT       commit to install; default: HEAD. Uncommitted changes are not installed.
# --dry-run          prints the commands and runs nothing
#
# The first four can also be set as POD_NAME, POD_PROJECT, POD_ZONE and POD_API. The hosts download uv,
# Python and the packages, so they need internet access. Run the script again to update.
set -euo pipefail
. "$(dirname "$0")/common.sh"

REF=HEAD
UV_VERSION="${POD_UV_VERSION:-0.13.9}"
PYTHON_VERSION="${POD_PYTHON_VERSION:-3.12}" # the images' Python is too old

parse "--name --project --zone --ref --api" "" "$@"
check_name
check_place
needs --ref "$REF" '[A-Za-z0-9_.][A-Za-z0-9_./^~-]*' main
check_tool git
check_tool gcloud

root="$(dirname "$HERE")"
archive="${TMPDIR:-/tmp}/instructjax-$NAME.tar.gz"
if [ -z "$DRY_RUN" ]; then
  git -C "$root" rev-parse --quiet --verify "$REF^{commit}" >/dev/null ||
    wrong "--ref $REF" "no such commit in $root"
  [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
    echo "note: uncommitted changes in $root are not installed" >&2
fi
run git -C "$root" archive --format=tar.gz "--output=$archive" "$REF"
copy_to_hosts "$archive" instructjax.tar.gz
# Delete the old code, or modules that the commit does not have would remain. Runs and data stay.
unpack="cd instructjax; rm -rf instructjax experiments tpu_setup; tar -xzf ../instructjax.tar.gz"
uv="\$HOME/.local/bin/uv"
fetch_uv="curl -LsSf https://astral.sh/uv/$UV_VERSION/install.sh | sh -s -- --quiet"
make="$uv venv --quiet --allow-existing --python $PYTHON_VERSION venv"
fill="$uv pip install --quiet --python venv/bin/python -e 'instructjax[tpu]'"
on_hosts all "set -e; mkdir -p instructjax; $unpack; cd; $fetch_uv; $make; $fill"
run rm -f "$archive"
