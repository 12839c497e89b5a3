#!/usr/bin/env bash
# Runs a job on Google Kubernetes Engine: nodes for a slice, and a JobSet (jobset.yaml) on them. GKE
# restarts the JobSet with --resume after preemption, and if the command exits with 75.
#
#   tpu_setup/gke.sh nodes --name ppo --project my-project --zone us-west4-a --cluster pods \
#       --accelerator v5litepod-16 --spot
#   tpu_setup/gke.sh run --name ppo --project my-project --zone us-west4-a --cluster pods \
#       --accelerator v5litepod-16 --image us-west4-docker.pkg.dev/my-project/instructjax/main \
#       --command 'python experiments/run_ppo.py --checkpoints gs://my-bucket/ppo'
#
# nodes      creates a node pool, which is the slice; an XPK cluster already has one
# manifest   prints the JobSet
# run        applies the JobSet
# logs       shows the output of one host as it appears
# stop       deletes the JobSet, on which its hosts save a checkpoint and exit
# delete     deletes the JobSet, the node pool, and the policy of a TPU7x
#
# --name NAME              name of the JobSet and of the node pool
# --project PROJECT        Google Cloud project
# --zone ZONE              zone of the nodes
# --cluster CLUSTER        name of the cluster
# --location PLACE         region or zone of the cluster; default: the zone's region
# --accelerator TYPE       v5litepod-16, v5p-128, tpu7x-16, ...: a slice of several hosts
# --spot                   nodes: uses spot capacity
# --service-account EMAIL  nodes: account that the hosts use
# --image IMAGE            run, manifest: image with the repository and its Python packages
# --command TEXT           run, manifest: as for resume.sh. bash passes SIGTERM only to a command
#                          that replaces it: after other commands, write `&& exec python ...`
# --worker N               logs: number of the host; default: 0
# --dry-run                prints the commands and runs nothing
#
# Flags can also be set by the variables of create.sh and by POD_CLUSTER, POD_LOCATION, POD_IMAGE.
set -euo pipefail
. "$(dirname "$0")/common.sh"

CLUSTER="${POD_CLUSTER:-}"
LOCATION="${POD_LOCATION:-}"
IMAGE="${POD_IMAGE:-}"
COMMAND=""
WORKER=0

verb="${1:---help}"
case "$verb" in
  nodes | manifest | run | logs | stop | delete) shift ;;
  -h | --help)
    usage
    exit
    ;;
  *) wrong "$verb" "not one of nodes, manifest, run, logs, stop, delete" ;;
esac
parse "--name --project --zone --cluster --location --accelerator --service-account --image \
--command --worker" "--spot" "$@"
check_name
API="" # POD_API does not matter here
check_place
name_part "$ZONE-gke" # not that of create.sh
needs --cluster "$CLUSTER" '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' pods POD_CLUSTER
LOCATION="${LOCATION:-${ZONE%-*}}"
needs --location "$LOCATION" '[a-z]+-[a-z]+[0-9]+(-(ai[0-9]+)?[a-z])?' us-west4

check_job() {
  check_accelerator
  [ "$HOSTS" -gt 1 ] || wrong "--accelerator $ACCELERATOR" "has one host; choose one with several"
  needs --image "$IMAGE" '[A-Za-z0-9][A-Za-z0-9_./:@-]*' \
    us-docker.pkg.dev/my-project/instructjax/main POD_IMAGE
  check_command
  case " $COMMAND " in *" --resume "*) ;; *) COMMAND+=" --resume" ;; esac
}

manifest() {
  local text name
  text="$(<"$HERE/jobset.yaml")"
  local COMMAND="'${COMMAND//"'"/"''"}'" # quoted for YAML
  for name in NAME HOSTS GKE_ACCELERATOR TOPOLOGY IMAGE COMMAND; do
    text="${text//"\${$name}"/"${!name}"}"
  done
  printf '%s\n' "$text"
}

# Uses the context made by `gcloud container clusters get-credentials`, not the current context.
kubernetes() { run kubectl "--context=gke_${PROJECT}_${LOCATION}_$CLUSTER" "$@"; }

of_slice=("--name=$NAME" "--project=$PROJECT" "--zone=$ZONE" "--cluster=$CLUSTER"
  "--accelerator=$ACCELERATOR")
of_cluster=("--cluster=$CLUSTER" "--project=$PROJECT" "--location=$LOCATION")
case "$verb" in
  nodes)
    check_accelerator
    [ "$HOSTS" -gt 1 ] || wrong "--accelerator $ACCELERATOR" "has one host; choose one with several"
    check_service_account
    check_tool gcloud
    pool=("--machine-type=$MACHINE" "--num-nodes=$HOSTS" --scopes=cloud-platform)
    [ -z "$DISK_TYPE" ] || pool+=("--disk-type=$DISK_TYPE")
    [ -z "$SERVICE_ACCOUNT" ] || pool+=("--service-account=$SERVICE_ACCOUNT")
    [ -z "$SPOT" ] || pool+=(--spot)
    if [ "$GKE_ACCELERATOR" = tpu7x ]; then # its nodes take their topology from a policy
      make_policy
      pool+=("--placement-policy=$PART")
    else
      pool+=("--tpu-topology=$TOPOLOGY")
    fi
    run gcloud container node-pools create "$NAME" "${of_cluster[@]}" "--node-locations=$ZONE" \
      "${pool[@]}"
    ;;
  manifest)
    check_job
    manifest
    ;;
  run)
    check_job
    check_tool kubectl
    apply=(kubernetes apply --filename=-)
    if [ -n "$DRY_RUN" ]; then
      printf '%s | ' "$(printed "$0" manifest "${of_slice[@]}" "--image=$IMAGE" "--command=$COMMAND")"
      "${apply[@]}"
    else
      manifest | "${apply[@]}"
    fi
    ;;
  logs)
    needs --worker "$WORKER" '[0-9]+' 3
    check_tool kubectl
    kubernetes logs --follow --tail=200 --container=jax-tpu \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=$WORKER"
    ;;
  stop)
    check_tool kubectl
    kubernetes delete jobset "$NAME" --ignore-not-found
    ;;
  delete) # each part, also if another cannot be deleted; the exit code is that of the first error
    check_tool kubectl
    check_tool gcloud
    codes=()
    kubernetes delete jobset "$NAME" --ignore-not-found || codes+=($?)
    run gcloud container node-pools delete "$NAME" "${of_cluster[@]}" --quiet || codes+=($?)
    if [[ "${ACCELERATOR:-tpu7x-}" = tpu7x-* ]]; then # which alone has a policy
      drop resource-policies "$PART" region || codes+=($?)
    fi
    exit "${codes[0]:-0}"
    ;;
esac
