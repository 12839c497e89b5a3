"""Sampling: noise, log-probabilities, statistics, continuous batching, compiled programs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from instructjax import models, sampler, sharding
from instructjax.models import ModelConfig, Rope
from instructjax.sampler import decode, draw, sample

CONFIG = ModelConfig(
    vocab_size=40, layers=2, width=16, heads=2, mlp_width=32, max_length=128, eos_ids=(3,)
)
ROTARY = dataclasses.replace(CONFIG, positions="rotary", kv_heads=1, norm="rms", gated=True)
WINDOWS = dataclasses.replace(
    ROTARY, window=5, windowed=(True, False), local_rope=Rope(theta=100.0), tied=False
)
FAMILIES = {"learned": CONFIG, "rotary": ROTARY, "windows": WINDOWS}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
R = 24


@functools.cache
def params(config=CONFIG):
    return jax.tree.map(lambda x: x * 4, models.init(config, jax.random.key(0)))


def generate(prompts=PROMPTS, seed=0, config=CONFIG, **changes):
    changes = {"max_new_tokens": R, **changes}
    return sampler.generate(params(config), config, prompts, jax.random.key(seed), **changes)


def many(n=40, vocab=40):
    """Prompts of 1 to 8 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, rng.integers(1, 9)).tolist() for _ in range(n)]


@functools.cache
def logits_of(config):
    return jax.jit(lambda tokens: models.logits(params(config), config, tokens))


