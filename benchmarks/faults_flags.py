"""Runs wrong command lines of all scripts, and reports the message and the seconds of each refusal.

    PYTHONPATH=experiments python benchmarks/faults_flags.py

Each runs as a process of its own on eight emulated devices, in a directory with the files of
`make_world`. It must end with exit code 2 and name the flag on stderr, and write nothing.
tests/test_wrong_flags.py runs the same lines in one process.

Hardware: two CPU cores; about ten minutes. Most of each process is the import of jax, and of
transformers where a model's config.json is read.
Result: a table in Markdown.
"""

import dataclasses
import functools
import importlib.util
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import run_sft
import tyro

from instructjax import hf, miniature, models
from instructjax.run import flags

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8
NOT_INSTALLED = "wandb"  # a tracker that the suite's packages leave out


class Line(NamedTuple):
    """A wrong command line: the script, its words as in a shell, and what stderr must name."""

    script: str
    words: str
    named: str


def lines(script: str, *rows: tuple[str, str]) -> list[Line]:
    return [Line(script, *row) for row in rows]


LM = "--max_new_tokens 32 --model lm"
GRPO = "grpo --model lm --reward rm"
WRONG = [
    *lines(
        "run_pretrain.py",
        ("--length 300", "--length 300"),
        ("--length 1", "--length 1"),
        ("--model runs/nothing", "--model runs/nothing"),
        ("--model rm", "--model rm"),
        ("--tokenizer lm/nothing", "--tokenizer lm/nothing"),
        ("--data text.txt", "--data text.txt"),
        ("--data jsonl:nothing.jsonl", "--data jsonl:nothing.jsonl"),
        ("--data 'jsonl:nothing/*.txt'", "--data jsonl:nothing/*.txt"),
        ("--data jsonl:~no-such-user/text.txt", "--data jsonl:~no-such-user/text.txt"),
        ("--data jsonl:text.txt --data.validation nothing", "--data.validation nothing"),
        ("--batch_size 8 --microbatches 3", "--batch_size 8"),
        ("--mesh fsdp=3", "--mesh"),
        ("--mesh model=2", "--mesh model=2"),
        ("--mesh data=1,tensor=8", "--mesh data=1,fsdp=1,tensor=8"),
        ("--adam.b2 1", "--adam.b2 1"),
        ("--steps 3 --profile 9:1", "--profile 9:1"),
        ("--shard_sequence", "--shard_sequence"),
    ),
    *lines(
        "run_sft.py",
        ("--learning_rate -1", "--learning_rate -1"),
        ("--batchsize 8", "--batchsize"),
        ("--steps many", "--steps"),
        ("--remat some", "--remat"),
        ("--preset tiny", "--preset tiny"),
        ("--keep reward", "--keep reward"),
        ("--keep reward --reward_model lm", "--reward_model lm"),
        ("--model unfinished", "--model unfinished"),
        ("--model gpt3-1.3b", "--model gpt3-1.3b"),
        ("--length 512", "--length 512"),
        ("--max_new_tokens 256", "--max_new_tokens 256"),
        (f"{LM} --data jsonl:demos.jsonl --data.max_prompt 64", "--data.max_prompt 64"),
        ("--out file", "--out file"),
        ("--out file/sft", "--out file/sft"),
        ("--out ''", "--out"),
        ("--out done", "--out done"),
        ("--out done --resume --seed 1", "--resume"),
        ("--out runs/pretrain", "--out runs/pretrain"),
        ("--checkpoints file", "--checkpoints file"),
        ("--keep_last 0", "--keep_last 0"),
        (f"--{NOT_INSTALLED} project", f"--{NOT_INSTALLED}"),
        (f"{LM} --data jsonl:empty.jsonl", "--data jsonl:empty.jsonl"),
        (f"{LM} --data jsonl:demos.jsonl --data.validation 0", "--data.validation 0"),
        ("--data.columns prompt", "--data.columns"),
        (f"{LM} --data hf:./nothing/set", "--data hf:./nothing/set"),
        (f"{LM} --data jsonl:demos.jsonl --batch_size 12", "--batch_size 12"),
        ("--pretrain_share 0.1 --pretrain jsonl:nothing", "--pretrain jsonl:nothing"),
    ),
    *lines(
        "run_rm.py",
        ("--epochs 0", "--epochs 0"),
        ("--folds 1", "--folds 1"),
        ("--folds 2 --ensemble 2", "--folds 2"),
        ("--folds 2 --checkpoints kept", "--checkpoints kept"),
        ("--folds 2 --batch_size 8 --out folds", "--out folds/fold-1"),
        ("--folds 2 --by ''", "--by"),
        ("--batch_size 12", "--batch_size 12"),
        ("--batch_size 8 --model runs/nothing", "--model runs/nothing"),
        ("--batch_size 8 --demonstrations jsonl:nothing", "--demonstrations jsonl:nothing"),
    ),
    *lines(
        "run_ppo.py",
        ("--reward nothing.py:f", "--reward nothing.py:f"),
        ("--reward judge.py:nothing", "--reward judge.py:nothing"),
        ("--reward judge.py:NUMBER", "--reward judge.py:NUMBER"),
        ("--reward broken.py:f", "--reward broken.py:f"),
        ("--reward lm", "--reward lm"),
        ("--reward", "--reward"),
        ("--reward.weights 1 2", "--reward.weights 1.0 2.0"),
        ("--loss judge.py:nothing", "--loss judge.py:nothing"),
        ("--loss judge", "--loss judge"),
        ("--gold runs/nothing", "--gold runs/nothing"),
        ("--value_model lm", "--value_model lm"),
        ("--ppo.value shared --value_model rm", "--value_model rm"),
        ("--ppo.clip -0.2", "--ppo.clip -0.2"),
        ("--ppo.minibatch 48", "--ppo.minibatch 48"),
        ("--ppo.minibatch 4", "--ppo.minibatch 4"),
        ("--ppo.beta 0 --ppo.kl_target 6", "--ppo.kl_target 6"),
        ("--ppo.missing_eos_value 1", "--ppo.missing_eos_value 1"),
        ("--ptx.microbatches 16", "--ppo.minibatch x --ptx.ratio 64"),
        ("--ptx.length 512", "--ptx.length 512"),
        ("--max_new_tokens 256", "--max_new_tokens 256"),
        ("--data.max_prompt 240", "--data.max_prompt 240"),
        ("--data jsonl:demos.jsonl", "--ptx.coef 27.8"),
        ("--pretrain jsonl:nothing", "--pretrain jsonl:nothing"),
        ("--sample_batch 7", "--sample_batch 7"),
        ("--eval_prompts 2000", "--eval_prompts 2000"),
        ("--out runs/sft", "--out runs/sft"),
    ),
    *lines(
        "swap_loss.py",
        ("ppo", "ppo"),
        ("dpo", "--model runs/sft"),
        ("dpo --model rm", "--model rm"),
        ("dpo --model lm --batch_size 12", "--batch_size 12"),
        ("dpo --model lm --data jsonl:nothing", "--data jsonl:nothing"),
        (f"{GRPO} --samples 1", "--samples 1"),
        (f"{GRPO} --max_new_tokens 64", "--max_new_tokens 64"),
        (f"{GRPO} --gold lm", "--gold lm"),
        ("rloo --model lm --reward judge.py:nothing", "--reward judge.py:nothing"),
    ),
    *lines(
        "sample.py",
        ("--model runs/nothing", "--model runs/nothing"),
        ("--model rm", "--model rm"),
        ("--model lm --tokenizer nothing/here", "--tokenizer nothing/here"),
        ("--model lm --max_new_tokens 64", "--max_new_tokens 64"),
        ("--max_new_tokens 64 --context 64", "--max_new_tokens 64"),
        ("--temperature -1", "--temperature -1"),
        ("--prompt ''", "--prompt"),
        ("--system Hello --dialogue False", "--system"),
    ),
    *lines(
        "evaluate.py",
        ("--models lm lm", "--models lm lm"),
        ("--models lm runs/nothing", "--models runs/nothing"),
        ("--models lm rm", "--models rm"),
        ("--models lm hf:lm --data jsonl:demos.jsonl", "--gold"),
        ("--best_of 4", "--best_of 4"),
        ("--labels none.jsonl", "--labels none.jsonl"),
        ("--out s3://bucket/x", "--out s3://bucket/x"),
    ),
    *lines(
        "reproduce.py",
        ("--runs pppo", "--runs pppo"),
        ("--out file", "--out file"),
        ("--seeds", "--seeds"),
    ),
    *lines(
        "overoptimise.py",
        ("--model lm --pairs 40 20", "--pairs"),
        ("--model lm --rm_models runs/nothing", "--rm_models runs/nothing"),
    ),
    *lines(
        "ensembles.py",
        ("--flipped 2", "--flipped 2"),
        ("--model lm --rm_model runs/nothing", "--rm_model runs/nothing"),
    ),
    *lines(
        "compare_algorithms.py",
        ("--responses 1", "--responses 1"),
        ("--model lm --reward runs/nothing", "--reward runs/nothing"),
    ),
    *lines("rewarded_soups.py", ("--model lm --reward rm", "--reward")),
    *lines(
        "run_rounds.py",
        ("--samples 10", "--samples 10"),
        ("--model runs/nothing", "--model runs/nothing"),
    ),
    *lines(
        "ai_feedback.py",
        ("--model rm", "--model rm"),
        ("--model lm --clamp 0.6 0.7", "--clamp 0.6 0.7"),
        ("--model lm --principles nothing.toml", "--principles nothing.toml"),
        ("--model lm --only_principles harms", "--only_principles harms"),
        ("--model lm --noise 1", "--noise"),
    ),
    *lines(
        "compare_labelers.py",
        ("--model lm --labelers runs/critic", "--labelers"),
        ("--model lm --labelers rm", "--labelers rm"),
    ),
    *lines(
        "compare_revisions.py",
        ("--model lm --critic rm", "--critic rm"),
        ("--model lm --oversight 1.5", "--oversight 1.5"),
    ),
    *lines(
        "red_team.py",
        ("--attacker lm --target lm --harm f.py:nothing", "--harm f.py:nothing"),
        ("--attacker rm --target lm --harm f.py:f", "--attacker rm"),
        ("--attacker lm --target runs/nothing --harm f.py:f", "--target runs/nothing"),
        ("--attacker lm --target lm --harm f.py:f --opening ''", "--opening"),
        ("--attacker lm --target lm --harm rm --examples no.jsonl", "--examples no.jsonl"),
    ),
    *lines(
        "red_team_rounds.py",
        ("--attacker rm --model lm --reward rm", "--attacker rm"),
        ("--attacker lm --model runs/nothing", "--model runs/nothing"),
        ("--attacker lm --model lm --reward rm --diversity 0 0", "--diversity"),
    ),
    *lines(
        "critique_revise.py",
        ("--model rm", "--model rm"),
        ("--model lm --critic runs/nothing", "--critic runs/nothing"),
        ("--model lm --oversight 0.1", "--oversight"),
        ("--model lm --principles nothing.toml", "--principles nothing.toml"),
    ),
    *lines(
        "preflight.py",
        ("", "--topology"),
        ("--topology v5litepod-4", "--topology v5litepod-4"),
        ("--topology v5e:2x2 --mesh fsdp=3", "--mesh"),
        ("--topology v5e:2x2 --batch_size 6", "--batch_size 6"),
        ("--topology v5e:2x2 --preset none", "--preset none"),
        ("--topology v5e:2x2 --model runs/nothing", "--model runs/nothing"),
        ("--topology v5e:2x2 --out nothing/x.json", "--out nothing/x.json"),
        ("--topology v5e:2x2 --search", "--topology v5e:2x2"),
    ),
    *lines(
        "-m instructjax.data",
        ("show --kind text --data jsonl:text.txt", "--tokenizer"),
        ("show --kind text --tokenizer nothing/here", "--tokenizer nothing/here"),
        ("show --kind text --tokenizer lm --data jsonl:nothing", "--data jsonl:nothing"),
        ("show --kind text --length 0", "--length 0"),
        ("prepare Name --kind text --data_dir .", "NAME Name"),
        ("prepare done --kind text --data_dir .", "--data_dir ."),
        ("tokenizer file", "OUT file"),
        ("tokenizer new --gpt2 nothing", "--gpt2 nothing"),
    ),
]


