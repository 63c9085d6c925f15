"""Damaged files and unusable domains: one line each, whatever is wrong with them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from builders import digits, original, restricted, setting_of, trained_model
from records import STEPS, record, trial
from sophon._base.errors import CheckpointError, DataError, SpecError
from sophon._cli import app
from sophon._cli.reading import read_record
from sophon._data import Domain, check_distinct, load_domain
from sophon._models import read_tensors
from sophon._protection.protection import Protected
from sophon._protection.sampling import StrategyDistribution
from sophon._protection.terms.rehearsal import Rehearsal
from sophon._records.audit_record import Score
from sophon._specs import DomainSpec, Strategy

SHORT = """
[model]
name = "small_convnet"

[original]
source = "embedded"
name = "letters"
limit = 10

[[restricted]]
source = "embedded"
name = "digits"
limit = 12

[protect]
method = "sophon"
rounds = 2
original_batch_size = 16
rehearsal = {steps = 1, query_batch_size = 8, distribution = {batch_sizes = [8]}}
guard = {tolerance_points = 90.0, every = 1}
"""


def sophon(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_bytes_flipped_anywhere_in_an_archive_are_one_line(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    images = stream.integers(0, 256, (40, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "whole.npz", x_train=images, y_train=np.arange(40) % 2)
    whole = (tmp_path / "whole.npz").read_bytes()
    chance, said = random.Random(0), []
    for _ in range(300):
        held = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.npz").write_bytes(bytes(held))
        try:
            load_domain(DomainSpec(source="npz", path="x.npz"), base=tmp_path)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 50
    assert max(map(len, said)) < 500
    assert all(text.isprintable() for text in said)


def test_bytes_flipped_anywhere_in_a_torch_file_are_one_line(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.zeros(4), "b": torch.ones(2, 2)},
        tmp_path / "whole.pth",
        _use_new_zipfile_serialization=False,
    )
    whole = (tmp_path / "whole.pth").read_bytes()
    chance, said = random.Random(0), []
    for _ in range(300):
        held = bytearray(whole)
        held[chance.randrange(len(held))] ^= 1 << chance.randrange(8)
        (tmp_path / "x.pth").write_bytes(bytes(held))
        try:
            read_tensors(tmp_path / "x.pth")
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 50
    assert max(map(len, said)) < 600
    assert all(len(text.splitlines()) == 1 for text in said)


def test_the_same_images_in_another_size_are_the_same_data(shared_data: Path) -> None:
    def loaded(size: int, classes: tuple[int, ...]) -> Domain:
        spec = DomainSpec(
            source="npz", path="cifar10.npz", image_size=size, classes=classes, limit=30
        )
        return load_domain(spec, base=shared_data)

    with pytest.raises(DataError, match=r"same data as the original 'cifar10' in another size"):
        check_distinct(loaded(32, (0, 1)), loaded(24, (0, 1)))
    check_distinct(loaded(32, (0, 1)), loaded(24, (2, 3)))


def test_two_domains_of_one_public_set_have_names_of_their_own(tmp_path: Path) -> None:
    kept, refused = (
        load_domain(
            DomainSpec(source="embedded", dataset="letters", name=name, classes=classes, limit=5),
            base=tmp_path,
        )
        for name, classes in (("early", (0, 1, 2)), ("late", (3, 4, 5)))
    )
    assert (kept.name, refused.name) == ("early", "late")
    assert kept.fingerprint() != refused.fingerprint()
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="dataset = 'x' is for torchvision"):
        load_domain(DomainSpec(source="folder", path=".", dataset="x"), base=tmp_path)


def test_an_unknown_users_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"~nobody-of-that-name.*write the folder out"):
        load_domain(DomainSpec(source="npz", path="~nobody-of-that-name/x.npz"), base=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fixed": Strategy(steps=999)}, "fixed.steps = 999"),
        (
            {"fixed": Strategy(), "distribution": StrategyDistribution(batch_sizes=(8,))},
            "give one",
        ),
    ],
)
def test_settings_of_a_rehearsal_that_would_do_nothing(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Rehearsal(steps=3, **fields)  # type: ignore[arg-type]


def test_domains_that_share_nothing_are_let_through() -> None:
    setting = setting_of(trained_model(), restricted=(digits(5, 8), digits(8, 10)))
    assert len(setting.restricted) == 2
    renamed = dataclasses.replace(restricted(), name="again")
    with pytest.raises(DataError, match="same data"):
        setting_of(trained_model(), restricted=(restricted(), renamed))
    assert original().class_count == 5


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return the folder of a protection of three rounds, its run file beside it."""
    (tmp_path / "run.toml").write_text(SHORT)
    done = sophon("protect", tmp_path / "run.toml", "--out", tmp_path / "p", "--quiet")
    assert done.exit_code == 0, done.stderr
    return tmp_path / "p"