def assert_drawn(prompts, rollout, config=CONFIG, samples=1):
    """Each token is the argmax of logits + noise in a pass without a cache, with no near tie."""
    responses = rollout.responses()
    whole = [[*prompts[row // samples], *response] for row, response in enumerate(responses)]
    width = max(map(len, prompts)) + R
    z = np.asarray(logits_of(config)(jnp.array([x + [0] * (width - len(x)) for x in whole])))
    row, r = (x.ravel() for x in np.indices((len(whole), R)))
    noise = draw.noise(jax.random.key(0), row // samples, row % samples, r, 40, 40)
    noise, nearest = np.asarray(noise).reshape(-1, R, 40), np.inf
    for i, response in enumerate(responses):
        n = len(response)
        perturbed = z[i, len(whole[i]) - n - 1 :][:n] + noise[i, :n]
        assert perturbed.argmax(-1).tolist() == response
        best = np.sort(perturbed, axis=-1)
        nearest = min(nearest, (best[:, -1] - best[:, -2]).min())
    assert nearest > 1e-4  # so that reordered sums cannot change a token


# ---------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.7}, {"top_p": 0.9, "top_k": 30, "min_new_tokens": 3}], ids=str
)
def test_log_probabilities_equal_a_second_pass(changes):
    """They are of the whole distribution at the sampling temperature, also where it is cut."""
    prompts = many()
    rollout = generate(prompts, **changes)
    responses, logp = rollout.responses(), np.asarray(rollout.logp_BR)
    # A sampled pad is a token like any other and shifts no later token.
    assert sum(0 in response[:-1] for response in responses) > 5
    tokens, live = np.zeros((40, 8 + R), np.int32), np.zeros((40, 8 + R), bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[i, 8 - len(prompt) : 8 + len(response)] = prompt + response
        live[i, 8 - len(prompt) : 8 + len(response)] = True
    hidden = models.apply(params(), CONFIG, tokens, mask_BT=jnp.array(live))[:, 7:-1]
    again = models.token_logp(
        hidden, models.unembedding(params()), tokens[:, 8:], CONFIG,
        temperature=changes.get("temperature", 1.0),
    )  # fmt: skip
    mask = np.asarray(rollout.mask_BR)
    np.testing.assert_allclose(logp[mask], np.asarray(again)[mask], atol=5e-5)
    assert (logp[~mask] == 0).all()
    assert (np.asarray(rollout.tokens_BR)[~mask] == 0).all()


# ---------------------------------------------------------------------------- the end


def test_a_response_ends_with_its_eos():
    rollout = generate(many())
    mask, tokens = np.asarray(rollout.mask_BR), np.asarray(rollout.tokens_BR)
    lengths = mask.sum(-1)
    assert (mask == (np.arange(R) < lengths[:, None])).all()
    ended = 0
    for row, n in zip(tokens, lengths, strict=True):
        assert 3 not in row[: n - 1]
        ended += row[n - 1] == 3
        assert row[n - 1] == 3 or n == R
    assert ended > 3
    assert len(set(lengths.tolist())) > 3


def test_several_eos_and_a_least_length():
    """Each EOS ends a response, but not before min_new_tokens; other tokens stay the same."""
    prompts, ends = many(), {3, *range(20, 40)}
    free = generate(prompts, eos_ids=tuple(ends)).responses()
    late = generate(prompts, eos_ids=tuple(ends), min_new_tokens=4).responses()
    assert len({row[-1] for row in free if len(row) < R}) > 5
    for a, b in zip(free, late, strict=True):
        assert not ends & set(a[:-1])
        assert not ends & set(b[:3])
        assert len(b) >= 4
        same = min(len(a) - 1, 3)
        assert a[:same] == b[:same]
        if len(a) > 4:
            assert a == b
    assert min(map(len, free)) == 1


# ---------------------------------------------------------------------------- noise


def test_noise_belongs_to_the_prompt():
    """Order, batch and bucket change no token; another key or another index does."""
    rollout = generate()
    assert_drawn(PROMPTS, rollout)
    whole = rollout.responses()
    order = [2, 0, 3, 1]
    moved = generate([PROMPTS[i] for i in order], indices=order).responses()
    assert moved == [whole[i] for i in order]
    assert generate([PROMPTS[2]], indices=[2]).responses() == [whole[2]]
    assert generate(widths=(4, 7, 96)).responses() == whole
    assert generate(seed=1).responses() != whole
    first, other = generate([PROMPTS[0]] * 2, indices=[0, 7]).responses()
    assert first == whole[0] != other


def test_samples_of_a_prompt():
    """Samples differ, and the first equals the only sample of another call."""
    rollout = generate(samples_per_prompt=3)
    assert_drawn(PROMPTS, rollout, samples=3)
    responses = rollout.responses()
    assert responses[::3] == generate().responses()
    assert all(len({tuple(row) for row in responses[i : i + 3]}) == 3 for i in range(0, 12, 3))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 12, "top_p": 0.8}],
    ids=str,
)
def test_frequencies(changes):
    """20,000 first tokens against the model's own probabilities, by a chi-square test."""
    prompt, endless = [5, 6, 7], dataclasses.replace(CONFIG, eos_ids=())
    rollout = sampler.generate(
        params(), endless, [prompt], jax.random.key(0), max_new_tokens=1, samples_per_prompt=20000,
        **changes,
    )  # fmt: skip
    counts = np.bincount(np.asarray(rollout.tokens_BR)[:, 0], minlength=40)
    z = np.asarray(models.logits(params(), CONFIG, jnp.array([prompt]))[0, -1], np.float64)
    p = np.exp(z / changes.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    if "top_k" in changes:
        p[order[changes["top_k"] :]] = 0
        p /= p.sum()
    if "top_p" in changes:
        kept = np.searchsorted(np.cumsum(p[order]), changes["top_p"]) + 1
        p[order[kept:]] = 0
        p /= p.sum()
    assert (counts[p == 0] == 0).all()
    often = p * 20000 >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * 20000
    used = expected > 0
    assert used.sum() > 3
    assert stats.chisquare(observed[used], expected[used]).pvalue > 0.001


def test_an_unfinished_vocabulary_is_never_sampled():
    """Rows of the padded table (40 of 128 are real) have no probability."""
    hot = {"temperature": 50.0, "max_new_tokens": 8}
    narrow = generate([[5]] * 64, **hot)
    assert np.asarray(narrow.tokens_BR).max() < 40
    wide = dataclasses.replace(CONFIG, vocab_size=128)
    other = sampler.generate(params(), wide, [[5]] * 8, jax.random.key(0), **hot)
    assert np.asarray(other.tokens_BR).max() >= 40


# ---------------------------------------------------------------------------- continuous batching


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_changes_no_token(family):
    """Fewer slots than rows, on one device and on eight, against as many slots as rows."""
    config = dataclasses.replace(FAMILIES[family], eos_ids=(3, 4, 5, 6, 7))
    prompts, key = many(35), jax.random.key(0)
    sample = functools.partial(
        sampler.generate, config=config, prompts=prompts, key=key, max_new_tokens=R,
        samples_per_prompt=2,
    )  # fmt: skip
    plain = sample(params(config), slots=70)
    assert_drawn(prompts, plain, config, samples=2)
    lengths = np.asarray(plain.mask_BR).sum(-1)
    assert lengths.min() < 3
    assert lengths.max() > 14
    meshes = {
        "learned": [{"data": 2, "fsdp": 2, "tensor": 2}],
        "rotary": [],  # its one key/value head cannot be split
        "windows": [{"data": 8, "fsdp": 1}],
    }
    for axes, slots in [(None, 18), *((axes, 8) for axes in meshes[family])]:
        mesh, placed = None, params(config)
        if axes is not None:
            mesh = sharding.make_mesh(**axes)
            layout = sharding.shardings(models.logical_axes(config), placed, mesh)
            placed = jax.device_put(placed, layout)
        got = sample(placed, slots=slots, mesh=mesh)
        assert got.responses() == plain.responses(), axes
        np.testing.assert_allclose(got.logp_BR, plain.logp_BR, atol=5e-5)


@pytest.mark.parametrize(("family", "axes"), [("windows", (1, 4, 1)), ("learned", (1, 2, 2))])
def test_stacked_weights_give_the_same_tokens(family, axes, monkeypatch):
    """As on TPUs: one layer scanned, in prefill, decoding, refills and the last few slots."""
    config = dataclasses.replace(FAMILIES[family], max_length=127)  # no program of another test
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[:4])
    layout = sharding.shardings(models.logical_axes(config), params(config), mesh)
    placed, prompts = jax.device_put(params(config), layout), many(72)
    plain = generate(prompts, config=config)
    as_on_tpu = functools.partial(sharding.Constrainer, fused=True)
    monkeypatch.setattr(sharding, "constrainer", lambda mesh, rules=None: as_on_tpu(mesh, rules))
    laid_out = []
    extend = decode.models.extend

    def extend_and_look(weights, *args, **named):
        laid_out.append(isinstance(weights["layers"], dict))
        return extend(weights, *args, **named)

    monkeypatch.setattr(decode.models, "extend", extend_and_look)
    key = jax.random.key(0)
    got = sampler.generate(placed, config, prompts, key, max_new_tokens=R, slots=64, mesh=mesh)
    assert laid_out
    assert all(laid_out)
    assert got.responses() == plain.responses()
    np.testing.assert_allclose(got.logp_BR, plain.logp_BR, atol=5e-5)


def schedule(lengths, slots, sizes):
    """The share of live slots by a plain simulation."""
    left, queue, spent, size = [0] * slots, list(lengths), 0, slots
    while True:
        for i, n in enumerate(left):
            if n == 0 and queue:
                left[i] = queue.pop(0)
        live = sum(n > 0 for n in left)
        while not queue and sizes and live <= sizes[0]:
            size = sizes.pop(0)
        if not live:
            return sum(lengths) / spent
        spent += size
        left = [max(n - 1, 0) for n in left]


def test_the_share_of_live_slots():
    """At least 0.8 by default, where the mean length is a quarter of the longest allowed."""
    config = dataclasses.replace(CONFIG, layers=1, eos_ids=(3, 4, 5, 6))
    # Every token is as likely: an EOS is 1 in 10.
    level = jax.tree.map(jnp.zeros_like, models.init(config, jax.random.key(0)))
    sample = functools.partial(
        sampler.generate, level, config, [[5]] * 128, jax.random.key(0), max_new_tokens=36
    )
    rollout = sample()
    lengths = np.asarray(rollout.mask_BR).sum(-1).tolist()
    assert 8 < np.mean(lengths) < 10
    assert rollout.live_fraction == pytest.approx(schedule(lengths, 32, [16, 8]))
    assert rollout.live_fraction > 0.8
    plain = sample(slots=128)
    assert plain.live_fraction == pytest.approx(schedule(lengths, 128, [64, 32]))
    assert plain.responses() == rollout.responses()
    endless = sampler.generate(
        level, dataclasses.replace(config, eos_ids=()), [[5]] * 9, jax.random.key(0),
        max_new_tokens=2,
    )  # fmt: skip
    assert endless.live_fraction == 1


# ---------------------------------------------------------------------------- programs


COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)")


