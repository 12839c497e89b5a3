"""tpu_setup/: the commands the scripts print, the errors they give, and runs on a stand-in cloud.

The cloud is a stand-in for gcloud. It keeps a slice's state in a file, and runs ssh commands in one
directory for each host.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

SETUP = Path(__file__).resolve().parents[1] / "tpu_setup"
SCRIPTS = sorted(path.name for path in SETUP.glob("*.sh"))
CLOUD_SCRIPTS = ["create.sh", "delete.sh", "install.sh", "logs.sh", "resume.sh", "run_all.sh"]
PLACE = {"project": "my-project", "zone": "us-west4-a"}
SLICE = {"name": "ppo", **PLACE}
SLICES = {  # chips, hosts, topology, image, machine, GKE's name
    "v5litepod-16": (
        16,
        4,
        "4x4",
        "v2-alpha-tpuv5-lite",
        "ct5lp-hightpu-4t",
        "tpu-v5-lite-podslice",
    ),
    "v5p-128": (64, 16, "4x4x4", "v2-alpha-tpuv5", "ct5p-hightpu-4t", "tpu-v5p-slice"),
}
COMMAND = "python run.py --prompt 'a  b' --size \"$HOME\""  # quotes, two spaces, a variable


def shell(script, *words, env=None, **flags):
    argv = ["bash", str(SETUP / script), *words]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **(env or {})}
    return subprocess.run(argv, env=clean, capture_output=True, text=True, timeout=60)


def parsed(line):
    """`gcloud a b --x=1 --y` -> (["gcloud", "a", "b"], {"x": "1", "y": True})."""
    words, flags = [], {}
    for word in shlex.split(line):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            assert name not in flags
            flags[name[2:]] = value if equals else True
        else:
            words.append(word)
    return words, flags


def dry(script, *words, **flags):
    done = shell(script, *words, "--dry-run", **flags)
    assert done.returncode == 0, done.stderr
    return [parsed(line) for line in done.stdout.splitlines()]


def list_of(kind, field):
    filters = {"filter": "name~/ppo$", "format": f"value({field})"}
    return (f"gcloud compute tpus {kind} list".split(), {**PLACE, **filters})


GROUP = "gcloud compute instance-groups managed"


def compute(text, **flags):
    """A command of Compute Engine in the project."""
    return (text.split(), {"project": "my-project", **flags})


def hosts_of_group():
    return compute(
        f"{GROUP} list-instances ppo", zone="us-west4-a", format="value(instance.basename())"
    )


def ssh(command, worker="all", api="tpus"):
    if api == "compute":
        return compute("gcloud compute ssh ppo-HOST", zone="us-west4-a", command=command)
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "ppo"]
    return (words, {**PLACE, "worker": worker, "command": command})


# -------------------------------------------------------------------------- printed commands

PART = "instructjax-ppo-us-west4-a"
LOOKS = [
    compute(f"{GROUP} list", zones="us-west4-a", filter="name=ppo", format="value(targetSize)"),
    compute(
        f"{GROUP} list-instances ppo",
        zone="us-west4-a",
        format="csv[no-heading](instanceStatus,currentAction)",
    ),
]
NAMED = {"format": "value(name)"}
DROPS = {
    "group": [
        compute(f"{GROUP} list", **NAMED, filter="name=ppo AND zone~/us-west4-a$"),
        compute(f"{GROUP} delete ppo", zone="us-west4-a", quiet=True),
    ],
    "template": [
        compute("gcloud compute instance-templates list", **NAMED, filter=f"name={PART}"),
        compute(f"gcloud compute instance-templates delete {PART}", quiet=True),
    ],
}


def drop_policy(part=PART):
    policies = "gcloud compute resource-policies"
    return [
        compute(f"{policies} list", **NAMED, filter=f"name={part} AND region~/us-west4$"),
        compute(f"{policies} delete {part}", region="us-west4", quiet=True),
    ]


def policy(topology, part=PART):
    return compute(
        f"gcloud compute resource-policies create workload-policy {part}",
        region="us-west4",
        type="HIGH_THROUGHPUT",
        **{"accelerator-topology": topology},
    )


@pytest.mark.parametrize(
    ("accelerator", "hosts", "topology", "machine", "extra"),
    [
        ("v6e-16", 4, "4x4", "ct6e-standard-4t", {}),
        ("v6e-8", 1, None, "ct6e-standard-8t", {}),
        ("v6e-1", 1, None, "ct6e-standard-1t", {}),
        ("v5p-128", 16, "4x4x4", "ct5p-hightpu-4t", {}),
        ("tpu7x-16", 2, "2x2x2", "tpu7x-standard-4t", {"boot-disk-type": "hyperdisk-balanced"}),
    ],
)
def test_create_on_compute_engine(accelerator, hosts, topology, machine, extra):
    """A template and a group of hosts; a policy makes several of them a slice."""
    family = "2404-amd64-tpu-tpu7x" if "7x" in accelerator else "2204-amd64-tpu-v5e-v5p-v6e"
    host = {
        "machine-type": machine,
        "image-family": f"ubuntu-accel-{family}",
        "image-project": "ubuntu-os-accelerator-images",
        "boot-disk-size": "200GB",
        "maintenance-policy": "TERMINATE",
        "scopes": "cloud-platform",
        **extra,
    }
    group = {"zone": "us-west4-a", "template": PART, "size": "0"}
    group["default-action-on-vm-failure"] = "do-nothing"
    if topology:
        group["target-size-policy-mode"] = "bulk"
        group["workload-policy"] = f"projects/my-project/regions/us-west4/resourcePolicies/{PART}"
    expected = [
        *LOOKS,
        *([*drop_policy(), policy(topology)] if topology else []),
        *DROPS["template"],
        compute(f"gcloud compute instance-templates create {PART}", **host),
        compute(f"{GROUP} create ppo", **group),
        compute(f"{GROUP} resize ppo", zone="us-west4-a", size=str(hosts)),
        *LOOKS,
        hosts_of_group(),
        ssh("true", api="compute"),
    ]
    api = {} if "7x" in accelerator else {"api": "compute"}  # TPU7x has no other
    assert dry("create.sh", accelerator=accelerator, **api, **SLICE) == expected


def test_a_request_has_more_flags():
    account = "tpu@my-project.iam.gserviceaccount.com"
    more = {"POD_CREATE_FLAGS": "--reservation=r --labels=a=b"}
    places = {"tpus": "queued-resources", "compute": "instance-templates"}
    for api, kind in places.items():
        flags = {**SLICE, "accelerator": "v6e-16", "api": api, "service_account": account}
        done = shell("create.sh", "--dry-run", "--spot", env=more, **flags)
        (got,) = [
            got
            for words, got in map(parsed, done.stdout.splitlines())
            if [kind, "create"] == words[-3:-1]
        ]
        assert (got["reservation"], got["labels"]) == ("r", "a=b")
        assert got["service-account"] == account
        if api == "compute":
            assert got["provisioning-model"] == "SPOT"
            assert got["instance-termination-action"] == "STOP"
        else:
            assert got["spot"] is True
    env = {"POD_DISK_SIZE": "50GB", "POD_IMAGE_PROJECT": "mine", "POD_RUNTIME_VERSION": "ours"}
    flags = {**SLICE, "accelerator": "v6e-16", "api": "compute"}
    text = shell("create.sh", "--dry-run", env=env, **flags).stdout
    for flag in ("--boot-disk-size=50GB", "--image-project=mine", "--image-family=ours"):
        assert flag in text


@pytest.mark.parametrize("accelerator", SLICES)
def test_create(accelerator):
    image = SLICES[accelerator][3]
    common = {**PLACE, "accelerator-type": accelerator}
    looks = list_of("queued-resources", "state.state")
    create = ["gcloud", "compute", "tpus", "queued-resources", "create", "ppo"]
    request = (create, {**common, "node-id": "ppo", "runtime-version": image, "spot": True})
    target = {**SLICE, "accelerator": accelerator}
    assert dry("create.sh", "--spot", **target) == [looks, request, looks]

    looks = list_of("tpu-vm", "state")
    account = "tpu@my-project.iam.gserviceaccount.com"
    create = ["gcloud", "compute", "tpus", "tpu-vm", "create", "ppo"]
    request = (create, {**common, "version": "v9", "service-account": account})
    got = dry("create.sh", "--direct", service_account=account, runtime_version="v9", **target)
    assert got == [looks, request, looks]


def test_delete():
    parts = [*DROPS["group"], *DROPS["template"], *drop_policy()]
    assert dry("delete.sh", api="compute", **SLICE) == parts
    words = ["gcloud", "compute", "tpus", "queued-resources", "delete", "ppo"]
    assert dry("delete.sh", **SLICE) == [(words, {**PLACE, "quiet": True, "force": True})]
    words = ["gcloud", "compute", "tpus", "tpu-vm", "delete", "ppo"]
    assert dry("delete.sh", "--direct", **SLICE) == [(words, {**PLACE, "quiet": True})]


@pytest.mark.parametrize("api", ["tpus", "compute"])
def test_install(api):
    archive, *copies, remove = dry("install.sh", ref="v1.0", api=api, **SLICE)
    if api == "compute":
        assert copies[0] == copies[2] == hosts_of_group()
        copies = copies[1::2]
    copy, (words, flags) = copies
    path = archive[1]["output"]
    assert archive[0] == ["git", "-C", str(SETUP.parent), "archive", "v1.0"]
    scp = ["gcloud", "compute", "tpus", "tpu-vm", "scp", path, "ppo:instructjax.tar.gz"]
    if api == "compute":
        scp = ["gcloud", "compute", "scp", path, "ppo-HOST:instructjax.tar.gz"]
    assert copy == (scp, PLACE if api == "compute" else {**PLACE, "worker": "all"})
    assert remove == (["rm", "-f", path], {})
    assert (words, flags) == ssh(flags["command"], api=api)
    *_, unpack, _, uv, python, packages = flags["command"].split("; ")
    assert shlex.split(unpack) == ["tar", "-xzf", "../instructjax.tar.gz"]
    assert uv.startswith("curl -LsSf https://astral.sh/uv/")
    assert "--python 3.12 " in python
    assert shlex.split(packages)[-2:] == ["-e", "instructjax[tpu]"]


@pytest.mark.parametrize("verb", ["run", "start"])
def test_run_all(verb):
    ((words, flags),) = dry(
        "run_all.sh", *["--detach"] * (verb == "start"), command=COMMAND, **SLICE
    )
    assert (words, flags) == ssh(flags["command"])
    assert shlex.split(flags["command"]) == ["bash", "instructjax/tpu_setup/job.sh", verb, COMMAND]


NUMBER = (
    "echo $(curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/"
    "instance/attributes/agent-worker-number || echo 0) $(hostname -s)"
)


def test_one_host():
    """On Compute Engine each host is asked for its number first."""
    asked = [hosts_of_group(), ssh(NUMBER, api="compute")]
    (*before, (words, flags)) = dry("run_all.sh", command="x", worker=2, api="compute", **SLICE)
    assert before == asked
    assert (words, flags) == ssh("bash instructjax/tpu_setup/job.sh run x", api="compute")
    logs = dry("logs.sh", worker=3, api="compute", **SLICE)
    assert logs == [*asked, ssh("tail -n 200 -F job/log", api="compute")]


def test_logs():
    assert dry("run_all.sh", command="x", worker=2, **SLICE) == [
        ssh("bash instructjax/tpu_setup/job.sh run x", worker="2")
    ]
    assert dry("logs.sh", worker=3, **SLICE) == [ssh("tail -n 200 -F job/log", worker="3")]


@pytest.mark.parametrize("accelerator", SLICES)
@pytest.mark.parametrize("direct", [[], ["--direct"]])
def test_resume(accelerator, direct):
    target = {**SLICE, "accelerator": accelerator}
    kind, field = ("tpu-vm", "state") if direct else ("queued-resources", "state.state")
    looks, *others = dry("resume.sh", "--spot", *direct, command=COMMAND, ref="v1.0", **target)
    assert looks == list_of(kind, field)
    deleted = dry("delete.sh", *direct, **SLICE)
    created = dry("create.sh", "--spot", *direct, **target)
    installed = dry("install.sh", ref="v1.0", **SLICE)
    started = dry("run_all.sh", "--detach", command=f"{COMMAND} --resume", **SLICE)
    before = len(deleted + created)
    assert others[:before] == deleted + created
    assert "job.sh status" in others[before][1]["command"]
    assert others[before + 1 :] == installed + started


def test_resume_on_compute_engine():
    target = {**SLICE, "accelerator": "v6e-16", "api": "compute"}
    on = {**SLICE, "api": "compute"}
    got = dry("resume.sh", "--spot", command=COMMAND, ref="v1.0", **target)
    *jobs, (_, flags) = got[: -len(dry("install.sh", ref="v1.0", **on)) - 2]
    assert "job.sh status" in flags["command"]
    assert jobs == [
        *LOOKS,
        *dry("delete.sh", **on),
        *dry("create.sh", "--spot", **target),
        hosts_of_group(),
    ]
    installed = dry("install.sh", ref="v1.0", **on)
    assert got[len(jobs) + 1 :] == [
        *installed,
        *dry("run_all.sh", "--detach", command=f"{COMMAND} --resume", **on),
    ]


@pytest.mark.parametrize("accelerator", SLICES)
def test_gke_commands(accelerator):
    _, hosts, topology, _, machine, _ = SLICES[accelerator]
    target = {**SLICE, "cluster": "pods", "accelerator": accelerator}
    ((words, flags),) = dry("gke.sh", "nodes", "--spot", **target)
    assert words == ["gcloud", "container", "node-pools", "create", "ppo"]
    pool = {
        "machine-type": machine,
        "tpu-topology": topology,
        "num-nodes": str(hosts),
        "spot": True,
    }
    where = {"cluster": "pods", "project": "my-project", "location": "us-west4"}
    assert flags == {**pool, **where, "node-locations": "us-west4-a", "scopes": "cloud-platform"}

    target.pop("accelerator")
    context = {"context": "gke_my-project_us-west4_pods"}
    ((words, flags),) = dry("gke.sh", "logs", worker=2, **target)
    assert words == ["kubectl", "logs"]
    assert flags["context"] == context["context"]
    assert flags["selector"].endswith("jobset-name=ppo,batch.kubernetes.io/job-completion-index=2")
    stop = (["kubectl", "delete", "jobset", "ppo"], {**context, "ignore-not-found": True})
    delete = (["gcloud", "container", "node-pools", "delete", "ppo"], {**where, "quiet": True})
    assert dry("gke.sh", "stop", **target) == [stop]
    assert dry("gke.sh", "delete", **target) == [stop, delete, *drop_policy(f"{PART}-gke")]


def test_gke_tpu7x():
    """Its nodes take their topology from a policy, which is deleted with them."""
    target = {**SLICE, "cluster": "pods", "accelerator": "tpu7x-16"}
    *made, (_, flags) = dry("gke.sh", "nodes", **target)
    part = f"{PART}-gke"
    assert made == [*drop_policy(part), policy("2x2x2", part)]
    assert (flags["placement-policy"], flags["num-nodes"]) == (part, "2")
    assert (flags["machine-type"], flags["disk-type"]) == (
        "tpu7x-standard-4t",
        "hyperdisk-balanced",
    )
    assert "tpu-topology" not in flags
    assert dry("gke.sh", "delete", **target)[2:] == drop_policy(part)
    text = shell("gke.sh", "manifest", command="x", image="i", **target).stdout
    assert "gke-tpu-accelerator: tpu7x\n" in text
    env = {"POD_API": "compute"}  # another way than GKE's, but also set
    flags = {**target, "accelerator": "v5litepod-16"}
    assert shell("gke.sh", "nodes", "--dry-run", env=env, **flags).returncode == 0


@pytest.mark.parametrize("accelerator", SLICES)
def test_jobset(accelerator):
    chips, hosts, topology, _, _, gke_name = SLICES[accelerator]
    target = {**SLICE, "cluster": "pods", "accelerator": accelerator, "image": "r.dev/p/i:1"}
    done = shell("gke.sh", "manifest", command=COMMAND, **target)
    assert "${" not in done.stdout.split("apiVersion", 1)[1]
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    meta = jobset["metadata"]
    assert meta["name"] == meta["labels"]["xpk.google.com/workload"] == "ppo"
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "multislice-queue"
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert meta["annotations"][exclusive] == "cloud.google.com/gke-nodepool"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (replicated["name"], replicated["replicas"]) == ("slice-job", 1)
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": gke_name,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["image"] == "r.dev/p/i:1"
    assert container["command"] + container["args"] == ["bash", "-c", f"{COMMAND} --resume"]
    assert container["resources"]["limits"]["google.com/tpu"] * hosts == chips
    # A job that exits with 75 must be restarted; one with 1 or 2 (failed, wrong usage) must not.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert {1, 2} <= set(rule["onExitCodes"]["values"])
    assert 75 not in rule["onExitCodes"]["values"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    # The command that --dry-run prints produces the same manifest.
    line = shell("gke.sh", "run", "--dry-run", command=COMMAND, **target).stdout
    printed, apply = line.rsplit(" | ", 1)
    again = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
    assert parsed(apply)[0] == ["kubectl", "apply"]


# ------------------------------------------------------------------------- errors

GOOD = {**SLICE, "accelerator": "v5litepod-16"}


@pytest.mark.parametrize(
    ("script", "bad", "named"),
    [
        *[(script, {"name": ""}, "--name") for script in CLOUD_SCRIPTS],
        *[(script, {"name": "My_Run"}, "--name My_Run") for script in CLOUD_SCRIPTS],
        *[(script, {"project": ""}, "--project") for script in CLOUD_SCRIPTS],
        *[(script, {"zone": "us-west4"}, "--zone us-west4") for script in CLOUD_SCRIPTS],
        ("create.sh", {"accelerator": ""}, "--accelerator"),
        ("create.sh", {"accelerator": "v5e-16"}, "v5litepod-16"),
        ("create.sh", {"accelerator": "v5p-100"}, "--accelerator v5p-100"),
        ("create.sh", {"accelerator": "h100-8"}, "--accelerator h100-8"),
        ("create.sh", {"service_account": "me"}, "--service-account me"),
        ("create.sh", {"runtime_version": "a b"}, "--runtime-version a b"),
        ("create.sh", {"speed": "1"}, "--speed=1"),
        *[(script, {"api": "mars"}, "--api mars") for script in CLOUD_SCRIPTS],
        ("create.sh", {"api": "compute"}, "--api compute: has no v5litepod"),
        ("resume.sh", {"api": "tpus", "accelerator": "tpu7x-16"}, "--api tpus: has no tpu7x"),
        ("create.sh", {"accelerator": "v7x-16"}, "tpu7x-16"),
        ("run_all.sh", {"worker": "first"}, "--worker first"),
        ("install.sh", {"ref": "--all"}, "--ref --all"),
        ("logs.sh", {"worker": "all"}, "--worker all"),
        ("run_all.sh", {"command": ""}, "--command"),
        ("run_all.sh", {"command": "a\nb"}, "--command"),
        ("resume.sh", {"command": " "}, "--command"),
    ],
)
def test_wrong_flags_are_named(script, bad, named):
    target = GOOD if script in ("create.sh", "resume.sh") else SLICE
    good = {**target, **({"command": "true"} if script in ("run_all.sh", "resume.sh") else {})}
    done = shell(script, "--dry-run", **{**good, **bad})
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_compute_engine_has_no_queue():
    for script in ("create.sh", "delete.sh", "resume.sh"):
        done = shell(script, "--direct", "--dry-run", env={"POD_API": "compute"}, **SLICE)
        assert done.returncode == 2
        assert "--direct: --api compute" in done.stderr


def test_gke_refuses():
    target = {**GOOD, "cluster": "pods", "image": "i", "command": "true"}
    for verb, bad, named in (
        ("run", {"cluster": ""}, "--cluster"),
        ("run", {"image": ""}, "--image"),
        ("run", {"location": "mars"}, "--location mars"),
        ("nodes", {"accelerator": "v5litepod-8"}, "--accelerator v5litepod-8"),
        ("fly", {}, "fly"),
    ):
        done = shell("gke.sh", verb, "--dry-run", **{**target, **bad})
        assert (done.returncode, done.stdout) == (2, "")
        assert named in done.stderr


def test_missing_tools_and_values(tmp_path):
    for tool in ("bash", "dirname", "sed", "tr"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = shell("delete.sh", env={"PATH": str(tmp_path)}, **SLICE)
    assert done.returncode == 2
    assert "gcloud: not found" in done.stderr
    done = shell("delete.sh", "--zone")
    assert (done.returncode, done.stderr) == (2, "error: --zone: needs a value\n")


def test_variables_stand_in_for_flags():
    names = {"name": "POD_NAME", "project": "POD_PROJECT", "zone": "POD_ZONE"}
    env = {names[flag]: value for flag, value in SLICE.items()}
    done = shell("delete.sh", "--dry-run", env=env)
    assert [parsed(line) for line in done.stdout.splitlines()] == dry("delete.sh", **SLICE)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    argv = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS]
    done = subprocess.run(argv, cwd=SETUP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax_and_help(script):
    subprocess.run(["bash", "-n", SETUP / script], check=True)
    text = (SETUP / script).read_text()
    if script == "common.sh":
        return
    assert os.access(SETUP / script, os.X_OK)
    assert "\nset -euo pipefail\n" in text
    done = shell(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--dry-run" in done.stdout
    assert f"tpu_setup/{script} " in done.stdout  # the example
    assert "set -euo" not in done.stdout


def shell_code(page):
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def calls_of(page, **env):
    """What the page's calls of the scripts print, in their order; and these lines of the page."""
    lines = []
    for text in shell_code(page):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for statement in text.replace("\\\n", "").splitlines():
            if statement.startswith("export "):
                lines.append(statement)
            elif re.match("(POD_CREATE_FLAGS=.* )?tpu_setup/", statement):
                lines.append(statement.split("  # ")[0] + " --dry-run")
    clean = {**env, **{name: os.environ[name] for name in ("PATH", "HOME")}}
    argv = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(argv, cwd=SETUP.parent, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [parsed(line) for line in done.stdout.splitlines()], lines


def test_the_readme():
    """Its shell code parses, and the scripts accept the README's calls."""
    got, lines = calls_of(SETUP / "README.md")
    created = [flags for _, flags in got if "node-id" in flags]
    assert [flags["accelerator-type"] for flags in created] == [*SLICES][:1] * 2 + [*SLICES][1:]
    called = {line.split()[0].removeprefix("tpu_setup/") for line in lines if "tpu_setup" in line}
    assert called == {*CLOUD_SCRIPTS, "gke.sh"}
    assert not any("POD_API" in line for line in lines)  # it would hold in the other sections too


def test_the_start_page():
    """The scripts accept its calls: a queued v5e, then groups of v6e. xpk has all its flags."""
    page = SETUP.parent / "docs" / "which-tpu.md"
    got, lines = calls_of(page)
    (queued,) = [flags for _, flags in got if "node-id" in flags]
    assert (queued["accelerator-type"], queued["spot"]) == ("v5litepod-16", True)
    hosts = [flags for words, flags in got if words[2:4] == ["instance-templates", "create"]]
    assert {host["machine-type"] for host in hosts} == {"ct6e-standard-4t"}
    models = ["SPOT", "RESERVATION_BOUND", "FLEX_START"]
    assert [host["provisioning-model"] for host in hosts] == models
    # No example sets what another one reads, or depends on what is set; each deletes its slice.
    exported = {name for line in lines for name in re.findall(r"(\w+)=", line.split('"')[0])}
    assert {name for name in exported if name.startswith("POD_")} == {
        *("POD_PROJECT", "POD_CREATE_FLAGS")
    }
    assert not any(line.startswith("export") and "POD_CREATE_FLAGS" in line for line in lines)
    others = {"POD_NAME": "x", "POD_ZONE": "us-west1-a", "POD_ACCELERATOR": "v4-8"}
    for api in ("tpus", "compute"):
        assert calls_of(page, POD_API=api, **others)[0] == got
    calls = [line for line in lines if "tpu_setup/" in line]
    place = re.compile("--name .* --zone .* --api (?:tpus|compute)")
    for resumed, deleted in zip(calls[::2], calls[1::2], strict=True):
        assert "tpu_setup/resume.sh " in resumed
        assert deleted.startswith("tpu_setup/delete.sh ")
        assert place.findall(resumed) == place.findall(deleted) != []
    names = re.findall(r"--name (\S+)", "\n".join(calls[::2]))
    assert len(set(names)) == len(names) == 4
    assert all(f"$BUCKET/{name}" in call for name, call in zip(names, calls[::2], strict=True))
    for text in (*shell_code(page), *shell_code(SETUP / "README.md")):
        for line in text.replace("\\\n", "").splitlines():
            if line.startswith("sky "):
                words = shlex.split(line)
                assert words[:4] == ["sky", "jobs", "launch", "tpu_setup/sky.yaml"]
                assert words[-2] == "--env"
                assert words[-1].startswith("COMMAND=python experiments/run_ppo.py --checkpoints")
            if line.startswith("xpk "):
                words, flags = parsed(line.replace('--command "', '--command="'))
                assert words == ["xpk", "workload", "create"]
                assert flags.keys() == {
                    *("project", "zone", "cluster", "workload", "tpu-type", "docker-image"),
                    *("max-restarts", "restart-on-exit-codes", "command"),
                }
                assert flags["restart-on-exit-codes"] == "75"
                assert "--resume --checkpoints" in flags["command"]


# ----------------------------------------------------------------- runs on a stand-in cloud

GCLOUD = r"""#!/usr/bin/env bash
echo "$(printf '%s ' "$@" | tr '\n' ' ')" >>"$CLOUD/calls" # one write: several run at once
state="$CLOUD/state"
worker=all
for word; do
  case "$word" in
    --command=*) command="${word#*=}" ;;
    --worker=*) worker="${word#*=}" ;;
    --filter=name=*) named="${word#*=name=}"; named="${named%% *}" ;;
    --template=*) template="${word#*=}" ;;
    --workload-policy=*) policy="${word##*/}" ;;
  esac
done
case "$*" in # a listing of hosts that fails after the first one
  *basename*) [ ! -e "$CLOUD/half" ] || { cat "$CLOUD/half"; exit 7; } ;;
esac
case "$* " in # a line of $CLOUD/bad_lists for each listing: the code with which it fails, or 0
  *" list "* | *" list-instances "*)
    read -r bad <"$CLOUD/bad_lists" || bad=0
    sed -i 1d "$CLOUD/bad_lists"
    [ "$bad" = 0 ] || exit "$bad" ;;
esac 2>/dev/null
case "$1 $2 $3" in
  "container node-pools create") touch "$CLOUD/pool"; exit ;;
  "container node-pools delete") [ ! -e "$CLOUD/no_pool" ] || exit 5; rm "$CLOUD/pool"; exit ;;
esac
case "$2 $3 $4" in # Compute Engine; a file for each part, and a line of states for each call
  "instance-groups managed list") [ ! -e "$CLOUD/group" ] || cat "$CLOUD/group"; exit ;;
  "instance-groups managed list-instances")
    case "$*" in
      *basename*) [ ! -e "$CLOUD/1" ] || printf 'ppo-aa\nppo-zz\n' ;; # host 1, host 0
      *) head -1 "$state" | tr ' ' '\n'; [ "$(wc -l <"$state")" = 1 ] || sed -i 1d "$state"
         [ ! -e "$CLOUD/vanishes" ] || rm "$CLOUD/vanishes" "$CLOUD/group" ;;
    esac
    exit ;;
  "instance-groups managed create")
    [ ! -e "$CLOUD/no_quota" ] || exit 4
    [ -e "$CLOUD/instance-templates/$template" ] || exit 1
    [ -e "$CLOUD/resource-policies/$policy" ] || exit 1
    echo 0 >"$CLOUD/group"; exit ;;
  "instance-groups managed resize")
    mkdir -p "$CLOUD/0" "$CLOUD/1"; echo 2 >"$CLOUD/group"; echo RUNNING, RUNNING, >"$state"
    exit ;;
  "instance-groups managed delete") rm -rf "$CLOUD/group" "$state" "$CLOUD"/[0-9]; exit ;;
  "instance-templates "* | "resource-policies "*)
    mkdir -p "$CLOUD/$2"; cd "$CLOUD/$2"
    case "$3" in
      list) [ ! -e "$named" ] || echo "$named" ;;
      create) [ "$4" != workload-policy ] || shift; [ ! -e "$4" ] && touch "$4" ;;
      delete) [ ! -e "$CLOUD/group" ] && rm "$4" ;; # else it is in use
    esac
    exit ;;
  "scp "*) [ "${4%%:*}" = ppo-aa ]; cp "$3" "$CLOUD/$((! $?))/${4#*:}"; exit ;;
  "ssh "*)
    [ "$3" = ppo-aa ]; host=$((! $?))
    head -1 "$state" | tr ' ' '\n' | grep -q RUNNING || exit 255
    [ ! -s "$CLOUD/misses" ] || { sed -i 1d "$CLOUD/misses"; exit 255; }
    cd "$CLOUD/$host" && HOME="$PWD" exec bash -c "$command" ;;
esac
case "$3 $4" in
  *" list") # one line for each call; the last line stays
    [ ! -e "$state" ] || head -1 "$state"
    [ ! -e "$state" ] || [ "$(wc -l <"$state")" = 1 ] || sed -i 1d "$state" ;;
  *" create")
    [ ! -e "$CLOUD/no_quota" ] || exit 4
    mkdir -p "$CLOUD/0" "$CLOUD/1" && echo ACTIVE >"$state" ;;
  *" delete") rm -rf "$state" "$CLOUD"/[0-9] ;;
  "tpu-vm scp") for host in "$CLOUD"/[0-9]; do cp "$5" "$host/${6#*:}"; done ;;
  "tpu-vm ssh")
    [ "$(head -1 "$state")" = ACTIVE ] || exit 1
    [ ! -s "$CLOUD/misses" ] || { sed -i 1d "$CLOUD/misses"; exit 255; }
    first=0
    for host in "$CLOUD"/[0-9]; do
      [ "$worker" = all ] || [ "$worker" = "${host##*/}" ] || continue
      code=0
      (cd "$host" && HOME="$host" exec bash -c "$command") || code=$?
      [ "$first" -ne 0 ] || first=$code
    done
    exit "$first" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """(env, directory): stand-ins for gcloud, git and curl that only use the directory."""
    tools, where, source = (tmp_path / name for name in ("tools", "cloud", "source"))
    for directory in (tools, where, source):
        directory.mkdir()
    (source / "tpu_setup").symlink_to(SETUP)
    uv = "mkdir -p ~/.local/bin && echo >~/.local/bin/uv && chmod +x ~/.local/bin/uv"
    stand_ins = {
        "gcloud": GCLOUD,
        "curl": f"""#!/bin/sh
case "$*" in *agent-worker-number) echo "${{HOME##*/}}" ;; *) echo '{uv}' ;; esac""",
        "hostname": """#!/bin/sh
