"""Commands that the documents give have the options that they use."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").glob("*.md"))]
# A program of ours and what follows it, to the end of the line or of the code; lines may be continued.
PROGRAM = re.compile(
    r"(?:python|accelerate launch(?: --\S+(?: [\w./]+)?)*) ((?:scripts|train|benchmarks)/\w+)\.py([^`\n|]*)"
)
OLD = {"LOG.md"}  # tells what was run, on the code of its day
YAML = "--config"  # read before there is a parser


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Programs, and the options that they are given."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [(program, re.findall(r"(?<!\S)\[?(--[A-Za-z][\w-]*)", rest)) for program, rest in PROGRAM.findall(joined)]


@cache
def options_of(program: str) -> str:
    """What the program's --help shows; benchmarks hand options on."""
    module = importlib.import_module(f"spaceexploreai.{program.replace('/', '.')}")
    with pytest.MonkeyPatch.context() as patch:
        shown = []
        patch.setattr("argparse.ArgumentParser.print_help", lambda self, file=None: shown.append(self.format_help()))
        with pytest.raises(SystemExit):
            module.main(["--help"])
    return shown[0]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in OLD], ids=lambda path: path.name)
def test_options_exist(path):
    unknown = [
        (program, option)
        for program, options in commands(path.read_text(encoding="utf-8"))
        for option in options
        if not program.startswith("benchmarks") and option != YAML
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", options_of(program))
    ]
    assert unknown == []


def test_programs_exist():
    for path in DOCUMENTS:
        for program, _ in commands(path.read_text(encoding="utf-8")):
            assert (ROOT / f"{program}.py").is_file(), f"{path.name}: {program}"


def test_the_check_sees_an_option_that_is_not_there():
    first, second = "scripts/forecast.py --model X \\\n    --tickers A --horizn 5", "scripts/forecast.py --as-of D"
    text = f"`python {first}` and `python {second}`"
    assert commands(text) == [
        ("scripts/forecast", ["--model", "--tickers", "--horizn"]),
        ("scripts/forecast", ["--as-of"]),
    ]
    assert "--horizn" not in options_of("scripts/forecast")
    assert "--as-of" in options_of("scripts/forecast")
