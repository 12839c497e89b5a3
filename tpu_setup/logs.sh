#!/usr/bin/env bash
# Shows the output of one host's job as it appears, until Ctrl-C, which does not stop the job.
#
#   tpu_setup/logs.sh --name ppo --project my-project --zone us-west4-a --worker 3
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --api NAME         that of create.sh; default: compute if POD_ACCELERATOR is a TPU7x, else tpus
# --worker N         number of the host; default: 0, the host that writes metrics and samples
# --dry-run          prints the commands and runs nothing
#
# The first four can also be set as POD_NAME, POD_PROJECT, POD_ZONE and POD_API.
set -euo pipefail
. "$(dirname "$0")/common.sh"

WORKER=0

parse "--name --project --zone --worker --api" "" "$@"
check_name
check_place
needs --worker "$WORKER" '[0-9]+' 3
check_tool gcloud

on_hosts "$WORKER" "tail -n 200 -F job/log"
