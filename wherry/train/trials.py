"""Trials: search the settings of a training run by Optuna; poor trials are ended early. Here, or on Ray.

    --tune trials=20                               learning rate, optimizer, batch, schedule, warm-up, data mixture
    --tune "trials=20,only=learning_rate;batch"    these alone; the rest stays as the job says
    --tune "trials=64,ray=true"                    trials at once on the machines of a Ray cluster

Source: Bergstra et al. 2011 (TPE), as Optuna has it: Akiba et al. 2019, arXiv:1907.10902; the median rule of
    Golovin et al. 2017 (Vizier) for pruning: a trial whose held-out loss is above the median of the others
    at the same share of the data ends. On Ray trials are not pruned: they run at once.
Idea:   minimise the held-out loss after the same number of samples: with another batch the steps change. The first
        trial is the job as it is given, so that the best is never worse. The best trial's model is the result.
Cost:   trials x the run. A killed search goes on where it was (Optuna's journal in the working folder).
Fails:  BadInput without held-out data, for a dimension that is not known; Missing without Optuna, or Ray.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry.errors import BadInput, Diverged, Missing
from wherry.journal import vacant
from wherry.knobs import coerce
from wherry.report import Report
from wherry.shelf import suggest
from wherry.train import loop
from wherry.train.job import Job

DIMENSIONS = ("learning_rate", "optimizer", "batch", "schedule", "warmup", "mixture")
LOOKS = 8  # at the held-out data in a trial
STARTUP = 4  # trials before any is pruned
SGD = 30.0  # its learning rates are about as many times AdamW's
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """trials: how many. only: dimensions that are searched. ray: on a Ray cluster. seed: of the search."""

    trials: int = 20
    only: tuple[str, ...] = DIMENSIONS
    ray: bool = False
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Tune":
        """Read "trials=20,only=learning_rate;batch,seed=1". Raises BadInput."""
        kinds = {"trials": int, "only": tuple[str, ...], "ray": bool, "seed": int}
        found: dict[str, Any] = {}
        for item in text.split(","):
            name, equals, value = item.partition("=")
            if name not in kinds or not equals:
                raise BadInput(f"--tune '{item}'{suggest(name, kinds)}: write trials=20,only=learning_rate;batch")
            found[name] = coerce("--tune", name, value, kinds[name])
        made = cls(**found)
        for name in made.only:
            if name not in DIMENSIONS:
                raise BadInput(f"--tune: no dimension '{name}'{suggest(name, DIMENSIONS)}: {', '.join(DIMENSIONS)}")
        if made.trials < 1:
            raise BadInput("--tune: one trial at least")
        return made


def drawn(trial: Any, job: Job, tune: Tune, out: Path, given: int) -> Job:
    """The job of one trial; its samples are `given` in number whatever the batch."""
    new: dict[str, Any] = {}
    if "optimizer" in tune.only:
        new["optimizer"] = trial.suggest_categorical("optimizer", ["adamw", "sgd", "muon"])
    if "learning_rate" in tune.only:
        times = trial.suggest_float("learning_rate", 0.1, 10.0, log=True)
        same = new.get("optimizer", job.optimizer) == "sgd" and job.optimizer != "sgd"
        new["learning_rate"] = job.learning_rate * times * (SGD if same else 1.0)
    if "batch" in tune.only:
        new["batch"] = max(1, round(job.batch * trial.suggest_categorical("batch", [0.5, 1.0, 2.0])))
    if "schedule" in tune.only:
        new["schedule"] = trial.suggest_categorical("schedule", ["cosine", "linear", "trapezoid"])
    steps = max(1, round(given / new.get("batch", job.batch)))
    if "warmup" in tune.only:
        new["warmup"] = round(steps * trial.suggest_categorical("warmup", [0.0, 0.05, 0.1]))
    new["cooldown"] = job.cooldown or steps // 3
    sources = [item.rpartition("*") for item in job.data.split(";")]
    if "mixture" in tune.only and len(sources) > 1:
        parts = []
        for i, (name, star, weight) in enumerate(sources):
            times = trial.suggest_float(f"weight {i}", 0.25, 4.0, log=True) if i else 1.0
            parts.append(f"{name if star else weight}*{(float(weight) if star else 1.0) * times:.4g}")
        new["data"] = ";".join(parts)
    return dataclasses.replace(
        job, **new, steps=steps, epochs=0.0, out=str(out), eval_every=max(1, steps // LOOKS), cache=cache(job)
    )  # fmt: skip


def cache(job: Job) -> str:
    """Where tokens and a teacher's answers lie: one place for all trials."""
    return job.cache or str(Path(job.out).parent / f".{Path(job.out).name}.tokens")


AS_GIVEN = {"optimizer": None, "learning_rate": 1.0, "batch": 1.0, "schedule": None, "warmup": 0.05}