def test_a_run_that_is_not_finished_is_said_to_be_none(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    (finished / "model.safetensors").unlink()
    for words in (
        ("audit", run, "--model", finished, "--out", tmp_path / "a"),
        ("audit", run, "--model", finished / "model.safetensors", "--dry-run"),
        ("evaluate", run, "--model", finished),
        ("export", finished, "--to", tmp_path / "e"),
    ):
        said = sophon(*words)
        assert said.exit_code == 2
        assert "holds a run that is not finished" in said.stderr
        assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("command", ["report", "inspect"])
def test_an_audit_without_any_trial_is_not_finished(command: str, tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    said = sophon(command, tmp_path)
    assert said.exit_code == 2
    assert "is of an audit that is not finished (0 trials are stored)" in said.stderr


def test_weights_of_others_are_not_exported(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    said = sophon("export", tmp_path, "--to", tmp_path / "e")
    assert said.exit_code == 2
    assert "has no model.json: name a folder that `sophon protect --out` wrote" in said.stderr


def test_what_was_edited_by_hand_is_one_line(finished: Path, tmp_path: Path) -> None:
    held = json.loads((finished / "model.json").read_text())
    held["protection"] = {"input": 3}
    (finished / "model.json").write_text(json.dumps(held))
    for words in (("export", finished, "--to", tmp_path / "e"), ("inspect", finished)):
        said = sophon(*words)
        assert said.exit_code == 2
        assert "is not as sophon wrote it" in said.stderr


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of somebody else's: the system's own user may read every file."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").chmod(0)
    return Path("w.safetensors")


@pytest.mark.usefixtures("unreadable", "nobody")
def test_a_file_that_may_not_be_read_is_not_said_to_be_absent(unreadable: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)"):
        read_tensors(unreadable)


@pytest.mark.parametrize("text", ["\udcff", "[" * 50_000, '{"a": ' * 50_000])
def test_prompts_that_are_no_text_are_named(tmp_path: Path, text: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        load_domain(DomainSpec(source="prompts", path="."), base=tmp_path)


def test_a_record_is_of_the_suite_that_it_says(tmp_path: Path) -> None:
    whole = record([trial("protected", [0.1] * len(STEPS))])
    suite, held = whole.suite_fingerprint, whole.model_dump(mode="json")
    file = tmp_path / "record.json"
    old = {key: value for key, value in held.items() if key != "suite_fingerprint"}
    for usual in (held, old, {**held, "suite_fingerprint": ""}):
        file.write_text(json.dumps(usual))
        assert read_record(file).trials == whole.trials
    crash = {"trial": whole.trials[0].key, "error": "MemoryError"}
    for later in ({"spec": {**held["spec"], "suite": "quick-2"}}, {"earlier_crashes": [crash]}):
        file.write_text(json.dumps({**old, **later}))
        with pytest.raises(CheckpointError, match="it lacks suite_fingerprint"):
            read_record(file)
    for changes, said in (
        ({"suite_fingerprint": "0" * len(suite)}, "its attacks were not those"),
        ({"spec_fingerprint": "0" * 64}, "its settings are not those"),
        ({"spec": {**held["spec"], "suite": "mine"}}, "its suite 'mine' is unknown"),
        ({"spec": {**held["spec"], "suite": "quick-2"}}, "its attacks were not those"),
        ({"spec": {**held["spec"], "steps": 7}}, "its settings are not those"),
    ):
        file.write_text(json.dumps({**held, **changes}))
        with pytest.raises(CheckpointError, match=said):
            read_record(file)


def test_all_packages_that_a_run_lacks_are_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(SHORT.replace("small_convnet", "timm:resnet18"))
    for name in ("timm", "sklearn", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    said = sophon("inspect", tmp_path / "run.toml")
    assert said.exit_code == 2
    assert "needs timm, sklearn, which" in said.stderr
    assert "'.[vision,demo]'" in said.stderr
    searching = sophon(
        *("protect", tmp_path / "run.toml", "--dry-run", "--set", "audit.search_trials=2")
    )
    assert "'.[vision,demo,search]'" in searching.stderr


def test_a_result_does_not_print_the_network() -> None:
    score = Score(correct=1, total=2)
    shown = repr(Protected(trained_model(), (), score, score, 3, None))
    assert len(shown.splitlines()) == 1
    assert "shipped_round=3" in shown


def test_a_closed_output_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(
        record([trial("protected", [0.1] * len(STEPS))]).model_dump_json()
    )
    command = f"{sys.executable} -m sophon report record.json --html report.html >&-"
    done = subprocess.run(
        command, check=False, shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").read_text().startswith("<!")
