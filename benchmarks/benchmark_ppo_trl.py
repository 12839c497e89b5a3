"""TRL's side of `benchmark.py ppo`: its PPOTrainer on the same shapes.

    python benchmarks/benchmark_ppo_trl.py '{"layers": 4, ...}'     fields: benchmark_ppo.Task

Each line on stdin runs one iteration, which prints one line of JSON. The trainer is TRL's own, in
float32, without options that cost time: no gradient checkpointing, no sample tables, no reports.
The whole batch is sampled and scored at once. The one change is that the lengths of responses are
forced, by writing two columns of the logits before a token is drawn.
"""

import json
import os
import resource
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from benchmark_ppo import Task
from trl.experimental import ppo  # type: ignore
from trl.experimental.ppo import ppo_trainer  # type: ignore

NEVER = -1e9


class Forced(transformers.LogitsProcessor):
    """Forces EOS as the last token of each row and nowhere else, and forbids the padding's id."""

    def __init__(self, lengths: list[int], prompt: int, eos: int, pad: int, ends: bool) -> None:
        self.lengths, self.prompt, self.ends = torch.tensor(lengths), prompt, ends
        self.eos, self.pad = eos, pad

    def __call__(self, input_ids, scores):  # type: ignore
        last = self.lengths == input_ids.shape[1] + 1 - self.prompt
        scores[:, self.eos] = torch.where(last, -NEVER, NEVER) if self.ends else NEVER
        scores[:, self.pad] = NEVER
        return scores


class Policy(transformers.GPT2LMHeadModel):
    """A GPT-2 with forced lengths; the trainer passes no logits processors to `generate`."""

    forced: Forced

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore
        return super().generate(*args, logits_processor=[self.forced], **kwargs)  # type: ignore


def reply(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def await_turn() -> None:
    if not sys.stdin.readline():
        sys.exit()


class Turns(transformers.TrainerCallback):
    """Runs an iteration for each line on stdin. Phases begin where callbacks and hooks see them."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self, most: int) -> None:
        if len(self.marks) < most:
            self.marks.append(time.perf_counter())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        await_turn()
        self.mark(1)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.mark(4)
        begun, sampled, scored, done = self.marks
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply(
            {
                "sampling": sampled - begun,
                "scoring": scored - sampled,
                "updates": done - scored,
                "seconds": done - begun,
                "peak_gb": kilobytes / 2**20,
            }
        )
        await_turn()
        self.marks = [time.perf_counter()]


def main(task: Task) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    eos, pad = task.vocab - 2, task.vocab - 1
    sizes = transformers.GPT2Config(
        vocab_size=task.vocab,
        n_layer=task.layers,
        n_embd=task.width,
        n_head=task.heads,
        n_positions=1024,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=pad,
        num_labels=1,  # type: ignore
    )
    ends = min(task.lengths) < task.response
    policy = Policy(sizes)
    policy.forced = Forced(task.lengths, task.prompt, eos, pad, ends)
    turns = Turns()
    rows = len(task.lengths)
    with tempfile.TemporaryDirectory() as out:
        trainer = ppo.PPOTrainer(
            args=ppo.PPOConfig(
                output_dir=out,
                # A minibatch is the batch over num_mini_batches. With gradient accumulation in its
                # place, accelerate would step once for all minibatches.
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=1,
                num_mini_batches=rows // task.minibatch,
                local_rollout_forward_batch_size=rows,
                num_ppo_epochs=1,
                total_episodes=10_000 * rows,
                response_length=task.response,
                stop_token="eos" if ends else None,
                temperature=1.0,
                learning_rate=1e-5,
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
            ),
            processing_class=SimpleNamespace(pad_token_id=pad, eos_token_id=eos),  # type: ignore
            model=policy,
            ref_model=None,  # a copy of the policy
            reward_model=transformers.GPT2ForSequenceClassification(sizes),
            value_model=transformers.GPT2ForSequenceClassification(sizes),
            train_dataset=torch.randint(eos, (rows, task.prompt)),  # type: ignore
            data_collator=lambda prompts: {"input_ids": torch.stack(prompts)},  # type: ignore
            callbacks=[turns],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        sample = ppo_trainer.batch_generation

        def sample_marked(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            turns.mark(2)
            live_BR = result[0][:, task.prompt :] != pad
            assert live_BR.sum(1).tolist() == task.lengths
            return result

        ppo_trainer.batch_generation = sample_marked
        # Only updates run policy and value net together.
        trainer.model.register_forward_pre_hook(lambda *_: turns.mark(3))
        reply({"parameters": sum(x.numel() for x in policy.parameters())})
        trainer.accelerator.print = lambda *_: None  # stdout is for replies
        trainer.train()


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
