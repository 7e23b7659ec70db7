"""Every shipped recipe is whole: it loads, its reader takes its options, and it says where the set is from."""

from pathlib import Path

import pytest
from rich.console import Console

from mmit.data.readers import READERS
from mmit.data.recipe import Recipe, list_recipes, load_recipe, recipe_table
from mmit.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "data_recipes"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem != "custom")

# what the sets' own pages state; the others state no exact number
COUNTS = {
    "llava_pretrain_558k": 558_128,
    "llava_v1_5_mix665k": 665_298,
    "llava_next_data": 779_289,
    "pmc_vqa_v2": 152_603,
    "vision_flan": 186_103,
    "allava_caption_laion": 505_588,
    "allava_instruct_laion": 505_588,
    "allava_caption_vflan": 202_552,
    "allava_instruct_vflan": 203_065,
    "allava_text": 143_000,
    "sharegpt4v_cap100k": 102_025,
    "vqav2": 443_757,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_whole(name: str) -> None:
    recipe = load_recipe(SHIPPED / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.reader in READERS
    assert recipe.url.startswith("https://")
    assert recipe.paper.startswith("https://")
    assert all([recipe.about, recipe.licence, recipe.files, recipe.traps])
    assert recipe.shards == f"data/shards/{name}"
    assert recipe.records == COUNTS.get(name, 0)


def test_all_readers_but_the_users_own_forms_have_a_published_set() -> None:
    used = {load_recipe(SHIPPED / f"{name}.yaml").reader for name in NAMES}
    assert used == set(READERS) - {"messages", "captions", "questions"}


def test_recipes_are_listed_by_file_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipes = list_recipes()
    assert sorted(recipe.name for recipe in recipes) == sorted([*NAMES, "my_set"])
    console = Console(width=200)
    with console.capture() as seen:
        console.print(recipe_table(recipes))
    assert any(line.split()[:3] == ["vqav2", "join", "443,757"] for line in seen.get().splitlines())


def own(folder: Path, text: str) -> Recipe:
    path = folder / "own.yaml"
    path.write_text("name: own\nsource: a.json\nshards: s\n" + text)
    return load_recipe(path)


def test_a_mistake_in_the_options_names_the_nearest_one(tmp_path: Path) -> None:
    assert own(tmp_path, "reader: llava_json\noptions: {skip_with: [pcl]}\n").options == {"skip_with": ["pcl"]}
    with pytest.raises(
        ConfigError, match=r"own\.yaml: reader llava_json has no option 'skip_wth'; did you mean 'skip_with'"
    ):
        own(tmp_path, "reader: llava_json\noptions: {skip_wth: [pcl]}\n")
    with pytest.raises(
        ConfigError, match="option 'empty_answers': Input should be 'error', 'drop' or 'skip'; it is 'no'"
    ):
        own(tmp_path, "reader: llava_json\noptions: {empty_answers: 'no'}\n")
    with pytest.raises(ConfigError, match="option 'question': Field required"):
        own(tmp_path, "reader: table\n")
    with pytest.raises(ConfigError, match=r"no reader 'llava_jsn'; .*; did you mean 'llava_json'"):
        own(tmp_path, "reader: llava_jsn\n")
    with pytest.raises(ConfigError, match="reader messages has no option 'roles'"):
        own(tmp_path, "reader: messages\noptions: {roles: {}}\n")
    with pytest.raises(ConfigError, match="traps: 'one' is not of type list of sentences"):
        own(tmp_path, "reader: llava_json\ntraps: one\n")
    with pytest.raises(ConfigError, match=r"unknown key 'option'; did you mean 'options'"):
        own(tmp_path, "reader: llava_json\noption: {}\n")
