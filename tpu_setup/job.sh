#!/usr/bin/env bash
# Runs the single long-running job of a host. The other scripts call this script on the hosts.
#
#   bash tpu_setup/job.sh start 'python experiments/run_ppo.py'
#
# run TEXT     runs a line of bash in ~/instructjax with ~/venv's Python, and waits
# start TEXT   does the same in the background, with the output in ~/job/log
# status       prints the host's name and `none`, `running`, the exit code, or `lost` if the job
#              ended without an exit code, as when the host was restarted
# stop         sends SIGTERM, on which the scripts save a checkpoint and exit with 75
# --dry-run    as the first word: prints what run, start and stop would execute
set -euo pipefail
. "$(dirname "$0")/common.sh"

if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
verb="${1:---help}"
COMMAND="${2:-}"
job="$HOME/job"

# After a restart of the host another process may get the job's id, so its start time is kept too.
started_at() { ps -o lstart= -p "$1" 2>/dev/null | tr -s ' ' - || true; }
alive() {
  [ ! -s "$job/code" ] && [ -s "$job/pid" ] && read -r pid began <"$job/pid" &&
    [ "$(started_at "$pid")" = "$began" ]
}

case "$verb" in
  run | start)
    check_command
    [ -d "$HOME/instructjax" ] || failed "no ~/instructjax on $(hostname): run tpu_setup/install.sh"
    cd "$HOME/instructjax"
    export PATH="$HOME/venv/bin:$PATH" PYTHONUNBUFFERED=1
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}" # without a TPU jax fails instead of being slow
    ;;
esac

case "$verb" in
  run) run bash -c "$COMMAND" ;;
  start)
    ! alive || failed "a job is running on $(hostname) already, process $pid"
    # SIGTERM goes to the whole process group. The command saves and exits. The shell must survive
    # to write the exit code, so it has a trap, which children do not inherit.
    # shellcheck disable=SC2016  # the inner shell expands these
    shell='trap "echo \$? >\"\$HOME/job/code\"" EXIT; trap : TERM INT HUP; '
    # shellcheck disable=SC2016
    shell+='echo "$(date -u +%FT%TZ) $1"; eval "$1"'
    job_command=(setsid bash -c "$shell" job "$COMMAND")
    if [ -n "$DRY_RUN" ]; then
      run "${job_command[@]}"
    else
      mkdir -p "$job"
      rm -f "$job/code"
      "${job_command[@]}" >>"$job/log" 2>&1 </dev/null 3>&- &
      echo "$! $(started_at $!)" >"$job/pid"
      echo "$(hostname) started"
    fi
    ;;
  status)
    if [ -s "$job/code" ]; then
      echo "$(hostname) $(cat "$job/code")"
    elif alive; then
      echo "$(hostname) running"
    elif [ -e "$job/pid" ]; then
      echo "$(hostname) lost"
    else
      echo "$(hostname) none"
    fi
    ;;
  stop)
    alive || failed "no job is running on $(hostname)"
    run kill -TERM -- "-$pid"
    ;;
  -h | --help) usage ;;
  *) wrong "$verb" "not one of run, start, status, stop" ;;
esac
