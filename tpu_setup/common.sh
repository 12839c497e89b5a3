# Functions that the scripts share: flags, checks, and running or printing a command. Source only.
# shellcheck shell=bash disable=SC2034  # the scripts use the variables

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec 3>&1 # for printed commands, also inside $(...)

# Each variable is also a flag: --name sets NAME.
NAME="${POD_NAME:-}"
PROJECT="${POD_PROJECT:-}"
ZONE="${POD_ZONE:-}"
ACCELERATOR="${POD_ACCELERATOR:-}"
RUNTIME_VERSION="${POD_RUNTIME_VERSION:-}" # default: the one for the accelerator, below
SERVICE_ACCOUNT="${POD_SERVICE_ACCOUNT:-}" # default: the project's Compute Engine account
POLL="${POD_POLL:-30}"                     # seconds between two checks of the service
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

check_place() {
  needs --project "$PROJECT" '([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]' my-project POD_PROJECT
  needs --zone "$ZONE" '[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]' us-west4-a POD_ZONE
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

# check_accelerator: sets CHIPS, HOSTS, TOPOLOGY, RUNTIME_VERSION and GKE's names for the slice.
# The number in a name counts chips for v5e and v6e, and cores (two a chip) for v4 and v5p.
check_accelerator() {
  needs --accelerator "$ACCELERATOR" '[a-z0-9]+-[0-9]+' v5litepod-16 POD_ACCELERATOR
  local kind="${ACCELERATOR%-*}" size="${ACCELERATOR##*-}" runtime
  case "$kind" in
    v5litepod) runtime=v2-alpha-tpuv5-lite GKE_ACCELERATOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t ;;
    v6e) runtime=v2-alpha-tpuv6e GKE_ACCELERATOR=tpu-v6e-slice MACHINE=ct6e-standard-4t ;;
    v5p) runtime=v2-alpha-tpuv5 GKE_ACCELERATOR=tpu-v5p-slice MACHINE=ct5p-hightpu-4t ;;
    v4) runtime=tpu-ubuntu2204-base GKE_ACCELERATOR=tpu-v4-podslice MACHINE=ct4p-hightpu-4t ;;
    v5e) wrong "--accelerator $ACCELERATOR" "write the cloud's name, v5litepod-$size" ;;
    *) wrong "--accelerator $ACCELERATOR" "not one of v4-N, v5litepod-N, v5p-N, v6e-N" ;;
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
    v4:8 | v5p:8) TOPOLOGY=2x2x1 ;;
    v4:16 | v5p:16) TOPOLOGY=2x2x2 ;;
    v4:32 | v5p:32) TOPOLOGY=2x2x4 ;;
    v4:64 | v5p:64) TOPOLOGY=2x4x4 ;;
    v4:128 | v5p:128) TOPOLOGY=4x4x4 ;;
    v4:256 | v5p:256) TOPOLOGY=4x4x8 ;;
    v4:512 | v5p:512) TOPOLOGY=4x8x8 ;;
    v4:1024 | v5p:1024) TOPOLOGY=8x8x8 ;;
    v4:2048 | v5p:2048) TOPOLOGY=8x8x16 ;;
    v4:4096 | v5p:4096) TOPOLOGY=8x16x16 ;;
    *) wrong "--accelerator $ACCELERATOR" "no such size; try a power of two: v5litepod-16, v5p-128" ;;
  esac
  CHIPS=$((${TOPOLOGY//x/*}))
  HOSTS=$((CHIPS / 4)) # a host has 4 chips, but single hosts of v5e and v6e have up to 8
  case "$TOPOLOGY" in 1x1 | 2x2 | 2x4) HOSTS=1 ;; esac
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

# on_hosts WORKERS COMMAND: runs a command by ssh; the exit code is the first non-zero one.
on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "--project=$PROJECT" "--zone=$ZONE" "--worker=$1" \
    "--command=$2"
}

# state: prints the service's state of the slice, or nothing if there is no such slice.
state() {
  local kind=queued-resources field=state.state
  [ -z "$DIRECT" ] || kind=tpu-vm field=state
  run gcloud compute tpus "$kind" list "--project=$PROJECT" "--zone=$ZONE" \
    "--filter=name~/$NAME\$" "--format=value($field)"
}

# is_up STATE: the hosts are usable. is_gone: they never will be again. is_going: they soon won't be.
is_up() { [[ "$1" =~ ^(ACTIVE|READY)$ ]]; }
is_gone() { [[ "$1" =~ ^(SUSPENDED|FAILED|PREEMPTED|TERMINATED|STOPPED)$ ]]; }
is_going() { [[ "$1" =~ ^(SUSPENDING|STOPPING|DELETING)$ ]]; }
