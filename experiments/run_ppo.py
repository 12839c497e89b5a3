"""PPO-ptx: the paper's third step, against a reward model or your own function (section 3.5).

    python experiments/run_ppo.py                                   # the miniature, from nothing
    python experiments/run_ppo.py --preset instructgpt-6b --model runs/sft --reward runs/rm \
        --data jsonl:prompts.jsonl --pretrain 'jsonl:books/*.txt'
    python experiments/run_ppo.py --reward my_file.py:my_function --loss my_file.py:my_policy_loss

Hardware: two CPU cores suffice for the miniature: 120 iterations, 195 s, after those of
run_sft.py and run_rm.py, which run first where their runs are not there.
Result: by the gold judge the policy wins 70 % (67 to 72) against SFT on held-out prompts, at 1.6
nats of KL, and its loss on pretraining text falls from 3.7 to 1.5.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run_rm
import run_sft
from ppo_config import PRESETS, Config
from ppo_programs import make_programs

from instructjax import advantages, hf, models, ppo, rollout, sampler, scoring, sharding, state
from instructjax.data import PackedRows, PromptRows, Record, Stream, load
from instructjax.evaluation import policies
from instructjax.evaluation.figures import plot_curves
from instructjax.evaluation.policies import Sampled
from instructjax.offload import freeze, rest
from instructjax.rollout import Rows
from instructjax.run import Run, main, pretrained
from instructjax.run.flags import parse
from instructjax.run.process import return_memory


def run_ppo(config: Config) -> dict[str, Any]:
    """Trains and evaluates; returns what results.json holds."""
    began = time.perf_counter()
    miniature = config.data.spec == "miniature"
    if miniature:
        ensure_sft_and_rm(config)
    with Run(config, stage="ppo") as run:
        flags, temperature = config.ppo, config.temperature

        # ------------------------------------------------------------------------- the four models

        mesh = sharding.make_mesh(**sharding.parse_mesh(config.mesh), devices=jax.devices())
        check_rows(config, mesh)
        model, params, tokenizer = pretrained.load(
            config.model, mesh, tokenizer=config.tokenizer, seed=config.seed
        )
        if model.scalar_head:
            raise ValueError(f"--model {config.model}: a reward model, not a language model")
        computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
        model = dataclasses.replace(model, **computed)
        reward = scoring.load(config.reward, mesh, tokenizer, config.model_dtype, config.offload)
        reference = None
        if flags.beta > 0 or flags.kl_target is not None:
            reference = rest(freeze(params, config.model_dtype), config.offload)

        policy, value, value_model = params, None, None
        if flags.value == "shared":
            policy = ppo.with_value_head(params, model.width, mesh)
        else:
            value_model, value = load_value_net(config, mesh, model, params, tokenizer)

        # ------------------------------------------------------------------------------- the data

        R = config.max_new_tokens
        read = functools.partial(load, tokenizer=tokenizer)
        fits = model.max_length - R + 1
        seen = read(config.data, "prompts", split="train", context=fits)
        unseen = read(config.data, "prompts", split="validation", context=fits)
        lengths = np.concatenate([half.prompt.lengths for half in (seen, unseen)])
        widths = sampler.buckets(lengths.tolist())
        P = min(widths[-1], model.max_length - R)
        buckets = rollout.bucket_sizes(R, flags.buckets)
        prompt_sizes, sizes = (" or ".join(map(str, x)) for x in (widths, buckets))
        print(f"  prompts are padded to {prompt_sizes} tokens, responses to {sizes}")
        stream = Stream(PromptRows(seen), config.batch_size, seed=config.seed)

        text = unseen_text = None
        pretrain = config.pretrain
        if miniature and not pretrain.spec:
            pretrain = dataclasses.replace(pretrain, spec="miniature")
        if pretrain.spec:
            packed = functools.partial(PackedRows, length=config.ptx.length)
            size = config.ptx.ratio * flags.minibatch
            own = sharding.own_rows(mesh, size)
            streamed = functools.partial(Stream, batch_size=size, seed=config.seed, own=own)
            text = streamed(packed(read(pretrain, "text", split="train")))
            unseen_text = streamed(packed(read(pretrain, "text", split="validation")))
        put_text = functools.partial(jax.make_array_from_process_local_data, sharding.batched(mesh))

        # ------------------------------------------------------------------------------ programs

        programs = make_programs(config, model, value_model, policy, value, mesh)
        learning_rate = programs.learning_rate
        seed_key = jax.random.key(config.seed)
        eval_key, before_key = jax.random.split(jax.random.fold_in(seed_key, 2**31 - 1))
        total = config.steps
        if total is None:
            total = math.ceil(len(seen) / config.batch_size)
        current: Any = None  # the PPOState, while there is training

        # ------------------------------------------------------------------------------ a rollout

        def roll_out(params: models.Params, prompts, indices, key: jax.Array) -> tuple[Rows, float]:
            """A response to each prompt, and the share of the sampler's slots that were live."""
            # Sampling needs the most memory, as weights are whole on few devices: with --offload
            # all that is trained rests, but for the weights that are sampled.
            nonlocal current
            resting = None
            if current is not None:
                resting = rest(with_params(current, None), config.offload)
                current = resting.tree
            size, names = config.sample_batch or len(prompts), ("tokens_BR", "mask_BR", "logp_BR")
            found, live = [], []
            for i in range(0, len(prompts), size):
                sampled = sampler.generate(
                    ppo.without_value_head(params),
                    model,
                    prompts[i : i + size],
                    key,
                    max_new_tokens=R,
                    temperature=temperature,
                    indices=indices[i : i + size],
                    widths=widths,
                    mesh=mesh,
                )
                found.append([sharding.fetch(getattr(sampled, name)) for name in names])
                live.append(float(sampled.live_fraction))
            if resting is not None:
                current = with_params(resting.awake(), params)
            rows = dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=True))
            return rollout.left_padded(prompts, P) | rows, float(np.mean(live))

        def over(rows: Rows, fn: Callable[..., jax.Array], *frozen: Any) -> np.ndarray:
            of_rows = functools.partial(fn, *frozen)
            return rollout.map_batches(of_rows, rows, flags.minibatch, buckets, mesh)

        def score(rows: Rows, records: Sequence[Record]) -> tuple[np.ndarray, dict[str, float]]:
            texts = tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
            prompts = [record.prompt for record in records]
            return reward.score(functools.partial(over, rows), prompts, texts, records)

        rescore = config.model_dtype != "float32" if flags.rescore is None else flags.rescore

        # ----------------------------------------------------------------------------- evaluation

        def assess(params: models.Params, key: jax.Array, count: int) -> Sampled:
            """One response to each of the first held-out prompts, at the training temperature."""
            count = min(count, len(unseen))
            records = unseen.records[:count]
            prompts = [unseen.prompt[i].tolist() for i in range(count)]
            rows, _ = roll_out(params, prompts, range(count), key)
            kl_B = None
            if reference is not None:
                own_BR = over(rows, programs.logp_of, params) if rescore else rows["logp_BR"]
                ref_BR = over(rows, programs.logp_of, reference.awake())
                kl_B = (own_BR - ref_BR).sum(1, where=rows["mask_BR"])
            texts = tokenizer.batch_decode(rollout.token_ids(rows), skip_special_tokens=True)
            return Sampled(
                prompts=[record.prompt for record in records],
                texts=texts,
                score_B=score(rows, records)[0],
                kl_B=kl_B,
                length_B=rows["mask_BR"].sum(1),
                ended_B=rollout.ended(rows, model.eos_ids),
                utility_B=gold_utilities(records, texts) if miniature else None,
            )

        def held_out_text_loss(params: models.Params) -> float:
            """Nats a token of up to 16 batches of held-out pretraining text."""
            means, tokens = [], []
            for batch, _ in zip(unseen_text.once() if unseen_text else [], range(16), strict=False):
                mean, (weight, _) = programs.text_loss_of(params, jax.tree.map(put_text, batch))
                means.append(float(mean))
                tokens.append(float(weight))
            return float(np.average(means, weights=tokens)) if means else math.nan

        def evaluate(step: int) -> None:
            now = assess(current.policy.params, eval_key, config.eval_prompts)
            found = {f"validation/{name}": value for name, value in now.means().items()}
            if unseen_text is not None:
                found["ptx/validation_loss"] = held_out_text_loss(current.policy.params)
            if now.utility_B is not None and before.utility_B is not None:
                count = len(now.utility_B)
                found["validation/win_rate"] = policies.win_rate(
                    now.utility_B, before.utility_B[:count]
                )[0]
            run.log(step, found)
            for prompt, text, scored in zip(now.prompts[:4], now.texts, now.score_B, strict=False):
                shown = {"prompt": prompt, "response": text, "score": float(scored)}
                run.metrics.sample(step, shown)
            run.console.print(policies.samples_table(f"iteration {step:,}", before, now))

        # Before there is a state, which would lie in memory beside it.
        before = assess(params, before_key, config.final_prompts)
        before_text = held_out_text_loss(params)

        # ---------------------------------------------------------------------------------- state

        current = ppo.PPOState(
            policy=state.create(policy, programs.policy_tx),
            value=None if value is None else state.create(value, programs.value_tx),
            ema=jax.tree.map(jnp.copy, policy) if flags.ema else None,
            beta=jax.device_put(jnp.float32(flags.beta), sharding.replicated(mesh)),
        )
        current, start, meta = run.restore(current)
        del params, policy, value

        # ----------------------------------------------------------------------------------- loop

        if start == 0:
            evaluate(0)
        if meta.get("stopped"):
            total = start
        shuffled_text = text.iterate(start * config.updates) if text and config.ptx.coef else None
        for step, asked in zip(run.steps(start, total), stream.iterate(start), strict=False):
            clock = [time.perf_counter()]
            return_memory()
            policy_params = current.policy.params
            key = jax.random.fold_in(seed_key, step)
            rows, live = roll_out(policy_params, asked["prompts"], asked["indices"], key)
            return_memory()
            clock.append(time.perf_counter())

            score_B, terms = score(rows, asked["records"])
            value_params = policy_params if current.value is None else current.value.params
            rows["value_BR"] = over(rows, programs.value_of, value_params)
            sampled_BR = rows["logp_BR"]
            if rescore:
                rows["logp_BR"] = over(rows, programs.logp_of, policy_params)
            ref_BR = rows["logp_BR"]  # without a reference the KL is 0
            if reference is not None:
                ref_BR = over(rows, programs.logp_of, reference.awake())
            names = ("logp_BR", "value_BR", "mask_BR")
            logp_BR, value_BR, mask_BR = (rows[name] for name in names)
            made, metrics = programs.experience(
                logp_BR,
                ref_BR,
                value_BR,
                mask_BR,
                score_B,
                rollout.ended(rows, model.eos_ids),
                current.beta,
            )
            rows |= jax.device_get(made)
            metrics |= {f"reward/{name}": value for name, value in terms.items()}
            clock.append(time.perf_counter())

            found: list[dict[str, float]] = []
            for index in minibatches(config, step):
                size = flags.minibatch // flags.microbatches
                parts = [
                    rollout.put(part, mesh)
                    for _, part in rollout.batches(rows, index, size, buckets)
                ]
                texts = []
                if shuffled_text is not None:
                    texts = [jax.tree.map(put_text, x) for x in shares(next(shuffled_text), config)]
                current, one = programs.update(current, parts, int(mask_BR[index].sum()), texts)
                found.append(jax.device_get(one))
            metrics |= {name: float(np.mean([x[name] for x in found])) for name in found[0]}
            mismatch = found[0]["policy/logp_change"]  # of the policy as it sampled
            if rescore:
                mismatch = np.abs(logp_BR - sampled_BR)[mask_BR].mean()
            metrics |= {
                "rollout/logp_mismatch": mismatch,
                "rollout/live_fraction": live,
                "optim/learning_rate": jnp.asarray(learning_rate((step - 1) * config.updates)),
            }
            if flags.kl_target is not None:
                beta = advantages.adapt_beta(
                    current.beta,
                    metrics["objective/kl"],
                    config.batch_size,
                    target=flags.kl_target,
                    horizon=flags.kl_horizon,
                )
                beta = jax.device_put(beta, sharding.replicated(mesh))
                current = dataclasses.replace(current, beta=beta)
            jax.block_until_ready(current)
            clock.append(time.perf_counter())
            for name, seconds in zip(("rollout", "score", "update"), np.diff(clock), strict=True):
                metrics[f"time/{name}"] = seconds
            run.log(step, metrics, tokens=int(mask_BR.sum()))

            stopped = flags.max_kl is not None and float(metrics["objective/kl"]) > flags.max_kl
            if step % config.eval_every == 0 or step == total or stopped:
                evaluate(step)
            if run.should_save(step) or stopped:
                run.save(step, current, {"stopped": stopped})
            if stopped:
                print(f"--ppo.max_kl {flags.max_kl}: objective/kl is over it at step {step}")
                break

        # ------------------------------------------------------------------------ what came of it

        after = {"PPO, averaged weights": current.ema, "PPO, last weights": current.policy.params}
        after = {
            name: ppo.without_value_head(trained)
            for name, trained in after.items()
            if trained is not None
        }
        current = None  # optimizers and value net are done
        hf.save(config.out / "export", model, next(iter(after.values())), tokenizer)
        sampled = {"SFT": before}
        losses_of_text = {"SFT": before_text}
        for name, trained in after.items():
            sampled[name] = assess(trained, eval_key, config.final_prompts)
            losses_of_text[name] = held_out_text_loss(trained)
        return report(config, run, sampled, losses_of_text, time.perf_counter() - began)


