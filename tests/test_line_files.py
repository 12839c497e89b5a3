"""Files of experiments: lines that a kill cut, and the flags of an earlier start."""

import json
import re

import line_files
import pytest


def test_a_torn_last_line_is_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert line_files.read_log(file) == []
    rows = [{"a": "ä"}, {"a": "東京"}]
    line_files.append(file, rows)
    whole = file.read_bytes()
    for torn in ('{"a": "', '{"a": "東'):
        for cut in range(1, len(torn.encode()) + 1):  # within a character too
            file.write_bytes(whole + torn.encode()[:cut])
            assert line_files.read_log(file) == rows
            assert file.read_bytes() == whole
    file.write_bytes('"東'.encode()[:2])
    assert line_files.read_log(file) == []


def test_a_finished_run_s_file_is_read_whole_or_not_at_all(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{file}")):
        line_files.read_lines(file)
    for written, rows in (
        ("", []),
        ('{"a": "東"}\n\n{"a": 2}\n', [{"a": "東"}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),  # another program's, without a line's end
    ):
        file.write_text(written, "utf-8")
        assert line_files.read_lines(file) == rows
        assert file.read_text("utf-8") == written
    file.write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: not JSON")):
        line_files.read_lines(file)
    assert file.read_text() == '{"a": 1}\n{"a"'


def test_a_run_goes_on_with_its_own_flags(tmp_path):
    out, defaults = tmp_path / "run", {"steps": 3, "mesh": ""}

    def check(stage="one", resume=True, free=(), **flags):
        line_files.check_resume(out, stage, flags, resume, defaults, free)

    check(resume=False, steps=9)  # there is none
    line_files.record(out, "one", {"model": "m", "mesh": "data=2"})
    check(model="m", mesh="data=4")
    for flags, said in (
        ({"model": "n"}, f"--resume: --model was 'm' in {out}, and is 'n'"),
        # What knew no such flag used its default.
        ({"model": "m", "steps": 4}, f"--resume: --steps was 3 in {out}, and is 4"),
        ({"model": "m", "harm": "f"}, f"--resume: --harm was None in {out}, and is 'f'"),
        ({"model": "m", "stage": "two"}, f"{out} holds a run of one, not of two"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            check(**flags)
    check(model="m", steps=3)
    check(model="n", steps=4, free=("model", "steps"))
    with pytest.raises(FileExistsError, match="holds a run: continue it with --resume"):
        check(resume=False, model="m")
    file = out / "config.json"
    before = json.loads(file.read_text())
    del before["stage"]  # of an earlier version
    file.write_text(json.dumps(before))
    check(stage="two", model="m")
