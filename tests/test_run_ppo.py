"""run_ppo.py from its command line to its run directory: toy sizes, eight emulated devices."""

import ast
import dataclasses
import gc
import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import ppo_config
import preflight_programs
import pytest
import run_ppo
import stopped

from instructjax import hf, miniature, models, ppo, rollout, sharding, state
from instructjax.data import sources
from instructjax.models import ModelConfig
from instructjax.run import process
from instructjax.scoring import RewardConfig

SMALL = {"demonstrations": 80, "comparisons": 60, "prompts": 40, "text": 200}
FEW = ["--batch_size", "16", "--ppo.minibatch", "8", "--ppo.buckets", "1", "--unroll", "1"]
FEW += ["--mesh", "data=4,fsdp=2", "--data.cache", "None", "--pretrain.cache", "None"]
FEW += ["--max_new_tokens", "6", "--eval_prompts", "8", "--final_prompts", "16"]
FEW += ["--eval_every", "2", "--ppo.warmup", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MINIATURE", SMALL)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> list[str]:
    """Flags that name a policy and a reward model of random weights."""
    out, tokenizer = tmp_path_factory.mktemp("models"), miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,), "pad_id": tokenizer.pad_token_id}
    config = ModelConfig(len(tokenizer), 2, 16, heads=2, mlp_width=32, max_length=96, **ids)
    params = models.init(config, jax.random.key(0))
    hf.save(out / "sft", config, params, tokenizer)
    config, params = models.with_scalar_head(params, config, jax.random.key(1))
    params["score"]["kernel"] = 10 * params["score"]["kernel"]
    params["score"]["bias"] = params["score"]["bias"] + 0.375
    hf.save(out / "rm", config, params, tokenizer)
    return ["--model", f"{out}/sft", "--reward", f"{out}/rm", *FEW]


