"""The models and the data that the systems are compared on, made on the spot.

``make_parts`` writes a CLIP tower and a Llama with random weights, as directories of transformers. mmit composes them;
the other system opens the composition, fresh connector included, as one LLaVA directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samples import SYSTEM, Writer, vocabulary, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 0
LEARNING_RATE = 1e-4
SAMPLES_PER_ROW = 8
ROWS_PER_STEP = 2
SAMPLES_PER_STEP = SAMPLES_PER_ROW * ROWS_PER_STEP
TEMPLATES = {1: "plain", 2: "vicuna"}
TRAINED = {1: ("connector",), 2: ("connector", "language_model")}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of a CLIP ViT and a Llama that go together."""

    pixels: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    inner: int
    layers: int
    heads: int
    rows: int

    @property
    def image_tokens(self) -> int:
        """Patches of 14 pixels in a picture."""
        return (self.pixels // 14) ** 2


SIZES = {
    "tiny": Size(
        pixels=112,
        vision_width=192,
        vision_layers=4,
        vision_heads=3,
        width=256,
        inner=688,
        layers=6,
        heads=4,
        rows=8192,
    ),
    "small": Size(
        pixels=168,
        vision_width=384,
        vision_layers=6,
        vision_heads=6,
        width=640,
        inner=1728,
        layers=12,
        heads=10,
        rows=16384,
    ),
}


@dataclass(frozen=True)
class World:
    """Where everything of one size lies."""

    folder: Path
    size: Size

    @property
    def tower(self) -> Path:
        """The CLIP directory."""
        return self.folder / "clip"

    @property
    def language_model(self) -> Path:
        """The Llama directory, tokenizer included."""
        return self.folder / "llama"

    def whole(self, stage: int) -> Path:
        """The same two with the fresh connector that mmit starts a stage with, as one LLaVA directory."""
        return self.folder / f"llava-stage{stage}"

    @property
    def images(self) -> Path:
        """The pictures."""
        return self.folder / "images"

    def records(self, stage: int) -> Path:
        """LLaVA JSON of a stage."""
        return self.folder / f"stage{stage}.json"

    def shards(self, stage: int) -> Path:
        """The same records, converted."""
        return self.folder / f"stage{stage}"

    def run_file(self, stage: int) -> Path:
        """mmit's run file of a stage."""
        return self.folder / f"stage{stage}.yaml"


def make_parts(world: World) -> None:
    """Write the tower and the language model with random weights."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    size = world.size
    torch.manual_seed(SEED)
    tower = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.pixels,
        patch_size=14,
        projection_dim=size.vision_width,
    )
    CLIPVisionModel(tower).save_pretrained(world.tower)
    CLIPImageProcessor(
        size={"shortest_edge": size.pixels}, crop_size={"height": size.pixels, "width": size.pixels}
    ).save_pretrained(world.tower)
    llama = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.rows,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(llama).save_pretrained(world.language_model)
    make_tokenizer(world.language_model)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer that needs about one token for a word of ``samples.vocabulary``, and give it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = vocabulary()
    often = f"{SYSTEM} USER: ASSISTANT: {words[0]}"
    core.train_from_iterator([*(f" {word} {word} {word}" for word in words), *[often] * 100], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=4096,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_data(world: World, stage: int, *, steps: int) -> None:
    """Write the samples of a stage as LLaVA JSON with JPEGs, and convert them with ``mmit data convert``'s function."""
    from mmit.data.convert import Conversion, convert

    writer = Writer(stage=stage, image_tokens=world.size.image_tokens, seed=SEED)
    records = list(islice(writer.records(), steps * SAMPLES_PER_STEP))
    write_records(records, world.records(stage), world.images)
    convert(
        Conversion(
            reader="llava_json",
            source=world.records(stage),
            target=world.shards(stage),
            name=f"stage{stage}",
            images=world.images,
        ),
        processes=1,
        overwrite=True,
        progress=False,
    )


def run_file(world: World, stage: int, *, length: int, seed: int) -> dict[str, Any]:
    """The run file of one stage; everything that is not said here is mmit's default."""
    return {
        "name": f"stage{stage}",
        "output": str(world.folder / "runs"),
        "seed": seed,
        "precision": "fp32",
        "model": {
            "encoder": {"type": "transformers", "path": str(world.tower), "resize": "crop"},
            "connector": {"type": "mlp", "depth": 2},
            "language_model": {"path": str(world.language_model), "template": "vicuna"},
        },
        "stages": {
            "measured": {
                "train": dict.fromkeys(TRAINED[stage], LEARNING_RATE),
                "data": {
                    "mix": [{"shards": str(world.shards(stage))}],
                    "template": TEMPLATES[stage],
                    # read in the training process, as the other system does, so that the work falls into its own step
                    "workers": 0,
                },
                "batch": {"length": length, "tokens_per_step": length * ROWS_PER_STEP},
                "optim": {"schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0, "clip_norm": 1.0},
            }
        },
        "launch": {"threads_per_rank": 1},
    }
