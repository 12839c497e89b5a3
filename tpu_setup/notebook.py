# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RLHF as InstructGPT did it, on one TPU, GPU or CPU
#
# This notebook runs the three steps of InstructGPT with instructjax: supervised fine-tuning (SFT),
# a reward model of human preferences, and PPO-ptx. It chooses the number of steps by the minutes
# that you give it, stops each script once and resumes it, draws the curves, talks to the model, and
# ends with a report of speed and memory to post.
#
# | where | device | model |
# |---|---|---|
# | Colab, free | one TPU v5e chip | Qwen3-0.6B, with LoRA |
# | Kaggle, free for 20 hours a week | eight TPU v5e chips | Qwen3-1.7B, with LoRA |
# | Colab or Kaggle | one GPU or two | SmolLM2-135M-Instruct, with LoRA |
# | anywhere, without a network too | CPU | the miniature: a built-in world with a small model |
#
# **What has been run.** On CPU, the whole notebook: with the miniature, and with a tiny model, LoRA
# and local files in the place of the hub's data. **What has not:** the models and data of the hub,
# TPUs, GPUs, Colab and Kaggle. If you run it there, please post the report of the last cell, or the
# error.
#
# To begin, give the repository's address as `CODE` in the next cell, unless this file lies in a
# clone, and run all cells. On Kaggle, switch `Internet` on first.
#
# The notebook is made from `notebook.py`, beside it. To change it, change that file, and then run
# `jupytext --update --to ipynb tpu_setup/notebook.py`.

# %% tags=["parameters"]
BUDGET = 60  # minutes for everything, installation included
CODE = ""  # a clone of instructjax, or an address for `git clone`; "": the clone around this file
INSTALL = True  # install the clone, with pip, where this kernel finds it
OUT = ""  # an empty folder, or one to go on in; "": instructjax-runs, on Kaggle in /tmp
MODEL = ""  # a name on the hub, or a folder's whole path; "": as the table above says
DATA = {  # docs/data.md lists more sets, and how to read your own: jsonl:/whole/path.jsonl
    "demonstrations": "hf:HuggingFaceH4/no_robots",
    "comparisons": "hf:HuggingFaceH4/ultrafeedback_binarized:train_prefs[:6000]",
    "prompts": "hf:databricks/databricks-dolly-15k",
    "text": "hf:Salesforce/wikitext/wikitext-2-raw-v1",
}
FLAGS = {}  # more flags of a script, as {"rm": "--data.columns 'prompt=question'"}
STEPS = {}  # at most so many steps of a script, as {"ppo": 50}; {}: as below
PROMPTS = []  # to ask the trained model; []: two that fit it
MEASURED = 5  # steps that a script makes before it is stopped once; they show how many fit

# %% [markdown]
# ## The device, and the installation
#
# A TPU serves one process at a time. So this notebook itself does not load jax: the training
# scripts do, one after another, and the next cell looks for the device in other ways.

# %%
import glob
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from IPython.display import Image, display

END = time.time() + 60 * BUDGET


