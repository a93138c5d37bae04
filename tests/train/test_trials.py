"""Trials: the search finds what is better, ends what is worse, goes on after a kill, and starts from the teacher."""

import dataclasses
from pathlib import Path

import pytest

from tests.conftest import write_llama
from wherry.checkpoint import Checkpoint
from wherry.data import shipped
from wherry.errors import BadInput
from wherry.train import loop, trials
from wherry.train.job import Job


def job(folder: Path, **more: object) -> Job:
    text = shipped("calibration").read_text(encoding="utf8")
    for name, part in (("a", text[:6000]), ("b", text[6000:9000]), ("held", text[9000:11000])):
        (folder / f"{name}.txt").write_text(part, encoding="utf8")
    fields = {"model": str(write_llama(folder / "m", layers=1)), "out": str(folder / "out"), "length": 16, "steps": 8,
              "data": f"{folder / 'a.txt'};{folder / 'b.txt'}*2", "held_out": str(folder / "held.txt"), "batch": 6,
              "learning_rate": 1e-7, "threads": 1}  # fmt: skip
    return Job(**(fields | more))  # type: ignore[arg-type]


def test_a_search_beats_a_bad_rate_and_writes_the_best(tmp_path: Path) -> None:
    given = job(tmp_path)
    tune = trials.Tune.parse("trials=5,only=learning_rate;optimizer;mixture,seed=3")
    report = trials.search(given, tune)
    rows = {row.what: row for row in report.rows}
    assert float(rows["held-out loss of the best"].value) < float(rows["held-out loss as given"].value)
    assert len([row for row in report.rows if row.what == "held-out loss"]) == 5
    assert Checkpoint.open(tmp_path / "out").module() is not None
    assert not [p for p in tmp_path.iterdir() if "trials" in p.name]


def test_a_poor_trial_is_ended_and_its_folder_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[int, int]] = []
    number = iter(range(100))

    def fake(mine: Job, judge: object) -> dict[str, float]:
        """Losses by hand: each trial is worse than the one before, from the first look on."""
        own = next(number)
        for step in range(mine.eval_every, mine.steps, mine.eval_every):
            looks.append((own, step))
            judge(step, 1.0 + own)  # type: ignore[operator]
        Path(mine.out).mkdir()
        return {"held_out": 1.0 + own}

    monkeypatch.setattr(loop, "run", fake)
    report = trials.search(job(tmp_path, steps=80), trials.Tune.parse("trials=8,only=learning_rate"))
    whole = max(len([1 for own, _ in looks if own == i]) for i in range(8))
    assert all(len([1 for own, _ in looks if own == i]) == whole for i in range(trials.STARTUP))
    assert all(len([1 for own, _ in looks if own == i]) < whole for i in range(trials.STARTUP, 8))
    assert len([row for row in report.rows if row.note and row.note.endswith("pruned")]) == 4
    assert (tmp_path / "out").is_dir()


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(mine: Job, judge: object) -> dict[str, float]:
        ran.append(mine.out)
        if len(ran) == 3:
            raise KeyboardInterrupt
        Path(mine.out).mkdir()
        return {"held_out": float(len(ran))}

    monkeypatch.setattr(loop, "run", fake)
    tune = trials.Tune.parse("trials=4,only=learning_rate")
    with pytest.raises(KeyboardInterrupt):
        trials.search(job(tmp_path), tune)
    left = [p for p in tmp_path.iterdir() if "trials-" in p.name]
    assert len(left) == 1
    trials.search(job_of(tmp_path), tune)
    assert len(ran) == 5  # two before, the killed one, two more
    assert not left[0].exists()


def job_of(folder: Path) -> Job:
    """The same job, its files left as they are."""
    return Job(
        model=str(folder / "m"), out=str(folder / "out"), length=16, steps=8, batch=6, learning_rate=1e-7, threads=1,
        data=f"{folder / 'a.txt'};{folder / 'b.txt'}*2", held_out=str(folder / "held.txt"),
    )


def test_another_batch_sees_as_many_samples(tmp_path: Path) -> None:
    class Fixed:
        def suggest_categorical(self, name: str, options: list) -> object:
            return {"optimizer": "sgd", "batch": 0.5, "schedule": "linear", "warmup": 0.1}[name]

        def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
            return 2.0

    made = trials.drawn(Fixed(), job(tmp_path), trials.Tune(), tmp_path / "t", 48)
    assert made.batch == 3
    assert made.steps * made.batch == 48
    assert made.learning_rate == pytest.approx(2e-7 * trials.SGD)
    assert made.data.split(";")[1].endswith("*4")
    assert made.warmup == 2


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    for wrong in ("trial=3", "trials=0", "trials=x", "trials=3,only=colour", "trials"):
        with pytest.raises(BadInput):
            trials.Tune.parse(wrong)
    with pytest.raises(BadInput, match="held-out"):
        trials.search(job(tmp_path, held_out=""), trials.Tune(trials=1))


def test_a_run_begins_with_the_teachers_layers(tmp_path: Path) -> None:
    teacher = write_llama(tmp_path / "t", layers=4)
    given = job(tmp_path, teacher=str(teacher), model=str(teacher), recipe="kl", init_from="teacher:layers=2", steps=1)
    loop.run(given)
    made, of = Checkpoint.open(tmp_path / "out"), Checkpoint.open(teacher)
    assert made.hf_config.num_hidden_layers == 2
    moved = made.weight("model.layers.1.mlp.up_proj.weight") - of.weight("model.layers.3.mlp.up_proj.weight")
    assert float(moved.abs().max()) < 1e-5
    with pytest.raises(BadInput, match="teacher"):
        loop.run(dataclasses.replace(given, teacher="", recipe="ce", out=str(tmp_path / "no")))


@pytest.mark.slow
def test_trials_on_ray_are_judged_like_local_ones(tmp_path: Path) -> None:
    """The same seed draws the same first trials; the first, as given, has the same held-out loss wherever it ran."""
    pytest.importorskip("ray", reason="pip install 'wherry[ray]'")
    found = []
    for ray in ("false", "true"):
        (tmp_path / ray).mkdir()
        report = trials.search(job(tmp_path / ray), trials.Tune.parse(f"trials=3,only=learning_rate,ray={ray}"))
        rows = {row.what: row for row in report.rows}
        assert len([row for row in report.rows if row.what == "held-out loss"]) == 3
        assert Checkpoint.open(tmp_path / ray / "out").module() is not None
        assert not [p for p in (tmp_path / ray).iterdir() if "trials" in p.name]
        found.append(rows["held-out loss as given"].value)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
