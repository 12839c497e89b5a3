#!/usr/bin/env bash
# Runs the same command on all hosts, in ~/instructjax with its Python.
#
#   tpu_setup/run_all.sh --name ppo --project my-project --zone us-west4-a \
#       --command "python -c 'import jax; jax.distributed.initialize(); print(jax.devices())'"
#   tpu_setup/run_all.sh --name ppo --project my-project --zone us-west4-a --detach \
#       --command 'python experiments/run_ppo.py'
#
# --name NAME
# --project PROJECT
# --zone ZONE
# --command TEXT     a line of bash
# --detach           starts it as the job of each host, which outlives the connection: logs.sh
#                    follows it, resume.sh keeps it going; `bash tpu_setup/job.sh stop` as
#                    --command ends it with a checkpoint
# --dry-run          prints the commands and runs nothing
#
# The first three are also read from POD_NAME, POD_PROJECT and POD_ZONE. The exit code is the
# first one of a host that is not 0; with --detach, that of starting.
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
