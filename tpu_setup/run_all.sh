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
# --api NAME         that of create.sh; default: compute if POD_ACCELERATOR is a TPU7x, else tpus
# --command TEXT     a line of bash
# --worker N         runs it on host N alone; default: all
# --detach           starts the command as each host's job, which outlives the connection. logs.sh
#                    shows its output. resume.sh restarts it. `bash tpu_setup/job.sh stop` as
#                    --command stops it with a checkpoint
# --dry-run          prints the commands and runs nothing
#
# The first four can also be set as POD_NAME, POD_PROJECT, POD_ZONE and POD_API. The exit code is the first
# non-zero one of a host; with --detach, that of starting the command.
set -euo pipefail
. "$(dirname "$0")/common.sh"

COMMAND=""
DETACH=""
WORKER=all

parse "--name --project --zone --command --worker --api" "--detach" "$@"
check_name
check_place
check_command
needs --worker "$WORKER" 'all|[0-9]+' 0
check_tool gcloud

verb=run
[ -z "$DETACH" ] || verb=start
on_hosts "$WORKER" "bash instructjax/tpu_setup/job.sh $verb $(quoted "$COMMAND")"
