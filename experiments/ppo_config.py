"""The flags of run_ppo.py, with the paper's values, the miniature's, and those of small models."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from instructjax import advantages
from instructjax.data import DataConfig
from instructjax.ranges import (
    Count,
    CountFrom2,
    CountOrZero,
    Finite,
    NotNegative,
    Positive,
    PositiveOrInf,
    Share,
    ShareBelow1,
)
from instructjax.run.flags import Adam, RunConfig
from instructjax.run.lora import LoRA
from instructjax.scoring import RewardConfig


@dataclass(frozen=True, kw_only=True)
class PPO:
    """The algorithm."""

    minibatch: Count = 64
    """Episodes per update [App. C.4: 64]."""
    epochs: Count = 4
    """Passes over each rollout, each in a new order [App. C.4: 1]."""
    microbatches: Count = 1
    """Parts of a minibatch, sorted by length, whose gradients are accumulated [ours]."""
    buckets: Count = 2
    """Lengths to which batches of responses are padded.
    More of them waste less padding and compile longer [ours]."""
    clip: Positive = 0.2
    """The policy's ratio is clipped to 1 +- this [App. C.4: 0.2]."""
    value_clip: PositiveOrInf = 0.2
    """The value net's change since the rollout is clipped to +- this; `inf` turns clipping off
    [paper silent; 0.2 in lm-human-preferences]."""
    beta: NotNegative = 0.05
    """Coefficient of the KL penalty in the reward; 0 also drops the reference model
    [App. C.4: 0.02]."""
    kl_target: Positive | None = None
    """Adapts beta to keep the KL at this many nats, summed over a response [paper: fixed beta]."""
    kl_horizon: Positive = 10_000
    """Horizon of the adaptive beta of --ppo.kl_target, in episodes. A longer one adapts more slowly
    [lm-human-preferences: 10,000]."""
    max_kl: Finite | None = None
    """Stops the run, as finished, when objective/kl exceeds this many nats [ours]."""
    gamma: Share = 1.0
    """Discount factor of the returns [App. C.4: no discount]."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation [paper silent; 0.95 in lm-human-preferences]."""
    whiten_advantages: bool = True
    """Shifts and scales the advantages of a rollout to mean 0 and variance 1 [paper silent; as in
    lm-human-preferences]."""
    whiten_rewards: bool = False
    """Scales the rewards of a rollout to variance 1 and keeps their mean [paper silent]."""
    clip_score: Positive | None = None
    """Clips scores to +- this before the KL penalty is added [paper silent]."""
    missing_eos: advantages.MissingEOS = "penalty"
    """What a response without EOS scores: `none` keeps its score, `penalty` subtracts
    --ppo.missing_eos_value, `fixed` puts --ppo.missing_eos_value in its place [paper silent]."""
    missing_eos_value: Finite | None = None
    """The penalty (default 1) or the fixed score (default -1) of a response without EOS [paper
    silent]."""
    rescore: bool | None = None
    """Computes the behaviour log-probabilities with another pass of the policy instead of taking
    the sampler's.
    Default: only in bfloat16, where the two differ [ours]."""
    value: Literal["separate", "shared"] = "separate"
    """Where values come from: a value net of its own [App. C.4], or a head on the policy's trunk
    [lm-human-preferences]."""
    value_coef: NotNegative = 0.1
    """Coefficient of the value loss on a shared trunk [lm-human-preferences: 0.1]."""
    learning_rate: NotNegative = 3e-6
    """Learning rate of the policy after the warm-up [App. C.4 swept 2.55e-6 to 2.55e-5]."""
    value_learning_rate: NotNegative = 9e-6
    """Learning rate of the value net after the warm-up [App. C.4: 9e-6, and 5e-6 for 175B]."""
    warmup: CountOrZero = 10
    """Iterations over which both learning rates rise from a tenth to their full value
    [App. C.4: 10]."""
    ema: ShareBelow1 = 0.0
    """Decay per update of the moving average of the policy's weights, which is exported.
    0 keeps no average and exports the last weights [App. C.4: 0.992]."""

    @property
    def missing_eos_score(self) -> float:
        """--ppo.missing_eos_value or its default."""
        if self.missing_eos_value is not None:
            return self.missing_eos_value
        return -1.0 if self.missing_eos == "fixed" else 1.0