[ "${HOME##*/}" = 0 ] && echo ppo-zz || echo ppo-aa""",
        "git": f"""#!/bin/sh
for word; do case "$word" in --output=*) tar -czhf "${{word#*=}}" -C {source} . ;; esac; done""",
    }
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    env = {"PATH": path, "CLOUD": str(where), "POD_POLL": "0.1", "TMPDIR": str(tmp_path)}
    return env, where


PARTS = ("instance-templates", "resource-policies")


def parts_in(where):
    return [path.name for part in PARTS for path in sorted((where / part).glob("*"))]


def calls(where, text):
    return [line for line in (where / "calls").read_text().splitlines() if text in line]


def delete_line(api="tpus"):
    return f"tpu_setup/delete.sh --name=ppo --project=my-project --zone=us-west4-a --api={api}"


@pytest.mark.parametrize("api", ["tpus", "compute"])
def test_a_run_survives_preemption(cloud, api):
    """It stops with 75, then its slice is preempted, then it finishes."""
    env, where = cloud
    preempted = "SUSPENDED" if api == "tpus" else "RUNNING, TERMINATED,"
    (where / "job").write_text(
        f"""[ "$*" = --resume ] || exit 3
echo start >>{where}/started
case "$(wc -l <{where}/started)" in
  [12]) exit 75 ;;
  4) ! mkdir {where}/taken || echo {preempted} >{where}/state; exit 1 ;;
  3) exit 1 ;;
