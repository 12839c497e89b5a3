"""The flags of run_ppo.py, with the paper's values and the miniature's."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from instructjax import advantages
from instructjax.data import DataConfig
from instructjax.run.flags import RunConfig
from instructjax.scoring import RewardConfig


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The algorithm."""

    minibatch: int = 16
    """Episodes of an update [App. C.4: 64]."""
    epochs: int = 1
    """Passes over a rollout, each in a new order [App. C.4: 1]."""
    microbatches: int = 1
    """Shares of a minibatch, sorted by length, whose gradients are added [ours]."""
    buckets: int = 2
    """Lengths that batches of responses are padded to; more waste less, compile longer [ours]."""
    clip: float = 0.2
    """Bound of the policy's ratio [App. C.4: 0.2]."""
    value_clip: float = 0.2
    """Bound of the value's change; `inf` is none [paper silent; 0.2 in lm-human-preferences]."""
    beta: float = 0.02
    """Of the KL penalty; 0 drops the reference model [App. C.4: 0.02]."""
    kl_target: float | None = None
    """Nats, summed over a response: beta adapts to reach them [paper: fixed beta]."""
    kl_horizon: float = 10_000
    """Episodes over which an adaptive beta reacts [lm-human-preferences: 10,000]."""
    max_kl: float | None = None
    """Stops the run, finished, once objective/kl is over this many nats [ours]."""
    gamma: float = 1.0
    """Discount [App. C.4: none]."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation [paper silent; 0.95 in lm-human-preferences]."""
    whiten_advantages: bool = True
    """Advantages of a rollout to mean 0 and variance 1 [paper silent; as lm-human-preferences]."""
    whiten_rewards: bool = False
    """Rewards of a rollout to variance 1, their mean kept [paper silent]."""
    clip_score: float | None = None
    """Scores are clipped to +- this [paper silent]."""
    missing_eos: advantages.MissingEOS = "none"
    """A response without EOS gets its score, that less a penalty, or a fixed one [paper silent]."""
    missing_eos_value: float | None = None
    """The penalty, 1 by default, or the fixed score, -1 by default [paper silent]."""
    rescore: bool | None = None
    """Behaviour log-probabilities from another pass of the policy, and not the sampler's own;
    default: only in bfloat16, where the two differ [ours]."""
    value: Literal["separate", "shared"] = "separate"
    """A value net of its own [App. C.4], or a head on the policy's trunk [lm-human-preferences]."""
    value_coef: float = 0.1
    """Of the value loss on a shared trunk [lm-human-preferences: 0.1]."""
    learning_rate: float = 1e-4
    """Of the policy, constant after the warm-up [App. C.4 swept 2.55e-6 to 2.55e-5]."""
    value_learning_rate: float = 3e-4
    """Of the value net [App. C.4: 9e-6, 5e-6 for 175B]."""
    warmup: int = 10
    """Iterations from a tenth of the learning rates up to them [App. C.4: 10]."""
    ema: float = 0.95
    """Decay of the exported average of the policy's weights, an update; 0 keeps none and
    exports the last ones [App. C.4: 0.992]."""


