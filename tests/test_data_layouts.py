"""The layouts of public data sets: the flags that each needs, and the records that come out.

The columns and their types are those of the sets; the words are made up. `card` after a name: the
layout was read in the set's card or its own documentation. `code`: in published code that reads the
set. `memory`: neither was at hand.
"""

import json

import pytest

from instructjax.data import DataConfig, DataError, read
from instructjax.data.columns import parse_columns
from instructjax.data.fields import NAMES
from instructjax.data.records import parse
from instructjax.data.template import Template


def outcome(kind, row, columns):
    """(messages before the reply, replies, ranks) of a row."""
    record = parse(row, "f:1", kind, parse_columns(columns, NAMES[kind]), Template())
    return structure(record)


def structure(record):
    return [tuple(m.values()) for m in record.messages], list(record.replies), list(record.ranks)


def says(role):
    return lambda text: {"role": role, "content": text}


user, assistant, system = says("user"), says("assistant"), says("system")
CHAT = [user("hi"), assistant("hello"), user("more")]


def pairs(*messages):
    return [(message["role"], message["content"]) for message in messages]


DEMO, COMP, PROMPT = "demonstrations", "comparisons", "prompts"

# (data set, row, [(kind, columns, messages, replies, ranks)])
LAYOUTS = [
    # Anthropic/hh-rlhf. card
    ("hh-rlhf",
     {"chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: good",
      "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: bad"},
     [(COMP, "", CHAT, ["good", "bad"], [1, 2]),
      (PROMPT, "", CHAT, [], [])]),
    # openbmb/UltraFeedback. code
    ("UltraFeedback",
     {"source": "s", "instruction": "do", "models": ["m1", "m2", "m3", "m4"],
      "completions": [
          {"annotations": {"helpfulness": {"Rating": "3", "Rationale": "r"}}, "critique": "c",
           "custom_system_prompt": "s", "fine-grained_score": score, "model": "m",
           "overall_score": score, "principle": "honesty", "response": text}
          for text, score in (("w", 4.0), ("x", 8.5), ("y", 4.0), ("z", 1.0))],
      "correct_answers": ["None"], "incorrect_answers": ["None"]},
     [(COMP, "responses=completions.*.response,scores=completions.*.overall_score",
       [user("do")], ["w", "x", "y", "z"], [2, 1, 2, 4]),
      (PROMPT, "", [user("do")], [], [])]),
    # HuggingFaceH4/ultrafeedback_binarized. card
    ("ultrafeedback_binarized",
     {"prompt": "do", "prompt_id": "1", "chosen": [user("do"), assistant("good")],
      "rejected": [user("do"), assistant("bad")], "messages": [user("do"), assistant("good")],
      "score_chosen": 8.0, "score_rejected": 3.0},
     [(COMP, "", [user("do")], ["good", "bad"], [1, 2]),
      (DEMO, "", [user("do")], ["good"], []),
      (PROMPT, "", [user("do")], [], [])]),
    # HuggingFaceH4/ultrachat_200k. memory
    ("ultrachat_200k",
     {"prompt": "hi", "prompt_id": "1", "messages": [*CHAT, assistant("bye")]},
     [(DEMO, "", CHAT, ["bye"], []),
      (PROMPT, "", CHAT, [], [])]),
    # openai/summarize_from_feedback, comparisons. The repository of the paper has an example.
    ("summarize_from_feedback",
     {"info": {"id": "t3_1", "post": "I fell.", "title": "A fall", "subreddit": "tifu",
               "site": None, "article": None},
      "summaries": [{"text": "fell", "policy": "sup4", "note": "n"},
                    {"text": "rose", "policy": "ref", "note": None}],
      "choice": 1, "worker": "w1", "batch": "b", "split": "train", "extra": {"confidence": 7}},
     [(COMP, r"prompt=TITLE: {info.title}\n\nPOST: {info.post}\n\nTL;DR:,"
       "responses=summaries.*.text,ranks=choice:0|1",
       [user("TITLE: A fall\n\nPOST: I fell.\n\nTL;DR:")], ["fell", "rose"], [2, 1]),
      (PROMPT, r"prompt=TITLE: {info.title}\n\nPOST: {info.post}\n\nTL;DR:",
       [user("TITLE: A fall\n\nPOST: I fell.\n\nTL;DR:")], [], [])]),
    # openai/webgpt_comparisons. card
    ("webgpt_comparisons",
     {"question": {"dataset": "eli5", "id": "1", "full_text": "why?"},
      "quotes_0": {"title": ["t"], "extract": ["e"]}, "answer_0": "a [1]",
      "tokens_0": {"prefix": [1, 2], "completion": [3]}, "score_0": -0.5,
      "quotes_1": {"title": [], "extract": []}, "answer_1": "b",
      "tokens_1": {"prefix": [1, 2], "completion": [4]}, "score_1": 0.5},
     [(COMP, "prompt=question.full_text,responses=answer_0+answer_1,scores=score_0+score_1",
       [user("why?")], ["a [1]", "b"], [2, 1]),
      (PROMPT, "prompt=question.full_text", [user("why?")], [], [])]),
    # stanfordnlp/SHP. card. Its `history` is the prompt.
    ("SHP",
     {"post_id": "q", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "how?",
      "c_root_id_A": "x", "c_root_id_B": "y", "created_at_utc_A": 2, "created_at_utc_B": 1,
      "score_A": 34, "score_B": 16, "human_ref_A": "a", "human_ref_B": "b", "labels": 1,
      "seconds_difference": 1.0, "score_ratio": 2.1},
     [(COMP, "prompt=history,responses=human_ref_A+human_ref_B,ranks=labels:1|0",
       [user("how?")], ["a", "b"], [1, 2]),
      (PROMPT, "prompt=history", [user("how?")], [], [])]),
    # berkeley-nest/Nectar. card; ranks are floats in the files.
    ("Nectar",
     {"prompt": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant: ",
      "answers": [{"answer": text, "model": "m", "rank": rank}
                  for text, rank in (("x", 2.0), ("y", 1.0), ("z", 3.0))],
      "turns": 2, "num_responses": 3, "source": ["lmsys"], "good_natured": True},
     [(COMP, "responses=answers.*.answer,ranks=answers.*.rank",
       CHAT, ["x", "y", "z"], [2, 1, 3]),
      (PROMPT, "", CHAT, [], [])]),
    # nvidia/HelpSteer2, ratings. card
    ("HelpSteer2",
     {"prompt": "do", "response": "x", "helpfulness": 3, "correctness": 4, "coherence": 4,
      "complexity": 2, "verbosity": 1},
     [(DEMO, "", [user("do")], ["x"], []),
      (PROMPT, "", [user("do")], [], [])]),
    # nvidia/HelpSteer2, its folder `preference`. code
    ("HelpSteer2/preference",
     {"split": "train", "prompt": "do", "response_1": "x", "response_2": "y",
      "preference_strength": 2, "preference_statement": "@Response 2 is better.",
      "preference_elaboration": "e", "three_most_similar_preferences": [],
      "all_preferences_unprocessed": []},
     [(COMP, "responses=response_1+response_2,ranks=preference_strength:signed",
       [user("do")], ["x", "y"], [2, 1]),
      (PROMPT, "", [user("do")], [], [])]),
    # nvidia/HelpSteer3, its configuration `preference`. card
    ("HelpSteer3",
     {"domain": "general", "language": "english", "context": CHAT, "response1": "x",
      "response2": "y", "overall_preference": -1,
      "individual_preference": [{"score": -1, "reasoning": "r", "feedback1": "f",
                                 "feedback2": "g"}]},
     [(COMP, "prompt=context,responses=response1+response2,ranks=overall_preference:signed",
       CHAT, ["x", "y"], [1, 2]),
      (PROMPT, "prompt=context", CHAT, [], [])]),
    # tatsu-lab/alpaca. memory
    ("alpaca",
     {"instruction": "do", "input": "x", "output": "done", "text": "Below is ... done"},
     [(DEMO, "", [user("do\n\nx")], ["done"], []),
      (DEMO, r"prompt={instruction}\n\n{input?}", [user("do\n\nx")], ["done"], []),
      (PROMPT, "", [user("do\n\nx")], [], [])]),
    ("alpaca, no input",
     {"instruction": "do", "input": "", "output": "done", "text": "Below is ... done"},
     [(DEMO, "", [user("do")], ["done"], []),
      (DEMO, r"prompt={instruction}\n\n{input?}", [user("do")], ["done"], [])]),
    # anon8231489123/ShareGPT_Vicuna_unfiltered. memory
    ("ShareGPT",
     {"id": "1", "conversations": [{"from": "human", "value": "hi"},
                                   {"from": "gpt", "value": "hello"},
                                   {"from": "human", "value": "more"},
                                   {"from": "gpt", "value": "bye"}]},
     [(DEMO, "", CHAT, ["bye"], []),
      (PROMPT, "", CHAT, [], [])]),
    # databricks/databricks-dolly-15k. memory
    ("dolly",
     {"instruction": "do", "context": "x", "response": "done", "category": "closed_qa"},
     [(DEMO, "", [user("do\n\nx")], ["done"], []),
      (PROMPT, "", [user("do\n\nx")], [], [])]),
    # HuggingFaceH4/no_robots. memory
    ("no_robots",
     {"prompt": "hi", "prompt_id": "1", "category": "Chat",
      "messages": [system("S"), *CHAT, assistant("bye")]},
     [(DEMO, "", [system("S"), *CHAT], ["bye"], []),
      (PROMPT, "", [system("S"), *CHAT], [], [])]),
    # Intel/orca_dpo_pairs. code
    ("orca_dpo_pairs",
     {"system": "S", "question": "do", "chosen": "good", "rejected": "bad"},
     [(COMP, "", [system("S"), user("do")], ["good", "bad"], [1, 2]),
      (DEMO, "completion=chosen", [system("S"), user("do")], ["good"], []),
      (PROMPT, "", [system("S"), user("do")], [], [])]),
    ("orca_dpo_pairs, no system message",
     {"system": "", "question": "do", "chosen": "good", "rejected": "bad"},
     [(COMP, "", [user("do")], ["good", "bad"], [1, 2])]),
    # lmsys/chatbot_arena_conversations. card
    ("chatbot_arena_conversations",
     {"question_id": "1", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena",
      "conversation_a": [user("do"), assistant("x")],
      "conversation_b": [user("do"), assistant("y")],
      "turn": 1, "anony": True, "language": "English", "tstamp": 1.5,
      "openai_moderation": {"flagged": False},
      "toxic_chat_tag": {"t5-large": {"flagged": False, "score": 0.1}}},
     [(COMP, "responses=conversation_a+conversation_b,ranks=winner:model_a|model_b",
       [user("do")], ["x", "y"], [2, 1]),
      (PROMPT, "prompt=conversation_a.0.content", [user("do")], [], [])]),
    # lmsys/lmsys-arena-human-preference-55k: lists of turns as JSON strings. code
    ("lmsys-arena-human-preference-55k",
     {"id": 1, "model_a": "m", "model_b": "n", "prompt": '["do"]', "response_a": '["x"]',
      "response_b": '["y"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
     [(COMP, "prompt=prompt.0,responses=response_a.0+response_b.0,"
       "scores=winner_model_a+winner_model_b",
       [user("do")], ["x", "y"], [1, 2]),
      (PROMPT, "prompt=prompt.0", [user("do")], [], [])]),
    # PKU-Alignment/PKU-SafeRLHF. code
    ("PKU-SafeRLHF",
     {"prompt": "do", "response_0": "x", "response_1": "y", "prompt_source": "s",
      "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca3-8B",
      "is_response_0_safe": True, "is_response_1_safe": False, "better_response_id": 1,
      "safer_response_id": 0},
     [(COMP, "responses=response_0+response_1,ranks=better_response_id:0|1",
       [user("do")], ["x", "y"], [2, 1]),
      (COMP, "responses=response_0+response_1,ranks=safer_response_id:0|1",
       [user("do")], ["x", "y"], [1, 2]),
      (PROMPT, "", [user("do")], [], [])]),
    # Skywork/Skywork-Reward-Preference-80K-v0.2. code
    ("Skywork-Reward-Preference-80K",
     {"chosen": [*CHAT, assistant("good")], "rejected": [*CHAT, assistant("bad")],
      "source": "magpie"},
     [(COMP, "", CHAT, ["good", "bad"], [1, 2]),
      (DEMO, "messages=chosen", CHAT, ["good"], []),
      (PROMPT, "", CHAT, [], [])]),
    # allenai/tulu-3-sft-mixture. memory
    ("tulu-3-sft-mixture",
     {"id": "1", "messages": [*CHAT, assistant("bye")], "source": "s"},
     [(DEMO, "", CHAT, ["bye"], []),
      (PROMPT, "", CHAT, [], [])]),
    # allenai/llama-3.1-tulu-3-8b-preference-mixture: the prompt is in the dialogues too. card
    ("tulu-3-preference-mixture",
     {"id": "1", "prompt": "do", "chosen": [user("do"), assistant("good")],
      "rejected": [user("do"), assistant("bad")], "source": "s"},
     [(COMP, "", [user("do")], ["good", "bad"], [1, 2]),
      (DEMO, "messages=chosen", [user("do")], ["good"], []),
      (PROMPT, "", [user("do")], [], [])]),
    # openai/gsm8k, main. The set's own files.
    ("gsm8k",
     {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
     [(DEMO, "", [user("1 + 1?")], ["It is <<1+1=2>>2.\n#### 2"], []),
      (PROMPT, "", [user("1 + 1?")], [], [])]),
]  # fmt: skip
CASES = [
    pytest.param(kind, row, columns, (pairs(*messages), replies, ranks), id=f"{name}-{kind}-{i}")
    for name, row, results in LAYOUTS
    for i, (kind, columns, messages, replies, ranks) in enumerate(results)
]


@pytest.mark.parametrize(("kind", "row", "columns", "expected"), CASES)
def test_layout(kind, row, columns, expected):
    assert outcome(kind, row, columns) == expected


ARENA = next(row for name, row, _ in LAYOUTS if name == "chatbot_arena_conversations")
ARENA_COLUMNS = "responses=conversation_a+conversation_b,ranks=winner:model_a|model_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "tie"}, "field 'ranks': all responses are tied"),
        ({"winner": "tie (bothbad)"}, "field 'ranks': all responses are tied"),
        # Two turns: the dialogues part at the first reply, so neither last reply answers both.
        (
            {
                "conversation_a": [user("do"), assistant("x"), user("more"), assistant("v")],
                "conversation_b": [user("do"), assistant("y"), user("more"), assistant("w")],
            },
            "same messages",
        ),
    ],
)
def test_battles_without_a_comparison(change, message):
    with pytest.raises(DataError, match=message):
        outcome(COMP, ARENA | change, ARENA_COLUMNS)


