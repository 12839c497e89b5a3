"""critique_revise.py: dialogues of critiques and revisions by hand, whole runs, and --resume."""

import dataclasses
import json

import chat_layouts
import constitution
import critique_revise
import jax
import numpy as np
import pytest
import revision_chains
import revision_results
from constitution import Constitution, Principle
from revision_chains import Chain

from instructjax import data, hf, miniature, models, rollout, sharding
from instructjax.data import DataConfig, template
from instructjax.miniature import critics
from instructjax.models import ModelConfig

PROMPTS = [{"prompt": "name a river"}, {"prompt": [{"role": "user", "content": "say hi"}]}]
THREE = Constitution(tuple(Principle(f"P{i}", "", f"ask {i}", f"mend {i}") for i in range(3)))


def read(tmp_path, tokenizer, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read(DataConfig(f"jsonl:{file}"), "prompts", tokenizer=tokenizer, log=str)


class Critic:
    """Stands for a `Speaker`: says what a function of (call, place) says."""

    def __init__(self, answer):
        self.answer, self.heard, self.keys = answer, [], []

    def say(self, conversations, key, lines):
        assert not lines
        self.heard.append(conversations)
        self.keys.append(key)
        return [self.answer(len(self.heard), i) for i in range(len(conversations))]


def test_a_critique_and_a_revision(tmp_path):
    """The critic reads the newest response, then its critique too; no end means no revision."""
    records = read(tmp_path, chat_layouts.tokenizer("qwen"), [*PROMPTS, *PROMPTS, *PROMPTS])
    chains = [Chain(f"p{i}", [f"r{i}"]) for i in range(4)]
    chains.append(Chain("p4", [], ended="before"))

    # The critique of chain 3 has no end, nor has the revision of chain 1.
    critic = Critic(lambda n, i: None if (n, i) in ((1, 3), (2, 1)) else f"said {n} {i}")
    key = jax.random.key(3)
    revision_chains.revise(chains, records, THREE, critic, key, number=1, seed=7)
    drawn = [THREE.draw(7, 1, i) for i in range(4)]
    assert len({principle.name for principle in drawn}) > 1
    assert [len(conversations) for conversations in critic.heard] == [4, 3]
    for i, principle in enumerate(drawn):
        *said, response, request = critic.heard[0][i]
        assert said == list(records[i].messages)
        assert response == {"role": "assistant", "content": f"r{i}"}
        assert request == {"role": "user", "content": principle.critique}
        if i < 3:
            assert critic.heard[1][i] == [
                *critic.heard[0][i],
                {"role": "assistant", "content": f"said 1 {i}"},
                {"role": "user", "content": principle.revision},
            ]
    assert not np.array_equal(*map(jax.random.key_data, critic.keys))
    assert chains[0] == Chain("p0", ["r0", "said 2 0"], [drawn[0].name], ["said 1 0"])
    assert chains[2] == Chain("p2", ["r2", "said 2 2"], [drawn[2].name], ["said 1 2"])
    assert (chains[1].texts, chains[3].texts) == (["r1"], ["r3"])
    assert chains[1].ended.startswith("a revision had no end")
    assert chains[3].ended.startswith("a critique had no end")
    assert chains[4].ended == "before"
    revision_chains.revise(chains, records, THREE, critic, key, number=2, seed=7)
    assert [said[-2]["content"] for said in critic.heard[2]] == ["said 2 0", "said 2 2"]
    assert len(chains[0].texts) == 3

    of_prompts = [dataclasses.replace(records[0], prompt=f"p{i}") for i in range(5)]
    revision_chains.write(chains, tmp_path / "chains.jsonl")
    assert revision_chains.read(tmp_path / "chains.jsonl", of_prompts) == chains
    assert revision_chains.read(tmp_path / "none.jsonl", of_prompts) == []
    with pytest.raises(ValueError, match=r"--resume: .*chains.jsonl is of other prompts"):
        revision_chains.read(tmp_path / "chains.jsonl", of_prompts[:4])

    rows = revision_results.rows_of(records[:4], chains[:4])
    assert [row["revision"] for row in rows] == [1, 2, 1, 2]
    assert rows[0] == {
        "prompt": list(records[0].messages) if not records[0].verbatim else "name a river",
        "completion": "said 2 0",
        "revision": 1,
        "principle": drawn[0].name,
    }


def test_what_a_model_says(monkeypatch):
    """Its words up to an end, or to the end of the line; nothing without an end, words or room."""
    tokenizer = chat_layouts.tokenizer("qwen")
    ids = {"eos_ids": (tokenizer.eos_token_id,)}
    model = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=40, **ids)
    eos, form = tokenizer.eos_token_id, template.of(tokenizer, "plain")

    def ids_of(text, end):
        return [*tokenizer(text)["input_ids"], *[eos] * end]

    said = [ids_of(" hi two\nname", True), ids_of("hi two", False), [eos], ids_of("a", True)]
    heard = []

    def sample(params, config, prompts, key, *, size, indices, max_new_tokens, temperature, mesh):
        assert (size, max_new_tokens, temperature) == (5, 9, 0.7)
        heard.append((prompts, indices))
        return rollout.right_padded(said), 1.0

    monkeypatch.setattr(revision_chains.rollout, "sample", sample)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    speaker = revision_chains.Speaker(model, {}, tokenizer, form, mesh, 5, 9, 0.7)
    long = "name hi " * 40
    while len(tokenizer(long)["input_ids"]) > 33:  # two more than leave room for 9 of 40
        long = long[:-1]
    assert len(tokenizer(long)["input_ids"]) > 31
    asked, key = ["hi", "to", "hi two", long, "one"], jax.random.key(0)
    for lines, expected in ((False, "hi two\nname"), (True, "hi two")):
        assert speaker.say(asked, key, lines) == [expected, None, None, None, "a"]
    said[1] = ids_of("hi two\nname", False)  # the line ends, the text does not
    assert speaker.say(asked, key, True)[1] == "hi two"
    assert speaker.say(asked, key, False)[1] is None
    prompts, numbers = heard[0]
    assert numbers == [0, 1, 2, 4]
    assert prompts == [tokenizer(asked[i])["input_ids"] for i in numbers]  # in its own form
    assert speaker.respond([[5], [6], [7], [8]], key) == [" hi two\nname", None, None, "a"]
    assert heard[-1] == ([[5], [6], [7], [8]], None)


