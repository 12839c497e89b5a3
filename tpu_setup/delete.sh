#!/usr/bin/env bash
# Deletes a slice, its hosts and everything on their disks. Checkpoints in a bucket stay.
#
#   tpu_setup/delete.sh --name ppo --project my-project --zone us-west4-a
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --api NAME         that of create.sh; default: compute if POD_ACCELERATOR is a TPU7x, else tpus
# --direct           needed if the slice was created with --direct
# --if-exists        compute: it is no error if there is no such group
# --dry-run          prints the commands and runs nothing
#
# The first four can also be set as POD_NAME, POD_PROJECT, POD_ZONE and POD_API.
set -euo pipefail
. "$(dirname "$0")/common.sh"

IF_EXISTS=""

parse "--name --project --zone --api" "--direct --if-exists" "$@"
check_name
check_place
check_tool gcloud

place=("$NAME" "--project=$PROJECT" "--zone=$ZONE" --quiet)
if [ "$API" = compute ]; then
  drop "$GROUP" "$NAME" zone
  found="$FOUND"
  drop instance-templates "$PART"
  found+="$FOUND"
  drop resource-policies "$PART" region
  found+="$FOUND" # of a request that failed half-way there may be parts alone
  [ -n "$found$IF_EXISTS$DRY_RUN" ] || failed "no group $NAME in $ZONE by --api compute; \
for the Cloud TPU API give --api tpus"
elif [ -n "$DIRECT" ]; then
  run gcloud compute tpus tpu-vm delete "${place[@]}"
else
  run gcloud compute tpus queued-resources delete "${place[@]}" --force
fi