def search(job: Job, tune: Tune, progress: Progress = loop.quiet) -> Report:
    """Try, and rename the best trial's model to `job.out`.

    Raises BadInput, Missing; Diverged when not one trial ended with a finite loss.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise Missing("--tune needs the package 'optuna'.\npip install 'wherry[tune]'") from error
    if not job.held_out:
        raise BadInput("--tune judges on held-out data: give --held-out")
    if not job.steps:
        raise BadInput("--tune compares trials of the same number of samples: give --steps, not --epochs")
    samples = job.steps * job.batch
    out = Path(job.out)
    vacant(out)
    folder = out.with_name(f".{out.name}.trials-{job.fingerprint[:12]}")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    backend = JournalFileBackend(str(folder / "optuna.log"))
    study = optuna.create_study(
        study_name="trials", storage=optuna.storages.JournalStorage(backend), load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=tune.seed, n_startup_trials=min(10, max(3, tune.trials // 3))),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=100 // LOOKS + 1),
    )  # fmt: skip
    if not study.trials:
        first = AS_GIVEN | {"optimizer": job.optimizer, "schedule": job.schedule}
        study.enqueue_trial({k: v for k, v in first.items() if k in tune.only})

    def one(trial: Any) -> float:
        mine = drawn(trial, job, tune, folder / f"trial-{trial.number}", samples)
        progress(trial.number, tune.trials, f"trial {trial.number + 1} of {tune.trials}")

        def judge(step: int, loss: float) -> None:
            trial.report(loss, round(100 * step / mine.steps))
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            return kept(folder, study, float(loop.run(mine, judge=judge)["held_out"]))
        except Diverged as error:
            raise optuna.TrialPruned from error
        finally:
            for left in folder.glob(f".trial-{trial.number}.partial-*"):
                shutil.rmtree(left, ignore_errors=True)

    ended = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    if tune.ray:
        at_once(study, job, tune, folder, samples, tune.trials - len(ended))
    else:
        study.optimize(one, n_trials=max(0, tune.trials - len(ended)))
    return settled(study, job, folder, out)


def kept(folder: Path, study: Any, loss: float) -> float:
    """Of all finished models on disk keep the best so far. Returns the loss."""
    known = {t.number: t.value for t in study.trials if t.value is not None}
    best = min(known.values(), default=float("inf"))
    for path in folder.glob("trial-*"):
        number = int(path.name.removeprefix("trial-"))
        worse = known.get(number, loss) > min(best, loss)
        if worse and path.is_dir():
            shutil.rmtree(path)
    return loss


def settled(study: Any, job: Job, folder: Path, out: Path) -> Report:
    """Rows of all trials; the best one's folder gets its name. Raises Diverged when there is none."""
    done = [t for t in study.trials if t.value is not None and t.state.name == "COMPLETE"]
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
        raise Diverged("no trial ended with a finite loss: lower the learning rate around which is searched")
    best = min(done, key=lambda t: t.value)
    report = Report(f"{len(study.trials)} trials of {job.recipe}")
    for trial in study.trials:
        told = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:.3g}'}" for k, v in trial.params.items())
        note = f"{told}; {'pruned' if trial.state.name == 'PRUNED' else trial.state.name.lower()}"
        loss = trial.value if trial.value is not None else (max(trial.intermediate_values.items()) or (0, None))[1] \
            if trial.intermediate_values else None  # fmt: skip
        report.add("held-out loss", f"trial {trial.number + 1}", loss, "nats", note=note)
    first = next((t for t in study.trials if t.number == 0 and t.value is not None), None)
    if first is not None:
        report.add("held-out loss as given", "", first.value, "nats")
    report.add("held-out loss of the best", f"trial {best.number + 1}", best.value, "nats")
    report.add("settings of the best", f"trial {best.number + 1}", json.dumps(best.params))
    (folder / f"trial-{best.number}").rename(out)
    shutil.rmtree(folder)
    return report


def at_once(study: Any, job: Job, tune: Tune, folder: Path, samples: int, count: int) -> None:
    """Trials on a Ray cluster, as many at once as it has CPUs; `job.out` must lie where all its machines see it."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise Missing("ray=true needs the package 'ray'.\npip install 'wherry[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    far = ray.remote(num_cpus=max(1, job.threads))(held_out)
    width = max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, job.threads))
    waiting: dict[Any, Any] = {}
    while count or waiting:
        while count and len(waiting) < width:
            trial = study.ask()
            mine = drawn(trial, job, tune, folder / f"trial-{trial.number}", samples)
            waiting[far.remote(dataclasses.asdict(mine))] = trial
            count -= 1
        (ended,), _ = ray.wait(list(waiting), num_returns=1)
        trial, loss = waiting.pop(ended), ray.get(ended)
        if loss is None:
            study.tell(trial, state=study_state("PRUNED"))
        else:
            study.tell(trial, kept(folder, study, loss))


def study_state(name: str) -> Any:
    """Optuna's name of a state."""
    import optuna

    return optuna.trial.TrialState[name]


def held_out(fields: dict[str, Any]) -> float | None:
    """The held-out loss of one job, on whatever machine this runs; None when it diverged."""
    try:
        return float(loop.run(Job.from_dict(fields))["held_out"])
    except Diverged:
        return None
