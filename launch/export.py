"""`longhaul export`."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.options import choose_images, choose_weights, find_target
from launch.view import shown_path


def export_checkpoint(
    console: Console,
    target: str,
    to: str,
    out: Path | None,
    weights: str,
    data: str | None,
    num_images: int,
    force: bool,
    runs: Path,
    threads: int,
    cache_dir: Path | None,
    cache_bytes: str | None,
) -> None:
    """`longhaul export`."""
    import torch

    from trainer.export.export import export
    from trainer.export.form import choose_form
    from trainer.run import cores_each
    from trainer.trained import load_trained, use_exact_statistics
    from trainer.weights import choose_checkpoint

    form, kind = choose_form(to), choose_weights(weights)
    run, checkpoint = find_target(target, runs)
    saved = choose_checkpoint(run, checkpoint)
    threads = threads or cores_each(1)
    torch.set_num_threads(threads)
    trained = load_trained(run, saved, kind, torch.device("cpu"), threads)
    ema = "-ema" if trained.averaged else ""
    out = (out or run.path / "export" / f"{run.name}-{saved.name}{ema}{form.suffix}").absolute()
    images = choose_images(data, cache_dir, cache_bytes)
    use_exact_statistics(trained, images)
    with images.open(run, "val", "train") as split:
        with console.status("Writing, loading again and comparing ..."):
            found = export(trained, form, split, out, num_images, force)
        kind_of_images = "held-out" if split.manifest.splits.get("val") else "training"
        console.print(f"{shown_path(str(saved))}, on {kind_of_images} images of {split.location}:", highlight=False)
    for line in found:
        console.print(escape(line), highlight=False)
    name = trained.recipe.model.name.rpartition(":")[2]
    usage = form.usage.format(path=shown_path(out), classes=trained.num_classes, name=name)
    console.print(f"[bold green]Exported:[/bold green] {escape(shown_path(out))}", highlight=False)
    console.print(f"Load it with {escape(usage)}", highlight=False)