# OpenAssistant/oasst1 and oasst2. card. The table has a row for each message, the export of trees a
# row for each tree. Both give the same records.
def oasst(name, parent, text, role, rank=None):
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023",
        "text": text, "role": role, "lang": "en", "review_count": 3,
        "review_result": True, "deleted": False,
        "rank": rank, "synthetic": False, "model_name": None, "detoxify": None,
        "message_tree_id": "1", "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }  # fmt: skip


TABLE = [
    oasst("1", None, "hi", "prompter"),
    oasst("2", "1", "hello", "assistant", 0),
    oasst("3", "1", "no", "assistant", 1),
    oasst("4", "2", "more", "prompter"),
    oasst("5", "4", "bye", "assistant"),
    oasst("6", "1", "yes", "assistant", 2),
]


def tree(name="1"):
    row = next(row for row in TABLE if row["message_id"] == name)
    replies = [tree(row["message_id"]) for row in TABLE if row["parent_id"] == name]
    return row | {"replies": replies}


@pytest.mark.parametrize(
    "rows",
    [TABLE, [{"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": tree()}]],
    ids=["table", "trees"],
)
def test_oasst(tmp_path, rows):
    path = tmp_path / "oasst.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def outcomes(kind):
        return [structure(r) for r in read(DataConfig(f"jsonl:{path}"), kind, log=str)]

    first, second = pairs(user("hi")), pairs(*CHAT)
    assert outcomes(COMP) == [(first, ["hello", "no", "yes"], [1, 2, 3])]
    assert outcomes(DEMO) == [(first, ["hello"], [])]
    assert outcomes(PROMPT) == [(first, [], []), (second, [], [])]