esac
"""
    )
    flags = {**SLICE, "accelerator": "v5p-16", "command": f"bash {where}/job", "api": api}
    done = shell("resume.sh", "--spot", env=env, **flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ppo: finished\n")
    assert done.stderr.splitlines()[-1] == f"the slice is still up: {delete_line(api)}"
    assert len((where / "started").read_text().splitlines()) == 6
    kind = "queued-resources" if api == "tpus" else "managed"
    assert len(calls(where, f"{kind} create ppo")) == 2
    assert len(calls(where, f"{kind} delete ppo")) == 1
    assert len(calls(where, "job.sh start")) == (3 if api == "tpus" else 6)  # once on each host
    assert "Done" not in done.stderr


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [((0, 1), 1, 1), ((134, 1), 1, 1), ((134, 137), 134, 5), ((0, 137), 137, 5)],
)
def test_an_error_ends_it(cloud, codes, code, starts):
    """At once if it is one of the command. One that was killed or aborted is tried again."""
    env, where = cloud
    command = f'case "$HOME" in */0) exit {codes[0]};; */1) exit {codes[1]};; esac; true'
    flags = {**SLICE, "accelerator": "v5p-16", "command": command}
    done = shell("resume.sh", env=env, **flags)
    assert done.returncode == code
    assert "logs.sh" in done.stderr
    assert f"\nthe slice is still up: {delete_line()}\n" in done.stderr
    assert len(calls(where, "job.sh start")) == starts


def test_resume_says_that_the_slice_may_be_up(cloud):
    """If the hosts do not answer, if a flag is wrong, and if it could not be set up."""
    env, where = cloud
    flags = {**SLICE, "accelerator": "v5p-16", "command": "true"}
    line = f"the slice may still be up: {delete_line()}"
    assert shell("create.sh", env=env, accelerator="v5p-16", **SLICE).returncode == 0
    (where / "misses").write_text("x\n" * 99)
    done = shell("resume.sh", env={**env, "POD_POLL": "0"}, **flags)
    assert done.returncode == 255
    assert line in done.stderr.splitlines()
    assert "ppo is ACTIVE and could not be set up" in done.stderr
    (where / "misses").write_text("")
    command = f"seq 99 >{where}/misses; sleep 5"
    done = shell("resume.sh", env={**env, "POD_POLL": "0.01"}, **{**flags, "command": command})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        line,
        "error: ppo: some of its 2 hosts do not answer; the job may still be running",
    ]
    (where / "bad_lists").write_text("2\n")
    done = shell("resume.sh", env=env, **flags)
    assert (done.returncode, done.stderr) == (2, f"{line}\n")
    (where / "bad_lists").write_text("2\n")
    done = shell("resume.sh", "--direct", env=env, **flags)
    assert (done.returncode, done.stderr) == (2, f"{line} --direct\n")


def test_resume_could_not_create(cloud):
    env, where = cloud
    (where / "no_quota").touch()
    flags = {**SLICE, "accelerator": "v5p-16", "command": "true"}
    done = shell("resume.sh", env={**env, "POD_POLL": "0"}, **flags)
    assert done.returncode == 4
    assert done.stderr == "error: ppo is not there and could not be set up\n"


def test_a_running_job_is_watched(cloud):
    """As after a restart of resume.sh; the hosts do not always answer."""
    env, where = cloud
    flags = {**SLICE, "accelerator": "v5p-16"}
    assert shell("create.sh", env=env, **flags).returncode == 0
    assert shell("install.sh", env=env, **SLICE).returncode == 0
    command = f"while [ ! -e {where}/end ]; do sleep 0.05; done"
    started = shell("run_all.sh", "--detach", env=env, command=command, **SLICE)
    assert started.returncode == 0
    argv = ["bash", str(SETUP / "resume.sh"), *(f"--{k}={v}" for k, v in flags.items())]
    argv.append(f"--command={command}")
    watching = subprocess.Popen(argv, env={**env, "HOME": "/"}, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    with watching.stdout as output:
        assert output.readline() == "ppo: a job is already running; watching it\n"
        (where / "misses").write_text("one\ntwo\n")
        while (where / "misses").stat().st_size:
            assert watching.poll() is None
        (where / "end").touch()
        assert output.read() == "ppo: finished\n"
    assert watching.wait() == 0
    assert len(calls(where, "job.sh start")) == 1


@pytest.mark.parametrize("api", ["tpus", "compute"])
def test_create_waits_though_checks_fail(cloud, api):
    """It gives up after ten in a row, and says that the request stays."""
    env, where = cloud
    flags = {**SLICE, "accelerator": "v5p-16", "api": api}
    good = "0\n" * (1 if api == "tpus" else 2)  # the listings of a check
    assert shell("create.sh", env=env, **flags).returncode == 0
    up = (where / "state").read_text()
    (where / "state").write_text(("CREATING\n" if api == "tpus" else "PENDING,\n") * 2 + up)
    (where / "bad_lists").write_text((good + "1\n" * 9) * 2)
    done = shell("create.sh", env=env, **flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "ppo: check 9 failed; it ends after 10 in a row"
    said = ["CREATING", "ACTIVE"] if api == "tpus" else ["PENDING", "READY"]
    assert done.stdout == f"ppo is {said[0]}\nppo is {said[1]}: 8 chips, 2 hosts\n"
    (where / "bad_lists").write_text(good + "1\n" * 10)
    done = shell("create.sh", env=env, **flags)
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ppo: 10 checks in a row failed. The request stays and costs")
    assert (where / "state").exists()


def test_create_waits(cloud):
    env, where = cloud
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (where / "state").write_text("\n".join(states) + "\n")
    done = shell("create.sh", env=env, **GOOD)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        *(f"ppo is {state}" for state in states[1:3]),
        "ppo is ACTIVE: 16 chips, 4 hosts",
    ]
    assert not calls(where, " create ")  # the slice was already requested


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["RUNNING, RUNNING,"], ["READY: 8 chips, 2 hosts"]),
        ([",CREATING ,CREATING", "RUNNING,", "PENDING, RUNNING,", "RUNNING, RUNNING,"],
         ["CREATING", "PENDING", "READY: 8 chips, 2 hosts"]),
        (["STAGING, TERMINATED,"], "TERMINATED"),
        (["RUNNING, ,NONE"], "TERMINATED"),  # nothing makes that host again
        (["STOPPING, TERMINATED,"], "STOPPING"),
    ],
)  # fmt: skip
def test_the_state_of_a_group(cloud, states, said):
    """It is up when all its hosts are, and gone when one is."""
    env, where = cloud
    (where / "1").mkdir()
    (where / "group").write_text("2\n")
    (where / "state").write_text("\n".join(states) + "\n")
    done = shell("create.sh", env=env, accelerator="v5p-16", api="compute", **SLICE)
    if isinstance(said, str):
        assert (done.returncode, done.stdout) == (1, "")
        assert f"ppo is {said}: run tpu_setup/delete.sh first" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"ppo is {state}" for state in said]
        assert not calls(where, " create ")
        assert len(calls(where, "--command=true")) == 1  # the first host only


def test_leftovers_of_a_group(cloud):
    """A request that failed half-way leaves a template and a policy, which are made again."""
    env, where = cloud
    (where / "no_quota").touch()
    flags = {**SLICE, "accelerator": "v5p-16", "api": "compute"}
    assert shell("create.sh", env=env, **flags).returncode == 4
    assert parts_in(where) == [PART] * 2
    done = shell("delete.sh", env=env, api="compute", **SLICE)
    assert (done.returncode, parts_in(where)) == (0, [])
    done = shell("delete.sh", env=env, api="compute", **SLICE)
    assert done.returncode == 1
    assert "no group ppo" in done.stderr
    assert shell("create.sh", env=env, **flags).returncode == 4
    (where / "no_quota").unlink()
    (where / "group").write_text("0\n")  # or one that never got its size
    (where / "state").write_text("\n")
    assert "ppo is STOPPED" in shell("create.sh", env=env, **flags).stderr
    (where / "group").unlink()
    assert shell("create.sh", env=env, **flags).returncode == 0
    assert shell("delete.sh", env=env, api="compute", **SLICE).returncode == 0
    assert not (where / "group").exists()
    assert parts_in(where) == []


def test_templates_and_policies_of_others(cloud):
    """What somebody else has called by the slice's name, in the same project, stays."""
    env, where = cloud
    for part in PARTS:
        (where / part).mkdir()
        (where / part / "ppo").touch()
    flags = {**SLICE, "accelerator": "v5p-16", "api": "compute"}
    assert shell("create.sh", env=env, **flags).returncode == 0
    assert parts_in(where) == [PART, "ppo"] * 2
    assert shell("delete.sh", env=env, api="compute", **SLICE).returncode == 0
    assert parts_in(where) == ["ppo"] * 2
    pool = {**SLICE, "accelerator": "tpu7x-16", "cluster": "pods"}
    assert shell("gke.sh", "nodes", env=env, **pool).returncode == 0
    assert parts_in(where) == ["ppo", f"{PART}-gke", "ppo"]


