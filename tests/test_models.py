"""The decoder: which tokens see which, the cache, and log-probabilities without all logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructjax import losses, models
from instructjax.models import ModelConfig, Rope

# Three decoders that between them turn every switch.
SMALL = {"vocab_size": 131, "layers": 3, "width": 24, "heads": 4, "mlp_width": 40, "max_length": 64}
GPT2 = ModelConfig(**SMALL)
MISTRAL = ModelConfig(
    **SMALL,
    family="mistral",
    kv_heads=2,
    head_dim=10,
    norm="rms",
    positions="rotary",
    gated=True,
    activation="silu",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied=False,
    window=4,
    windowed=(True,) * 3,
)
GEMMA3 = dataclasses.replace(
    MISTRAL,
    family="gemma3_text",
    kv_heads=1,
    activation="gelu_pytorch_tanh",
    tied=True,
    norm_offset=True,
    post_norms=True,
    qk_norm=True,
    scale_embedding=True,
    rope=Rope(theta=1e6),
    local_rope=Rope(theta=100.0),
    windowed=(True, False, True),
    attention_softcap=5.0,
    final_softcap=3.0,
    query_scalar=7.0,
)
CONFIGS = pytest.mark.parametrize("config", [GPT2, MISTRAL, GEMMA3], ids=lambda c: c.family)


@functools.cache
def params_of(config):
    """Random parameters, large enough that every position and switch shows."""
    params = models.init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def tokens_of(B, T, vocab=131):
    return jnp.array(np.random.default_rng(0).integers(0, vocab, (B, T)))


apply = jax.jit(models.apply, static_argnums=1)
extend = jax.jit(models.extend, static_argnums=1)
logits = jax.jit(models.logits, static_argnums=1)


# ---------------------------------------------------------------------------- attention


@CONFIGS
def test_no_gradient_from_later_tokens(config):
    """d hidden[t] / d embedding of token s is exactly 0 for s > t, and beyond the windows."""
    params, tokens = params_of(config), jnp.arange(12)[None]  # each token its own embedding row

    def hidden(table):
        changed = {**params, "embed": {**params["embed"], "tokens": table}}
        return models.apply(changed, config, tokens)[0].sum(-1)  # [T]

    jacobian = jax.jit(jax.jacrev(hidden))(params["embed"]["tokens"])  # [T, V, D]
    reach = np.abs(jacobian[:, :12]).sum(-1)  # [t, s]
    t, s = np.indices(reach.shape)
    assert (reach[s > t] == 0).all()
    far = config.layers * (config.window - 1) if config is MISTRAL else np.inf
    assert (reach[(s <= t) & (t - s <= far)] > 0).all()
    assert (reach[t - s > far] == 0).all()


@CONFIGS
def test_left_padding_changes_nothing(config):
    params, tokens = params_of(config), tokens_of(2, 9)
    mask = jnp.ones((2, 9), bool)
    padded = jnp.pad(tokens, ((0, 0), (5, 0)), constant_values=17)
    padded_mask = jnp.pad(mask, ((0, 0), (5, 0)))
    alone = apply(params, config, tokens, mask_BT=mask)
    behind = apply(params, config, padded, mask_BT=padded_mask)[:, 5:]
    np.testing.assert_allclose(behind, alone, atol=1e-5)


@CONFIGS
def test_packed_documents_do_not_meet(config):
    params, tokens = params_of(config), tokens_of(1, 14)
    segments = jnp.array([[1] * 8 + [2] * 6])
    positions = jnp.array([[*range(8), *range(6)]])
    packed = apply(params, config, tokens, segments_BT=segments, positions_BT=positions)
    first, second = apply(params, config, tokens[:, :8]), apply(params, config, tokens[:, 8:])
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], 1), atol=1e-5)


@CONFIGS
@pytest.mark.parametrize(("layers", "how"), [(1, {"parallel": True}), (3, {"remat": "full"})])
def test_hidden_states_at_some_positions(config, layers, how):
    """Hidden states and gradients equal those of a pass that returns all positions."""
    config = dataclasses.replace(config, layers=layers, windowed=config.windowed[-layers:], **how)
    unrolled = dataclasses.replace(config, unroll=layers)
    params, tokens = params_of(config), tokens_of(2, 12)
    packed = {  # prompts with a response or two, and padding
        "mask_BT": jnp.array([[True] * 12, [True] * 9 + [False] * 3]),
        "segments_BT": jnp.array([[1] * 3 + [2] * 4 + [3] * 5, [1] * 4 + [2] * 8]),
        "parents_BT": jnp.array([[1] * 7 + [3] * 5, [1] * 12]),
        "positions_BT": jnp.array([[*range(7), *range(5)], [*range(12)]]),
    }
    weights = jnp.array(np.random.default_rng(1).normal(size=(2, 4, config.width)))

    def run(config, at, pick):
        def weighted(params):
            hidden = pick(models.apply(params, config, tokens, at=at, **packed))
            return jnp.sum(hidden * weights), hidden

        compiled = jax.jit(jax.value_and_grad(weighted, has_aux=True)).lower(params).compile()
        (_, hidden), grads = compiled(params)
        return hidden, grads, compiled.cost_analysis()["flops"]

    some, same = np.array([[2, 11, 6, 6], [0, 8, 3, 5]]), np.tile(np.arange(5, 9), (2, 1))
    for at, columns in ((jnp.array(some), some), (slice(5, 9), same)):
        picked = lambda x, columns=columns: x[np.arange(2)[:, None], columns]  # noqa: E731
        want, want_grads, of_all = run(unrolled, None, picked)
        for each in (config, unrolled):
            got, got_grads, flops = run(each, at, lambda x: x)
            np.testing.assert_allclose(got, want, atol=1e-5)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got_grads, want_grads
            )
        assert flops < (1 - 0.3 / layers) * of_all  # the last layer's, of 4 queries and not 12


@CONFIGS
def test_a_shared_prompt_changes_nothing(config):
    """K responses packed behind one prompt: hidden states and gradients as if each stood alone."""
    params, B, K, P, R = params_of(config), 2, 3, 7, 5
    rng = np.random.default_rng(0)
    prompt, responses = rng.integers(0, 131, (B, P)), rng.integers(0, 131, (B, K, R))
    prompt_mask = np.arange(P) >= np.array([[0], [3]])
    response_mask = np.arange(R) < np.array([[5, 2, 3], [1, 4, 0]])[..., None]
    weights = jnp.array(rng.normal(size=(B, K, R, config.width)) * response_mask[..., None])

    def shared(params):
        _, hidden = models.apply_shared(
            params, config, prompt, jnp.array(prompt_mask), responses, jnp.array(response_mask)
        )
        return jnp.sum(hidden * weights), hidden

    def alone(params):
        each = lambda x: np.repeat(x[:, None], K, 1)  # noqa: E731
        tokens = np.concatenate([each(prompt), responses], -1).reshape(B * K, P + R)
        live = np.concatenate([each(prompt_mask), response_mask], -1).reshape(B * K, P + R)
        hidden = models.apply(params, config, tokens, mask_BT=jnp.array(live))
        hidden = hidden[:, P:].reshape(B, K, R, -1)
        return jnp.sum(hidden * weights), hidden

    (got, got_hidden), got_grads = jax.jit(jax.value_and_grad(shared, has_aux=True))(params)
    (want, want_hidden), want_grads = jax.jit(jax.value_and_grad(alone, has_aux=True))(params)
    assert np.abs(got_hidden - want_hidden)[response_mask].max() < 1e-5
    assert abs(got - want) < 1e-4
    scale = max(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(want_grads))
    close = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) < 1e-5 * scale, got_grads, want_grads)
    assert all(jax.tree.leaves(close))


def test_rope_frequencies_by_hand():
    # theta^(-2i/8) for theta = 10^4: 1, 0.1, 0.01, 0.001; half of each head rotated: 1, 0.01
    np.testing.assert_allclose(
        models.attention.rope_frequencies(Rope(), 8), [1, 0.1, 0.01, 0.001], rtol=1e-6
    )
    np.testing.assert_allclose(
        models.attention.rope_frequencies(Rope(fraction=0.5), 8), [1, 0.01], rtol=1e-6
    )
    # llama3, original context 400 pi: turns are 200, 20, 2, 0.2. From 4 turns kept; under 1
    # stretched by 8; at 2, a third of the way: 1/3 + 2/3 / 8 = 5/12.
    llama3 = Rope(kind="llama3", factor=8.0, original_length=400 * np.pi)
    np.testing.assert_allclose(
        models.attention.rope_frequencies(llama3, 8), [1, 0.1, 0.01 * 5 / 12, 0.001 / 8], rtol=1e-5
    )
    # yarn, the same context: pair i turns 200 / 10^i times, so 20 and 0.2 turns are those of pairs
    # 1 and 3. Pair 2 lies between them: 1/2 + 1/2 / 8. 10 and 0.3 turns are rounded to 1 and 3.
    for limits in (
        {"beta_fast": 20, "beta_slow": 0.2, "truncate": False},
        {"beta_fast": 10, "beta_slow": 0.3},
    ):
        yarn = Rope(kind="yarn", factor=8.0, original_length=400 * np.pi, **limits)
        np.testing.assert_allclose(
            models.attention.rope_frequencies(yarn, 8),
            [1, 0.1, 0.01 * 9 / 16, 0.001 / 8],
            rtol=1e-5,
        )


def test_rope_frequencies_of_a_length_by_hand():
    # dynamic, 2.5 times the original context: theta times (2 * 2.5 - 1)^(8/6)
    dynamic = Rope(kind="dynamic", factor=2.0, original_length=100)
    longrope = Rope(
        kind="longrope", original_length=100, short_factor=(1, 1, 2, 2), long_factor=(4,) * 4
    )
    plain = np.array([1, 0.1, 0.01, 0.001])
    for rope, length, divisors in [
        (dynamic, 100, 1),
        (dynamic, 250, 4 ** (np.arange(4) / 3)),
        (longrope, 100, [1, 1, 2, 2]),
        (longrope, 101, 4),
    ]:
        got = models.attention.rope_frequencies(rope, 8, length)
        np.testing.assert_allclose(got, plain / divisors, rtol=1e-5)
    cos, sin = models.attention.rotation(
        Rope(kind="yarn", attention_factor=1.5), 8, jnp.array([[7]]), 100
    )
    np.testing.assert_allclose(cos**2 + sin**2, 1.5**2, rtol=1e-5)


# ---------------------------------------------------------------------------- the cache


@CONFIGS
@pytest.mark.parametrize("stacked", [False, True], ids=["unstacked", "stacked"])
def test_greedy_decoding_through_the_cache(config, stacked):
    """Token for token the same as decoding without one, from prompts padded on the left."""
    params, steps = params_of(config), 10
    prompt, mask = tokens_of(3, 6), jnp.array(np.arange(6)[None] >= np.array([[0], [2], [5]]))
    pick = jax.jit(lambda p, h: models.token_logits(h, models.unembedding(p), config)[:, -1])

    tokens = jnp.pad(prompt, ((0, 0), (0, steps)))  # one shape for all steps; what is to come
    live = jnp.pad(mask, ((0, 0), (0, steps)))  # is not yet live
    for t in range(6, 6 + steps):
        best = jnp.argmax(logits(params, config, tokens, live)[:, t - 1], -1)
        tokens, live = tokens.at[:, t].set(best), live.at[:, t].set(True)

    weights = params if stacked else models.unstack(params, config)
    cache = models.Cache.create(config, batch=3, columns=6 + steps, stacked=stacked)
    hidden, cache = extend(weights, config, cache, prompt, mask, column=0)
    cached = []
    for column in range(6, 6 + steps):
        cached.append(jnp.argmax(pick(params, hidden), -1))
        hidden, cache = extend(weights, config, cache, cached[-1][:, None], column=column)
    np.testing.assert_array_equal(jnp.stack(cached, 1), tokens[:, 6:])
    assert len({tuple(row) for row in np.asarray(tokens[:, 6:])}) == 3  # the prompts matter


def test_weights_and_cache_are_both_stacked_or_neither():
    cache = models.Cache.create(GPT2, batch=2, columns=3)
    with pytest.raises(ValueError, match="both be stacked, or neither"):
        models.extend(params_of(GPT2), GPT2, cache, tokens_of(2, 3), column=0)


@CONFIGS
def test_what_a_column_held_is_overwritten(config):
    """With stacked weights as without them; nothing there is seen any more."""
    params = params_of(config)
    hidden = []
    for weights in (params, models.unstack(params, config)):
        stacked = weights is params
        cache = models.Cache.create(config, batch=3, columns=6, stacked=stacked)
        _, cache = extend(weights, config, cache, tokens_of(3, 6), column=0)
        hidden.append(extend(weights, config, cache, tokens_of(3, 2), column=3)[0])
    np.testing.assert_allclose(*hidden, atol=2e-5)


# ---------------------------------------------------------------------------- heads


def plain_logp(hidden, unembed, targets, config, temperature=1.0):
    """NumPy, a token at a time, in float64: (log-probability, entropy) of each."""
    hidden, unembed = np.asarray(hidden, np.float64), np.asarray(unembed, np.float64)
    logp, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for b, t in np.ndindex(*targets.shape):
        z = unembed[: config.vocab_size] @ hidden[b, t]
        if config.final_softcap:
            z = config.final_softcap * np.tanh(z / config.final_softcap)
        p = np.exp(z / temperature - np.max(z / temperature))
        p /= p.sum()
        logp[b, t] = np.log(p[targets[b, t]])
        entropy[b, t] = -sum(q * np.log(q) for q in p if q > 0)
    return logp, entropy


@pytest.mark.parametrize("config", [GPT2, GEMMA3], ids=lambda c: c.family)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [3, 64])
def test_token_logp_against_a_loop(config, temperature, chunk):
    params, tokens = params_of(config), tokens_of(2, 8)
    hidden, unembed = apply(params, config, tokens), models.unembedding(params)
    got = models.token_logp(
        hidden, unembed, tokens, config, temperature=temperature, entropy=True, chunk=chunk
    )
    want = plain_logp(hidden, unembed, np.asarray(tokens), config, temperature)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    np.testing.assert_allclose(got[1], want[1], atol=2e-5)


@pytest.mark.parametrize("config", [GPT2, GEMMA3], ids=lambda c: c.family)
def test_greedy_targets(config):
    """Among the real vocabulary, whose table is padded with zeros."""
    params, tokens = params_of(config), tokens_of(2, 8)
    hidden, unembed = apply(params, config, tokens), models.unembedding(params)
    likeliest = jnp.argmax(logits(params, config, tokens), axis=-1)
    targets = jnp.where(jnp.arange(8) % 3 > 0, likeliest, (likeliest + 1) % config.vocab_size)
    logp, entropy, greedy = models.token_logp(
        hidden, unembed, targets, config, entropy=True, greedy=True, chunk=3
    )
    np.testing.assert_array_equal(greedy, targets == likeliest)
    want = models.token_logp(hidden, unembed, targets, config, entropy=True)
    np.testing.assert_allclose(logp, want[0], atol=1e-5)
    np.testing.assert_allclose(entropy, want[1], atol=1e-5)


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("config", [GPT2, GEMMA3], ids=lambda c: c.family)
def test_gradients_without_logits(config):
    """Both routes give the gradient through the plain logits."""
    params, tokens = params_of(config), tokens_of(2, 11)
    hidden, unembed = apply(params, config, tokens), models.unembedding(params)
    weights = jnp.array(np.random.default_rng(1).random((2, 11)) * (np.arange(11) > 2))

    def plain(h, w, weights):
        nll = losses.token_cross_entropy(models.token_logits(h, w, config), tokens)
        return jnp.sum(nll * weights)

    def recomputed(h, w, weights):
        return -jnp.sum(models.token_logp(h, w, tokens, config, chunk=4) * weights)

    def fused(h, w, weights):
        return models.cross_entropy(h, w, tokens, weights, config, 4)

    want, want_grads = jax.value_and_grad(plain, (0, 1, 2))(hidden, unembed, weights)
    for route in (recomputed, fused):
        got, grads = jax.value_and_grad(route, (0, 1, 2))(hidden, unembed, weights)
        assert abs(got - want) < 1e-5 * abs(want)
        for a, b in zip(grads, want_grads, strict=True):
            assert relative(a, b) < 1e-5
        assert (grads[0][weights == 0] == 0).all()  # a token that does not count
        assert (grads[1][config.vocab_size :] == 0).all()  # a row that is padding


def test_memory_of_the_loss():
    """Under a quarter of the plain version's at GPT-2's vocabulary, with equal gradients."""
    config = dataclasses.replace(GPT2, vocab_size=50257)
    B, T, D = 4, 512, 256
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(B, T, D)), jnp.float32)
    unembed = jnp.array(rng.normal(size=(config.padded_vocab_size, D)) * 0.1, jnp.float32)
    targets, weights = tokens_of(B, T, 50257), jnp.ones((B, T))

    def plain(h, w):
        return jnp.sum(losses.token_cross_entropy(models.token_logits(h, w, config), targets))

    def recomputed(h, w):
        return -jnp.sum(models.token_logp(h, w, targets, config))

    def fused(h, w):
        return models.cross_entropy(h, w, targets, weights, config)

    def run(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembed).compile()
        return program.memory_analysis().temp_size_in_bytes, *program(hidden, unembed)

    whole, want, want_grads = run(plain)
    assert whole > 4 * B * T * 50257  # the plain one does hold the logits
    for loss in (recomputed, fused):
        size, got, grads = run(loss)
        assert size < whole / 4, (size, whole)
        assert abs(got - want) < 1e-5 * abs(want)
        for a, b in zip(grads, want_grads, strict=True):
            assert relative(a, b) < 1e-5


def test_token_cross_entropy_by_hand():
    # softmax(0, ln 3) = (1/4, 3/4)
    nll = losses.token_cross_entropy(jnp.array([[[0.0, np.log(3.0)]] * 2]), jnp.array([[0, 1]]))
    np.testing.assert_allclose(nll, [[np.log(4), np.log(4 / 3)]], rtol=1e-6)


def test_scalar_head():
    config, params = models.with_scalar_head(params_of(MISTRAL), MISTRAL, jax.random.key(0))
    assert "unembed" not in params
    hidden = apply(params, config, tokens_of(2, 5))
    params["score"]["bias"] = jnp.float32(3.0)
    got = models.scalars(params, config, hidden)
    want = np.einsum("btd,d->bt", hidden, params["score"]["kernel"]) + 3
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Initialised with standard deviation 1 / sqrt(d + 1) and no bias.
    wide = dataclasses.replace(MISTRAL, width=4095, heads=1, kv_heads=1)
    _, drawn = models.with_scalar_head({}, wide, jax.random.key(0))
    assert abs(float(jnp.std(drawn["score"]["kernel"])) * 64 - 1) < 0.05
    assert drawn["score"]["bias"] == 0
    # No accelerator may round a reward to bfloat16.
    program = str(jax.make_jaxpr(lambda h: models.scalars(params, config, h))(hidden))
    assert program.count("dot_general") == program.count("Precision.HIGHEST, Precision.HIGHEST")
    with pytest.raises(ValueError, match="scalar head"):
        models.scalars(params, MISTRAL, hidden)
    with pytest.raises(ValueError, match="scalar head has no logits"):
        models.logits(params, config, tokens_of(2, 5))


# ---------------------------------------------------------------------------- how it is computed


def loss_of(params, config, tokens, key=None):
    hidden = models.apply(params, config, tokens, key=key)[:, :-1]
    unembed, weights = models.unembedding(params), jnp.ones(tokens[:, 1:].shape)
    return models.cross_entropy(hidden, unembed, tokens[:, 1:], weights, config)


def test_unrolling_changes_nothing():
    tokens = tokens_of(2, 9)
    grad = jax.jit(jax.grad(loss_of), static_argnums=1)
    plain = grad(params_of(GEMMA3), GEMMA3, tokens)
    again = grad(params_of(GEMMA3), dataclasses.replace(GEMMA3, unroll=3), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, plain)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_alone(remat):
    tokens = tokens_of(2, 9)
    grad = jax.jit(jax.grad(loss_of), static_argnums=1)
    plain = grad(params_of(GEMMA3), GEMMA3, tokens)
    again = grad(params_of(GEMMA3), dataclasses.replace(GEMMA3, remat=remat), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, plain)

    def temporaries(remat):
        config = dataclasses.replace(GPT2, layers=8, remat=remat)
        shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
        program = grad.lower(shapes, config, jax.ShapeDtypeStruct((8, 64), jnp.int32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(remat) < temporaries("none")


def test_dropout_needs_a_key():
    config = dataclasses.replace(GPT2, dropout=0.2)
    params, tokens = params_of(config), tokens_of(2, 9)
    off = apply(params, config, tokens)
    np.testing.assert_array_equal(off, apply(params, GPT2, tokens))
    on = [apply(params, config, tokens, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(on[0], on[1])
    assert (on[0] != off).any()
    assert (on[0] != on[2]).any()


def test_dropout_keeps_the_mean_of_what_a_sublayer_adds():
    """Over many keys, the residual after one layer averages to that without dropout."""
    config = dataclasses.replace(GPT2, layers=1, dropout=0.2)
    params = jax.tree.map(lambda leaf: leaf[0], params_of(GPT2)["layers"])
    layer = models.layer.Layer(config)
    x = jnp.zeros((1, 1, config.width))

    def run(key):
        passed = {"mix": lambda q, k, v: (v, None), "shard": models.unsharded}
        # The MLP's own branch is silenced: what it adds is not linear in the attention's.
        silent = {**params, "mlp": jax.tree.map(jnp.zeros_like, params["mlp"])}
        return layer.apply({"params": silent}, x, None, key, **passed)[0]

    keys = jax.random.split(jax.random.key(0), 4000)
    many, plain = jax.jit(jax.vmap(run))(keys), run(None)
    np.testing.assert_allclose(many.mean(0), plain, atol=0.02)
    dropped = float(jnp.mean(many == 0))
    assert abs(dropped - 0.2) < 0.02


def test_dropout_differs_by_layer_and_branch():
    """With every residual value distinct, what is dropped in one place is not in another."""
    config = dataclasses.replace(GPT2, dropout=0.5, layers=2, width=64)
    ones = {"mix": lambda q, k, v: (v, None), "shard": models.unsharded}
    params = models.init(config, jax.random.key(0))
    first = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    # Biases alone: attention adds 1 everywhere, the MLP 10.
    first = jax.tree.map(jnp.zeros_like, first)
    first["attention"]["out"]["bias"] += 1
    first["mlp"]["down"]["bias"] += 10
    layer, x = models.layer.Layer(config), jnp.zeros((1, 1, 64))
    run = lambda key: layer.apply({"params": first}, x, None, key, **ones)[0]  # noqa: E731
    values = set(np.asarray(run(jax.random.key(0))).ravel().tolist())
    assert values == {0.0, 2.0, 20.0, 22.0}  # the two masks are independent

    # The same layer twice under the scan: were the keys equal, only 0, 4, 40 and 44 could be.
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), first)
    silent = {"embed": jax.tree.map(jnp.zeros_like, params["embed"]), "layers": both}
    norm = {"scale": jnp.ones(64), "bias": jnp.zeros(64)}
    hidden = models.apply(
        {**silent, "final_norm": norm}, config, jnp.zeros((1, 1), int), key=jax.random.key(0)
    )
    assert len(np.unique(np.asarray(hidden).round(4))) > 4


def test_positions_beyond_the_table_are_refused():
    params = params_of(GPT2)
    with pytest.raises(ValueError, match="65 positions in a model of max_length 64"):
        models.logits(params, GPT2, tokens_of(1, 65))
    with pytest.raises(ValueError, match="65 positions"):
        models.Cache.create(GPT2, 1, 65)
    models.logits(params_of(MISTRAL), MISTRAL, tokens_of(1, 65))  # rotary ones have no table


def test_bfloat16_computes_logits_in_float32():
    config = dataclasses.replace(GPT2, dtype="bfloat16")
    params, tokens = params_of(config), tokens_of(2, 9)
    hidden = apply(params, config, tokens)
    assert hidden.dtype == jnp.bfloat16
    logp = models.token_logp(hidden, models.unembedding(params), tokens, config)
    assert logp.dtype == jnp.float32
    exact = models.token_logp(apply(params, GPT2, tokens), models.unembedding(params), tokens, GPT2)
    assert 0 < np.abs(logp - exact).max() < 0.5


def test_gemma_scales_its_embedding_in_the_compute_dtype():
    """As transformers does: by sqrt(24) = 4.89898 rounded to bfloat16, 4.90625."""
    config = dataclasses.replace(GEMMA3, dtype="bfloat16")
    params, tokens = params_of(config), tokens_of(2, 9)
    rounded = params["embed"]["tokens"].astype("bfloat16").astype("float32")
    scaled = {**params, "embed": {"tokens": (rounded * 4.90625).astype("bfloat16")}}
    unscaled = dataclasses.replace(config, scale_embedding=False)
    want = apply(scaled, unscaled, tokens)
    np.testing.assert_array_equal(apply(params, config, tokens), want)


# ---------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("name", "parameters"),
    # 12 L D^2 + 13 L D for the layers, 2 D for the final norm, (V + 2048) D for the tables.
    [
        ("gpt3-1.3b", 12 * 24 * 2048**2 + 13 * 24 * 2048 + 2 * 2048 + (50304 + 2048) * 2048),
        ("gpt3-6b", 12 * 32 * 4096**2 + 13 * 32 * 4096 + 2 * 4096 + (50304 + 2048) * 4096),
        ("gpt3-175b", 12 * 96 * 12288**2 + 13 * 96 * 12288 + 2 * 12288 + 52352 * 12288),
    ],
)
def test_sizes_of_the_papers_models(name, parameters):
    config = models.PRESETS[name]
    shapes = jax.eval_shape(lambda key: models.init(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_config_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="not a multiple of 5 heads"):
        ModelConfig(**{**SMALL, "heads": 5})
    with pytest.raises(ValueError, match="kv_heads"):
        ModelConfig(**SMALL, kv_heads=3)
    with pytest.raises(ValueError, match="2 entries for 3 layers"):
        ModelConfig(**SMALL, windowed=(True, False), window=4)
    with pytest.raises(ValueError, match="need a window"):
        ModelConfig(**SMALL, windowed=(True,) * 3)
    rope = Rope(kind="longrope", short_factor=(1.0, 1.0), long_factor=(1.0,) * 3)
    with pytest.raises(ValueError, match=r"\(2, 3\) short and long factors for 3 pairs"):
        ModelConfig(**SMALL, rope=rope)


def test_cast_keeps_norms_and_the_scalar_head():
    config = dataclasses.replace(GEMMA3, qkv_bias=True, out_bias=True, mlp_bias=True)
    _, params = models.with_scalar_head(params_of(config), config, jax.random.key(0))
    cast = models.cast(params, "bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        name = jax.tree_util.keystr(path)
        kept = "_norm'" in name or "'score'" in name
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name
