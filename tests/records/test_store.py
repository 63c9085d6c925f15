"""The store of trials: nothing is lost, whichever processes meet over one trial."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import sophon._records.store
from records import crashed, trial
from sophon._base.errors import CheckpointError
from sophon._base.files import temporary_beside
from sophon._records.audit_record import Crashed, Trial
from sophon._records.store import DocumentStore, TrialStore, earlier_crashes


def _good(wall_s: float = 1.0) -> Trial:
    return trial("protected", (0.5,)).model_copy(update={"key": "k", "wall_s": wall_s})


def _crash(error: str, wall_s: float = 1.0) -> Trial:
    outcome = Crashed(error=error, traceback="...")
    changes = {"key": "k", "outcome": outcome, "wall_s": wall_s}
    return crashed("protected").model_copy(update=changes)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stored", [True, False])
def test_a_trial_stays_and_crashes_stand_beside_it(stored: bool, tmp_path: Path) -> None:
    store = TrialStore(tmp_path if stored else None)
    store.put(_crash("first"))
    assert store.get("k") is None
    store.put(_crash("second"))
    store.put(_good(2.0))
    store.put(_good(3.0))
    store.put(_crash("third"))
    assert store.get("k") == _good(2.0)
    assert [t.outcome.error for _, t in store.crashes()] == ["first", "second", "third"]  # type: ignore[union-attr]
    if stored:
        assert _names(tmp_path) == [
            "k.crashed-1.json",
            "k.crashed-2.json",
            "k.crashed-3.json",
            "k.json",
        ]


# What of a `put` another process may come between, by the function of the store that is next.
@pytest.mark.parametrize("step", ["write_new_text", "write_numbered_text"])
@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("first_crashes", [True, False])
@pytest.mark.parametrize("second_crashes", [True, False])
def test_whenever_another_process_comes_between_nothing_is_lost(
    step: str,
    earlier: bool,
    first_crashes: bool,
    second_crashes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if earlier:
        TrialStore(tmp_path).put(_crash("earlier"))
    first = _crash("a", 2.0) if first_crashes else _good(2.0)
    second = _crash("b", 3.0) if second_crashes else _good(3.0)
    function: Callable[..., object] = getattr(sophon._records.store, step)
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            TrialStore(tmp_path).put(second)
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sophon._records.store, step, interrupted)
        TrialStore(tmp_path).put(first)
    store = TrialStore(tmp_path)
    if not calls:
        # This step is not taken: the other process comes after all.
        store.put(second)
    put = [first, second]
    good = [t for t in put if t.outcome.kind != "crashed"]
    held = store.get("k")
    assert held in good if good else held is None
    errors = sorted(t.outcome.error for _, t in store.crashes() if t is not None)  # type: ignore[union-attr]
    before = ["earlier"] if earlier else []
    assert errors == sorted([*before, *(t.outcome.error for t in put if t not in good)])  # type: ignore[union-attr]
    assert not list(tmp_path.glob(".*"))


def test_many_writers_at_once_each_keep_their_crash(tmp_path: Path) -> None:
    trials = [_crash(f"error {n}") if n % 2 else _good(n) for n in range(12)]
    ready, failed = threading.Barrier(len(trials)), []

    def put(one: Trial) -> None:
        ready.wait()
        try:
            TrialStore(tmp_path).put(one)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a failure
            failed.append(error)

    threads = [threading.Thread(target=put, args=(one,)) for one in trials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TrialStore(tmp_path)
    assert not failed
    assert store.get("k") in trials
    errors = {t.outcome.error for _, t in store.crashes() if t is not None}  # type: ignore[union-attr]
    assert errors == {f"error {n}" for n in range(1, 12, 2)}
    assert len(_names(tmp_path)) == 1 + len(errors)


def test_only_crashes_of_other_runs_of_the_same_trials_are_earlier_ones(tmp_path: Path) -> None:
    store = TrialStore(tmp_path)
    last = _crash("last", 5.0)
    for one in (
        _crash("first\nof two lines"),
        _crash("x").model_copy(update={"key": "other"}),
        last,
    ):
        store.put(one)
    (tmp_path / "k.crashed-9.json").write_text("")
    found = earlier_crashes(store, [last])
    assert [(c.trial, c.error) for c in found] == [("k", "first"), ("k", "")]
    # Crashed alike before: the trial itself says so.
    store.put(_crash("last", 7.0))
    assert earlier_crashes(store, [last]) == found
    assert earlier_crashes(store, []) == ()


def test_a_damaged_trial_is_no_missing_one(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete that file"):
        TrialStore(tmp_path).get("k")


def test_a_trial_under_anothers_name_is_refused(tmp_path: Path) -> None:
    held = trial("protected", (0.5,)).model_copy(update={"key": "a" * 64})
    store = TrialStore(tmp_path)
    store.put(held)
    (tmp_path / f"{held.key}.json").rename(tmp_path / f"{'b' * 64}.json")
    with pytest.raises(CheckpointError, match=r"aaaa.* under another's name: delete"):
        store.get("b" * 64)
    assert store.get(held.key) is None


@pytest.mark.parametrize("stored", [True, False])
def test_the_first_document_under_a_key_stays(stored: bool, tmp_path: Path) -> None:
    store = DocumentStore(tmp_path / "new" if stored else None)
    assert store.get("k") is None
    for value in (1, 2):
        store.put("k", {"value": value})
    assert store.get("k") == {"value": 1}
    assert store.get("other") is None


def test_earlier_crashes_come_in_the_order_of_the_trials() -> None:
    store = TrialStore(None)
    trials = [_good().model_copy(update={"key": key}) for key in ("b", "c", "a")]
    for key in ("a", "b", "c"):
        store.put(_crash(f"of {key}").model_copy(update={"key": key}))
    found = earlier_crashes(store, trials)
    assert [(c.trial, c.error) for c in found] == [(k, f"of {k}") for k in ("b", "c", "a")]


def test_temporary_names_differ_though_process_numbers_do_not(tmp_path: Path) -> None:
    names = {temporary_beside(tmp_path / "a") for _ in range(20)}
    assert len(names) == 20
    assert all(name.parent == tmp_path and name.name.startswith(".a.") for name in names)
