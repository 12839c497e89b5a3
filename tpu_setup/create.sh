#!/usr/bin/env bash
# Asks for a slice and waits until it is up; one that is there already is waited for.
#
#   tpu_setup/create.sh --name ppo --project my-project --zone us-west4-a \
#       --accelerator v5litepod-16 --spot
#
# --name NAME              of the queued resource and of its TPU VM
# --project PROJECT
# --zone ZONE              one that has the accelerator
# --accelerator TYPE       v5litepod-16, v5p-128, ...
# --spot                   spot capacity: it can be taken back at any moment
# --direct                 a TPU VM at once or an error, without the queue
# --runtime-version NAME   of the hosts' image; default: the one for the accelerator
# --service-account EMAIL  whose rights the hosts have; default: Compute Engine's own
# --dry-run                prints the commands and runs nothing
#
# The first four are also read from POD_NAME, POD_PROJECT, POD_ZONE and POD_ACCELERATOR. To stop
# waiting leaves the request in the queue; the same command waits for it again.
set -euo pipefail
. "$(dirname "$0")/common.sh"

parse "--name --project --zone --accelerator --runtime-version --service-account" \
  "--spot --direct" "$@"
check_name
check_place
check_accelerator
check_service_account
check_tool gcloud

now="$(state)"
if is_gone "$now" || is_going "$now"; then
  failed "$NAME is $now: tpu_setup/delete.sh it first, or let tpu_setup/resume.sh do both"
fi
if [ -z "$now" ]; then
  place=("--project=$PROJECT" "--zone=$ZONE" "--accelerator-type=$ACCELERATOR")
  [ -z "$SERVICE_ACCOUNT" ] || place+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$SPOT" ] || place+=(--spot)
  if [ -n "$DIRECT" ]; then
    run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" "--version=$RUNTIME_VERSION"
  else
    run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${place[@]}" \
      "--runtime-version=$RUNTIME_VERSION"
  fi
fi

while now="$(state)"; [ -z "$DRY_RUN" ] && ! is_up "$now"; do
  if [ -z "$now" ] || is_gone "$now" || is_going "$now"; then
    failed "$NAME is ${now:-not there any more}"
  fi
  echo "$NAME is $now"
  sleep "$POLL"
done
[ -n "$DRY_RUN" ] || echo "$NAME is $now: $CHIPS chips, $HOSTS hosts"