# ------------------------------------------------------------------------------------- helpers


def with_params(current: ppo.PPOState, params: models.Params | None) -> Any:
    """The state with other parameters of the policy, or none."""
    policy = dataclasses.replace(current.policy, params=params)
    return dataclasses.replace(current, policy=policy)


def ensure_sft_and_rm(config: Config) -> None:
    """Runs the miniature's earlier steps with their defaults, or finishes them, where needed."""
    for path, default, script in (
        (config.model, run_sft.Config().out, "run_sft.py"),
        *((spec, run_rm.Config().out, "run_rm.py") for spec in config.reward.spec),
    ):
        if Path(path) != default:
            continue
        if pretrained.finished(default):
            print(f"{default} is there: {script} is not run again")
            continue
        print(f"{default} is not there yet: running {script} first")
        if script == "run_sft.py":
            preset = dataclasses.replace(run_sft.PRESETS["miniature"], preset="miniature")
            run_sft.run_sft(dataclasses.replace(preset, resume=True))
        else:
            preset = dataclasses.replace(run_rm.PRESETS["miniature"], preset="miniature")
            run_rm.run_rm(dataclasses.replace(preset, resume=True))


def check_rows(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Every batch must divide over the devices that share it."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = {
        "--ppo.minibatch over --ppo.microbatches": config.ppo.minibatch // config.ppo.microbatches,
        "--ppo.minibatch x --ptx.ratio over --ptx.microbatches": (
            config.ppo.minibatch * config.ptx.ratio // config.ptx.microbatches
        ),
    }
    for name, count in rows.items():
        if count % parts:
            raise ValueError(
                f"{name} is {count} rows, which do not divide over data x fsdp of {parts} devices"
            )


