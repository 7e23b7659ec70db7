"""What is said about held-out losses, and when nothing is said."""

from pathlib import Path

from mmit.train.verdicts import best_of, text_change, verdicts


def lines(held_out: list[float], training: list[float | None], text: list[float] | None = None) -> list[dict]:
    found = [
        {"step": 10 * number, "loss": loss, "training_loss": trained}
        for number, (loss, trained) in enumerate(zip(held_out, training, strict=True))
    ]
    for line, loss in zip(found, text or [], strict=False):
        line["text_loss"] = loss
    return found


TRAINING = [None, 3.0, 2.0, 1.0, 0.5]


def test_two_measurements_above_the_best_while_training_falls_are_overfitting(tmp_path: Path) -> None:
    measured = lines([4.0, 3.0, 2.5, 2.6, 2.7], TRAINING)
    assert best_of(measured) == (20, 2.5)
    said = verdicts(measured, tmp_path)["overfitting"]
    assert "was best at step 20, 2.5000, and is 2.7000 now" in said
    assert "the training loss fell from 2.0000 to 0.5000" in said
    assert "save.keep_best" in said  # that step's model was not kept
    kept = tmp_path / "checkpoints" / "step-000020" / "model"
    kept.mkdir(parents=True)
    assert f"take the model of that step, {kept}" in verdicts(measured, tmp_path)["overfitting"]


def test_a_rise_that_is_short_or_small_or_shared_by_the_training_loss_is_not(tmp_path: Path) -> None:
    assert not verdicts(lines([4.0, 3.0, 2.6, 2.5, 2.7], TRAINING), tmp_path)
    assert not verdicts(lines([4.0, 3.0, 2.5, 2.51, 2.52], TRAINING), tmp_path)
    assert not verdicts(lines([4.0, 3.0, 2.5, 2.6, 2.7], [None, 3.0, 2.0, 2.1, 2.2]), tmp_path)
    assert not verdicts([], tmp_path)
    assert not verdicts(lines([float("nan")] * 3, [None, 2.0, 1.0]), tmp_path)


def test_a_run_that_only_harms_was_best_before_it(tmp_path: Path) -> None:
    said = verdicts(lines([1.0, 1.5, 2.0], [None, 1.0, 0.5]), tmp_path)
    assert "no training was better than none" in said["overfitting"]


def test_text_that_is_forgotten_is_said_beyond_a_tenth(tmp_path: Path) -> None:
    fine = lines([3.0, 2.0, 1.0], [None, 2.0, 1.0], [2.0, 2.3, 2.2])
    assert text_change(fine) == "2.0000 -> 2.2000 (+10.0%)"
    assert not verdicts(fine, tmp_path)
    lost = lines([3.0, 2.0, 1.0], [None, 2.0, 1.0], [2.0, 2.1, 2.24])
    assert "forgets: its loss on plain text went 2.0000 -> 2.2400 (+12.0%)" in verdicts(lost, tmp_path)["text"]
    assert text_change(lost[:1]) == ""