def test_names_of_parts():
    """They follow Google's rules. Those of slices in other zones, and of gke.sh's, differ."""

    def part(script, *words, **place):
        (*_, (words, _)) = [
            call
            for call in dry(script, *words, **{**SLICE, **place, "accelerator": "tpu7x-16"})
            if "workload-policy" in call[0]
        ]
        return words[-1]

    long = "a" + 38 * "b"
    zones = ("us-west4-a", "northamerica-northeast1-a", "northamerica-northeast1-b")
    names = [part("create.sh", name=name, zone=zone) for name in ("p", long) for zone in zones]
    names += [
        part("gke.sh", "nodes", name=name, zone=zone, cluster="pods")
        for name in ("p", long)
        for zone in zones
    ]
    assert len(set(names)) == len(names) == 12
    assert max(len(name) for name in names) <= 63
    assert all(re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name) for name in names)
    assert names[0] == "instructjax-p-us-west4-a"


def test_delete_finds_no_group(cloud):
    """The slice is one of the Cloud TPU API, but POD_API is still that of another slice."""
    env, where = cloud
    assert shell("create.sh", env=env, **GOOD).returncode == 0
    done = shell("delete.sh", env={**env, "POD_API": "compute"}, **SLICE)
    assert done.returncode == 1
    assert done.stderr == (
        "error: no group ppo in us-west4-a by --api compute; "
        "for the Cloud TPU API give --api tpus\n"
    )
    assert (where / "state").exists()
    assert shell("delete.sh", "--if-exists", env=env, api="compute", **SLICE).returncode == 0
    assert (where / "state").exists()
    done = shell("delete.sh", env={**env, "POD_API": "compute"}, api="tpus", **SLICE)
    assert done.returncode == 0
    assert not (where / "state").exists()