def collectives(hlo):
    """Elements of the largest collective (inside loops, outside of them)."""
    bodies, calls, sizes, name = set(), {}, {}, ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%([\w.\-]+) \(", line):
            name = opened[1]
        bodies |= set(re.findall(r"(?:body|condition)=%([\w.\-]+)", line))
        calls.setdefault(name, set()).update(re.findall(r"=%([\w.\-]+)", line))
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\[([\d,]*)\]", match[1])
            size = max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)
            sizes[name] = max(sizes.get(name, 0), size)
    inside, new = set(), bodies
    while new:
        inside |= new
        new = {callee for name in new for callee in calls.get(name, ())} - inside
    within = max((size for name, size in sizes.items() if name in inside), default=0)
    return within, max((size for name, size in sizes.items() if name not in inside), default=0)


@pytest.mark.parametrize("axes", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_no_parameter_is_gathered_in_the_loop(axes):
    """Sharded weights are gathered before the loop; inside it only activations move."""
    mesh = sharding.make_mesh(*axes)
    config = dataclasses.replace(CONFIG, width=64, mlp_width=128, heads=4, vocab_size=512)
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    layout = sharding.shardings(models.logical_axes(config), shapes, mesh)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, layout
    )
    rows = sharding.batched(mesh)
    prompts = decode.PaddedPrompts(
        *(
            jax.ShapeDtypeStruct(shape, kind, sharding=rows)
            for shape, kind in (((32, 8), jnp.int32), ((32, 8), bool), ((32,), jnp.int32))
        )
    )
    program = sampler.generate_on_device.lower(
        *(placed, prompts, jax.random.key(0), draw.Distribution.create(1.0)),
        settings=sampler.Settings(config, R, eos_ids=(3,), slots=2),
        mesh=mesh,
    ).compile()
    within, before = collectives(program.as_text())
    smallest = 64 * 64 // axes[2]  # a query kernel's share
    assert before >= smallest
    # Prefill also runs in a loop, with 2 prompts of 8 tokens per turn: 1,024 activations.
    assert within <= (1024 if axes[2] > 1 else 0)