def load_value_net(
    config: Config,
    mesh: jax.sharding.Mesh,
    model: models.ModelConfig,
    params: models.Params,
    tokenizer: Any,
) -> tuple[models.ModelConfig, models.Params]:
    """The reward model's copy (App. C.4), bias included; or the policy's with a new head."""
    found = [spec for spec in config.reward.spec if not scoring.is_function(spec)]
    path = config.value_model or (found[0] if found else None)
    if path is None:
        return run_rm.with_reward_head(model, params, config.seed, mesh)
    own, params = scoring.load_model(path, mesh, tokenizer, "float32", "--value_model")
    computed = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
    return dataclasses.replace(own, **computed), params


def minibatches(config: Config, step: int) -> list[np.ndarray]:
    """Row numbers of each update of an iteration: a new order each epoch, of (seed, step) alone."""
    random = np.random.default_rng([config.seed, step])
    orders = [random.permutation(config.batch_size) for _ in range(config.ppo.epochs)]
    return [part for order in orders for part in order.reshape(-1, config.ppo.minibatch)]


def shares(batch: dict[str, np.ndarray], config: Config) -> list[dict[str, np.ndarray]]:
    """An update's text in --ptx.microbatches parts."""
    count = config.ptx.microbatches
    return [{name: x[i::count] for name, x in batch.items()} for i in range(count)]


