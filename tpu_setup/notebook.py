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
# a reward model of human preferences, and PPO-ptx. It keeps to a number of minutes, stops PPO once
# and resumes it, draws the curves, talks to the model, and ends with a report of speed and memory.
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
TRIAL, KILL_AFTER = 5, 3  # steps that measure the seconds of a step; steps of PPO before the kill

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
    """Whether the hub can be reached. On Kaggle, switch `Internet` on in the settings."""
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
# data too often, and `SHARE` divides the time.

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
# `train` runs a script for a few steps in a folder of its own, and so measures the seconds of a
# step and of all the rest: loading, compilation, evaluation. Then it runs as many steps as fit the
# stage's share of the minutes that are left. If they take longer than expected, the script gets a
# SIGTERM, saves, and is resumed for one more step, after which it evaluates and exports.
#
# If the session ends early, run the notebook again with the same `OUT`: finished stages are not
# repeated, and a stage that was stopped goes on.


# %%
def run(words, stop=lambda: False, only=""):
    """Runs a command in OUT. Once `stop()` is true, it gets a SIGTERM.

    Shows the lines of its output that begin with `only`, and the last others if it fails. Returns
    the exit code: 0 finished, 75 stopped and resumable.
    """
    print("$", shlex.join(map(str, words)), flush=True)
    hidden = []
    with subprocess.Popen(
        list(map(str, words)),
        cwd=OUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "110", "FORCE_COLOR": ""},
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
                if line.startswith(only):
                    print(line, end="", flush=True)
                else:
                    hidden.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode not in (0, 75):
        print("".join(hidden[-50:]))
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
    return (OUT / "runs" / stage / "export/config.json").exists()


def due(stage):
    """The time at which a stage should end: now, and its share of what is left."""
    left = [SHARE[other] for other in COMMANDS if not finished(other)]
    return time.time() + max(0.0, 0.95 * (END - time.time())) * SHARE[stage] / sum(left)


def steps_until(end, name, rest):
    """Number of steps that fit, if everything but the steps takes `rest` seconds."""
    second = step_seconds(name)
    fit = int(0.9 * (end - time.time() - rest) / second)
    print(f"{name}: {second:.2f} s a step, {rest:.0f} s besides; {max(fit, 0):,} steps fit")
    return fit


def finish(stage, steps, end):
    """Runs or resumes a stage up to a number of steps, or to a time if that is earlier."""
    begin = made(stage)  # a script that is just starting would not save

    def late():
        return time.time() > end and begin < made(stage) < steps

    code = run(script(stage, "--resume", "--steps", steps), late)
    if code == 75:
        code = run(script(stage, "--resume", "--steps", min(steps, made(stage) + 1)))
    assert code == 0, f"run_{stage}.py ended with code {code}"


def train(stage):
    """Runs a stage for its share of the time."""
    if finished(stage):
        return print(f"{stage} is finished: {OUT / 'runs' / stage}")
    began, end, trial = time.time(), due(stage), f"{stage}-trial"
    shutil.rmtree(OUT / "runs" / trial, ignore_errors=True)
    print(f"{stage}: {TRIAL} steps, to measure")
    code = run(script(stage, "--out", f"runs/{trial}", "--steps", TRIAL), only=f"{stage}  ")
    assert code == 0, f"run_{stage}.py ended with code {code}"
    rest = time.time() - began - TRIAL * step_seconds(trial)
    fit = steps_until(end, trial, rest)
    shutil.rmtree(OUT / "runs" / trial)
    finish(stage, max(made(stage) + 1, min(fit, MOST[stage])), end)


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
# ## 3. PPO-ptx, stopped once
#
# A free TPU can be taken away at any time. So this cell sends PPO a SIGTERM after a few steps, as
# the cloud does. The script finishes its step, saves it and ends with code 75.

# %%
if not finished("ppo"):
    began, PPO_END, begin = time.time(), due("ppo"), made("ppo")
    first = script("ppo", "--resume", "--steps", MOST["ppo"])
    killed = run(first, lambda: made("ppo") >= begin + KILL_AFTER)
    assert killed == 75, f"expected code 75, not {killed}"
    STOPPED = made("ppo")
    print(f"exit code {killed}: stopped after step {STOPPED}")
    rest = time.time() - began - (STOPPED - begin) * step_seconds("ppo")

# %% [markdown]
# The same command goes on from the saved step, with as many steps as fit. Nothing is lost and
# nothing is made twice: each step has one line in `metrics.jsonl`.

# %%
if not finished("ppo"):
    fit = STOPPED + steps_until(PPO_END, "ppo", rest)
    finish("ppo", max(STOPPED + 1, min(fit, MOST["ppo"])), PPO_END)
    steps = [row["step"] for row in metrics("ppo")]
    assert steps == list(range(steps[-1] + 1)), "a step is missing, or was made twice"
    print(f"PPO went on from step {STOPPED} to step {steps[-1]}")

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
# Please post it, so that others know what to expect of this device. The command below it prints it
# for any runs.

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
