"""The model card says what the run's own files say, and its command repeats the run."""

import json
import re
import shlex
import shutil

import pytest

from plumbing.card import card, main
from plumbing.command import UserError
from tests.conftest import command, validation


def test_a_finished_run_has_a_card_with_its_numbers(finished, prepared):
    text = (finished / "README.md").read_text()
    bits = validation(finished)[-1]
    assert f"| {bits:,.1f}, and " in text and "12 steps of 4 x 256 tokens" in text
    report = json.loads((prepared / "report.json").read_text())["shards"]
    assert f"{report['train-00000']['documents']} files to learn from" in text
    assert f"seen {12 * 4 * 256 / report['train-00000']['tokens']:.1f} times" in text
    assert re.search(r"\| took \| [\d.]+ minutes at [\d,]+ tokens/s \(median\), [\d.]+ GB, on .*1 thread \|", text)
    grid = re.search(r"!\[.*\]\((.*)\)", text)[1]
    assert (finished / grid).exists()
    assert str(prepared.parent) not in re.search(r"data\.prepare (\S+)", text)[1]  # the source is named, not its path


def test_its_commands_repeat_the_run(photos, tmp_path):
    """Bit for bit: the commands of a card, run elsewhere, end at the same bits."""
    flags = (
        "--dim 32 --layers 1 --heads 2 --kv-heads 2 --hidden 64 --context 256 --batch 2 --steps 3 --every 3 --samples 1"
    )
    for folder in ("first", "again"):
        (tmp_path / folder).mkdir()
    data, out = tmp_path / "first" / "data", tmp_path / "first" / "run"
    for words in (
        f"-m data.prepare {photos} {data} --size 32 --vocab 258 --workers 1",
        f"train.py --data {data} --out {out} {flags}",
    ):
        assert command(*words.split()).returncode == 0
    text = (out / "README.md").read_text()
    block = re.search(r"## Repeat it\n\n((?:    .*\n)+)", text)[1]
    for line in block.splitlines():
        moved = line.strip().replace(f"data.prepare {photos.name}", f"data.prepare {photos}").replace("first", "again")
        done = command(*shlex.split(moved)[1:])
        assert done.returncode == 0, done.stderr
    assert validation(tmp_path / "again" / "run") == validation(out)


def test_distances_that_fid_gave_stand_in_the_card(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert "FID" not in card(run)
    two = {"fid": 1.25, "dims": 768, "kid": 0.001, "a": {"path": "out/samples", "count": 400}, "b": {"path": "test"}}
    row = {"keep": "0.5", "fid_originals": 0.75, "fid_roundtrip": 0.5, "fid_floor": 0.25, "count": 80}
    lines = [json.dumps(each) for each in (two, {"completions": [row], "dims": 2048})]
    (run / "fid.jsonl").write_text("\n".join([*lines, "damaged"]) + "\n")
    main([str(run)])
    text = (run / "README.md").read_text()
    assert "| out/samples | test | 400 | 1.250 (768) | | 0.00100 |" in text
    assert "| completions, 0.5 given | their originals | 80 | 0.750 (2048) | 0.250 | |" in text


def test_it_is_said_whether_the_end_was_best(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in log:
        if "val_bits_per_file" in record:
            record["val_bits_per_file"] = 100.0 + record["step"]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    assert "best at step 4 (104.0 bits)" in card(run)


def test_what_has_no_card_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run that has been evaluated"):
        main([str(tmp_path / "empty")])