def gold_utilities(records: Sequence[Record], texts: Sequence[str]) -> np.ndarray:
    """The miniature's gold judge on responses."""
    from instructjax.miniature import judge

    pairs = zip(records, texts, strict=True)
    return np.array([judge(dict(record.row), text).utility for record, text in pairs])


def report(
    config: Config,
    run: Run,
    sampled: dict[str, Sampled],
    text_losses: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Prints and writes what came of it."""
    base = sampled["SFT"]
    results = policies.results(sampled, text_losses) | {"seconds": seconds}
    if jax.process_index() != 0:
        return results
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with (config.out / "samples_after.jsonl").open("w", encoding="utf-8") as file:
        for i, prompt in enumerate(base.prompts):
            line = {"prompt": prompt} | {name: one.texts[i] for name, one in sampled.items()}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    panels = {
        "score": ("objective/score", "validation/score"),
        "KL, nats a response": ("objective/kl", "validation/kl"),
        "length, tokens": ("rollout/length", "validation/length"),
        "entropy, nats a response": ("objective/entropy",),
        "value net": ("value/loss", "value/explained_variance"),
        "pretraining text, nats a token": ("ptx/loss", "ptx/validation_loss"),
    }
    if base.utility_B is not None:
        panels["wins against SFT"] = ("validation/win_rate",)
    plot_curves(config.out, panels, config.out / "curves.png")
    run.console.print(policies.table(results, len(base.prompts)))
    names = ("metrics.jsonl", "samples.jsonl", "samples_after.jsonl", "results.json", "curves.png")
    wrote = [*(config.out / name for name in names), config.out / "export"]
    next_command = f"python experiments/sample.py --model {config.out}"
    run.finish({"seconds": seconds}, wrote, next_command)
    return results


def cli(argv: Sequence[str] | None = None) -> None:
    run_ppo(parse(Config, PRESETS, __doc__, argv))


if __name__ == "__main__":
    main(cli)