@dataclass(frozen=True, kw_only=True)
class PTX:
    """Pretraining text mixed into the updates of the policy."""

    coef: NotNegative = 27.8
    """Coefficient of the ptx gradient, gamma in eq. 2; 0 is plain PPO [App. C.4: 27.8]."""
    ratio: Count = 1
    """Rows of pretraining text per episode [App. C.4: 8]."""
    length: CountFrom2 = 512
    """Number of tokens of a row of pretraining text [paper silent]."""
    microbatches: Count = 1
    """Parts of an update's text whose gradients are accumulated [ours]."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(RunConfig):
    """The flags that run_ppo.py and swap_loss.py share."""

    batch_size: Count
    """Number of prompts of an iteration, whose responses are trained on together."""
    lora: LoRA = field(default_factory=LoRA)
    sample_batch: Count | None = None
    """Prompts whose responses are sampled at the same time; `None`: all of a batch.
    Fewer need less memory for keys and values, and change no token."""
    max_new_tokens: Count = 32
    """Longest response in tokens, EOS included [App. C: 1k]."""
    eval_prompts: Count = 128
    """Held-out prompts of each evaluation."""
    gold: tuple[str, ...] = ()
    """Gold judge: reward models and functions, as for --reward, that score responses to held-out
    prompts and never train the policy.
    By default the miniature has its own judge, and other data none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_batch is not None and self.batch_size % self.sample_batch:
            raise ValueError(
                f"--batch_size {self.batch_size}: not a multiple of --sample_batch"
                f" {self.sample_batch}"
            )


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """PPO-ptx."""

    FIXED = (
        *(*RunConfig.FIXED, "pretrain", "reward", "value_model", "loss", "ppo", "adam", "ptx"),
        *("max_new_tokens", "temperature", "lora"),
    )
    SHOWN = (
        *("ppo.learning_rate", "ppo.value_learning_rate", "ppo.beta", "ppo.missing_eos"),
        *("batch_size", "ppo.minibatch", "ppo.epochs", "max_new_tokens", "ptx.coef"),
    )

    out: Path = Path("runs/ppo")
    model: str = "runs/sft"
    """The policy at the start, which is the reference too: a preset, a run directory, a Hugging
    Face directory or a hub name."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts to sample responses to."""
    pretrain: DataConfig = field(default_factory=lambda: DataConfig(""))
    """Pretraining text for the ptx gradient.
    Empty: the miniature's text with --data miniature, and otherwise none, which needs
    --ptx.coef 0."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What scores a response."""
    value_model: str | None = None
    """The reward model that the value net starts from; default: the first of --reward, or the
    policy with a new head where all rewards are functions."""
    loss: str | None = None
    """A function that replaces PPO's policy loss, `my_file.py:my_policy_loss`.
    It is called with the arguments of `losses.ppo_clip`."""
    batch_size: Count = 64
    """Episodes per iteration: prompts, with one response each [App. C.4: 512]."""
    max_new_tokens: Count = 128
    """Longest response in tokens, EOS included [App. C: 1k]."""
    temperature: Positive = 1.0
    """Temperature of sampling and of all log-probabilities [App. C.4: 1]."""
    ppo: PPO = field(default_factory=PPO)
    adam: Adam = field(default_factory=Adam)
    ptx: PTX = field(default_factory=PTX)
    eval_every: Count = 25
    """Iterations between evaluations on held-out prompts. The last iteration always has one."""
    final_prompts: Count = 256
    """Number of held-out prompts of the evaluation at the end."""
    offload: bool = False
    """Keeps the reference and the reward models in host memory while they are not used.
    While responses are sampled, it also keeps all trained arrays there, except the policy's
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ppo, ptx = self.ppo, self.ptx
        batch, text_rows = self.batch_size, ppo.minibatch * ptx.ratio
        for parts, flag, whole, whole_flag in (
            (ppo.minibatch, "--ppo.minibatch", batch, "--batch_size"),
            (ppo.microbatches, "--ppo.microbatches", ppo.minibatch, "--ppo.minibatch"),
            (ptx.microbatches, "--ptx.microbatches", text_rows, "--ppo.minibatch x --ptx.ratio"),
        ):
            if whole % parts:
                raise ValueError(f"{whole_flag} {whole}: not a multiple of {flag} {parts}")
        if ptx.coef and not self.pretrain.spec and self.data.spec != "miniature":
            raise ValueError(
                f"--ptx.coef {ptx.coef}: PPO-ptx needs text, --pretrain SPEC; or give --ptx.coef 0,"
                " which is plain PPO"
            )
        if self.eval_prompts > self.final_prompts:  # evaluations compare with the report's "before"
            raise ValueError(
                f"--eval_prompts {self.eval_prompts}: more than --final_prompts"
                f" {self.final_prompts}"
            )
        if ppo.beta == 0:
            for flag in ("kl_target", "max_kl"):
                if getattr(ppo, flag) is not None:
                    raise ValueError(
                        f"--ppo.{flag} {getattr(ppo, flag)}: needs --ppo.beta above 0; without a KL"
                        " penalty there is no reference model, and no KL"
                    )
        if ppo.missing_eos == "none" and ppo.missing_eos_value is not None:
            raise ValueError(
                f"--ppo.missing_eos_value {ppo.missing_eos_value}: has no effect with"
                " --ppo.missing_eos none; give penalty or fixed"
            )
        if ppo.value == "shared" and self.value_model is not None:
            raise ValueError(
                f"--value_model {self.value_model}: there is no value net with --ppo.value shared"
            )

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
        missing_eos="none",  # the paper is silent
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
    final_prompts=512,  # ours
    model_dtype="bfloat16",  # App. C: fp16, with fp32 masters
    remat="dots",  # ours
)
# All ours. Text rows at 8 to an episode would take most of the time; at 27.8 their gradient pulls
# this small policy back to a base model that is not trained out; and an average over 125 updates
# would lag so short a run. A reward model of this size is soon exploited: a larger beta.
MINIATURE = Config(
    steps=120,
    batch_size=256,
    max_new_tokens=32,
    eval_every=30,
    final_prompts=1024,
    unroll=2,
    ppo=PPO(
        minibatch=64,
        epochs=1,
        learning_rate=3e-4,
        value_learning_rate=1e-3,
        beta=0.15,
        missing_eos="none",
        ema=0.95,
    ),
    ptx=PTX(coef=0.03, ratio=1, length=64),
)
PRESETS = {
    "miniature": MINIATURE,
    # For a first look: as few steps as let the policy win clearly against SFT, at a rate for that.
    "quick": dataclasses.replace(
        MINIATURE,
        out=Path("runs/quick/ppo"),
        model="runs/quick/sft",
        reward=RewardConfig(("runs/quick/rm",)),
        steps=30,
        batch_size=128,
        eval_every=15,
        eval_prompts=64,
        final_prompts=512,
        ppo=dataclasses.replace(
            MINIATURE.ppo,
            learning_rate=5e-4,
            value_learning_rate=2e-3,
            ema=0.9,
            buckets=1,  # one program in place of three
        ),
    ),
    # For models below 1B. In brackets: where a value is from. TRL: its PPOTrainer's defaults and
    # its example on TL;DR with a Pythia of 1B. Huang et al.: 2024, arXiv 2403.17031, from 1B up.
    "small": Config(
        batch_size=64,  # [TRL; Huang et al. take 512]
        max_new_tokens=128,  # [ours; TL;DR's summaries have at most 53]
        ppo=PPO(
            minibatch=64,  # the whole batch [TRL, Huang et al.]
            epochs=4,  # [TRL, Huang et al.]
            microbatches=8,  # [ours]
            beta=0.05,  # [TRL, Huang et al.]
            missing_eos="penalty",  # of 1 [TRL; Huang et al. score such a response -1]
            learning_rate=3e-6,  # [TRL, Huang et al.]
            value_learning_rate=9e-6,  # [App. C.4; TRL and Huang et al. take 3e-6]
            warmup=10,  # [App. C.4]
            ema=0,  # none [TRL, Huang et al.]
        ),
        # Without --pretrain, --ptx.coef 0 is to be given.
        ptx=PTX(
            coef=27.8,  # [App. C.4]
            ratio=1,  # [ours: 8 rows of text an episode would take most of the time]
            length=512,  # [ours]
            microbatches=8,  # [ours]
        ),
        final_prompts=256,  # [ours]
        remat="full",  # [TRL checkpoints activations too]
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
