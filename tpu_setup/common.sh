# Functions that the scripts share: flags, checks, and running or printing a command. Source only.
# shellcheck shell=bash disable=SC2034  # the scripts use the variables

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec 3>&1 # for printed commands, also inside $(...)

# Each variable is also a flag: --name sets NAME.
NAME="${POD_NAME:-}"
PROJECT="${POD_PROJECT:-}"
ZONE="${POD_ZONE:-}"
ACCELERATOR="${POD_ACCELERATOR:-}"
API="${POD_API:-}"                         # tpus or compute; default: the accelerator's, below
RUNTIME_VERSION="${POD_RUNTIME_VERSION:-}" # default: the one for the accelerator, below
SERVICE_ACCOUNT="${POD_SERVICE_ACCOUNT:-}" # default: the project's Compute Engine account
IMAGE_PROJECT="${POD_IMAGE_PROJECT:-ubuntu-os-accelerator-images}" # of --api compute
DISK_SIZE="${POD_DISK_SIZE:-200GB}"        # of a host of --api compute; its image has 10 GB
CREATE_FLAGS="${POD_CREATE_FLAGS:-}"       # more flags for gcloud's request of the hosts
POLL="${POD_POLL:-30}"                     # seconds between two checks of the service
PATIENCE=10                                # checks or attempts in a row that may fail
DRY_RUN=""
SPOT=""
DIRECT=""

# wrong FLAG REASON: ends the script with exit code 2, wrong usage.
wrong() {
  echo "error: $1: $2" >&2
  exit 2
}

failed() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

# usage: prints the comment at the top of the script.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^#[ ]\{0,1\}//p;}' "$0"
}

# parse VALUED SWITCHES ARGUMENTS...: `--zone X` and `--zone=X` set ZONE to X, `--spot` sets SPOT.
parse() {
  local valued=" $1 " switches=" $2 --dry-run " flag variable
  shift 2
  while [ $# -gt 0 ]; do
    flag="${1%%=*}"
    variable="$(echo "${flag#--}" | tr 'a-z-' 'A-Z_')"
    if [ "$1" = --help ] || [ "$1" = -h ]; then
      usage
      exit 0
    elif [[ "$switches" == *" $1 "* ]]; then
      printf -v "$variable" 1
      shift
    elif [[ "$valued" != *" $flag "* ]]; then
      wrong "$1" "no such flag; --help lists the flags"
    elif [ "$1" != "$flag" ]; then
      printf -v "$variable" %s "${1#*=}"
      shift
    elif [ $# -gt 1 ]; then
      printf -v "$variable" %s "$2"
      shift 2
    else
      wrong "$flag" "needs a value"
    fi
  done
}

# needs FLAG VALUE PATTERN EXAMPLE [VARIABLE]: checks that a flag has a value of the right form.
needs() {
  local whole="^($3)\$"
  [ -n "$2" ] || wrong "$1" "is required, for example $1 $4${5:+ (or set $5)}"
  [[ "$2" =~ $whole ]] || wrong "$1 $2" "expected something like $4"
}

check_name() {
  needs --name "$NAME" '[a-z]([a-z0-9-]{0,37}[a-z0-9])?' my-run POD_NAME
}

# check_place: checks where the slice is, and by which of Google's APIs.
check_place() {
  needs --project "$PROJECT" '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project POD_PROJECT
  needs --zone "$ZONE" '[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]' us-west4-a POD_ZONE
  case "$ACCELERATOR" in
    tpu7x-*) API="${API:-compute}" ;;
    *) API="${API:-tpus}" ;;
  esac
  needs --api "$API" 'tpus|compute' "tpus or compute" POD_API
  [ "$API" = tpus ] || [ -z "$DIRECT" ] || wrong --direct "--api compute has no queue to leave out"
  name_part "$ZONE"
}

# name_part PLACE: sets PART, a name that only these scripts give, for the parts of a slice that a
# project has next to those of others: a template and a policy. It has at most 63 characters.
name_part() {
  PART="instructjax-$NAME-$1"
  [ "${#PART}" -gt 63 ] || return 0
  PART="$(cksum <<<"$1")"
  PART="instructjax-$NAME-${PART%% *}"
}

check_service_account() {
  [ -z "$SERVICE_ACCOUNT" ] || needs --service-account "$SERVICE_ACCOUNT" '[^@ ]+@[^@ ]+' \
    tpu@my-project.iam.gserviceaccount.com
}

check_command() {
  needs --command "$COMMAND" '.*[^[:space:]].*' "'python experiments/run_ppo.py'"
  [ "$COMMAND" = "${COMMAND//$'\n'/}" ] || wrong --command "must be one line"
}

# check_tool NAME: checks that a program is installed, unless --dry-run is given.
check_tool() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null ||
    wrong "$1" "not found on PATH: see https://cloud.google.com/sdk/docs/install, or use --dry-run"
}

