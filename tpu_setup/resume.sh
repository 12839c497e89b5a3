#!/usr/bin/env bash
# Keeps a run going until it has finished. It creates the slice, installs, runs the command with
# --resume on all hosts and watches it. It replaces a preempted slice by a new one. If the command
# exits with 75 (stopped, but resumable), it runs the command again. It does so too with 137, of a
# host whose command was killed, and 134, of hosts that jax ends when another falls silent; but not
# if that happens five times in a row, each time in the first hour.
#
#   tpu_setup/resume.sh --name ppo --project my-project --zone us-west4-a \
#       --accelerator v5litepod-16 --spot \
#       --command 'python experiments/run_ppo.py --checkpoints gs://my-bucket/ppo'
#
# --command TEXT     a line of bash that ends with one of experiments/run_*.py and its flags;
#                    --resume is added, and also starts a run that has no checkpoint yet
# --ref COMMIT       commit to install; default: HEAD
# --dry-run          prints the commands that follow a preemption, and runs nothing
# --name, --project, --zone, --accelerator, --api, --spot, --direct, --runtime-version and
# --service-account are those of create.sh.
#
# Ctrl-C leaves the job running; the same command watches it again. The hosts' disks are lost with
# the slice, so keep checkpoints in a bucket. The exit code is 0 if all hosts finished, else that of
# the first host that failed. Either way the slice stays up, and costs, until delete.sh deletes it.
set -euo pipefail
. "$(dirname "$0")/common.sh"

REF=HEAD
COMMAND=""
ABORTS=5 # times in a row that the command may be killed or aborted within an hour

parse "--name --project --zone --accelerator --api --runtime-version --service-account --ref \
--command" \
  "--spot --direct" "$@"
check_name
check_place
check_accelerator
check_service_account
check_command
check_tool gcloud

place=("--name=$NAME" "--project=$PROJECT" "--zone=$ZONE" "--api=$API")
common=()
[ -z "$DIRECT" ] || common+=(--direct)
[ -z "$DRY_RUN" ] || common+=(--dry-run)
create=("--accelerator=$ACCELERATOR" "--runtime-version=$RUNTIME_VERSION"
  "--service-account=$SERVICE_ACCOUNT")
[ -z "$SPOT" ] || create+=(--spot)
case " $COMMAND " in *" --resume "*) ;; *) COMMAND+=" --resume" ;; esac

# left WORDS: says how to delete the slice, which costs as long as it is there.
left() {
  local delete=(tpu_setup/delete.sh "${place[@]}")
  [ -z "$DIRECT" ] || delete+=(--direct)
  echo "the slice $1: $(printed "${delete[@]}")" >&2
}

# jobs_of_hosts: prints a line for each host: its name and the status of its job.
jobs_of_hosts() {
  local job=instructjax/tpu_setup/job.sh
  on_hosts all "if [ -e $job ]; then bash $job status; else echo \$(hostname) none; fi"
}

bring_up() {
  local now
  now="$(state)" || return
  while is_going "$now"; do
    sleep "$POLL"
    now="$(state)" || return
  done
  if [ -n "$DRY_RUN" ] || is_gone "$now"; then
    echo "$NAME is ${now:-gone}: requesting a new slice" >&2
    "$HERE/delete.sh" "${place[@]}" --if-exists ${common[@]+"${common[@]}"} || return
    now=""
  fi
  is_up "$now" || "$HERE/create.sh" "${place[@]}" "${create[@]}" ${common[@]+"${common[@]}"}
}

# begin: installs and starts the job, unless a job is already running.
begin() {
  local jobs
  jobs="$(jobs_of_hosts)" || return
  if grep -q ' running$' <<<"$jobs"; then
    echo "$NAME: a job is already running; watching it"
  else
    "$HERE/install.sh" "${place[@]}" "--ref=$REF" ${DRY_RUN:+--dry-run} &&
      "$HERE/run_all.sh" "${place[@]}" --detach "--command=$COMMAND" ${DRY_RUN:+--dry-run}
  fi
}

# watch: returns if the job must be run again; ends the script if it finished or failed.
aborted=0
watch() {
  local missed=0 now jobs code began=$SECONDS
  while [ "$missed" -lt "$PATIENCE" ]; do
    sleep "$POLL"
    missed=$((missed + 1))
    now="$(state)" || continue
    is_up "$now" || return 0
    jobs="$(jobs_of_hosts)" || continue
    [ "$(grep -cE ' (none|running|lost|[0-9]+)$' <<<"$jobs")" = "$HOSTS" ] || continue
    missed=0
    # Wait until all have ended: an error on one host stops the others too.
    ! grep -q ' running$' <<<"$jobs" || continue
    # If a job was lost, the other hosts' errors are a consequence, not the command's own.
    ! grep -qE ' (lost|none)$' <<<"$jobs" || return 0
    code="$(awk '$2 !~ /^(0|75|134|137)$/ {print $2; exit}' <<<"$jobs")"
    if [ -z "$code" ] && grep -qE ' (134|137)$' <<<"$jobs"; then
      [ $((SECONDS - began)) -lt 3600 ] || aborted=0
      aborted=$((aborted + 1))
      [ "$aborted" = "$ABORTS" ] || return 0
      code="$(awk '$2 != 0 && $2 != 75 {print $2; exit}' <<<"$jobs")"
    fi
    aborted=0
    if [ -n "$code" ]; then
      echo "$jobs" >&2
      left "is still up"
      failed "the command failed; tpu_setup/logs.sh --worker N shows a host's output" "$code"
    fi
    ! grep -q ' 75$' <<<"$jobs" || return 0
    echo "$NAME: finished"
    left "is still up"
    exit 0
  done
  left "may still be up"
  failed "$NAME: some of its $HOSTS hosts do not answer; the job may still be running"
}

if [ -n "$DRY_RUN" ]; then
  bring_up
  begin
  exit
fi
tries=0
while true; do
  if bring_up && begin; then
    tries=0
    watch
    echo "$NAME: resuming"
  else
    status=$?
    if [ "$status" -eq 2 ]; then
      left "may still be up"
      exit 2
    fi
    # The slice may have been preempted during setup; the service reports that a little later.
    tries=$((tries + 1))
    now="$(state)" || now=unknown
    if [ "$now" = FAILED ] || [ "$tries" -ge "$PATIENCE" ]; then
      [ -z "$now" ] || left "may still be up"
      failed "$NAME is ${now:-not there} and could not be set up" "$status"
    fi
    sleep "$POLL"
  fi
done
