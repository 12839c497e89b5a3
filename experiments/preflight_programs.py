"""The programs that preflight.py compiles: those of the scripts, on arguments that are shapes."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ppo_config
import run_rm
import run_sft
from jax.sharding import AbstractMesh, Mesh, Sharding
from run_ppo import Programs

from instructjax import hf, models, offload, ppo, preflight, sampler, scoring, sharding, state
from instructjax.data.batches import rounded_up
from instructjax.models import ModelConfig, Params
from instructjax.preflight import Compilable
from instructjax.run import RunConfig, checks
from instructjax.sampler.decode import PaddedPrompts, Settings
from instructjax.sampler.draw import Distribution

SHAPE = jax.ShapeDtypeStruct
RESPONSES = 9  # to a prompt, at most (section 3.4)
LONGEST = 1024  # tokens of a prompt and of a response where no flag says more (App. C)


def check_rows(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless every batch of a script divides over the mesh."""
    if isinstance(config, ppo_config.Config):
        flags, text = config.ppo, config.ptx
        checks.check_rows("--ppo.minibatch", flags.minibatch, flags.microbatches, mesh)
        if text.coef:
            name, rows = "--ppo.minibatch x --ptx.ratio", flags.minibatch * text.ratio
            checks.check_rows(name, rows, text.microbatches, mesh)
    elif isinstance(config, run_sft.Config | run_rm.Config):
        checks.check_rows("--batch_size", config.batch_size, 1, mesh)


# ------------------------------------------------------------------------------------ SFT and RM


def sft_step(config: run_sft.Config, model: ModelConfig, mesh: Mesh) -> Compilable:
    """As run_sft.py makes it."""
    model, trained, frozen = split_params(config, model, mesh)
    tx, _, step = run_sft.make_step(config, model, trained, mesh, 1000)
    batch = text_batch(config.batch_size, row_of_text(config, model), mesh)
    args = abstract_state(trained, tx), batch, abstract_key(mesh), frozen
    return Compilable("SFT step", step, args)


def rm_step(config: run_rm.Config, model: ModelConfig, mesh: Mesh) -> Compilable:
    """As run_rm.py makes it, with up to 9 responses to a prompt."""
    model = dataclasses.replace(model, scalar_head=True)
    model, trained, frozen = split_params(config, model, mesh)
    tx, step = run_rm.make_step(config, model, trained, mesh, 1000)
    B, K = config.batch_size, RESPONSES
    names = "tokens_BT", "segments_BT", "parents_BT", "positions_BT"
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        names, (B, row_of_comparisons(config, model))
    )
    shapes |= dict.fromkeys(("last_BCK", "ranks_BCK", "mask_BCK"), (B, 1, K))
    shapes |= {"margin_BC": (B, 1), "confidence_BC": (B, 1)}
    args = abstract_state(trained, tx), abstract_rows(shapes, mesh), abstract_key(mesh)
    return Compilable("RM step", step, (*args, frozen))


def row_of_text(config: run_sft.Config, model: ModelConfig) -> int:
    """Tokens of a row of run_sft.py: --length, or what holds a demonstration of the greatest
    lengths, as far as run_sft.py goes without --length.
    """
    longest, limits = min(run_sft.LONGEST, model.max_length), config.data
    P, R = limits.max_prompt, limits.max_response
    whole = longest if P is None or R is None else rounded_up(P + R)
    return config.length or min(whole, longest)


def row_of_comparisons(config: run_rm.Config, model: ModelConfig) -> int:
    """Tokens of a row of run_rm.py: --length, or what holds a prompt with all responses, of the
    greatest lengths, as far as run_rm.py goes without --length.
    """
    P, R = lengths(config.data.max_prompt, config.data.max_response, model)
    return config.length or min(rounded_up(P + RESPONSES * R), run_rm.LONGEST)


# ------------------------------------------------------------------------------------ PPO


