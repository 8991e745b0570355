"""The jobs of the study, in the order in which each finds what it needs."""

from __future__ import annotations

from LightningDiT.verdict.jobs import Job
from studies.convergence.arms import (
    ALIGNED,
    ARMS,
    PLAIN,
    TOKENIZER_END,
    TRANSFORMER,
    VISION_FILE,
    VISION_MODEL,
    Plan,
    run_name,
    start_name,
)


def jobs_of(plan: Plan) -> list[Job]:
    """Return every job of the study in their order: each needs what earlier ones make."""
    data, vision = ("--data-root", plan.data_root), plan.folder / VISION_FILE
    options = ("--model", VISION_MODEL, "--epochs", str(plan.vision_epochs), "--output", str(vision))
    jobs = [Job("vision", ("studies.train_vision_model", *data, *options), vision)]
    for name in (PLAIN, ALIGNED):
        jobs += _tokenizer_jobs(name, plan, data)
    names = [run_name(arm, seed) for seed in plan.seeds for arm in ARMS]
    names += [start_name(arm, seed) for seed in plan.seeds for arm in ARMS if arm.quick]
    for name in names:
        run, figures = plan.folder / name, plan.folder / f"{name}.json"
        config, output = ("--config", f"{run}.yaml"), ("--count", str(plan.count), "--output", str(figures))
        evaluate = ("studies.convergence.evaluate_checkpoints", *config, "--run", str(run), *data, *output)
        jobs.append(Job(name, ("LightningDiT.train", *config, "--output", str(run)), run / TRANSFORMER))
        jobs.append(Job(f"{name}-evaluated", evaluate, figures))
    return jobs


def _tokenizer_jobs(name: str, plan: Plan, data: tuple[str, str]) -> list[Job]:
    """Return the jobs that train a tokenizer, evaluate it, and encode the training images."""
    config = ("--config", str(plan.folder / f"tokenizer-{name}.yaml"))
    trained, evaluated, latents = (plan.folder / f"{what}-{name}" for what in ("tokenizer", "evaluation", "latents"))
    first = next(arm for arm in ARMS if arm.tokenizer == name)
    transformer = ("--config", str(plan.folder / f"{run_name(first, plan.seeds[0])}.yaml"))
    train = ("LightningDiT.train_tokenizer", *config, *data, "--output", str(trained))
    encode = ("LightningDiT.extract_features", *transformer, *data, "--output", str(latents))
    evaluate = ("LightningDiT.evaluate_tokenizer", *config, *data, "--features", "judge", "--output", str(evaluated))
    return [
        Job(f"tokenizer-{name}", train, trained / TOKENIZER_END),
        Job(f"latents-{name}", encode, latents / "latents_stats.pt"),
        Job(f"evaluation-{name}", evaluate, evaluated / "evaluation.json"),
    ]