def make_world(directory: Path) -> None:
    """Writes the files that the command lines name."""
    tokenizer = miniature.tokenizer()
    sizes = {"vocab_size": len(tokenizer), "layers": 1, "width": 32, "mlp_width": 32}
    eos = {"eos_ids": (tokenizer.eos_token_id,), "max_length": 64}
    config = dataclasses.replace(models.PRESETS["miniature"], **sizes, **eos)
    for name, scalar_head in (("lm", False), ("rm", True)):
        model = dataclasses.replace(config, scalar_head=scalar_head)
        shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
        params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        hf.save(directory / name, model, params, tokenizer)
    (directory / "unfinished" / "checkpoints").mkdir(parents=True)
    for name in ("done", "folds/fold-1"):
        (directory / name).mkdir(parents=True)
    done = dataclasses.replace(run_sft.PRESETS["miniature"], preset="miniature")
    flags.write(dataclasses.replace(done, out=directory / "done"), "sft")
    for name in ("done", "folds/fold-1"):
        (directory / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (directory / "file").touch(0o755)
    (directory / "empty.jsonl").touch()
    (directory / "text.txt").write_text("list two animals that are white.\n")
    (directory / "demos.jsonl").write_text('{"prompt": "list two.", "completion": "swan."}\n' * 9)
    (directory / "judge.py").write_text("NUMBER = 1\n")
    (directory / "broken.py").write_text("def f(:\n")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in sorted(directory.rglob("*")) if x.is_file()}


