"""Runs the commands of docs/data.md on real data sets, and checks the counts that they print."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from instructjax.data.__main__ import cli
from instructjax.data.prepare import gpt2_tokenizer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "data.md"
COMMANDS = re.findall(
    r"^# (.+): (.+)\npython -m instructjax\.data (show .+)$", DOCS.read_text(), re.M
)
COUNTS = {name: counts for name, counts, _ in COMMANDS}
# Number of rows from each SOURCE.md; for plain text, of files or lines.
ROWS = {
    "novels_public_domain": 38,
    "wikitext2_raw": 1,
    "wikipedia_30_articles": 30,
    "tinyshakespeare": 1,
    "e2e_nlg": 4_672,
    "gsm8k": 7_473,
    "gsm8k, four models' solutions, right or wrong": 1_319,
    "scitldr, the first summary of each": 1_992 + 619,
    "seed_instructions": 175,
    "dolly_hh_small": 1_000,
    "p3_t0_subset": 23_891,
    "oasst_100_trees": 100,
    "oasst_100_trees, the replies ranked first": 100,
    "oasst_100_trees, prompts of others": 250,
    "hh_harmless_base_test (offensive throughout)": 2_312,
    "hh_harmless_base_test, prompts": 2_312,
    "e2e_human_ratings, quality": 2_292,
    "e2e_human_ratings, naturalness": 3_099,
    "e2e_human_ratings, each input once": 2_292,
}
FACTS = {
    "oasst_100_trees": "57 of 2, 117 of 3, 27 of 4, 3 of 5, 6 of 6, 1 of 8, 1 of 9; 754 pairs",
    "e2e_human_ratings, quality": "1,617 of 5; 16,170 pairs, 31.8% ties; 89 labelers",
    "e2e_human_ratings, naturalness": "2,082 of 5;",
    "hh_harmless_base_test (offensive throughout)": "2,308 of 2;",
    "p3_t0_subset": "99.9% full",
}
SAMPLE = ("novels_public_domain/*", "novels_public_domain/W*", 3)  # all novels take ten seconds


@pytest.fixture(scope="session")
def gpt2(shared_data, tmp_path_factory):
    return gpt2_tokenizer(str(shared_data / "gpt2_bpe"), str(tmp_path_factory.mktemp("gpt2")))


def test_every_data_set_has_its_command(shared_data):
    assert COUNTS.keys() == ROWS.keys()
    for name, rows in ROWS.items():
        assert COUNTS[name].startswith(f"{rows:,} rows read, ")
    assert len(list(shared_data.glob(SAMPLE[0]))) == ROWS["novels_public_domain"] + 1  # SOURCE.md


@pytest.mark.parametrize(("name", "counts", "line"), COMMANDS, ids=list(COUNTS))
def test_command(name, counts, line, shared_data, gpt2, monkeypatch, capsys):
    if SAMPLE[0] in line:
        line = line.replace(*SAMPLE[:2])
        counts = counts.replace(str(ROWS[name]), str(SAMPLE[2]))
    line = line.replace("$DATA", str(shared_data)).replace("$GPT2", str(gpt2))
    options = ["--no-example", "--data.cache", "None"]
    monkeypatch.setattr(sys, "argv", ["data", *shlex.split(line), *options])
    cli()
    printed = capsys.readouterr().out
    for fact in counts.split(", "):
        assert re.search(rf"(^|[: ]){re.escape(fact)}(:|$)", printed, re.M), fact
    assert FACTS.get(name, "") in printed


def test_gpt2_ids(gpt2):
    """Known ids of GPT-2's vocabulary; decoding gives the text back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    text = "naïve  spaces\n\n\tand 🙂 1234"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