def metrics_of(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """Three iterations, uninterrupted."""
    out = tmp_path_factory.mktemp("ppo") / "whole"
    run_ppo.cli([*start, "--out", str(out), "--steps", "3"])
    return out


def test_a_run_directory_is_complete_and_its_export_loads(whole):
    names = ["config.json", "metrics.jsonl", "samples.jsonl", "samples_after.jsonl"]
    names += ["results.json", "curves.png", "report.html", "export"]
    assert [name for name in names if not (whole / name).exists()] == []
    rows = {row["step"]: row for row in metrics_of(whole)}
    assert list(rows) == [0, 1, 2, 3]
    field = "objective/kl objective/score objective/reward objective/entropy policy/approx_kl"
    field += " policy/clip_fraction policy/ratio value/loss value/clip_fraction"
    field += " value/explained_variance ptx/loss rollout/length rollout/eos_fraction"
    field += " optim/learning_rate optim/grad_norm rollout/logp_mismatch"
    assert set(field.split()) <= set(rows[1])
    assert "validation/win_rate" in rows[0]
    assert "validation/win_rate" in rows[2]
    assert "validation/win_rate" not in rows[1]
    config, _ = hf.load(whole / "export")
    assert not config.scalar_head
    results = json.loads((whole / "results.json").read_text())
    names = {"SFT", "PPO, averaged weights", "PPO, last weights", "seconds", "evaluations"}
    assert set(results) == names
    assert [row["step"] for row in results["evaluations"]] == [0, 2, 3]
    assert results["evaluations"][1]["kl"] == rows[2]["validation/kl"]


def test_the_first_iteration_begins_at_the_reference(whole):
    """KL is the difference of two computations of one number; the ratio is that of two policies
    of which the second has made one small step."""
    first = metrics_of(whole)[1]
    assert abs(first["objective/kl"]) < 5e-5 * 6
    assert first["rollout/logp_mismatch"] < 5e-5
    assert first["objective/reward"] == pytest.approx(first["objective/score"], abs=1e-5)
    assert first["policy/ratio"] == pytest.approx(1, abs=0.05)
    episodes = json.loads((whole / "config.json").read_text())["config"]["batch_size"]
    prompts = first["rollout/tokens"] - episodes * first["rollout/length"]
    assert 3 * episodes < prompts < 60 * episodes
    later = metrics_of(whole)[3]
    assert later["objective/kl_k3"] > 1e-7  # and it does move
    assert first["objective/score"] != later["objective/score"]


def test_scores_are_not_cut_to_integers(whole):
    for row in metrics_of(whole)[1:]:
        assert row["objective/score"] != round(row["objective/score"])


def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(start, whole, tmp_path):
    """Beta, average, both optimizers, both streams and keys are the checkpoint's."""
    out = tmp_path / "ppo"
    flags = [*start, "--out", str(out), "--steps", "3", "--save_every", "1"]
    with stopped.before_step(2):
        run_ppo.cli(flags)
    run_ppo.cli([*flags, "--resume"])
    assert metrics_of(out) == metrics_of(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    for a, b in zip(
        *(jax.tree.leaves(hf.load(x / "export")[1]) for x in (out, whole)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_miniatures_temporaries_are_not_mapped_anew():
    """What `process.keep_memory` keeps is above them; two steps in flight are free together."""
    flags = ppo_config.PRESETS["miniature"]
    flags = dataclasses.replace(flags, data=dataclasses.replace(flags.data, max_prompt=48))
    model = models.PRESETS["miniature"]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    temporaries = {}
    for each in preflight_programs.ppo_programs(flags, model, model, mesh):
        if each.name in ("policy gradient", "value gradient"):
            compiled = each.jitted.lower(*each.args).compile()
            temporaries[each.name] = compiled.memory_analysis().temp_size_in_bytes
    assert len(temporaries) == 2
    assert max(temporaries.values()) < process.KEPT
    assert 2 * max(temporaries.values()) < process.UNUSED


@pytest.fixture(scope="module")
def moved(start, tmp_path_factory):
    """(run directory, what each call of the sampler was given and gave, the average of the weights
    in the end) of two iterations with a large learning rate, an adaptive beta and fewer prompts
    than episodes."""
    out = tmp_path_factory.mktemp("moved")
    prompts = [{"prompt": record["prompt"]} for record in miniature.prompts(0, 12, "train")]
    (out / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    calls, averages = [], []

    def drop(self, drop=run_ppo.TrainingState.drop):
        averages.append(jax.device_get(self.state.ema))
        drop(self)

    def sample(self, params, prompts, numbers, key, sample=run_ppo.Programs.sample):
        rows, live = sample(self, params, prompts, numbers, key)
        responses = [tuple(ids) for ids in rollout.token_ids(rows)]
        calls.append((prompts, list(numbers), key, responses))
        return rows, live

    flags = [*start, "--out", str(out / "run"), "--steps", "2", "--eval_every", "9"]
    flags += ["--preset", "miniature", "--data", f"jsonl:{out}/few.jsonl"]
    flags += ["--data.validation", "0.4"]
    flags += ["--pretrain", "miniature", "--ppo.warmup", "0", "--ppo.learning_rate", "0.1"]
    flags += ["--ppo.kl_target", "0.5", "--ppo.kl_horizon", "32", "--ppo.beta", "0.5"]
    flags += ["--ppo.lam", "0.5", "--ppo.value_learning_rate", "0", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_ppo.Programs, "sample", sample)
        patch.setattr(run_ppo.TrainingState, "drop", drop)
        run_ppo.cli(flags)
    training = [call for call in calls if len(call[0]) == 16]
    return out / "run", training, averages[0]


def iterations(moved) -> list[dict]:
    """The metrics of both iterations."""
    return metrics_of(moved[0])[1:]


def test_the_reward_is_the_score_less_beta_kl(moved):
    """With a KL well off 0, and of the policy from the reference, not the reverse."""
    first, second = iterations(moved)
    assert second["objective/kl"] > 0.1
    for row in (first, second):
        want = row["objective/score"] - row["objective/beta"] * row["objective/kl"]
        assert row["objective/reward"] == pytest.approx(want, rel=1e-5)
    results = json.loads((moved[0] / "results.json").read_text())
    assert results["PPO, last weights"]["kl"] > 0.1


def test_the_average_of_the_weights_is_exported(moved):
    """After two updates at a decay of 0.95 it is nearer to the start than the last weights are."""
    results = json.loads((moved[0] / "results.json").read_text())
    kl = {name: results[f"PPO, {name} weights"]["kl"] for name in ("averaged", "last")}
    assert kl["averaged"] < 0.5 * kl["last"]
    exported = hf.load(moved[0] / "export")[1]
    jax.tree.map(np.testing.assert_array_equal, exported, moved[2])


def test_values_are_those_of_the_value_net(moved):
    """It starts as the reward model and stays so, at a learning rate of 0."""
    first, second = iterations(moved)
    assert abs(first["value/mean"]) > 0.01
    assert first["value/mean"] != second["value/mean"]
    assert first["value/loss"] > 0


def test_beta_follows_the_kl(moved):
    """The first iteration's KL is 0: a fifth of a target's error, times 16 of 32 episodes."""
    first, second = iterations(moved)
    assert first["objective/beta"] == 0.5
    assert second["objective/beta"] == pytest.approx(0.5 * (1 - 0.2 * 16 / 32), rel=1e-6)


def test_an_iteration_has_noise_of_its_own(moved):
    keys = [jax.random.key_data(key).tolist() for _, _, key, _ in moved[1]]
    want = [jax.random.fold_in(jax.random.key(3), step) for step in (1, 2)]
    assert keys == [jax.random.key_data(key).tolist() for key in want]


def test_a_prompt_that_a_batch_holds_several_times_gets_several_responses(moved):
    for prompts, numbers, _, responses in moved[1][:1]:
        assert len(set(numbers)) == 16
        copies = {}
        for prompt, response in zip(prompts, responses, strict=True):
            copies.setdefault(tuple(prompt), []).append(response)
        assert len(copies) < 12
        assert max(map(len, copies.values())) >= 2
        assert sum(len(set(x)) for x in copies.values()) == 16


def test_episodes_are_numbered_through_the_stream(moved):
    assert moved[1][0][1] + moved[1][1][1] == list(range(32))


def test_with_offload_the_sampler_waits_for_a_running_save():
    """A save in the background holds its arrays on the devices; so does the last assessment."""
    mesh, events = sharding.make_mesh(data=8), []
    everywhere = sharding.replicated(mesh)
    params, tx = jax.device_put({"w": np.ones((4, 4), np.float32)}, everywhere), optax.adam(0.1)
    current = ppo.PPOState(state.create(params, tx), None, params, jax.device_put(0.5, everywhere))
    want = jax.device_get(current)
    training = run_ppo.TrainingState(current, True, lambda: events.append("waited"))
    del current
    with training.sampling() as policy_params:
        events.append("sampling")
        assert policy_params["w"].sharding.memory_kind == "device"
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(training.state)}
        assert kinds == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(training.state)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state), want)
    training.drop()
    assert events == ["waited", "sampling", "waited"]
    assert training.state is None


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        *(("--temperature", "0.5"), ("--max_new_tokens", "5"), ("--model_dtype", "bfloat16")),
        *(("--value_model", "x"), ("--adam.clip_norm", "2"), ("--ppo.lam", "0.9")),
    ],
)
def test_a_resumed_run_may_not_become_another(start, whole, flag, changed, capsys):
    flags = [*start, "--out", str(whole), "--steps", "3", "--resume", flag, changed]
    with pytest.raises(SystemExit, match="2"):
        run_ppo.cli(flags)
    said = capsys.readouterr().err
    assert re.search(rf"error: --resume would make another run.*{flag[2:]}", said)


