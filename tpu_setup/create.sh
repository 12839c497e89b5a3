#!/usr/bin/env bash
# Requests a slice and waits until it is up. If the slice exists or is queued, it only waits.
#
#   tpu_setup/create.sh --name ppo --project my-project --zone us-west4-a \
#       --accelerator v5litepod-16 --spot
#
# --name NAME              name of the queued resource and of its TPU VM
# --project PROJECT        Google Cloud project
# --zone ZONE              a zone that has the accelerator
# --accelerator TYPE       v5litepod-16, v5p-128, ...
# --spot                   uses spot capacity, which can be preempted at any moment
# --direct                 creates a TPU VM at once or fails, without the queue
# --runtime-version NAME   the hosts' image; default: the one for the accelerator
# --service-account EMAIL  account that the hosts use; default: Compute Engine's
# --dry-run                prints the commands and runs nothing
#
# The first four can also be set as POD_NAME, POD_PROJECT, POD_ZONE and POD_ACCELERATOR. Ctrl-C
# leaves the request in the queue; the same command waits for it again.
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
  failed "$NAME is $now: run tpu_setup/delete.sh first, or let tpu_setup/resume.sh do both"
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
    failed "$NAME is ${now:-gone: the request no longer exists}"
  fi
  echo "$NAME is $now"
  sleep "$POLL"
done
[ -n "$DRY_RUN" ] || echo "$NAME is $now: $CHIPS chips, $HOSTS hosts"
