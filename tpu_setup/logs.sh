#!/usr/bin/env bash
# Shows the output of one host's job as it appears, until Ctrl-C, which does not stop the job.
#
#   tpu_setup/logs.sh --name ppo --project my-project --zone us-west4-a --worker 3
#
# --name NAME        name of the slice
# --project PROJECT  Google Cloud project
# --zone ZONE        zone of the slice
# --worker N         number of the host; default: 0, the host that writes metrics and samples
# --dry-run          prints the commands and runs nothing
#
# The first three can also be set as POD_NAME, POD_PROJECT and POD_ZONE.
set -euo pipefail
. "$(dirname "$0")/common.sh"

WORKER=0

parse "--name --project --zone --worker" "" "$@"
check_name
check_place
needs --worker "$WORKER" '[0-9]+' 3
check_tool gcloud

on_hosts "$WORKER" "tail -n 200 -F job/log"