# ------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Config:
    """Wrong command lines."""

    out: Path = Path("runs/faults-flags")
    """Directory that the processes run in. It must not exist, or be empty."""
    script: str = ""
    """Name of the only script to run; by default all are run."""


def run(chosen: list[Line], directory: Path) -> Iterator[tuple[Line, int, float, float, str]]:
    """(line, exit code, seconds, processor seconds, stderr) of each command line."""
    paths = (ROOT, ROOT / "experiments")
    environment = {
        **{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": f"{DEVICES}", "HF_HUB_OFFLINE": "1"},
        **{"PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"},
    }
    for line in chosen:
        script = line.script.split()
        if line.script.endswith(".py"):
            script = [str(ROOT / "experiments" / line.script)]
        began, used = time.perf_counter(), processor_seconds()
        ended = subprocess.run(
            [sys.executable, *script, *shlex.split(line.words)],
            cwd=directory,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - began
        said = ended.stderr.replace(f"{directory.absolute()}/", "")
        yield line, ended.returncode, took, processor_seconds() - used, said


def processor_seconds() -> float:
    """Processor seconds of all processes that have ended. Other load changes them little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def command(line: Line) -> str:
    """The cell of a table that shows a command line."""
    return f"{line.script} {line.words}".replace("|", r"\|").strip()


def message(stderr: str, named: str) -> str:
    """The line that names the flag, of an error of ours or of tyro's box."""
    said = [text.strip(" │") for text in stderr.splitlines()]
    said = [text for text in said if text and text[0] not in "╭╰─"]
    text = next((text for text in said if named in text), "")
    text = text.removeprefix("error: ").replace("|", r"\|")
    return text if len(text) < 140 else f"{text[:137]}..."


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    if any(config.out.iterdir()):
        sys.exit(f"error: --out {config.out}: is not empty")
    make_world(config.out)
    before, times, failed = contents(config.out), [], []
    chosen = [line for line in WRONG if config.script in ("", line.script)]
    if importlib.util.find_spec(NOT_INSTALLED):
        chosen = [line for line in chosen if line.named != f"--{NOT_INSTALLED}"]
    print("| command line | exit code | seconds | of a processor | message |")
    print("|---|---|---|---|---|")
    for line, code, took, used, stderr in run(chosen, config.out):
        shown, said = command(line), message(stderr, line.named)
        print(f"| `{shown}` | {code} | {took:.1f} | {used:.1f} | {said} |", flush=True)
        times.append((took, used))
        if code != 2 or line.named not in stderr or contents(config.out) != before:
            failed.append(shown)
    took, used = zip(*times, strict=True)
    print(
        f"\n{len(chosen) - len(failed)} of {len(chosen)} were refused with exit code 2, named the"
        f" flag and wrote nothing. Median and maximum: {statistics.median(took):.1f} and"
        f" {max(took):.1f} s, of a processor {statistics.median(used):.1f} and {max(used):.1f} s."
    )
    if failed:
        sys.exit("error: not refused as they should be: " + "; ".join(failed))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, use_underscores=True))