def test_resume_deletes_a_group_that_is_gone(cloud):
    """Somebody else deleted it after resume.sh saw it."""
    env, where = cloud
    (where / "vanishes").touch()
    (where / "group").write_text("2\n")
    (where / "state").write_text("TERMINATED, TERMINATED,\n")
    flags = {**SLICE, "accelerator": "v5p-16", "api": "compute", "command": "true"}
    done = shell("resume.sh", env=env, **flags)
    assert done.returncode == 0, done.stderr
    assert not (where / "vanishes").exists()
    assert len(calls(where, "managed create ppo")) == 1
    assert not calls(where, "managed delete ppo")
    assert "no group" not in done.stderr


def test_hosts_of_a_group(cloud):
    """All run a command at once; the code is that of the first that failed. One has a number."""
    env, where = cloud
    on = {**SLICE, "api": "compute"}
    shell("create.sh", env=env, accelerator="v5p-16", **on)
    assert shell("install.sh", env=env, **on).returncode == 0
    meet = f"touch {where}/$(basename $HOME).is; until [ -e {where}/0.is ] && [ -e {where}/1.is ]; "
    meet += "do sleep 0.02; done"
    done = shell("run_all.sh", env=env, command=f"{meet}; exit 1$(basename $HOME)", **on)
    assert done.returncode == 11  # ppo-aa, which is host 1
    done = shell("run_all.sh", env=env, worker=0, command="hostname; exit 7", **on)
    assert (done.returncode, done.stdout) == (7, "ppo-zz\n")
    done = shell("run_all.sh", env=env, worker=5, command="hostname", **on)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--worker 5" in done.stderr
    shell("delete.sh", env=env, **on)
    assert "finds no hosts" in shell("run_all.sh", env=env, command="x", **on).stderr