def test_weights_for_decoding():
    """In the compute dtype except norms; whole on each data shard, split over tensor."""
    mesh = sharding.make_mesh(2, 2, 2)
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    weights = jax.jit(sample.lay_out, static_argnums=(1, 2))(params(), config, mesh)
    query = weights["layers"][1]["attention"]["query"]["kernel"]
    assert query.dtype == jnp.bfloat16
    assert query.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    assert weights["layers"][0]["mlp_norm"]["scale"].dtype == jnp.float32
    assert len(weights["layers"]) == 2
    rollout = sampler.generate(
        params(), config, PROMPTS, jax.random.key(0), max_new_tokens=4, mesh=mesh
    )
    assert np.isfinite(rollout.logp_BR).all()


def test_one_program_for_all_prompts_of_a_bucket():
    generate([[5] * 3, [6]], widths=(8, 16))
    before = sampler.generate_on_device._cache_size()
    generate([[5] * 8, [6] * 2], seed=3, indices=[7, 9], widths=(8, 16))
    assert sampler.generate_on_device._cache_size() == before


def test_buckets():
    assert sampler.buckets([5, 17, 64, 3]) == (16, 32, 64)
    assert sampler.buckets([100], multiple=32) == (128,)
    # 90 short, 9 middle, 1 long: the widest is needed; then the width that saves the most.
    lengths = [10] * 90 + [50] * 9 + [200]
    assert sampler.buckets(lengths, most=1) == (208,)
    assert sampler.buckets(lengths, most=2) == (16, 208)
    assert sampler.buckets(lengths, most=3) == (16, 64, 208)
    # Responses of any length up to the longest allowed.
    for longest, most, widths in [
        (32, 2, (16, 32)),
        (32, 1, (32,)),
        (20, 2, (8, 20)),
        (6, 1, (6,)),
        (5, 4, (5,)),
        (1024, 4, (256, 512, 768, 1024)),
    ]:
        assert sampler.buckets(range(1, longest + 1), most, 8, longest=longest) == widths


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 6))
def test_buckets_of_all_lengths(longest, most):
    widths = sampler.buckets(range(1, longest + 1), most, 8, longest=longest)
    assert widths == tuple(sorted(set(widths)))
    assert widths[-1] == longest
    assert len(widths) <= most
    assert all(width % 8 == 0 for width in widths[:-1])