def accelerator():
    """The extra of instructjax for the device of this machine, before jax is there to ask."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    smi = shutil.which("nvidia-smi")
    return "cuda" if smi and subprocess.run([smi], capture_output=True).returncode == 0 else ""


def online():
    """Whether the hub can be reached."""
    try:
        if os.environ.get("HF_HUB_OFFLINE") != "1":
            return bool(urllib.request.urlopen("https://huggingface.co", timeout=10))
    except OSError:
        pass
    return False


def clone():
    """The folder of the repository."""
    if "://" in CODE or CODE.startswith("git@"):
        if not Path("instructjax").exists():
            subprocess.run(["git", "clone", CODE, "instructjax"], check=True)
        return Path("instructjax").resolve()
    here = Path(CODE).resolve()
    for folder in (here, *here.parents):
        if (folder / "experiments/run_ppo.py").exists():
            return folder
    raise SystemExit("Give the repository's address, or the folder of a clone, as CODE above.")


REPOSITORY, EXTRA, ONLINE = clone(), accelerator(), online()
KAGGLE = Path("/kaggle/working").exists()
OUT = Path(OUT or ("/tmp/instructjax-runs" if KAGGLE else "instructjax-runs")).resolve()
OUT.mkdir(parents=True, exist_ok=True)
if INSTALL:
    extras = ",".join(filter(None, [EXTRA, "hf" if ONLINE else ""]))
    package = f"{REPOSITORY}[{extras}]" if extras else str(REPOSITORY)
    print(f"installing {package}: a minute or a few")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", package], check=True)

# %% [markdown]
# ## The model and the sizes
#
# `TABLE` chooses by the device. `MOST` is the number of steps beyond which training would see the
# data too often, and `SHARE` divides the time. Without a network, or on a CPU, it is the miniature:
# its training of about nine minutes on two quick cores does not need all of the 60. Compiled with
# `experiments/preflight.py`, PPO takes 8.32 of 15.75 GiB on one v5e chip, 4.90 on each of eight.

# %%
QUESTION = """
import jax
from instructjax import hosts
hosts.choose_platform()
devices = jax.devices()
print(devices[0].platform, len(devices), devices[0].device_kind)
"""
asked = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True)
assert asked.returncode == 0, asked.stderr
platform, count, kind = asked.stdout.split(maxsplit=2)
print(f"{count} x {kind.strip()}; the hub is {'there' if ONLINE else 'not there'}")
if EXTRA and platform == "cpu":
    raise SystemExit(f"There is a device for instructjax[{EXTRA}], and jax does not see it.")

DEVICE = {"cpu": "CPU", "gpu": "GPU", "tpu": "one chip"}[platform]
if platform == "tpu" and int(count) > 1:
    DEVICE = "chips"
TABLE = {  # model, dtype
    "CPU": ("miniature", "float32"),
    "GPU": ("HuggingFaceTB/SmolLM2-135M-Instruct", "float32"),  # a T4 has no bfloat16
    "one chip": ("Qwen/Qwen3-0.6B", "bfloat16"),
    "chips": ("Qwen/Qwen3-1.7B", "bfloat16"),
}
if not MODEL:
    MODEL = TABLE[DEVICE][0] if ONLINE else "miniature"
MINIATURE = MODEL == "miniature"

# Each script's flags. The miniature has its own data, and a base model to pretrain first.
SIZES = f"--lora.rank 16 --model_dtype {TABLE[DEVICE][1]} --data.on_error skip"
COMMANDS = {
    "sft": f"--model {MODEL} --data {DATA['demonstrations']} {SIZES}"
    " --learning_rate 2e-4 --length 1024",
    "rm": f"--model runs/sft --data {DATA['comparisons']} {SIZES}"
    f" --learning_rate 1e-4 --length 1024 --demonstrations {DATA['demonstrations']}"
    " --demonstrations.on_error skip",
    "ppo": f"--model runs/sft --reward runs/rm --data {DATA['prompts']} {SIZES}"
    " --ppo.learning_rate 3e-5 --ppo.value_learning_rate 9e-5 --data.max_prompt 256"
    f" --pretrain {DATA['text']} --pretrain.on_error skip --ptx.coef 0.1",
}
MOST = {"sft": 400, "rm": 500, "ppo": 200}
if MINIATURE:
    COMMANDS = {"pretrain": "", "sft": "", "rm": "", "ppo": ""}
    MOST = {"pretrain": 857, "sft": 1272, "rm": 2454, "ppo": 120}
MOST |= STEPS
SHARE = {"pretrain": 2, "sft": 2, "rm": 3, "ppo": 6}
print(f"model: {MODEL}")

# %% [markdown]
# ## How the time is kept
#
# Each script is started with all its steps and gets a SIGTERM after the first few, as when a cloud
# takes a TPU away. It finishes its step, saves, and ends with code 75. From these steps `train`
# computes how many fit the stage's share of the minutes that are left, and resumes the script with
# that many. If they take longer than expected, the script is stopped again, and makes one step more
# before it evaluates and exports. Loading, compiling and evaluating are not cut short: with too
# small a budget each stage makes a few steps, and the whole takes longer than asked.
#
# If the session ends early, run the notebook again with the same `OUT`: finished stages are not
# repeated, and a stage that was stopped goes on.


# %%
PLAIN = {  # output of plain lines, at once, and no bars of downloads
    **{"PYTHONUNBUFFERED": "1", "COLUMNS": "110", "FORCE_COLOR": ""},
    **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
}


def run(words, stop=lambda: False):
    """Runs a command in OUT, and shows its output. Once `stop()` is true, it gets a SIGTERM.

    Returns the exit code: 0 finished, 75 stopped and resumable.
    """
    print("$", shlex.join(map(str, words)), flush=True)
    with subprocess.Popen(
        list(map(str, words)),
        cwd=OUT,
        env={**os.environ, **PLAIN},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # an interrupt of the notebook is passed on below, once
    ) as process:

        def watch():
            while process.poll() is None:
                if stop():
                    return process.terminate()
                time.sleep(0.2)

        threading.Thread(target=watch, daemon=True).start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def script(stage, *flags):
    """The command of a training script."""
    words = shlex.split(f"{COMMANDS[stage]} {FLAGS.get(stage, '')}")
    return [sys.executable, REPOSITORY / f"experiments/run_{stage}.py", *words, *flags]


def metrics(name):
    """The lines of a run's metrics.jsonl."""
    file = OUT / "runs" / name / "metrics.jsonl"
    return [json.loads(x) for x in file.read_text().split("\n")[:-1]] if file.exists() else []


def made(name):
    """Number of steps that a run has made."""
    return max((row["step"] for row in metrics(name)), default=0)