@pytest.mark.parametrize("listed", ["", "ppo-aa\n"])
def test_hosts_that_cannot_be_listed(cloud, listed):
    """A command is run on all hosts or on none."""
    env, where = cloud
    flags = {**SLICE, "accelerator": "v5p-16", "api": "compute"}
    assert shell("create.sh", env=env, **flags).returncode == 0
    (where / "half").write_text(listed)
    (where / "calls").unlink()
    for script, extra in (
        ("run_all.sh", {"command": "true"}),
        ("run_all.sh", {"command": "true", "worker": 0}),
        ("install.sh", {}),
        ("create.sh", {"accelerator": "v5p-16"}),
    ):
        done = shell(script, env=env, api="compute", **SLICE, **extra)
        assert done.returncode == 7
        assert "error: ppo: its hosts could not be listed" in done.stderr
    assert not calls(where, "compute ssh") + calls(where, "compute scp")


def test_create_finds_no_hosts(cloud):
    env, where = cloud
    flags = {**SLICE, "accelerator": "v5p-16", "api": "compute"}
    assert shell("create.sh", env=env, **flags).returncode == 0
    (where / "calls").unlink()
    shutil.rmtree(where / "1")  # the stand-in then lists none
    done = shell("create.sh", env=env, **flags)
    assert done.returncode == 1
    assert done.stderr == "error: ppo: --api compute finds no hosts\n"
    assert not calls(where, "compute ssh")


