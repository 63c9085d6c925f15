"""Run files as strangers write them: whatever is wrong is one short line, at once."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest

from sophon._base.errors import SpecError
from sophon._cli.demo import RUN
from sophon._cli.run_file import _text_of, parse_run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*-sampled.toml"))
DEEP = 3000
VALUES = (
    *("9" * 5000, "9" * 30, "1e400", "1e-320", "-inf", "nan", "-1", "0", "0x" + "f" * 300),
    *("true", '""', "[]", "{}", "[[[[1]]]]", '"x"', "2020-01-01", "[1, 2]", "{a = 1}", '"\\u0000"'),
    *("'''", '"joint"', '[{kind = "erasure"}]', '{kind = "heal"}', "{sgd = [1e-320, 0.1]}"),
    *('[[{kind = "fresh_head"}, {kind = "heal"}]]', f'"{"y" * 100_000}"', "[" * DEEP + "]" * DEEP),
    *("{a = " * DEEP + "1" + "}" * DEEP, "[" + "1," * 50_000 + "]", '"C:\\Users\\me"'),
)
LINES = (
    *("[x" + ".y" * DEEP + "]", "a" + ".b" * DEEP + " = 1", '"a".' * DEEP + "b = 1", "[protect]"),
    *(
        "\n".join(f"k{n} = 1" for n in range(DEEP)),
        "[model.arguments]\nx = [[1]]",
        '"' + '\\"' * DEEP,
    ),
    *('[[protect.hinder]]\nkind = "rehearsal"\nsteps = -1', '[protect.update]\nkind = "joint"'),
)


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


def mutated(chance: random.Random) -> str:
    texts = [RUN, *(path.read_text() for path in RECIPES)]
    lines = chance.choice(texts).splitlines()
    for _ in range(chance.randint(1, 3)):
        at, how = chance.randrange(len(lines)), chance.random()
        key, equals, _ = lines[at].partition("=")
        if how < 0.5 and equals:
            lines[at] = f"{key}= {chance.choice(VALUES)}"
        elif how < 0.7:
            lines.insert(at, chance.choice([*LINES, *lines]))
        elif how < 0.8:
            lines[at] = lines[at].replace("[[", "[").replace("]]", "]")
        else:
            where = chance.randrange(len(lines[at]) + 1)
            wrong = chance.choice("[]{}=\"'.,\\#\0é9-")
            lines[at] = lines[at][:where] + wrong + lines[at][where + 1 :]
    return "\n".join(lines)


def test_a_mutated_run_file_is_read_or_refused_in_a_line() -> None:
    refused = 0
    for seed in range(400):
        text = mutated(random.Random(seed))
        with contextlib.suppress(pytest.fail.Exception):  # it is as good as before
            refusal(text)
            refused += 1
    assert refused > 200


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
