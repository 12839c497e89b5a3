"""A model's ends of a response and its form of prompts, from loading to sampling and export."""

import dataclasses
import json

import chat_layouts
import jax
import pytest
import run_sft

from instructjax import hf, models, rollout, sampler, scoring, sharding
from instructjax.data import DataConfig, DataError, template
from instructjax.models import ModelConfig
from instructjax.run import pretrained


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


def write_model(path, tokenizer, eos_ids=(), scalar_head=False):
    """A Hugging Face directory with random values."""
    config = ModelConfig(
        *(len(tokenizer), 1, 16, 2, 32, 128), eos_ids=eos_ids, pad_id=0, scalar_head=scalar_head
    )
    hf.save(path, config, models.init(config, jax.random.key(0)), tokenizer)
    return str(path)


def test_the_ends_of_config_tokenizer_and_template_are_one_set(tmp_path, mesh):
    """Gemma's layout: the config ends texts at another id than the chat template ends turns."""
    tokenizer = chat_layouts.tokenizer("gemma")
    bos, eos, start, turn = tokenizer.convert_tokens_to_ids(chat_layouts.LAYOUTS["gemma"].special)
    path = write_model(tmp_path / "m", tokenizer, (start,))  # as a model of another family might
    config, params, loaded = pretrained.load(path, mesh)
    assert config.eos_ids == (start, eos, turn)
    # A rollout ends at each of them, and `ended` counts it.
    for end in config.eos_ids:
        biased = jax.tree.map(lambda x: x, params)
        biased["final_norm"]["bias"] = 1e5 * params["embed"]["tokens"][end]
        drawn = sampler.generate(
            biased, config, [[bos]], jax.random.key(1), max_new_tokens=4, eos_ids=config.eos_ids
        )
        assert drawn.responses() == [[end]]
        rows = {"tokens_BR": drawn.tokens_BR, "mask_BR": jax.device_get(drawn.mask_BR)}
        assert rollout.ended(jax.device_get(rows), config.eos_ids).all()
    # Both files of the export list them.
    hf.save(tmp_path / "out", config, params, loaded)
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        assert ids == list(config.eos_ids)


def test_a_models_reader_has_its_ends_and_its_vocabulary(tmp_path, mesh):
    tokenizer = chat_layouts.tokenizer("qwen")
    config, _, loaded = pretrained.load(write_model(tmp_path / "m", tokenizer, (0,)), mesh)
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "completion": "Hi<|endoftext|>"}')
    source = DataConfig(f"jsonl:{tmp_path}/d.jsonl", cache=None, template="plain")
    data = pretrained.reader(config, loaded)(source, "demonstrations", log=str)
    assert loaded.decode(data.response[0, 0]) == "Hi<|endoftext|>"
    fewer = dataclasses.replace(config, vocab_size=2)
    with pytest.raises(DataError, match="no row in the embedding of 2"):
        pretrained.reader(fewer, loaded)(source, "demonstrations", log=str)


def test_demonstrations_end_where_the_models_rollouts_do(tmp_path):
    """SFT reads the ids of the model: an id that its config alone has ends a demonstration."""
    tokenizer = chat_layouts.tokenizer("qwen")
    path = write_model(tmp_path / "m", tokenizer, (0,))
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"say {i}", "completion": "Hi one<|endoftext|>"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_sft.cli(
        f"--model {path} --data jsonl:{data} --data.template plain --data.cache None --steps 60"
        f" --learning_rate 1e-2 --length 64 --batch_size 8 --microbatches 1 --max_new_tokens 24"
        f" --out {tmp_path / 'run'} --eval_every 60".split()
    )
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert samples[-1]["response"] == "Hi one<|endoftext|>"


def test_a_run_records_its_form_and_warns_of_another(tmp_path, mesh, capsys):
    path = write_model(tmp_path / "m", chat_layouts.tokenizer("qwen"))
    config, params, tokenizer = pretrained.load(path, mesh, template="plain")
    hf.save(tmp_path / "sft", config, params, tokenizer)
    assert "warning" not in capsys.readouterr().out
    _, _, again = pretrained.load(str(tmp_path / "sft"), mesh, template="auto")
    assert template.of(again).form == "plain"
    assert "warning" not in capsys.readouterr().out
    _, _, again = pretrained.load(str(tmp_path / "sft"), mesh, template="chat")
    assert template.recorded(again) == "chat"
    warning = f"warning: --model {tmp_path / 'sft'} was trained on plain prompts: these are chat"
    assert warning in capsys.readouterr().out
    # The form is the model's, also where --tokenizer names another directory.
    other = tmp_path / "tokenizer"
    chat_layouts.tokenizer("qwen").save_pretrained(other)
    _, _, again = pretrained.load(str(tmp_path / "sft"), mesh, tokenizer=str(other))
    assert template.of(again).form == "plain"
    (tmp_path / "list").mkdir()
    for file in (tmp_path / "sft").iterdir():
        (tmp_path / "list" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "list" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list/tokenizer_config\.json: holds a JSON list"):
        pretrained.load(str(tmp_path / "list"), mesh, tokenizer=str(other))
    # A reward model of the other form.
    rm = write_model(tmp_path / "rm", tokenizer, scalar_head=True)
    _, _, again = pretrained.load(str(tmp_path / "sft"), mesh, template="chat")
    capsys.readouterr()
    scoring.load_model(rm, mesh, again, "float32", "--reward")
    warning = f"warning: --reward {rm} was trained on plain prompts: these are chat"
    assert warning in capsys.readouterr().out
    scoring.load_model(rm, mesh, tokenizer, "float32", "--reward")
    assert "warning" not in capsys.readouterr().out
