"""Run files as strangers write them: whatever is wrong is one short line, at once."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

from mutants import DEEP, LINES, VALUES, read, run_file
from sophon._base.errors import SpecError
from sophon._cli.demo import RUN
from sophon._cli.run_file import _text_of, parse_run


def refusal(text: str, *settings: str) -> str:
    """Return what is said of a run file, which is short and takes no time."""
    begun = time.process_time()
    with pytest.raises(SpecError) as caught:
        parse_run(text, list(settings), where="run.toml")
    assert time.process_time() - begun < 2
    message = str(caught.value)
    assert len(message) <= 600
    assert len(message.splitlines()) <= 2
    return message


def test_a_mutated_run_file_is_read_or_refused_in_a_line() -> None:
    refused = 0
    for seed in range(400):
        text = run_file(random.Random(seed))
        with contextlib.suppress(pytest.fail.Exception):  # it is as good as before
            refusal(text)
            refused += 1
    assert refused > 200


LEAST = {"records": 30, "weights": 40, "archives": 40, "tables": 40, "tars": 30, "datasets": 30}


@pytest.mark.parametrize(("kind", "least"), LEAST.items())
def test_mutated_files_are_read_or_refused_in_two_lines(
    tmp_path: Path, kind: str, least: int
) -> None:
    said = [read(kind, seed, tmp_path) for seed in range(60)]
    assert sum(map(bool, said)) >= least
    assert not all(said)


@pytest.mark.parametrize("line", LINES[:3])
@pytest.mark.parametrize("value", [VALUES[0], *VALUES[-4:-1]])
def test_what_no_parser_takes_is_refused_before_it_is_parsed(line: str, value: str) -> None:
    for text in (line, f"z = {value}"):
        assert "no run file needs that" in refusal(f"{RUN}\n{text}")
    assert refusal(RUN, f"protect.rounds={value}")
    assert refusal(RUN, f"{'a.' * DEEP}b=1")
    assert refusal(RUN, f"restricted.{'9' * 5000}.limit=1")


def test_a_file_without_an_end_is_read_to_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("# é\n" * 200_000)
    with pytest.raises(SpecError, match="more than 262,144 bytes"):
        _text_of(file)


DISTRIBUTION = "protect.rehearsal.distribution"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            f'{DISTRIBUTION}.preparations=[[{{kind="fresh_head"}},{{kind="heal"}}]]',
            "list them first",
        ),
        (
            f'{DISTRIBUTION}.preparations=[[{{kind="ridge_head"}},{{kind="fresh_head"}}]]',
            "list it last",
        ),
        (
            f'{DISTRIBUTION}.preparations=[[{{kind="heal",share=0.6}},{{kind="distil",share=0.6}}]]',
            "leave steps",
        ),
        (f"{DISTRIBUTION}.learning_rates={{sgd=[1e-320,0.1]}}", "1e-30 or more"),
        (f"protect.rounds={'9' * 200}", "protect.rounds = 999"),
        (f"model.classes={'9' * 30}", "model.classes"),
        ("restricted={source='folder', path='x'}", r"[[restricted]]"),
        (f"model.name=[{'1,' * 5000}]", "model.name"),
    ],
)
def test_settings_are_refused_where_they_are_read(setting: str, said: str) -> None:
    text = RUN.replace("[protect]", "[protect]\nmethod = 'sophon'")
    assert said in refusal(text, setting)


def test_a_windows_path_in_double_quotes_is_told_how_to_write_it() -> None:
    assert "single quotes" in refusal('[model]\nname = "C:\\Users\\me"')