@pytest.mark.parametrize(
    ("spec", "missing_eos", "ended", "warns"),
    [
        (("rm",), "none", 0.14, True),
        (("f.py:f", "rm"), "none", 0.79, True),
        (("rm",), "none", 0.81, False),
        (("rm",), "penalty", 0.14, False),  # which sets the score of such a response apart
        (("f.py:f",), "none", 0.14, False),  # a function sees what it scores
    ],
)
def test_a_reward_model_that_scores_cut_responses_is_warned_of(spec, missing_eos, ended, warns):
    flags = ppo_config.PRESETS["miniature"]
    flags = dataclasses.replace(
        flags,
        reward=RewardConfig(spec),
        ppo=dataclasses.replace(flags.ppo, missing_eos=missing_eos),
    )
    said = run_ppo.cut_responses(flags, ended)
    assert (said is not None) == warns
    assert not warns or f"{1 - ended:.0%} of SFT's responses are cut at --max_new_tokens 32" in said


def test_choices(start, whole, tmp_path, monkeypatch):
    """Two epochs, uneven lengths in buckets and shares, a head on the trunk, adaptive beta,
    re-scored behaviour, a score for no EOS, models at rest on the host, sequences split between
    sublayers, a few prompts sampled at a time, and an early stop."""
    out = tmp_path / "ppo"
    flags = [*start, "--out", str(out), "--steps", "9", "--mesh", "data=1,fsdp=4,tensor=2"]
    flags += ["--ppo.epochs", "2", "--ppo.buckets", "2", "--ppo.microbatches", "2"]
    flags += ["--ptx.microbatches", "2", "--ppo.value", "shared", "--ppo.kl_target", "0.5"]
    flags += ["--ppo.rescore", "True", "--offload"]
    flags += ["--ppo.missing_eos", "fixed", "--ppo.missing_eos_value", "-1.5"]
    flags += ["--ppo.whiten_rewards", "--ppo.clip_score", "2", "--ppo.max_kl", "-1"]
    flags += ["--ppo.beta", "0.02", "--shard_sequence", "--sample_batch", "2"]
    generate, resting = run_ppo.sampler.generate, []
    gc.collect()
    others = jax.live_arrays()  # of other tests
    known = set(map(id, others))

    def generate_and_look(params, *args, **kwargs):
        alike = params["embed"]["tokens"].shape
        live = [x for x in jax.live_arrays() if x.shape == alike and id(x) not in known]
        kinds = [x.sharding.memory_kind for x in live]
        resting.append((kinds.count("pinned_host"), len(kinds)))
        return generate(params, *args, **kwargs)

    monkeypatch.setattr(run_ppo.sampler, "generate", generate_and_look)
    passes, logp = [], run_ppo.Programs.logp
    monkeypatch.setattr(run_ppo.Programs, "logp", lambda *args: passes.append(1) or logp(*args))
    run_ppo.cli(flags)
    # At first and in the end there is no state: SFT, or average and policy, beside the two frozen
    # models on the host. Between, the moments and the average are there too.
    assert set(resting) == {(2, 3), (5, 6), (2, 4)}
    rows = metrics_of(out)
    assert [row["step"] for row in rows] == [0, 1]  # any KL is above -1 nats
    assert abs(rows[1]["objective/kl"]) < 1e-5
    assert rows[1]["rollout/eos_fraction"] == 0
    assert rows[1]["objective/score"] == -1.5
    assert rows[1]["reward/model"] != -1.5
    assert 0 < rows[1]["rollout/logp_mismatch"] < 5e-5
    # Policy and reference: in the iteration and in five assessments.
    assert len(passes) == 2 * (1 + 5)
    assert rows[1]["objective/beta"] == pytest.approx(0.02)
    _, params = hf.load(out / "export")
    assert "value_head" not in params
    before, whole_before = (
        [json.loads(line)["SFT"] for line in (x / "samples_after.jsonl").read_text().splitlines()]
        for x in (out, whole)
    )
    assert before == whole_before  # sampled in parts or not, the same
    assert len(set(before)) == 4
    run_ppo.cli([*flags, "--resume"])  # of a run that has stopped: the report again, and no step
    assert metrics_of(out) == rows


