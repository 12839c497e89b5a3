#!/usr/bin/env bash
# Deletes a slice, its hosts and everything on their disks. Checkpoints in a bucket stay.
#
#   tpu_setup/delete.sh --name ppo --project my-project --zone us-west4-a
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --direct           needed if the slice was created with --direct
# --dry-run          prints the commands and runs nothing
#
# The first three can also be set as POD_NAME, POD_PROJECT and POD_ZONE.
set -euo pipefail
. "$(dirname "$0")/common.sh"

parse "--name --project --zone" "--direct" "$@"
check_name
check_place
check_tool gcloud

place=("$NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet)
if [ -n "$DIRECT" ]; then
  run gcloud compute tpus tpu-vm delete "${place[@]}"
else
  run gcloud compute tpus queued-resources delete "${place[@]}" --force
fi
