#!/usr/bin/env bash
# Runs the same command on all hosts, in ~/instructjax with ~/venv's Python.
#
#   tpu_setup/run_all.sh --name ppo --project my-project --zone us-west4-a \
#       --command "python -c 'import jax; jax.distributed.initialize(); print(jax.devices())'"
#   tpu_setup/run_all.sh --name ppo --project my-project --zone us-west4-a --detach \
#       --command 'python experiments/run_ppo.py'
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --command TEXT     a line of bash
# --detach           starts the command as each host's job, which outlives the connection. logs.sh
#                    shows its output. resume.sh restarts it. `bash tpu_setup/job.sh stop` as
#                    --command stops it with a checkpoint
# --dry-run          prints the commands and runs nothing
#
# The first three can also be set as POD_NAME, POD_PROJECT and POD_ZONE. The exit code is the first
# non-zero one of a host; with --detach, that of starting the command.
set -euo pipefail
. "$(dirname "$0")/common.sh"

COMMAND=""
DETACH=""

parse "--name --project --zone --command" "--detach" "$@"
check_name
check_place
check_command
check_tool gcloud

verb=run
[ -z "$DETACH" ] || verb=start
on_hosts all "bash instructjax/tpu_setup/job.sh $verb $(quoted "$COMMAND")"