def test_plain_ppo_without_reference_on_a_function(start, tmp_path, monkeypatch):
    """Neither text, reference, reward model nor average; the value net is the policy with a new
    head."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, responses, records):\n"
        "    assert len(prompts) == len(responses) == len(records)\n"
        "    assert [record.prompt for record in records] == list(prompts)\n"
        f"    with open({str(tmp_path / 'prompts.txt')!r}, 'a') as file:\n"
        "        print(list(prompts), file=file)\n"
        "    return [len(text.split()) / 4 for text in responses]\n"
        "def letters(prompts, responses, records):\n"
        "    return [len(text) for text in responses]\n"
    )
    out = tmp_path / "ppo"
    flags = [*start, "--out", str(out), "--steps", "1", "--reward", f"{file}:length"]
    prompts, sample = [], run_ppo.Programs.sample
    monkeypatch.setattr(
        run_ppo.Programs, "sample", lambda *args: prompts.append(args[2]) or sample(*args)
    )
    flags += ["--gold", f"{file}:letters"]
    run_ppo.cli([*flags, "--ptx.coef", "0", "--ppo.beta", "0", "--ppo.ema", "0"])
    texts = [json.loads(line) for line in (out / "samples_after.jsonl").read_text().splitlines()]
    seen = [ast.literal_eval(line) for line in (tmp_path / "prompts.txt").read_text().splitlines()]
    decode = miniature.tokenizer().batch_decode
    words = lambda texts: [text.split() for text in texts]  # noqa: E731
    assert [words(texts) for texts in seen] == [words(decode(ids)) for ids in prompts]
    row = metrics_of(out)[1]
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"SFT", "PPO, last weights", "seconds", "evaluations"}
    for name in ("SFT", "PPO, last weights"):  # by the gold judge, which gave no reward
        letters = np.mean([len(line[name]) for line in texts])
        assert results[name]["utility"] == pytest.approx(letters)
    assert (out / "export" / "model.safetensors").exists()
    assert "ptx/loss" not in row
    assert not [name for name in row if "kl" in name and name != "policy/approx_kl"]
    assert row["objective/reward"] == row["objective/score"]
    assert row["reward/length"] == pytest.approx(row["objective/score"], rel=1e-6)
    assert row["objective/score"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ppo.minibatch", "12"], "--batch_size 16: not a multiple of --ppo.minibatch 12"),
        (["--ppo.microbatches", "3"], "--ppo.minibatch 8: not a multiple"),
        (["--temperature", "0"], "--temperature 0.0: must be positive"),
        (["--sample_batch", "3"], "--batch_size 16: not a multiple of --sample_batch 3"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--sample_batch", "0"], "--sample_batch 0: must be at least 1"),
        (["--ptx.microbatches", "3"], "--ppo.minibatch x --ptx.ratio"),
        (["--ppo.beta", "0", "--ppo.kl_target", "6"], "--ppo.kl_target 6.0: needs --ppo.beta"),
        (["--ppo.beta", "0", "--ppo.max_kl", "6"], "--ppo.max_kl 6.0: needs --ppo.beta"),
        (["--ppo.value", "shared", "--value_model", "x"], "--value_model x: there is no value net"),
        (["--final_prompts", "7"], "--eval_prompts 8: more than --final_prompts 7"),
        (["--ppo.beta", "-0.1"], "--ppo.beta -0.1: must not be negative"),
        (["--ppo.epochs", "0"], "--ppo.epochs 0: must be at least 1"),
        (["--eval_every", "0"], "--eval_every 0: must be at least 1"),
        (["--ppo.minibatch", "4"], "--ppo.minibatch 4: does not divide over 8 shards"),
        (["--ppo.ema", "1"], "--ppo.ema 1.0: must be at least 0 and below 1"),
        (["--data", "jsonl:x.jsonl"], "--ptx.coef 27.8: PPO-ptx needs text, --pretrain SPEC; or"),
    ],
)
def test_wrong_flags_are_named(start, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        run_ppo.cli([*start, "--out", str(tmp_path / "x"), *flags])
    assert exit.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in words


def test_the_models_are_computed_as_the_flags_say(start):
    flags = {"model_dtype": "bfloat16", "remat": "dots", "unroll": 2}
    config = ppo_config.Config(model=start[1], reward=RewardConfig((start[3],)), **flags)
    mesh = sharding.make_mesh(data=8)
    model, params, tokenizer, _ = run_ppo.load_policy(config, mesh)
    _, value_model, _ = run_ppo.load_value_net(config, mesh, model, params, tokenizer)
    for each in (model, value_model):
        assert (each.dtype, each.remat, each.unroll) == ("bfloat16", "dots", 2)