def step_seconds(name):
    """Seconds of a step. The first one compiles, and has no throughput."""
    return statistics.median(
        row["time/step"] for row in metrics(name) if "throughput/tokens_per_second" in row
    )


def finished(stage):
    """Whether a stage has written its model and, after its last evaluation, its curves."""
    files = "export/config.json", "curves.png"
    return all((OUT / "runs" / stage / file).exists() for file in files)


def due(stage):
    """The time at which a stage should end: now, and its share of what is left."""
    left = [SHARE[other] for other in COMMANDS if not finished(other)]
    return time.time() + max(0.0, 0.95 * (END - time.time())) * SHARE[stage] / sum(left)


def train(stage):
    """Runs a stage for its share of the time."""
    if finished(stage):
        return print(f"{stage} is finished: {OUT / 'runs' / stage}")
    began, end, begin = time.time(), due(stage), made(stage)
    first = script(stage, "--resume", "--steps", MOST[stage])
    code = run(first, lambda: made(stage) >= begin + MEASURED)
    if code == 75:
        stopped, second = made(stage), step_seconds(stage)
        # Loading and compiling. The second start finds the compiled programs on disk; with the
        # evaluation and the export at the end it is taken to need half as long again.
        besides = time.time() - began - (stopped - begin) * second
        left = end - time.time()
        fit = int((left - 1.5 * besides) / second)
        steps = min(stopped + max(1, fit), MOST[stage])
        print(f"{stage}: stopped after step {stopped} with code 75. It has {left / 60:.1f} minutes")
        print(
            f"left, a step takes {second:.2f} s, and the start took {besides:.0f} s: it goes on to"
        )
        print(f"step {steps:,}{'.' if fit > 0 else ', as no more fit: give a larger BUDGET.'}")
        code = run(
            script(stage, "--resume", "--steps", steps),
            lambda: time.time() > end and stopped < made(stage) < steps,
        )
        if code == 75:
            code = run(script(stage, "--resume", "--steps", min(steps, made(stage) + 1)))
    assert code == 0, f"run_{stage}.py ended with code {code}"
    steps = [row["step"] for row in metrics(stage)]
    assert steps == list(range(steps[0], steps[-1] + 1)), "a step is missing, or was made twice"
    print(f"{stage}: {steps[-1]:,} steps, each once; {time.time() - began:.0f} s")


# %% [markdown]
# ## 1 and 2. Supervised fine-tuning, and the reward model
#
# The model learns from demonstrations; the miniature's base model learns from text first. Then the
# reward model learns which of several responses people prefer. Compare its accuracy on held-out
# pairs with the bag of words and with the longer response, in the last table of the output.

# %%
for stage in COMMANDS:
    if stage != "ppo":
        train(stage)

# %% [markdown]
# ## 3. PPO-ptx
#
# The policy samples responses, the reward model scores them, and PPO raises the scores, less a
# penalty on the KL from SFT. Look for `stopped after step`, and for `resumed after step` below it.

# %%
train("ppo")

# %% [markdown]
# ## The curves, and the model's answers
#
# In PPO the score should rise while the KL stays at a few nats. In a run of a few steps there is
# little to see. `runs/ppo/report.html` has all curves, and held-out prompts with the responses from
# before and after.

# %%
for stage in COMMANDS:
    print(stage)
    display(Image(str(OUT / "runs" / stage / "curves.png"), width=900))

# %%
ASKED = ["What is the capital of France?", "Give me two tips to sleep better."]
if MINIATURE:
    ASKED = ["list two animals that are white.", "write one fact about lentle."]
for prompt in PROMPTS or ASKED:
    talk = [sys.executable, REPOSITORY / "experiments/sample.py", "--model", "runs/ppo"]
    run([*talk, "--max_new_tokens", 64, "--prompt", prompt])

# %% [markdown]
# ## The report
#
# Please post it, so that others know what to expect of this device. The command at its top prints
# such a report for any runs. Compare the peak with what the run counted, and with the peaks of
# `experiments/preflight.py`.

# %%
speed = [sys.executable, "-m", "instructjax.evaluation.speed", *(f"runs/{x}" for x in COMMANDS)]
assert run([*speed, "--out", "report.md"]) == 0
git = ["git", "-C", str(REPOSITORY), "remote", "get-url", "origin"]
address = subprocess.run(git, capture_output=True, text=True).stdout.strip()
if address.startswith("https://"):
    print(f"Post it here: {address.removesuffix('.git')}/issues/new?title=Speed+on+a+device")
print(f"{(time.time() - END) / 60 + BUDGET:.1f} of {BUDGET} minutes used; all files: {OUT}")
if KAGGLE:  # which keeps this folder, and not /tmp
    shutil.copy(OUT / "report.md", "report.md")
    if not MINIATURE:
        shutil.copytree(OUT / "runs/ppo/adapter", "adapter", dirs_exist_ok=True)
