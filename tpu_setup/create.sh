#!/usr/bin/env bash
# Requests a slice and waits until it is up. If the slice exists or is queued, it only waits.
#
#   tpu_setup/create.sh --name ppo --project my-project --zone us-west4-a \
#       --accelerator v5litepod-16 --spot
#
# --name NAME              name of the slice: of the queued resource and its TPU VM, or of the group
# --project PROJECT        Google Cloud project
# --zone ZONE              a zone that has the accelerator
# --accelerator TYPE       v5litepod-16, v5p-128, v6e-16, tpu7x-16, ...
# --api NAME               tpus: the Cloud TPU API, for v4, v5e, v5p and v6e. compute: Compute Engine,
#                          for v5p, v6e and TPU7x. Default: compute for TPU7x, else tpus
# --spot                   uses spot capacity, which can be preempted at any moment
# --direct                 tpus: creates a TPU VM at once or fails, without the queue
# --runtime-version NAME   the hosts' runtime (tpus) or image family (compute); default: the
#                          accelerator's
# --service-account EMAIL  account that the hosts use; default: Compute Engine's
# --dry-run                prints the commands and runs nothing
#
# The first five can also be set as POD_NAME, POD_PROJECT, POD_ZONE, POD_ACCELERATOR and POD_API.
# POD_CREATE_FLAGS holds more flags for gcloud's request, separated by spaces, as for a reservation.
# Ctrl-C leaves the request in the queue; the same command waits for it again. So does an error while
# it waits, as when ten checks in a row fail.
set -euo pipefail
. "$(dirname "$0")/common.sh"

parse "--name --project --zone --accelerator --api --runtime-version --service-account" \
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
common=()
[ -z "$SERVICE_ACCOUNT" ] || common+=("--service-account=$SERVICE_ACCOUNT")
read -r -a more <<<"$CREATE_FLAGS"
common+=(${more[@]+"${more[@]}"})

request_tpus() {
  local place=("--project=$PROJECT" "--zone=$ZONE" "--accelerator-type=$ACCELERATOR")
  [ -z "$SPOT" ] || place+=(--spot)
  if [ -n "$DIRECT" ]; then
    run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" "--version=$RUNTIME_VERSION" \
      ${common[@]+"${common[@]}"}
  else
    run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${place[@]}" \
      "--runtime-version=$RUNTIME_VERSION" ${common[@]+"${common[@]}"}
  fi
}

# request_compute: a template of a host and a group of such hosts, which wait until there is room for
# all of them. A group does not replace a host: the slice would no longer be one.
request_compute() {
  local host=("--machine-type=$MACHINE" "--image-family=$RUNTIME_VERSION"
    "--image-project=$IMAGE_PROJECT" "--boot-disk-size=$DISK_SIZE" --maintenance-policy=TERMINATE
    --scopes=cloud-platform)
  local group=("--template=$PART" --size=0 --default-action-on-vm-failure=do-nothing)
  [ -z "$DISK_TYPE" ] || host+=("--boot-disk-type=$DISK_TYPE")
  [ -z "$SPOT" ] || host+=(--provisioning-model=SPOT --instance-termination-action=STOP)
  if [ "$HOSTS" -gt 1 ]; then
    make_policy
    group+=(--target-size-policy-mode=bulk
      "--workload-policy=projects/$PROJECT/regions/${ZONE%-*}/resourcePolicies/$PART")
  fi
  drop instance-templates "$PART"
  compute instance-templates create "$PART" "${host[@]}" ${common[@]+"${common[@]}"}
  compute "$GROUP" create "$NAME" "--zone=$ZONE" "${group[@]}"
  compute "$GROUP" resize "$NAME" "--zone=$ZONE" "--size=$HOSTS"
}

# answers: waits until a host of --api compute can be reached; it is RUNNING before that. The first
# ssh adds your key to the project, so it is to one host only.
answers() {
  local host tries=0
  host="$(hosts)" || failed "$NAME: its hosts could not be listed" $?
  host="${host%%$'\n'*}"
  [ -n "$host" ] || failed "$NAME: --api $API finds no hosts"
  until on_host true "$host"; do
    tries=$((tries + 1))
    [ "$tries" -lt 10 ] || failed "$host does not answer"
    sleep "$POLL"
  done
}

[ -n "$now" ] || "request_$API"

missed=0
while true; do
  if ! now="$(state)"; then
    missed=$((missed + 1))
    [ "$missed" -lt "$PATIENCE" ] || failed "$NAME: $missed checks in a row failed. The request stays \
and costs once it is granted: the same command waits for it, tpu_setup/delete.sh deletes it"
    echo "$NAME: check $missed failed; it ends after $PATIENCE in a row" >&2
    sleep "$POLL"
    continue
  fi
  missed=0
  if [ -n "$DRY_RUN" ] || is_up "$now"; then break; fi
  if [ -z "$now" ] || is_gone "$now" || is_going "$now"; then
    failed "$NAME is ${now:-gone: the request no longer exists}"
  fi
  echo "$NAME is $now"
  sleep "$POLL"
done
[ -n "$DRY_RUN" ] || echo "$NAME is $now: $CHIPS chips, $HOSTS hosts"
[ "$API" = tpus ] || answers
