from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_contours import LEAF_SPEC, tiny_data, tiny_net, tiny_task, trainer

import crbp
from crbp.losses import evidential_loss, expected_probability, focal_loss
from crbp.models import FeedForwardNet
from crbp.tasks import ContourTask, FrobeniusPenalty, LipschitzPenalty, PredictionWriter

pytestmark = pytest.mark.filterwarnings(LEAF_SPEC)


class Spy(pl.Callback):
    """Keeps what is logged at every step and in every epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def batch() -> dict[str, Any]:
    return next(iter(tiny_data().train_dataloader()))  # type: ignore[no-any-return]


def test_everything_is_logged(tmp_path: Path) -> None:
    spy, task = Spy(), tiny_task()
    fit = trainer(tmp_path, callbacks=[spy])
    fit.fit(task, tiny_data())
    logged = {name: float(value) for name, value in fit.callback_metrics.items()}
    of_run = {"loss", "focal", "penalty", "spectral_penalty", "residual", "backward_terms", "backward_residual"}
    assert {f"train/{name}" for name in of_run | {"backward_failed", "backward_fell_back"}} <= set(logged)
    quality = {"f1", "iou", "precision", "recall", "balanced_accuracy", "loss", "residual", "penalty"}
    assert {f"val/{name}" for name in quality | {"spectral_radius", "spectral_radius_converged"}} <= set(logged)
    assert logged["train/backward_terms"] == 3
    for step in spy.steps:
        ramp = step["train/penalty_weight"] / task.penalty.weight  # type: ignore[union-attr]
        settling = task.residual_weight * step["train/residual"] ** 2
        settling += task.spectral_weight * step["train/spectral_penalty"]
        total = step["train/focal"] + step["train/penalty_weight"] * step["train/penalty"] + ramp * settling
        assert step["train/loss"] == pytest.approx(total)


def test_failed_solves_are_counted_over_the_epoch(tmp_path: Path) -> None:
    # No residual passes this limit, so each of the 5 solves counts as diverged and falls back.
    strict = crbp.RBP(crbp.Neumann(terms=1), on_divergence="fallback", max_residual=1e-9)
    fit = trainer(tmp_path, limit_val_batches=0)
    fit.fit(tiny_task(strict), tiny_data())
    assert fit.callback_metrics["train/backward_failed"] == 5
    assert fit.callback_metrics["train/backward_fell_back"] == 5


def test_feedforward_logs_nothing_of_a_run(tmp_path: Path) -> None:
    fit = trainer(tmp_path)
    fit.fit(ContourTask(FeedForwardNet(4, 3, depth=2)), tiny_data())
    assert not [name for name in fit.callback_metrics if "residual" in name or "penalty" in name or "radius" in name]
    assert "val/f1" in fit.callback_metrics


def test_predictions_of_an_evidential_task_are_the_probabilities_that_its_loss_is_of() -> None:
    task, given = tiny_task(loss="evidential", predict_steps=True), batch()
    with torch.no_grad():
        logits = task.net(given["image"]).logits
        found = task.predict_step(given, 0)
    torch.testing.assert_close(found["probability"], expected_probability(logits)[:, 1])
    torch.testing.assert_close(found["steps"][:, -1], found["probability"])


def test_an_annealed_weight_needs_an_end_of_training(tmp_path: Path) -> None:
    task = ContourTask(tiny_net(crbp.BPTT()), loss="evidential", schedule="constant", warmup=0.0)
    with pytest.raises(crbp.SettingsError, match="kl_weight=0"):
        trainer(tmp_path, max_epochs=-1).fit(task, tiny_data())


def test_weight_against_wrong_evidence_rises_through_training(tmp_path: Path) -> None:
    seen: list[float] = []

    class Watched(ContourTask):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            logits = self.net(batch["image"]).logits.detach()
            risk, both = (evidential_loss(logits, batch["mask"], weight) for weight in (0.0, 1.0))
            loss = super().training_step(batch, batch_idx)
            seen.append(float((loss.detach() - risk) / (both - risk)))
            return loss

    task = Watched(tiny_net(crbp.BPTT()), loss="evidential", kl_weight=0.5)
    fit = trainer(tmp_path)
    fit.fit(task, tiny_data())
    assert seen == pytest.approx([0.5 * step / 5 for step in range(5)], abs=1e-4)
    assert "train/focal" not in fit.callback_metrics
    assert float(fit.callback_metrics["val/loss"]) > 0


@pytest.mark.filterwarnings("ignore:You are trying to .self.log... but the .self.trainer. reference is not registered")
def test_supervision_of_all_steps_is_the_mean_of_the_losses() -> None:
    task = tiny_task(crbp.BPTT(), supervision="all", penalty=None)
    given = batch()
    prediction = task.net(given["image"], every_step=True)
    each = torch.stack([focal_loss(logits, given["mask"]) for logits in prediction.steps])
    torch.testing.assert_close(task.training_step(given, 0), each.mean())


@pytest.mark.parametrize("reduction", ["norm", "mean_square", "sum_square"])
def test_penalty_is_that_of_the_core(reduction: Any) -> None:
    run = tiny_net()(batch()["image"]).run
    penalty = LipschitzPenalty(weight=2.0, bound=0.3, reduction=reduction)
    torch.testing.assert_close(penalty(run), crbp.lipschitz_penalty(run, bound=0.3, reduction=reduction))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_task(supervision="all"), "keeps the graph of every step"),
        (lambda: tiny_task(crbp.TruncatedBPTT(window=2), supervision="all"), "keeps the graph of every step"),
        (lambda: tiny_task(supervision="some"), "supervision must be one of"),
        (lambda: tiny_task(schedule="linear"), "schedule must be one of"),
        (lambda: tiny_task(learning_rate=0.0), "learning_rate must be finite and above 0"),
        (lambda: tiny_task(warmup=1.0), "warmup must lie in"),
        (lambda: tiny_task(beta2=1.0), "beta2 must lie in"),
        (lambda: tiny_task(penalty=None, penalty_ramp=0.5), "has no penalty to raise"),
        (lambda: tiny_task(gamma=-1.0), "gamma must be finite"),
        (lambda: tiny_task(loss="hinge"), "loss must be one of"),
        (lambda: tiny_task(loss="evidential", gamma=1.0), "gamma=1.0 is of the focal loss"),
        (lambda: tiny_task(kl_weight=0.5), "kl_weight=0.5 is of the evidential loss"),
        (lambda: tiny_task(loss="evidential", kl_weight=-0.5), "kl_weight must be finite"),
        (lambda: tiny_task(weight_decay=-1.0), "weight_decay must be finite"),
        (lambda: ContourTask(FeedForwardNet(4, 3), penalty=LipschitzPenalty(weight=1)), "needs a recurrent network"),
        (lambda: ContourTask(FeedForwardNet(4, 3), supervision="all"), "needs a recurrent network"),
        (lambda: ContourTask(FeedForwardNet(4, 3), predict_steps=True), "needs a recurrent network"),
        (lambda: LipschitzPenalty(weight=0.0), "leave the penalty out"),
        (lambda: LipschitzPenalty(weight=1.0, bound=1.0), "bound must lie in"),
        (lambda: LipschitzPenalty(weight=1.0, reduction="max"), "reduction must be one of"),  # type: ignore[arg-type]
        (lambda: FrobeniusPenalty(weight=1.0, samples=0), "samples must be a whole number"),
        (lambda: tiny_data(batch_size=0), "batch_size must be a whole number"),
        (lambda: tiny_data(batch_size=23), "batch_size must be at most train_size"),
        (lambda: tiny_data(workers=-1), "workers must be a whole number"),
        (lambda: tiny_data(seed=-1), "seed must be a whole number"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule_rises_then_follows_a_cosine(tmp_path: Path) -> None:
    spy = Spy()
    task = tiny_task(learning_rate=1.0, warmup=0.2)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[spy], gradient_clip_val=1e-9).fit(task, tiny_data())
    cosine = [(1 + torch.cos(torch.tensor(torch.pi * step / 10)).item()) / 2 for step in range(10)]
    rise = [1 / 3, 2 / 3, *[1.0] * 8]
    assert spy.rates == pytest.approx([a * b for a, b in zip(rise, cosine, strict=True)])


def test_constant_schedule(tmp_path: Path) -> None:
    spy = Spy()
    task = tiny_task(schedule="constant", warmup=0.0, learning_rate=0.5)
    trainer(tmp_path, limit_val_batches=0, callbacks=[spy], gradient_clip_val=1e-9).fit(task, tiny_data())
    assert spy.rates == [0.5] * 5


def test_penalty_ramp_is_geometric_over_two_decades(tmp_path: Path) -> None:
    spy = Spy()
    task = tiny_task(penalty=LipschitzPenalty(weight=3.0), penalty_ramp=0.4)
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[spy]).fit(task, tiny_data())
    found = [step["train/penalty_weight"] for step in spy.steps]
    assert found == pytest.approx([3 * 10 ** (2 * (step / 4 - 1)) for step in range(4)] + [3.0] * 6)


def test_second_moment_decay_reaches_adam(tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fitted.fit(tiny_task(beta2=0.9), tiny_data())
    assert fitted.optimizers[0].param_groups[0]["betas"] == (0.9, 0.9)


def test_schedule_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        trainer(tmp_path, max_epochs=-1, max_time="00:00:10:00").fit(tiny_task(), tiny_data())


def test_spectral_radius_under_inference_mode_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(crbp.CrbpError, match="inference_mode=False"):
        trainer(tmp_path, inference_mode=True).validate(tiny_task(), tiny_data(), verbose=False)
    trainer(tmp_path, inference_mode=True).validate(
        tiny_task(spectral_radius=False, penalty=None), tiny_data(), verbose=False
    )


@pytest.mark.parametrize("cell", ["HGRU", "ConvLSTM", "ConvGRU"])
def test_bf16_mixed_precision(tmp_path: Path, cell: str) -> None:
    fit = trainer(tmp_path, precision="bf16-mixed", max_epochs=6, gradient_clip_val=1.0)
    spy = Spy()
    fit.callbacks.append(spy)  # type: ignore[attr-defined]
    task = ContourTask(tiny_net(cell=cell), penalty=LipschitzPenalty(weight=1.0), learning_rate=2e-2)
    fit.fit(task, tiny_data())
    losses = [step["train/loss"] for step in spy.steps]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(parameter.dtype == torch.float32 for parameter in task.parameters())


def test_predictions(tmp_path: Path) -> None:
    task = tiny_task(predict_steps=True)
    found = trainer(tmp_path).predict(task, tiny_data())
    assert found is not None
    assert [len(part["probability"]) for part in found] == [4, 4, 2]  # type: ignore[call-overload, index]
    part: Any = found[0]
    assert part["steps"].shape == (4, 4, 12, 12)
    torch.testing.assert_close(part["steps"][:, -1], part["probability"])
    assert float(part["probability"].min()) >= 0
    assert float(part["probability"].max()) <= 1


def test_predictions_as_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    task = tiny_task()
    writer = PredictionWriter(tmp_path / "out")
    found: Any = trainer(tmp_path, callbacks=[writer]).predict(task, tiny_data())
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{i:07d}.png" for i in range(10)]
    with image.open(files[5]) as picture:
        pixels = torch.tensor(list(picture.tobytes())).view(12, 12) / 255
    torch.testing.assert_close(pixels, found[1]["probability"][1], rtol=0, atol=0.5 / 255 + 1e-6)


def test_checkpoint_holds_no_pickled_object(tmp_path: Path) -> None:
    fit = trainer(tmp_path)
    fit.fit(tiny_task(), tiny_data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert "net" not in stored["hyper_parameters"]
    again = ContourTask.load_from_checkpoint(tmp_path / "a.ckpt", net=tiny_net(), weights_only=True)
    assert again.learning_rate == 5e-3