def test_results_by_hand(tmp_path):
    """Figures of each number; a chain that has ended keeps its last revision."""
    request = {"seed": 0, "story": 1, "about": "Mira"}
    rows = [{"prompt": f"p{i}", "request": request} for i in range(2)]
    records = read(tmp_path, miniature.tokenizer(), rows)
    kind, rude = "Mira was happy.", "Mira was happy. go away."
    yes, no = "it is kind.", "it is rude."
    chains = [
        Chain("p0", [rude, kind, kind], ["rude", "rude"], [no, no]),
        Chain("p1", [rude, rude], ["rude"], [yes], ended="so"),
    ]

    def judge(texts):
        rudeness = np.array([float("away" in text) for text in texts])
        return {"toxic": rudeness, "unknown": np.array([np.nan, 1.0])}

    results = revision_results.results_of(records, chains, judge)
    assert [row["revision"] for row in results] == [0, 1, 2]
    assert [row["revised"] for row in results] == [0, 2, 1]
    assert [row["toxic"][0] for row in results] == [1, 0.5, 0.5]
    assert [row["words"] for row in results] == [5, 4, 4]
    assert results[0]["unknown"][0] == 1
    assert "changed" not in results[0]
    assert [row["changed"] for row in results[1:]] == [0.5, 0]
    assert [row["critique_right"] for row in results[1:]] == [{"rude": 0.5}, {"rude": 0.0}]
    revision_results.print_results(results)


