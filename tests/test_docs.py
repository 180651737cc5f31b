"""The documents speak of settings that exist."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]


def settings_of(text):
    """What looks like `group.key=value` or `group=option` in the packflex column of the table."""
    for line in text.splitlines():
        cells = line.split(" | ")
        if len(cells) > 4:
            yield from re.findall(
                r"`((?:packing|attention|tokenize|module|trainer|optimizer|steps|peft|model)[\w.]*)(?:=(\w+))?",
                cells[-1],
            )


def test_equivalents_exist():
    found = list(settings_of((ROOT / "docs" / "equivalents.md").read_text()))
    assert len(found) > 20
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("finetune", overrides=["peft=lora", "optimizer=adamw"])
        for name, value in found:
            if "." not in name:
                assert (ROOT / "conf" / name / f"{value}.yaml").is_file(), name
                continue
            group, key = name.split(".", 1)
            assert key in OmegaConf.to_container(config, resolve=False)[group], name


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