def ppo_programs(
    config: ppo_config.Config,
    model: ModelConfig,
    reward_model: ModelConfig,
    mesh: Mesh,
    shared_base: bool = False,
) -> Iterator[Compilable]:
    """An iteration of run_ppo.py: every response has --max_new_tokens tokens and every prompt the
    greatest length, so all is at its largest.

    Args:
      reward_model: of the reward model and of the value net.
      shared_base: whether, with LoRA, these two are adapters of the policy's weights.
    """
    flags, text = config.ppo, config.ptx
    size = preflight.shard_bytes
    model, policy, base = split_params(config, model, mesh)
    reference = policy if config.lora.rank else abstract_frozen(policy, config.model_dtype)
    value_model = dataclasses.replace(reward_model, scalar_head=True)
    value_model, value, value_base = split_params(config, value_model, mesh)
    frozen_rm = models.whole(abstract_frozen(value, config.model_dtype), value_base)
    if config.lora.rank and not shared_base:  # its weights are not adapted
        frozen_rm.pop("adapter")
    if flags.value == "shared":
        head = {"kernel": SHAPE((model.width,), jnp.float32), "bias": SHAPE((), jnp.float32)}
        head = jax.tree.map(lambda x: placed(x, sharding.replicated(mesh)), head)
        policy = {**policy, "value_head": head}
    own_value = flags.value == "separate"
    programs = Programs(
        *(config, model, value_model if own_value else None, policy, value if own_value else None),
        mesh,
        frozen=base,
        value_frozen=value_base,
    )
    policy_state = abstract_state(policy, programs.policy_tx)
    value_state = abstract_state(value, programs.value_tx) if own_value else None

    # What is on each device between programs. With --offload, `waiting` is on the host then, and
    # during a rollout all that is trained is there too, but for the policy's weights.
    trained = size(policy_state) + (size(value_state) if own_value else 0)
    average = size(policy) if flags.ema else 0.0
    trained += average
    fixed = size(base) + (0 if shared_base or not own_value else size(value_base))
    waiting = {"reference": 0.0, "reward model": size(frozen_rm)}
    if flags.beta:
        # With LoRA the reference is the base, with the adapter that --model came with if it did.
        waiting["reference"] = size(reference)
    if shared_base:
        waiting["reward model"] -= size(value_base)
    held = trained + fixed + (0 if config.offload else sum(waiting.values()))

    P, R = lengths(config.data.max_prompt, config.max_new_tokens, model)
    batch, static, trips = rollout(config, model, P, R, mesh)
    number = placed(SHAPE((), jnp.float32), sharding.replicated(mesh))
    distribution = Distribution(temperature=number)
    sampled = models.whole(ppo.without_value_head(policy), base)
    yield Compilable(
        *(
            "rollout",
            sampler.generate_on_device,
            (sampled, batch, abstract_key(mesh), distribution),
        ),
        static=static,
        trips=trips,
        runs=config.batch_size / (config.sample_batch or config.batch_size),
        # At the end an average is sampled beside the last weights.
        resident=(average + fixed if config.offload else held - size(policy)) - size(base),
        made=decoding_weights(model, base, mesh),
        parts={"prefill": [0.0] * len(trips)},
    )

    B, B_update = flags.minibatch, flags.minibatch // flags.microbatches
    rows = response_rows(B, P, R, mesh)
    passes = config.batch_size / B
    whole_policy = models.whole(policy, base)
    whole_value = models.whole(value, value_base) if own_value else whole_policy
    # (function, parameters, runs, bytes of the parameters that are on the devices between programs)
    scored = {
        "reference": (
            *(programs.token_logp, models.whole(reference, base), passes if flags.beta else 0),
            size(base) + (0 if config.offload else waiting["reference"]),
        ),
        "reward model": (
            *(scoring.scorer(computed(value_model, config), mesh), frozen_rm, passes),
            (size(value_base) if shared_base else 0)
            + (0 if config.offload else waiting["reward model"]),
        ),
        "value net": (programs.token_values, whole_value, passes, size(whole_value)),
        "policy, re-scored": (
            *(programs.token_logp, whole_policy, passes * programs.rescore, size(whole_policy)),
        ),
    }
    for name, (jitted, params, runs, kept) in scored.items():
        if runs:
            yield Compilable(name, jitted, (params, rows), runs=runs, resident=held - kept)

    updates = float(config.updates)
    rows = response_rows(B_update, P, R, mesh)
    text_rows = flags.minibatch * text.ratio // text.microbatches
    ptx_batch = text_batch(text_rows, text.length, mesh)
    gradients: dict[str, Any] = {
        "policy gradient": (programs.policy_gradient, policy, base, rows, flags.microbatches)
    }
    if text.coef:
        ptx = programs.ptx_gradient, policy, base, ptx_batch, text.microbatches
        gradients["ptx gradient"] = ptx
    if own_value:
        of_value = programs.value_gradient, value, value_base, rows, flags.microbatches
        gradients["value gradient"] = of_value
    for name, (gradient, params, frozen, batch, count) in gradients.items():
        # The last of several batches: the sums of those before it are arguments.
        first = None, None, params, batch, number, number, frozen
        _, metrics = jax.eval_shape(gradient.add, *first)
        metrics = jax.tree.map(lambda x: placed(x, number.sharding), metrics)
        yield Compilable(
            *(name, gradient.add, (params, metrics, *first[2:])),
            runs=updates * count,
            resident=held - size(params) - size(frozen),
        )
    averaged = policy if flags.ema else None
    steps: dict[str, Any] = {"policy step": (programs.policy_step, policy_state, averaged, policy)}
    if own_value:
        steps["value step"] = programs.value_step, value_state, None, value
    for name, (step, *args) in steps.items():
        others = held - size(args) + size(args[-1])  # without its gradients
        yield Compilable(name, step, tuple(args), runs=updates, resident=others)