def test_other_numbers_need_no_other_program():
    generate(temperature=0.9, top_k=7, top_p=0.7)
    before = sampler.generate_on_device._cache_size()
    generate(temperature=1, top_k=9, top_p=0.8)
    generate(temperature=0, top_k=1, top_p=0.1)
    assert sampler.generate_on_device._cache_size() == before


def test_a_restriction_that_is_off_has_no_work():
    """Training samples without restrictions, and its program has no loop that looks for one."""

    def loops(**numbers):
        rows = jax.ShapeDtypeStruct((4, 40), jnp.float32)
        distribution = draw.Distribution.create(1.0, **numbers)
        return str(jax.make_jaxpr(draw.draw)(rows, rows, distribution)).count("scan[")

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sample, "generate_on_device", lambda *args, **_: seen.append(args[3]) or 1 / 0
        )
        for changes in ({}, {"top_k": 5}, {"top_p": 0.9}):
            with pytest.raises(ZeroDivisionError):
                generate(**changes)
    assert [x.top_k is None for x in seen] == [True, False, True]
    assert [x.top_p is None for x in seen] == [True, True, False]
    assert [loops(), loops(top_k=5), loops(top_k=5, top_p=0.9)] == [0, 1, 2]


def test_temperature_0_takes_the_likeliest_token():
    """Its log-probabilities are those of temperature 1."""
    prompts = many()
    rollout = generate(prompts, temperature=0, top_p=0.5)
    responses = rollout.responses()
    width = max(map(len, prompts)) + R
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    z = np.asarray(logits_of(CONFIG)(jnp.array([x + [0] * (width - len(x)) for x in whole])))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        of_tokens = z[row, len(prompt) - 1 :][: len(response)]
        assert of_tokens.argmax(-1).tolist() == response
        logp = jax.nn.log_softmax(of_tokens)[np.arange(len(response)), np.array(response)]
        np.testing.assert_allclose(rollout.logp_BR[row, : len(response)], logp, atol=5e-5)
    assert generate(prompts, seed=1, temperature=0).responses() == responses
    greedy = {"max_new_tokens": R, "temperature": 0}
    streamed = sampler.stream(params(), CONFIG, prompts[0], jax.random.key(1), **greedy)
    assert list(streamed) == responses[0]


# ---------------------------------------------------------------------------- one after another