def test_sky():
    """sky.yaml installs what install.sh installs, and runs what resume.sh runs."""
    task = yaml.safe_load((SETUP / "sky.yaml").read_text())
    assert task["workdir"] == "."
    resources = task["resources"]
    assert resources["use_spot"] is True
    assert resources["job_recovery"]["recover_on_exit_codes"] == [75]
    kind = resources["accelerators"].removeprefix("tpu-")
    created = dry("create.sh", accelerator=kind, **SLICE)[1][1]
    assert resources["accelerator_args"]["runtime_version"] == created["runtime-version"]
    install = (SETUP / "install.sh").read_text()
    for name in ("UV", "PYTHON"):
        (version,) = re.findall(rf"POD_{name}_VERSION:-([0-9.]+)", install)
        assert version in task["setup"]
    assert "--python ~/venv/bin/python -e '.[tpu]'" in task["setup"]
    assert task["envs"] == {"COMMAND": None}  # SkyPilot then requires it


def test_sky_runs(cloud, tmp_path):
    env, _ = cloud
    home = tmp_path / "home"
    (home / "sky_workdir").mkdir(parents=True)
    (home / "sky_workdir" / "tpu_setup").symlink_to(SETUP)
    task = yaml.safe_load((SETUP / "sky.yaml").read_text())
    command = "true; echo $PWD"
    env = {**env, "HOME": str(home), "COMMAND": command}
    for part in ("setup", "run"):
        argv = ["bash", "-c", task[part]]
        done = subprocess.run(
            argv, cwd=home / "sky_workdir", env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{home}/instructjax --resume\n"


def test_create_gives_up(cloud):
    env, where = cloud
    for states in ("SUSPENDED", "CREATING\nPROVISIONING\nFAILED"):
        (where / "state").write_text(f"{states}\n")
        done = shell("create.sh", env=env, **GOOD)
        assert done.returncode == 1
        assert states.splitlines()[-1] in done.stderr
    (where / "state").unlink()
    (where / "no_quota").touch()
    assert shell("create.sh", env=env, **GOOD).returncode == 4


def test_gke_run(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/words; cat >{tmp_path}/stdin; exit 3\n')
    kubectl.chmod(0o755)
    target = {**GOOD, "cluster": "pods", "image": "i", "command": COMMAND}
    done = shell("gke.sh", "run", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, **target)
    assert done.returncode == 3
    words = (tmp_path / "words").read_text().split()
    assert words == ["--context=gke_my-project_us-west4_pods", "apply", "--filename=-"]
    assert (tmp_path / "stdin").read_text() == shell("gke.sh", "manifest", **target).stdout


@pytest.mark.parametrize(
    ("kubectl", "no_pool", "code"), [(0, False, 0), (3, False, 3), (3, True, 3), (0, True, 5)]
)
@pytest.mark.parametrize("accelerator", [{}, {"accelerator": "tpu7x-16"}])
def test_gke_delete(cloud, tmp_path, accelerator, kubectl, no_pool, code):
    """It deletes the nodes, which cost, and the policy, also if kubectl fails."""
    env, where = cloud
    tool = tmp_path / "tools" / "kubectl"
    tool.write_text(f'#!/bin/sh\necho "kubectl $*" >>{where}/calls\nexit {kubectl}\n')
    tool.chmod(0o755)
    target = {**SLICE, "cluster": "pods"}
    assert shell("gke.sh", "nodes", env=env, accelerator="tpu7x-16", **target).returncode == 0
    assert parts_in(where) == [f"{PART}-gke"]
    if no_pool:
        (where / "no_pool").touch()
    done = shell("gke.sh", "delete", env=env, **target, **accelerator)
    assert done.returncode == code
    assert len(calls(where, "delete jobset ppo")) == 1
    assert (where / "pool").exists() == no_pool
    assert parts_in(where) == []
    assert shell("gke.sh", "stop", env=env, **target).returncode == kubectl


def test_run_all_returns_the_hosts_code(cloud):
    env, where = cloud
    shell("create.sh", env=env, **GOOD)
    done = shell("run_all.sh", env=env, command="true", **SLICE)
    assert done.returncode == 127  # nothing is installed
    assert shell("install.sh", env=env, **SLICE).returncode == 0
    done = shell(
        "run_all.sh", env=env, command=f"echo 'a  b' >{where}/$(basename $HOME).txt", **SLICE
    )
    assert done.returncode == 0, done.stderr
    assert [(where / f"{host}.txt").read_text() for host in range(2)] == ["a  b\n"] * 2
    done = shell("run_all.sh", env=env, command='[ "$(basename $HOME)" = 0 ] || exit 9', **SLICE)
    assert done.returncode == 9


def test_a_job_saves_when_stopped(tmp_path):
    """SIGTERM reaches the command, and its exit code is kept; a second job is refused."""
    (tmp_path / "instructjax").mkdir()
    env = {"HOME": str(tmp_path)}
    save = f"trap 'echo saved >{tmp_path}/saved; exit 75' TERM; touch {tmp_path}/up; sleep 9 & wait"

    def status():
        return shell("job.sh", "status", env=env).stdout.split()[-1]

    def wait_for(condition):
        for _ in range(200):
            if condition():
                return
            subprocess.run(["sleep", "0.02"], check=True)
        raise AssertionError((tmp_path / "job" / "log").read_text())

    assert status() == "none"
    assert shell("job.sh", "start", f'true && bash -c "{save}"', env=env).returncode == 0
    wait_for((tmp_path / "up").exists)
    assert status() == "running"
    refused = shell("job.sh", "start", "true", env=env)
    assert refused.returncode == 1
    assert "running" in refused.stderr
    assert shell("job.sh", "stop", env=env).returncode == 0
    wait_for(lambda: status() == "75")
    assert (tmp_path / "saved").exists()
    assert shell("job.sh", "stop", env=env).returncode == 1
    assert shell("job.sh", "start", "sleep 9", env=env).returncode == 0
    assert status() == "running"  # and no longer 75
    assert shell("job.sh", "stop", env=env).returncode == 0
    wait_for(lambda: status() == "143")
    # As after a restart of the host, when another process has the same id.
    (tmp_path / "job" / "code").unlink()
    (tmp_path / "job" / "pid").write_text(f"{os.getpid()} Mon-Jan-1-00:00:00-2024\n")
    assert status() == "lost"
