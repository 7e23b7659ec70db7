"""What is watched and written while a stage trains: the log and where it goes, held-out samples, spikes of the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from mmit.config.data import Source
from mmit.config.sections import Section


class WandB(Section):
    """A run of Weights & Biases (https://wandb.ai) that gets what the log gets."""

    project: Annotated[str, Field(min_length=1)]
    """Its name there; it is made where it does not exist."""
    entity: str = ""
    """The team; empty is your own account's."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` keeps everything in the stage's folder, for ``wandb sync`` later."""


class Trackio(Section):
    """A run of trackio (https://github.com/gradio-app/trackio) that gets what the log gets."""

    project: Annotated[str, Field(min_length=1)]
    """The name under which its page lists the runs."""
    space: str = ""
    """The Hugging Face Space that shows it; empty keeps it on this machine."""


class Log(Section):
    """What is written while training."""

    every_steps: PositiveInt = 1
    """Steps between lines of the log; metrics.jsonl holds every step."""
    by_source: bool = False
    """Also write the loss of each source of the mixture, as ``loss_by_source``."""
    update_ratio_every: NonNegativeInt = 100
    """Steps between measurements of how far an update moves the weights of each part, as a share of their norm; 0 never
    measures. That step keeps a second copy of this rank's part of the master weights."""
    mfu: bool | Literal["auto"] = "auto"
    """Measure what the devices reach in a matrix product (under a second, at the start), and tell which share of it a
    step reaches; ``auto`` does so on GPUs."""
    tensorboard: bool = False
    """Also write event files (needs the extra ``track``)."""
    wandb: WandB | None = None
    """Also write to Weights & Biases (needs the extra ``wandb``)."""
    trackio: Trackio | None = None
    """Also write to trackio (needs the extra ``trackio``)."""


class Evaluate(Section):
    """Held-out samples that are measured while training: their loss, and what the pictures are worth in it."""

    mix: Annotated[list[Source], Field(min_length=1)]
    """The held-out data sets; none of their samples may be trained on."""
    every_steps: PositiveInt = 500
    """Steps between measurements; there is one at the end too."""
    samples: PositiveInt = 256
    """Most samples of each data set, chosen at random."""
    visual_gain: bool = False
    """Also measure with a blank picture and with another sample's: how much higher the loss is then is what the
    pictures are worth."""
    text: str = "none"
    """Text without pictures whose loss is measured too, also before step 1, to see whether the language model keeps
    what it knew: ``probe`` (24 short questions that come with mmit), or a directory of shards; ``none``: no text."""
    answers: NonNegativeInt = 0
    """Of so many of the samples, also write the greedy answer to their first question, in ``answers.jsonl``."""
    answer_tokens: PositiveInt = 64
    """The longest such answer."""

    @field_validator("mix")
    @classmethod
    def _each_sample_once(cls, mix: list[Source]) -> list[Source]:
        if any(source.epochs != 1.0 or source.samples is not None or source.weight is not None for source in mix):
            raise ValueError("held-out samples are measured once each: take 'epochs', 'samples' and 'weight' out")
        return mix


class Spike(Section):
    """What to do with a step whose loss jumps; it is known before the update. A loss that is not finite always ends."""

    action: Literal["stop", "skip", "warn"] = "stop"
    """``stop`` ends the run before the update; ``skip`` leaves the update out, so that weights and moments stay as they
    are; ``warn`` only tells it."""
    factor: Annotated[float, Field(gt=1.0)] = 3.0
    """A loss above so many times the median of the last ones is a spike."""
    window: Annotated[int, Field(ge=3, le=10_000)] = 50
    """The last losses, of steps that made an update; nothing is judged before there are so many."""
    limit: NonNegativeInt = 10
    """Updates of the stage that ``skip`` may leave out; the next spike ends the run."""