# check_accelerator: sets CHIPS, HOSTS, TOPOLOGY, MACHINE, DISK_TYPE, GKE_ACCELERATOR and
# RUNTIME_VERSION: for --api tpus a runtime, for --api compute an image family. The number in a name
# counts chips for v5e and v6e, and cores (two a chip) for v4, v5p and TPU7x.
check_accelerator() {
  needs --accelerator "$ACCELERATOR" '[a-z0-9]+-[0-9]+' v5litepod-16 POD_ACCELERATOR
  local kind="${ACCELERATOR%-*}" size="${ACCELERATOR##*-}" runtime=""
  local family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  DISK_TYPE=""
  case "$kind" in
    v5litepod) runtime=v2-alpha-tpuv5-lite family="" GKE_ACCELERATOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu ;;
    v6e) runtime=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice MACHINE=ct6e-standard ;;
    v5p) runtime=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice MACHINE=ct5p-hightpu ;;
    v4) runtime=tpu-ubuntu2204-base family="" GKE_ACCELERATOR=tpu-v4-podslice MACHINE=ct4p-hightpu ;;
    tpu7x)
      family=ubuntu-accel-2404-amd64-tpu-tpu7x GKE_ACCELERATOR=tpu7x MACHINE=tpu7x-standard
      DISK_TYPE=hyperdisk-balanced # the only kind of boot disk that TPU7x has
      ;;
    v5e) wrong "--accelerator $ACCELERATOR" "write the cloud's name, v5litepod-$size" ;;
    v7x | tpu7) wrong "--accelerator $ACCELERATOR" "write the cloud's name, tpu7x-$size" ;;
    *) wrong "--accelerator $ACCELERATOR" "not one of v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N" ;;
  esac
  case "$kind:$size" in
    v5litepod:1 | v6e:1) TOPOLOGY=1x1 ;;
    v5litepod:4 | v6e:4) TOPOLOGY=2x2 ;;
    v5litepod:8 | v6e:8) TOPOLOGY=2x4 ;;
    v5litepod:16 | v6e:16) TOPOLOGY=4x4 ;;
    v5litepod:32 | v6e:32) TOPOLOGY=4x8 ;;
    v5litepod:64 | v6e:64) TOPOLOGY=8x8 ;;
    v5litepod:128 | v6e:128) TOPOLOGY=8x16 ;;
    v5litepod:256 | v6e:256) TOPOLOGY=16x16 ;;
    v4:8 | v5p:8 | tpu7x:8) TOPOLOGY=2x2x1 ;;
    v4:16 | v5p:16 | tpu7x:16) TOPOLOGY=2x2x2 ;;
    v4:32 | v5p:32 | tpu7x:32) TOPOLOGY=2x2x4 ;;
    v4:64 | v5p:64 | tpu7x:64) TOPOLOGY=2x4x4 ;;
    v4:128 | v5p:128 | tpu7x:128) TOPOLOGY=4x4x4 ;;
    v4:256 | v5p:256 | tpu7x:256) TOPOLOGY=4x4x8 ;;
    v4:512 | v5p:512 | tpu7x:512) TOPOLOGY=4x8x8 ;;
    v4:1024 | v5p:1024 | tpu7x:1024) TOPOLOGY=8x8x8 ;;
    v4:2048 | v5p:2048 | tpu7x:2048) TOPOLOGY=8x8x16 ;;
    v4:4096 | v5p:4096 | tpu7x:4096) TOPOLOGY=8x16x16 ;;
    *) wrong "--accelerator $ACCELERATOR" "no such size; try a power of two: v5litepod-16, v5p-128" ;;
  esac
  CHIPS=$((${TOPOLOGY//x/*}))
  HOSTS=$((CHIPS / 4)) # a host has 4 chips, but single hosts of v5e and v6e have up to 8
  case "$TOPOLOGY" in 1x1 | 2x2 | 2x4) HOSTS=1 ;; esac
  MACHINE+="-$((CHIPS / HOSTS))t"
  [ "$API" = tpus ] || runtime="$family"
  [ -n "$runtime" ] || wrong "--api $API" "has no ${ACCELERATOR%-*}; see tpu_setup/README.md"
  RUNTIME_VERSION="${RUNTIME_VERSION:-$runtime}"
  needs --runtime-version "$RUNTIME_VERSION" '[a-z0-9][a-z0-9.-]*' "$runtime"
}

# quoted WORD: prints it for a POSIX shell, with quotes only if needed.
quoted() {
  case "$1" in
    '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf %s "$1" ;;
  esac
}

# printed COMMAND...: prints the line that runs the command.
printed() {
  local word line=""
  for word; do line+="$(quoted "$word") "; done
  echo "${line% }"
}

# run COMMAND...: runs the command, or prints it with --dry-run.
run() {
  if [ -z "$DRY_RUN" ]; then "$@"; else printed "$@" >&3; fi
}

# compute KIND VERB WORDS...: runs `gcloud compute KIND VERB WORDS...` in the project.
compute() {
  local kind="$1"
  shift
  # shellcheck disable=SC2086  # a kind is several words
  run gcloud compute $kind "$@" "--project=$PROJECT"
}

GROUP="instance-groups managed" # gcloud's name for them

# hosts: prints the names of the hosts of --api compute. With --dry-run one stands for all.
hosts() {
  compute "$GROUP" list-instances "$NAME" "--zone=$ZONE" "--format=value(instance.basename())" ||
    return
  [ -z "$DRY_RUN" ] || echo "$NAME-HOST"
}

# on_each COMMAND...: runs `COMMAND... HOST` for all hosts at once; the exit code is the first
# non-zero one. Each has its own process group, so that Ctrl-C ends them.
on_each() (
  set -m
  pids=()
  trap 'for pid in ${pids[@]+"${pids[@]}"}; do kill -- "-$pid" 2>/dev/null; done; exit 130' INT TERM
  names="$(hosts)" || failed "$NAME: its hosts could not be listed; nothing was run" $?
  [ -n "$names" ] || failed "$NAME: --api $API finds no hosts"
  for name in $names; do
    "$@" "$name" </dev/null &
    pids+=($!)
  done
  set +m # else bash says that they are done
  first=0
  for pid in "${pids[@]}"; do # in the order of the hosts
    code=0
    wait "$pid" || code=$?
    [ "$first" -ne 0 ] || first=$code
  done
  exit "$first"
)

# on_host COMMAND NAME: runs a command on a host of --api compute.
on_host() { run gcloud compute ssh "$2" "--project=$PROJECT" "--zone=$ZONE" "--command=$1"; }

# copy_to FROM TO NAME: copies a file to a host of --api compute.
copy_to() { run gcloud compute scp "$1" "$3:$2" "--project=$PROJECT" "--zone=$ZONE"; }

# host_number N: prints the name of the host of --api compute that is number N in the slice.
host_number() {
  local metadata=metadata.google.internal/computeMetadata/v1/instance/attributes found
  found="$(on_each on_host "echo \$(curl -sf -H Metadata-Flavor:Google \
http://$metadata/agent-worker-number || echo 0) \$(hostname -s)")" || return
  [ -z "$DRY_RUN" ] || found="$1 $NAME-HOST"
  awk -v number="$1" '$1 == number {print $2; exit}' <<<"$found"
}

# on_hosts WORKERS COMMAND: runs a command by ssh; the exit code is the first non-zero one.
on_hosts() {
  local host
  if [ "$API" = tpus ]; then
    run gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" "--worker=$1" \
      "--command=$2"
  elif [ "$1" = all ]; then
    on_each on_host "$2"
  else
    host="$(host_number "$1")" || return
    [ -n "$host" ] || wrong "--worker $1" "$NAME has no such host"
    on_host "$2" "$host"
  fi
}

# copy_to_hosts FILE NAME: copies a file to the home directory of all hosts.
copy_to_hosts() {
  if [ "$API" = tpus ]; then
    run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "--project=$PROJECT" "--zone=$ZONE" \
      --worker=all
  else
    on_each copy_to "$1" "$2"
  fi
}

# state: prints the service's state of the slice, or nothing if there is no such slice.
state() {
  local kind=queued-resources field=state.state size
  if [ "$API" = tpus ]; then
    [ -z "$DIRECT" ] || kind=tpu-vm field=state
    run gcloud compute tpus "$kind" list "--project=$PROJECT" "--zone=$ZONE" \
      "--filter=name~/$NAME\$" "--format=value($field)"
  else
    size="$(compute "$GROUP" list "--zones=$ZONE" "--filter=name=$NAME" "--format=value(targetSize)")" ||
      return
    [ -n "$size$DRY_RUN" ] || return 0
    # A host's status, or the group's action on it if it does not exist. If one host is gone or
    # going, the slice is; it is up when all are.
    compute "$GROUP" list-instances "$NAME" "--zone=$ZONE" \
      "--format=csv[no-heading](instanceStatus,currentAction)" | awk -F, -v size="$size" '
        $1 == "" {$1 = $2 == "NONE" ? "TERMINATED" : $2}
        $1 == "RUNNING" {up++; next}
        $1 ~ /^(TERMINATED|STOPPED|SUSPENDED)$/ {gone = $1; next}
        $1 ~ /^(STOPPING|PENDING_STOP|SUSPENDING|DEPROVISIONING|DELETING)$/ {going = 1; next}
        {other = $1}
        END {
          if (going) print "STOPPING"
          else if (gone || size == "0") print gone ? gone : "STOPPED"
          else if (other) print other
          else if (size != "") print up == size ? "READY" : "CREATING"
        }'
  fi
}

# drop KIND NAME PLACE: deletes what has that name, if it exists; FOUND is then the name. PLACE is
# zone or region.
drop() {
  local where="" filter="name=$2"
  case "${3:-}" in
    zone) where="--zone=$ZONE" filter+=" AND zone~/$ZONE\$" ;;
    region) where="--region=${ZONE%-*}" filter+=" AND region~/${ZONE%-*}\$" ;;
  esac
  FOUND="$(compute "$1" list "--filter=$filter" "--format=value(name)")" || return
  [ -z "$FOUND$DRY_RUN" ] || compute "$1" delete "$2" ${where:+"$where"} --quiet
}

# make_policy: creates the policy that joins hosts to a slice of the topology.
make_policy() {
  drop resource-policies "$PART" region
  compute resource-policies create workload-policy "$PART" "--region=${ZONE%-*}" \
    --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY"
}

# is_up STATE: the hosts are usable. is_gone: they never will be again. is_going: they soon won't be.
is_up() { [[ "$1" =~ ^(ACTIVE|READY)$ ]]; }
is_gone() { [[ "$1" =~ ^(SUSPENDED|FAILED|PREEMPTED|TERMINATED|STOPPED)$ ]]; }
is_going() { [[ "$1" =~ ^(SUSPENDING|STOPPING|DELETING)$ ]]; }