def decoding_weights(model: ModelConfig, base: Params, mesh: Mesh) -> float:
    """Bytes on a device of the weights that `sampler.lay_out` makes: in the compute dtype, with
    adapters merged in float32, and not split over `data` and `fsdp`. 0 where the arguments serve.

    Args:
      base: frozen weights in the compute dtype; empty: all are trained, in float32.
    """
    whole = mesh.shape["data"] * mesh.shape["fsdp"] == 1
    as_they_are = not base if model.dtype == "float32" else bool(base)
    if whole and as_they_are:
        return 0.0
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(models.cast, dtype=model.dtype), shapes)
    axes = models.logical_axes(model)
    layout = sharding.shardings(axes, shapes, mesh, sharding.GENERATION)
    return preflight.shard_bytes(jax.tree.map(placed, shapes, layout))


def rollout(
    config: ppo_config.Config, model: ModelConfig, P: int, R: int, mesh: Mesh
) -> tuple[PaddedPrompts, dict[str, Any], list[float]]:
    """(prompts, static arguments, trips of the loops) of the sampler's program."""
    prompts = config.sample_batch or config.batch_size
    settings = Settings(model, R, eos_ids=model.eos_ids)
    rows, settings = sampler.plan(prompts, settings, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    whole = PaddedPrompts(
        np.empty((rows * shards, P), np.int32),
        np.empty((rows * shards, P), bool),
        np.empty(rows * shards, np.int32),
    )
    batch = jax.tree.map(lambda x: SHAPE(x.shape, x.dtype, sharding=sharding.batched(mesh)), whole)
    # No response ends early: the loops of the last few slots, which take less memory, would have
    # no turns, and deep models would compile twice as long for them. A slot is refilled once a
    # response.
    settings = settings._replace(eos_ids=())
    trips = [R * rows / settings.slots]
    if settings.slots < rows:
        trips.append(settings.slots / R)
    return batch, {"settings": settings, "mesh": mesh}, trips


# ------------------------------------------------------------------------------------ arguments


def computed(model: ModelConfig, config: Any) -> ModelConfig:
    """The model as a script computes it."""
    how = {"dtype": config.model_dtype, "remat": config.remat, "unroll": config.unroll}
    return dataclasses.replace(model, **how)


def lengths(prompt: int | None, response: int | None, model: ModelConfig) -> tuple[int, int]:
    """(P, R). Without a flag each is at most the paper's 1,024, and the context holds both."""
    R = min(response or min(model.max_length // 2, LONGEST), model.max_length)
    return min(prompt or LONGEST, model.max_length - R), R


def split_params(config: Any, model: ModelConfig, mesh: Mesh) -> tuple[ModelConfig, Params, Params]:
    """(the model as a script computes it, what it trains, what it freezes), as of `lora.load`."""
    model, flags = computed(model, config), config.lora
    params = abstract_params(model, mesh)
    if not flags.rank:
        return model, params, {}
    init = functools.partial(models.init_adapter, model, rank=flags.rank)
    of_model = {"targets": flags.paths(model), "shared": hf.shares_input(model)}
    shapes = jax.eval_shape(functools.partial(init, **of_model), jax.random.key(0))
    layout = sharding.shardings(models.adapter_axes(shapes), shapes, mesh)
    adapter = jax.tree.map(placed, shapes, layout)
    trained, frozen = models.split({**params, "adapter": adapter})
    model = dataclasses.replace(model, adapter_scale=flags.scale)
    return model, trained, abstract_frozen(frozen, config.model_dtype)


def abstract_params(model: ModelConfig, mesh: Mesh) -> Params:
    """Parameters laid out for training."""
    shapes = jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
    layout = sharding.shardings(models.logical_axes(model), shapes, mesh)
    return jax.tree.map(placed, shapes, layout)


def abstract_frozen(params: Params, dtype: str) -> Params:
    """What `offload.freeze` makes of them."""
    shapes = jax.eval_shape(functools.partial(offload.freeze, dtype=dtype), params)
    return jax.tree.map(lambda x, like: placed(x, like.sharding), shapes, params)


def abstract_state(params: Params, tx: Any) -> state.TrainState:
    """What `state.create` makes of them."""
    step: Any = SHAPE((), jnp.int32)
    shapes = state.TrainState(step, params, jax.eval_shape(tx.init, params))
    return jax.tree.map(placed, shapes, state.shardings(params, tx))


def abstract_key(mesh: Mesh) -> Any:
    return placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def abstract_rows(shapes: Mapping[str, tuple[int, ...]], mesh: Mesh) -> dict[str, Any]:
    """A batch by its arrays' names: of masks, of floating-point numbers, of ids."""
    floats = ("logp_BR", "value_BR", "advantage_BR", "return_BR", "margin_BC", "confidence_BC")

    def dtype(name: str) -> Any:
        return jnp.bool_ if "mask" in name else jnp.float32 if name in floats else jnp.int32

    where = sharding.batched(mesh)
    return {name: SHAPE(shape, dtype(name), sharding=where) for name, shape in shapes.items()}


def text_batch(rows: int, length: int, mesh: Mesh) -> dict[str, Any]:
    """Rows of `data.PackedRows`."""
    names = "tokens_BT", "segments_BT", "positions_BT", "mask_BT"
    return abstract_rows(dict.fromkeys(names, (rows, length)), mesh)


def response_rows(rows: int, P: int, R: int, mesh: Mesh) -> dict[str, Any]:
    """Rows of a rollout once it is scored; see rollout.py."""
    of_responses = "tokens_BR", "mask_BR", "logp_BR", "value_BR", "advantage_BR", "return_BR"
    of_prompts = dict.fromkeys(("prompt_BP", "prompt_mask_BP"), (rows, P))
    return abstract_rows({**of_prompts, **dict.fromkeys(of_responses, (rows, R))}, mesh)


def placed(shape: Any, where: Sharding) -> Any:
    return SHAPE(shape.shape, shape.dtype, sharding=where)