def test_streaming_gives_the_same_tokens():
    """Also where the prompt has several chunks."""
    for prompt, new in ((PROMPTS[0], R), (PROMPTS[1], 5), ([*range(4, 40)] * 3, 20)):
        for changes in ({"temperature": 0.9, "top_p": 0.9}, {"top_k": 3}):
            whole = generate([prompt], max_new_tokens=new, **changes).responses()[0]
            streamed = sampler.stream(
                params(), CONFIG, prompt, jax.random.key(0), max_new_tokens=new, **changes
            )
            assert list(streamed) == whole


@pytest.mark.parametrize("axes", [None, (2, 2, 2)], ids=str)
def test_a_conversation_compiles_two_programs(axes, caplog):
    """Whatever the lengths and settings: one for chunks of prompts and one for single tokens."""
    config = dataclasses.replace(CONFIG, max_length=126 + (axes is None))  # no other test's program
    mesh = None if axes is None else sharding.make_mesh(*axes)
    session = sampler.Session(params(config), config, context=1000, mesh=mesh)
    assert session.context == config.max_length
    ids, answers = [], []
    settings = [{}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 4}, {"top_p": 0.9}, {}]
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for turn, changes in enumerate(settings):
            ids += list(range(5, 10 + 2 * turn))
            key, new = jax.random.key(turn), 8 + turn
            answer = list(session.stream(ids, key, max_new_tokens=new, **changes))
            answers.append((list(ids), turn, {"max_new_tokens": new, **changes}, answer))
            ids += answer
    compiled = [record.getMessage() for record in caplog.records]
    assert len([text for text in compiled if text.startswith("Compiling jit(_run_and_draw)")]) == 2
    # The cache that the turns share changes no token.
    for prompt, seed, changes, answer in answers[::2]:
        assert generate([prompt], seed, config, widths=(112,), **changes).responses() == [answer]


def test_a_session_runs_only_what_is_new(monkeypatch):
    session = sampler.Session(params(), CONFIG, context=128)
    ran, run = [], session._run
    monkeypatch.setattr(
        session, "_run", lambda chunk, *args: ran.append(chunk) or run(chunk, *args)
    )

    def answer(prompt):
        ran.clear()
        tokens = list(session.stream(prompt, jax.random.key(0), max_new_tokens=4, temperature=0))
        assert tokens == list(
            sampler.stream(
                params(), CONFIG, prompt, jax.random.key(0), max_new_tokens=4, temperature=0
            )
        )
        return tokens

    first = answer([5, 6, 7, 8])
    assert ran[0] == [5, 6, 7, 8]
    answer([5, 6, 7, 8, *first, 9, 9])
    assert ran[0] == [first[-1], 9, 9]  # the last token was drawn, and has not run
    answer([5, 6, 9, 9])
    assert ran[0] == [9, 9]
    answer([5, 6])
    assert ran[0] == [6]  # its state gives the next token
    long = [*range(5, 40)] * 3
    answer(long[:90])
    answer(long)
    assert ran[0] == long[64:]  # the columns behind the first 90 are too few for a chunk
    # An interrupt may lose the cache, which each step donates.
    jax.tree.map(lambda x: x.delete(), session._cache)
    answer([5, 6, 7])
    assert ran[0] == [5, 6, 7]


def test_bad_arguments():
    for changes, message in [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"max_new_tokens": 127}, "do not fit the model's context of 128"),
        ({"temperature": -1.0}, "temperature and top_k must not be negative"),
        ({"top_k": -1}, "temperature and top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"min_new_tokens": 25}, "min_new_tokens must be in"),
        ({"slots": 0}, "slots at least 1"),
        ({"widths": (2, 4)}, r"5 tokens is wider than every width of \(2, 4\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(**changes)
    session = sampler.Session(params(), CONFIG, context=50)
    with pytest.raises(ValueError, match="do not fit the model's context of 50"):
        next(session.stream([5] * 40, jax.random.key(0), max_new_tokens=11))
    # The widest bucket is cut to what the context leaves.
    assert generate([[5] * 100], max_new_tokens=28).tokens_BR.shape == (1, 28)
