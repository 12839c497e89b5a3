"""The programs of the scripts, on arguments that are shapes alone: what preflight.py compiles."""

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

from instructjax import models, offload, preflight, sampler, scoring, sharding, state
from instructjax.models import ModelConfig, Params
from instructjax.preflight import Compilable
from instructjax.run import RunConfig, checks
from instructjax.sampler.decode import PaddedPrompts, Settings
from instructjax.sampler.draw import Distribution

SHAPE = jax.ShapeDtypeStruct


def check_rows(config: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless every batch of a script divides over the mesh."""
    if isinstance(config, ppo_config.Config):
        flags, text = config.ppo, config.ptx
        checks.check_rows("--ppo.minibatch", flags.minibatch, flags.microbatches, mesh)
        if text.coef:
            name, rows = "--ppo.minibatch x --ptx.ratio", flags.minibatch * text.ratio
            checks.check_rows(name, rows, text.microbatches, mesh)
    elif isinstance(config, run_sft.Config | run_rm.Config):
        checks.check_rows("--batch_size", config.batch_size, config.microbatches, mesh)


# ------------------------------------------------------------------------------------ SFT and RM


def sft_step(config: run_sft.Config, model: ModelConfig, mesh: Mesh) -> Compilable:
    """As run_sft.py makes it."""
    model = computed(model, config)
    params = abstract_params(model, mesh)
    tx, _, step = run_sft.make_step(config, model, params, mesh, 1000)
    length = config.length or min(run_sft.LONGEST, model.max_length)
    batch = text_batch(config.batch_size, length, mesh)
    return Compilable("SFT step", step, (abstract_state(params, tx), batch, abstract_key(mesh)))


def rm_step(config: run_rm.Config, model: ModelConfig, mesh: Mesh) -> Compilable:
    """As run_rm.py makes it. Without --length a row holds a prompt with 9 responses, all of the
    greatest length.
    """
    model = computed(dataclasses.replace(model, scalar_head=True), config)
    params = abstract_params(model, mesh)
    tx, step = run_rm.make_step(config, model, params, mesh, 1000)
    B, K = config.batch_size, 9
    P, R = lengths(config.data.max_prompt, config.data.max_response, model)
    names = "tokens_BT", "segments_BT", "parents_BT", "positions_BT"
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (B, config.length or P + K * R))
    shapes |= dict.fromkeys(("last_BCK", "ranks_BCK", "mask_BCK"), (B, 1, K))
    shapes |= {"margin_BC": (B, 1), "confidence_BC": (B, 1)}
    args = abstract_state(params, tx), abstract_rows(shapes, mesh), abstract_key(mesh)
    return Compilable("RM step", step, args)


# ------------------------------------------------------------------------------------ PPO


def ppo_programs(
    config: ppo_config.Config, model: ModelConfig, reward_model: ModelConfig, mesh: Mesh
) -> Iterator[Compilable]:
    """An iteration of run_ppo.py: every response has --max_new_tokens tokens and every prompt the
    greatest length, so all is at its largest.

    Args:
      reward_model: of the reward model and of the value net.
    """
    flags, text = config.ppo, config.ptx
    model = computed(model, config)
    value_model = computed(dataclasses.replace(reward_model, scalar_head=True), config)
    policy, value = abstract_params(model, mesh), abstract_params(value_model, mesh)
    programs = Programs(config, model, value_model, policy, value, mesh)
    policy_state = abstract_state(policy, programs.policy_tx)
    value_state = abstract_state(value, programs.value_tx)
    frozen, frozen_rm = (abstract_frozen(x, config.model_dtype) for x in (policy, value))

    size = preflight.shard_bytes
    states = size(policy_state) + size(value_state)
    if flags.ema:
        states += size(policy)  # the average
    frozen_size = 0 if config.offload else size(frozen) + size(frozen_rm)

    P, R = lengths(config.data.max_prompt, config.max_new_tokens, model)
    batch, static, trips = rollout(config, model, P, R, mesh)
    number = placed(SHAPE((), jnp.float32), sharding.replicated(mesh))
    distribution = Distribution(temperature=number)
    yield Compilable(
        *("rollout", sampler.generate_on_device, (policy, batch, abstract_key(mesh), distribution)),
        static=static,
        trips=trips,
        runs=config.batch_size / (config.sample_batch or config.batch_size),
        # With --offload everything that is trained is on the host. At the end the average is
        # sampled beside the last weights.
        resident=size(policy) if config.offload else states - size(policy) + frozen_size,
        parts={"prefill": [0.0] * len(trips)},
    )

    B, B_update = flags.minibatch, flags.minibatch // flags.microbatches
    rows = response_rows(B, P, R, mesh)
    passes = config.batch_size / B
    # With --offload one frozen model at a time is on the devices.
    scored = {
        "reference": (programs.token_logp, frozen, passes),
        "reward model": (scoring.scorer(computed(value_model, config), mesh), frozen_rm, passes),
        "value net": (programs.token_values, value, passes),
        "policy, re-scored": (programs.token_logp, policy, passes * programs.rescore),
    }
    for name, (jitted, params, runs) in scored.items():
        of_state = params is value or params is policy
        others = states + frozen_size - (size(params) if of_state or not config.offload else 0)
        if runs:
            yield Compilable(name, jitted, (params, rows), runs=runs, resident=others)

    updates = float(config.updates)
    rows = response_rows(B_update, P, R, mesh)
    text_rows = flags.minibatch * text.ratio // text.microbatches
    ptx_batch = text_batch(text_rows, text.length, mesh)
    assert programs.value_gradient is not None
    assert programs.value_step is not None
    gradients = {
        "policy gradient": (programs.policy_gradient, policy, rows, flags.microbatches),
        "ptx gradient": (programs.ptx_gradient, policy, ptx_batch, text.microbatches),
        "value gradient": (programs.value_gradient, value, rows, flags.microbatches),
    }
    if not text.coef:
        del gradients["ptx gradient"]
    for name, (gradient, params, batch, count) in gradients.items():
        # The last of several batches: the sums of those before it are arguments.
        _, metrics = jax.eval_shape(gradient.add, None, None, params, batch, number, number)
        metrics = jax.tree.map(lambda x: placed(x, number.sharding), metrics)
        args = params, metrics, params, batch, number, number
        others = states + frozen_size - size(params)
        yield Compilable(name, gradient.add, args, runs=updates * count, resident=others)
    for name, step, args in (
        (
            "policy step",
            programs.policy_step,
            (policy_state, policy if flags.ema else None, policy),
        ),
        ("value step", programs.value_step, (value_state, None, value)),
    ):
        others = states + frozen_size - size(args) + size(args[-1])  # without its gradients
        yield Compilable(name, step, args, runs=updates, resident=others)


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
    """(P, R), which fill the model's context where the flags set no bound."""
    R = min(response or model.max_length // 2, model.max_length)
    return min(prompt or model.max_length, model.max_length - R), R


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
