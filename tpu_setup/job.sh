#!/usr/bin/env bash
# The one long-running command of a host; the other scripts call this there.
#
#   bash tpu_setup/job.sh start 'python experiments/run_ppo.py'
#
# run TEXT     runs a line of bash in ~/instructjax with ~/venv's Python, and waits
# start TEXT   the same in the background, with its output in ~/job/log
# status       prints the host's name and `none`, `running`, the exit code, or `lost`: it ended
#              without one, as when the host was restarted
# stop         SIGTERM, on which the scripts save and exit with 75
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

# Numbers of processes begin anew with the host, so the time it started is kept beside it.
started_at() { ps -o lstart= -p "$1" 2>/dev/null | tr -s ' ' - || true; }
alive() {
  [ ! -s "$job/code" ] && [ -s "$job/pid" ] && read -r pid began <"$job/pid" &&
    [ "$(started_at "$pid")" = "$began" ]
}

case "$verb" in
  run | start)
    check_command
    [ -d "$HOME/instructjax" ] || failed "no ~/instructjax on $(hostname): tpu_setup/install.sh first"
    cd "$HOME/instructjax"
    export PATH="$HOME/venv/bin:$PATH" PYTHONUNBUFFERED=1
    export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}" # without a TPU an error, not a slow run
    ;;
esac

case "$verb" in
  run) run bash -c "$COMMAND" ;;
  start)
    ! alive || failed "a job is running on $(hostname) already, process $pid"
    # On SIGTERM to the group this shell stays, where the command saves and ends: a trap waits for
    # it, and children do not inherit traps.
    # shellcheck disable=SC2016  # for the shell inside
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