@dataclass(frozen=True, kw_only=True)
class PTX:
    """Pretraining gradients."""

    coef: float = 27.8
    """Of the pretraining gradient; 0 is plain PPO [App. C.4: 27.8]."""
    ratio: int = 8
    """Rows of pretraining text to an episode [App. C.4: 8]."""
    length: int = 128
    """Tokens of a row [paper silent]."""
    microbatches: int = 1
    """Shares of an update's text whose gradients are added [ours]."""


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """PPO-ptx."""

    FIXED = (*RunConfig.FIXED, "tokenizer", "pretrain", "reward", "loss", "ppo", "ptx")

    out: Path = Path("runs/ppo")
    model: str = "runs/sft"
    """The policy at the start, which is the KL reference too."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    pretrain: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Text, for the pretraining gradients. Empty: the miniature's where --data is, or else none,
    which needs --ptx.coef 0."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a response is worth."""
    value_model: str | None = None
    """What the value net starts from; default: the first reward model, or the policy with a new
    head where rewards are functions alone."""
    loss: str | None = None
    """A policy loss in place of PPO's, `my_file.py:my_policy_loss`; called as `losses.ppo_clip`."""
    batch_size: int = 64
    """Episodes of an iteration: prompts, with one response each [App. C.4: 512]."""
    sample_batch: int | None = None
    """Prompts that are sampled at a time; `None`: all of an iteration's. The keys and values of as
    many prompts lie in memory; fewer change no token."""
    max_new_tokens: int = 32
    """Longest response, in tokens [App. C: 1k]."""
    temperature: float = 1.0
    """Of sampling, and of all log-probabilities [App. C.4: 1]."""
    ppo: PPO = field(default_factory=PPO)
    ptx: PTX = field(default_factory=PTX)
    eval_every: int = 25
    """Iterations from one evaluation on held-out prompts to the next; the last always has one."""
    eval_prompts: int = 128
    """Held-out prompts of an evaluation."""
    final_prompts: int = 512
    """Held-out prompts of the report at the end."""
    offload: bool = False
    """Reference and reward models rest in host memory while they are not used, and so does all that
    is trained, but for the policy's weights, while responses are sampled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_batch is not None and (
            self.sample_batch < 1 or self.batch_size % self.sample_batch
        ):
            raise ValueError(
                f"--sample_batch {self.sample_batch}: --batch_size {self.batch_size} is not a"
                " multiple of it"
            )
        if self.batch_size % self.ppo.minibatch:
            raise ValueError(
                f"--batch_size {self.batch_size}: not a multiple of --ppo.minibatch"
                f" {self.ppo.minibatch}"
            )
        if self.ppo.minibatch % self.ppo.microbatches:
            raise ValueError(
                f"--ppo.minibatch {self.ppo.minibatch}: not a multiple of --ppo.microbatches"
                f" {self.ppo.microbatches}"
            )
        if self.ptx.coef and self.ppo.minibatch * self.ptx.ratio % self.ptx.microbatches:
            raise ValueError(
                f"--ptx.microbatches {self.ptx.microbatches}: does not divide the"
                f" {self.ppo.minibatch * self.ptx.ratio} rows of text of an update"
            )
        if self.ptx.coef and not self.pretrain.spec and self.data.spec != "miniature":
            raise ValueError("--pretrain SPEC is needed for PPO-ptx; --ptx.coef 0 is plain PPO")
        if not 0 <= self.ppo.ema < 1:
            raise ValueError(f"--ppo.ema {self.ppo.ema}: must be at least 0 and below 1")
        if self.eval_prompts > self.final_prompts:  # evaluations compare with the report's "before"
            raise ValueError(
                f"--eval_prompts {self.eval_prompts}: more than --final_prompts"
                f" {self.final_prompts}"
            )
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: must be positive")

    @property
    def updates(self) -> int:
        """Updates of an iteration."""
        return self.ppo.epochs * self.batch_size // self.ppo.minibatch


PAPER = Config(
    model=tyro.MISSING,  # the 2-epoch SFT model of App. C.3, not the SFT baseline
    data=DataConfig(tyro.MISSING, max_prompt=1024),  # App. C: prompts over 1k tokens are dropped
    pretrain=DataConfig(tyro.MISSING),
    reward=RewardConfig(tyro.MISSING),  # section 3.5: one 6B reward model for all policies
    batch_size=512,  # App. C.4
    steps=500,  # App. C.4: 256k episodes
    max_new_tokens=1024,  # App. C: responses of at most 1k tokens
    temperature=1.0,  # App. C.4
    ppo=PPO(
        minibatch=64,  # App. C.4
        epochs=1,  # App. C.4
        clip=0.2,  # App. C.4
        value_clip=0.2,  # ours: the paper is silent
        beta=0.02,  # App. C.4
        gamma=1.0,  # App. C.4: no discount
        lam=0.95,  # ours, as in the earlier OpenAI code
        learning_rate=8.05e-6,  # ours: the highest that did not diverge without ptx (App. C.4)
        value_learning_rate=9e-6,  # App. C.4
        warmup=10,  # App. C.4, from a tenth
        ema=0.992,  # App. C.4
        buckets=4,  # ours
    ),
    ptx=PTX(
        coef=27.8,  # App. C.4
        ratio=8,  # App. C.4
        length=2048,  # ours: the context
        microbatches=8,  # ours
    ),
    eval_prompts=512,  # ours
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
PRESETS = {
    # All ours. Text rows at 8 to an episode would take most of the time; at 27.8 their gradient
    # pulls this small policy back to a base model that is not trained out; and an average over
    # 125 updates would lag so short a run. A reward model of this size is soon exploited: a
    # larger beta.
    "miniature": Config(
        steps=120,
        batch_size=256,
        eval_every=30,
        final_prompts=1024,
        unroll=2,
        ppo=PPO(minibatch=64, learning_rate=3e-4, value_learning_rate=1e-3, beta=0.15),
        ptx=PTX(coef=0.03, ratio=1, length=64),
    ),
    "instructgpt-1.3b": PAPER,
    "instructgpt-6b": PAPER,
    "instructgpt-175b": dataclasses.replace(
        PAPER,
        ppo=dataclasses.replace(
            PAPER.ppo,
            learning_rate=2.45e-6,  # ours: that of its SFT
            value_learning_rate=5e-6,  # App. C.4
        ),
    ),
}