def test_the_rule_based_critic(tmp_path, monkeypatch, capsys):
    """Revisions raise the utility, and oversights cost some; --resume changes nothing."""
    tokenizer = miniature.tokenizer()
    ids = {"eos_ids": (tokenizer.eos_token_id,)}
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=128, **ids)
    hf.save(tmp_path / "lm", config, models.init(config, jax.random.key(0)), tokenizer)
    rows = miniature.demonstrations(0, 40)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "from instructjax.miniature import critics\n"
        "def utility(prompts, responses, records):\n"
        "    pairs = zip(records, responses)\n"
        "    return [critics.term(dict(r.row), x, 'utility') for r, x in pairs]\n"
        "def rude(prompts, responses, records):\n"
        "    pairs = zip(records, responses)\n"
        "    return [critics.term(dict(r.row), x, 'rude') for r, x in pairs]\n"
    )

    heard = []

    def sample(params, model, prompts, key, **_):
        heard.append(prompts)
        eos = tokenizer.eos_token_id
        said = [[*tokenizer(row["completion"])["input_ids"], eos] for row in rows]
        said[3] = said[3][:-1]  # does not end
        return rollout.right_padded(said), 1.0

    monkeypatch.setattr(revision_chains.rollout, "sample", sample)
    words = ["--model", f"{tmp_path}/lm", "--critic", "rules", "--data", f"jsonl:{file}"]
    words += ["--split", "all", "--prompts", "40"]

    def run(name, *more, judge="utility"):
        out = ["--gold", f"{tmp_path}/judge.py:{judge}", "--out", f"{tmp_path / name}"]
        critique_revise.cli([*words, *more, *out])
        return json.loads((tmp_path / name / "results.json").read_text())

    exact = run("exact", "--revisions", "6")
    utility = [row["utility"][0] for row in exact]
    assert utility[6] > utility[2] > utility[0]
    assert {x for row in exact[1:] for x in row["critique_right"].values()} == {1.0}
    overlooked = run("overlooked", "--revisions", "2", "--oversight", "0.6")
    assert overlooked[2]["utility"][0] < utility[2]
    assert overlooked[0] == exact[0]
    kind = run("kind", "--revisions", "1", "--only_principles", "rude", judge="rude")
    assert kind[0]["utility"][0] < 0 == kind[1]["utility"][0]
    assert set(kind[1]["critique_right"]) == {"rude"}

    assert heard[0] == [tokenizer(row["prompt"])["input_ids"] for row in rows]  # as SFT sees them

    run("again", "--revisions", "2")
    assert run("again", "--revisions", "6", "--resume") == exact
    made = [(tmp_path / name / "revisions.jsonl").read_text() for name in ("exact", "again")]
    assert made[0] == made[1]
    learned = DataConfig(f"jsonl:{tmp_path}/exact/revisions.jsonl", only="revision=1|2")
    learned = data.read(learned, "demonstrations", tokenizer=tokenizer, log=str)
    assert len(learned) == 78  # of 39 responses
    assert {record.prompt for record in learned} == {r["prompt"] for r in rows[:3] + rows[4:]}
    for flag, value in (("--prompts", "30"), ("--seed", "4"), ("--oversight", "0.1")):
        with pytest.raises(SystemExit):
            run("again", "--revisions", "6", "--resume", flag, value)
        assert f"--resume: {flag} was" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("again", "--revisions", "6")
    assert "holds a run: continue it with --resume" in capsys.readouterr().err
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    with pytest.raises(ValueError, match=r"chains.jsonl is of other prompts"):
        run("again", "--revisions", "6", "--resume")
    file.write_text(json.dumps({**PROMPTS[0], "request": "a text"}) + "\n")
    with pytest.raises(ValueError, match=r"--critic rules: .*rows.jsonl:1 has no request"):
        run("other")


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    """The folder of two tiny random chat models."""
    folder = tmp_path_factory.mktemp("chat_models")
    tokenizer = chat_layouts.tokenizer("qwen")
    ids = {"eos_ids": (tokenizer.eos_token_id, *range(len(tokenizer) // 10))}  # a tenth ends a text
    config = ModelConfig(len(tokenizer), 1, 16, heads=2, mlp_width=32, max_length=1024, **ids)
    for seed, name in enumerate(("lm", "critic")):
        hf.save(folder / name, config, models.init(config, jax.random.key(seed)), tokenizer)
    return folder


def test_the_first_response(tmp_path):
    """After a plain prompt it stays as it was sampled, as SFT adds no space."""
    tokenizer = chat_layouts.tokenizer("qwen")
    tokenizer.chat_template = None
    plain, dialogue = read(tmp_path, tokenizer, PROMPTS)
    assert critique_revise.first_of(plain, " hi").texts == [" hi"]
    assert critique_revise.first_of(dialogue, " hi").texts == ["hi"]
    assert critique_revise.first_of(plain, None).texts == []
    assert critique_revise.first_of(plain, None).ended


def test_models_from_the_command_line(chat_models, tmp_path, monkeypatch):
    """Two random models: some texts end. The judge is a function of the text."""
    keys, forms, revise = [], [], critique_revise.revise

    def noted(chains, records, principles, critic, key, **numbers):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        forms.append(critic.form.form)
        revise(chains, records, principles, critic, key, **numbers)

    monkeypatch.setattr(critique_revise, "revise", noted)
    (tmp_path / "judge.py").write_text(
        "def words(prompts, responses, records):\n    return [len(x.split()) for x in responses]\n"
    )
    rows = [{"prompt": f"name {i} hi to two"} for i in range(12)]
    long = "name hi " * 900  # has room for itself, and for no response of 48 tokens
    tokenizer = chat_layouts.tokenizer("qwen")
    while len(tokenizer(long)["input_ids"]) > 990:
        long = long[:-1]
    rows.insert(0, {"prompt": long})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", f"{chat_models}/lm", "--data", f"jsonl:{tmp_path}/rows.jsonl"]
    words += ["--max_new_tokens", "48", "--batch_size", "8", "--revisions", "2"]
    words += ["--gold", f"{tmp_path}/judge.py:words"]
    some = ["--split", "all", "--prompts", "9"]
    runs = {
        "own": some,
        "critic": [*some, "--critic", f"{chat_models}/critic"],
        "seed": [*some, "--seed", "1"],
        "cold": [*some, "--temperature", "0.3"],
        "plain": [*some, "--data.template", "plain"],
        "train": ["--data.validation", "0.5"],
    }
    made = {}
    for name, more in runs.items():
        critique_revise.cli([*words, *more, "--out", f"{tmp_path / name}"])
        lines = (tmp_path / name / "chains.jsonl").read_text().splitlines()
        made[name] = [Chain(**json.loads(line)) for line in lines]
    first = {name: [chain.texts[:1] for chain in chains] for name, chains in made.items()}
    assert len({*keys[:2]}) == 2
    assert keys[:2] == keys[2:4]  # of the same seed, whoever is the critic
    assert forms[0] == "chat"
    assert forms[2 * [*runs].index("plain")] == "plain"
    assert first["own"] == first["critic"] != first["seed"]
    assert first["own"] != first["cold"]
    assert made["own"] != made["critic"]
    assert len(made["own"]) == 9
    assert 1 < len(made["train"]) < 12
    assert made["own"][0].prompt.startswith("<|im_start|>")
    assert made["plain"][0].prompt == "name 0 hi to two"
    assert first["own"] != first["plain"]
    assert any(len(chain.texts) == 3 for chain in made["own"])
    results = json.loads((tmp_path / "own/results.json").read_text())
    begun = [chain for chain in made["own"] if chain.texts]
    expected = np.mean([len(chain.texts[0].split()) for chain in begun])
    assert results[0]["utility"][0] == pytest.approx(expected)
    (tmp_path / "tools.jsonl").write_text(json.dumps({**rows[1], "tools": [{"name": "f"}]}) + "\n")
    given = ["--model", f"{chat_models}/lm", "--data", f"jsonl:{tmp_path}/tools.jsonl"]
    with pytest.raises(ValueError, match="tools"):
        critique_revise.cli([*given, "--split", "all", "--out", f"{tmp_path}/tools"])


def test_wrong_flags(tmp_path, capsys):
    cases = [
        (["--principles", "none.toml"], "--principles none.toml: no such file"),
        (["--only_principles", "utility", "--principles", "miniature"], "critique and revision"),
        (["--critic", "rules", "--principles", "x.toml"], "--principles: `--critic rules` knows"),
        (["--oversight", "0.1"], "--oversight is of `--critic rules` alone"),
        (["--model", "runs/nothing"], "--model runs/nothing: no such directory"),
        (["--critic", "runs/nothing"], "--critic runs/nothing: no such directory"),
    ]
    for flags, named in cases:
        model = [] if "--model" in flags else ["--model", "miniature"]
        with pytest.raises(SystemExit) as end:
            critique_revise.cli([*model, *flags, "--out", f"{tmp_path / 'out'}"])
        assert end.value.code == 2
        assert named in capsys.readouterr().err


def test_draws_are_of_all_principles():
    principles = constitution.read("miniature", ("critique", "revision"))
    drawn = [principles.draw(0, 1, i).name for i in range(600)]
    counts = [drawn.count(p.name) for p in critics.PRINCIPLES if p.critique]
    assert min(counts) > 60
    assert drawn != [principles.draw(1, 1, i).name for i in range(600)]
    assert drawn != [principles.draw(0, 2, i).name for i in range(600)]
