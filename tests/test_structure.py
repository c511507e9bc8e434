"""Rules of the house that no linter knows, each tried on a planted violation before it is applied to the tree."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
import yaml
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig
from spaceexploreai.train.arguments import parse_run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "data", "evaluation", "scripts", "train")


def repository_files() -> list[Path]:
    """Tracked files and those that are new and not ignored; without git, all that `.gitignore` does not name."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in sorted(set(listed.split("\0"))) if (ROOT / name).is_file()]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return list(walk(ROOT, [".git", *(pattern.rstrip("/") for pattern in ignored)]))


def walk(folder: Path, ignored: list[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in ignored):
            yield from walk(path, ignored) if path.is_dir() else [path]


FILES = [path.relative_to(ROOT).as_posix() for path in repository_files()]
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".py")}
HUB_FILES = [name for name in SOURCES if re.fullmatch(r"\w+_spaceexplore\.py", name)]


# --- imports ---


class Import(NamedTuple):
    """One imported module: `names` of a `from` import, `level` its leading dots, `optional` inside try/ImportError."""

    module: str
    names: tuple[str, ...] = ()
    level: int = 0
    optional: bool = False

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def find_imports(source: str) -> list[Import]:
    tree = ast.parse(source)
    optional = {id(node) for attempt in ast.walk(tree) if is_import_attempt(attempt) for node in attempt.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), 0, id(node) in optional) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            found.append(Import(node.module or "", names, node.level, id(node) in optional))
    return found


def is_import_attempt(node: ast.AST) -> bool:
    return isinstance(node, ast.Try) and any(
        isinstance(handler.type, ast.Name) and handler.type.id in {"ImportError", "ModuleNotFoundError"}
        for handler in node.handlers
    )


def module_name(file: str) -> str:
    """`data/prices.py` is `spaceexploreai.data.prices`; the root `__init__.py` is `spaceexploreai`."""
    return ".".join(["spaceexploreai", *Path(file).with_suffix("").parts]).removesuffix(".__init__")


def imported_project_modules(source: str, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports; a relative import counts from the root, the one place for it."""
    found = set()
    for item in find_imports(source):
        absolute = f"spaceexploreai.{item.module}".rstrip(".") if item.level else item.module
        found |= {absolute, *(f"{absolute}.{name}" for name in item.names)} & modules
    return found


def reachable_modules(start: str, graph: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


# Upstream must not know downstream. The root package counts: it re-exports the model.
BEHIND = {
    "data": r"spaceexploreai|.*\.(modeling|pipeline)_\w+|.*\.(train|evaluation|scripts|benchmarks|app)(\..+)?",
    "evaluation": r"spaceexploreai|.*\.(modeling|configuration|pipeline)_\w+"
    r"|.*\.(data|train|scripts|benchmarks|app)(\..+)?",
    "train": r".*\.(scripts|benchmarks|app)(\..+)?",
    "": r".*\.(data|train|evaluation|scripts|benchmarks|app)(\..+)?",
}


def flow_violations(sources: dict[str, str]) -> list[str]:
    modules = {module_name(file) for file in sources}
    graph = {module_name(file): imported_project_modules(source, modules) for file, source in sources.items()}
    found = []
    for file in sources:
        folder = Path(file).parent.as_posix().removeprefix(".")
        if folder in BEHIND and file != "app.py":
            reached = sorted(reachable_modules(module_name(file), graph))
            found += [f"{file} reaches {module}" for module in reached if re.fullmatch(BEHIND[folder], module)]
    return found


@pytest.mark.parametrize(
    ("file", "statement", "reached"),
    [
        ("data/a.py", "from spaceexploreai.modeling_x import y", "spaceexploreai.modeling_x"),
        ("data/a.py", "from spaceexploreai import Model", "spaceexploreai"),
        ("data/a.py", "def f():\n    import spaceexploreai.train.sft as s", "spaceexploreai.train.sft"),
        ("data/a.py", "from spaceexploreai.feature_x import y", "spaceexploreai.modeling_x"),
        ("evaluation/a.py", "from spaceexploreai.data import prices", "spaceexploreai.data.prices"),
        ("train/sft.py", "from spaceexploreai.scripts.run import main", "spaceexploreai.scripts.run"),
        ("modeling_x.py", "from spaceexploreai.train import sft", "spaceexploreai.train.sft"),
        ("train/sft.py", "from spaceexploreai.benchmarks import speed", "spaceexploreai.benchmarks.speed"),
    ],
)
def test_flow_guard_sees_an_upstream_import(file, statement, reached):
    sources = {
        "__init__.py": "from .modeling_x import Model",
        "modeling_x.py": "",
        "feature_x.py": "from .modeling_x import y",
        "data/prices.py": "",
        "train/sft.py": "",
        "scripts/run.py": "",
        "benchmarks/speed.py": "",
    }
    assert flow_violations(sources | {file: ""}) == []
    assert f"{file} reaches {reached}" in flow_violations(sources | {file: statement})


def test_imports_point_one_way():
    assert flow_violations(SOURCES) == []


NETWORK_PACKAGES = {"torch", "transformers", "huggingface_hub"}
FRAME_FILES = ("feature_extraction_", "indicators_", "pipeline_")
# Without it a forecast has weekdays in place of the exchange's holidays, and says so.
OPTIONAL_PACKAGES = {"exchange_calendars"}


def hub_import_violations(file: str, source: str) -> list[str]:
    packages = NETWORK_PACKAGES | sys.stdlib_module_names
    if not file.startswith(("modeling_", "configuration_")):
        packages = packages | {"numpy"}
    if file.startswith(FRAME_FILES):
        packages = packages | {"pandas", "pandas_ta_classic"}
    found = []
    for item in find_imports(source):
        if item.level:
            allowed = item.level == 1 and re.fullmatch(r"\w+_spaceexplore", item.module) and "*" not in item.names
        elif item.optional:
            allowed = file.startswith(FRAME_FILES) and item.top in OPTIONAL_PACKAGES
        else:
            allowed = item.top in packages
        if not allowed:
            found.append(f"{file} imports {'.' * item.level}{item.module}")
    return found


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("modeling_spaceexplore.py", "import numpy as np"),
        ("modeling_spaceexplore.py", "def forward():\n    import einops"),
        ("modeling_spaceexplore.py", "from . import configuration_spaceexplore"),
        ("modeling_spaceexplore.py", "from ..x_spaceexplore import y"),
        ("modeling_spaceexplore.py", "from .data.x_spaceexplore import y"),
        ("modeling_spaceexplore.py", "from .layers import y"),
        ("modeling_spaceexplore.py", "from spaceexploreai.configuration_spaceexplore import SpaceExploreConfig"),
        ("tokenization_spaceexplore.py", "import pandas"),
        ("tokenization_spaceexplore.py", "try:\n    import exchange_calendars\nexcept ImportError:\n    pass"),
        ("pipeline_spaceexplore.py", "try:\n    import pywt\nexcept ImportError:\n    pass"),
        ("pipeline_spaceexplore.py", "try:\n    import exchange_calendars\nexcept ValueError:\n    pass"),
    ],
)
def test_hub_import_guard_sees(file, statement):
    assert len(hub_import_violations(file, statement)) == 1


@pytest.mark.parametrize("file", HUB_FILES)
def test_hub_files_import_only_what_the_hub_gives_them(file):
    assert hub_import_violations(file, SOURCES[file]) == []


def loader_disagreements(path: Path) -> list[str]:
    """Where the Hub loader, which finds relative imports by regular expression, sees something else than Python."""
    imports = find_imports(path.read_text(encoding="utf-8"))
    relative = {item.module for item in imports if item.level}
    required = {item.top for item in imports if not item.level and not item.optional}
    missing = {name for name in relative if not (path.parent / f"{name}.py").is_file()}
    found = [f"relative import of {name!r}" for name in set(get_relative_imports(path)) ^ relative]
    found += [f"requirement of {name!r}" for name in set(get_imports(path)) ^ required]
    return sorted(found + [f"no file for {name!r}" for name in missing])


@pytest.mark.parametrize(
    ("source", "disagreement"),
    [
        ('"""An example:\n    from .other_spaceexplore import Foo\n"""', "relative import of 'other_spaceexplore'"),
        ("from . import other_spaceexplore", "relative import of ''"),
        ("from .absent_spaceexplore import Foo", "no file for 'absent_spaceexplore'"),
        ("if is_pandas_available():\n    import pandas", "requirement of 'pandas'"),
        ("try:\n    import pandas\nexcept ValueError:\n    pass", "requirement of 'pandas'"),
    ],
)
def test_loader_guard_sees(tmp_path, source, disagreement):
    (tmp_path / "other_spaceexplore.py").touch()
    path = tmp_path / "planted_spaceexplore.py"
    path.write_text(source, encoding="utf-8")
    assert disagreement in loader_disagreements(path)


@pytest.mark.parametrize("file", HUB_FILES)
def test_hub_loader_sees_the_imports_that_python_sees(file):
    assert loader_disagreements(ROOT / file) == []


def bare_import_violations(file: str, source: str, project_names: set[str]) -> list[str]:
    """Imports of the project outside the Hub files that would load a second copy of it, with different classes."""
    found = []
    for item in find_imports(source):
        wrong = file != "__init__.py" if item.level else item.top in project_names
        found += [f"{file} imports {'.' * item.level}{item.module}"] if wrong else []
    return found


@pytest.mark.parametrize(
    "statement",
    ["from .prices import x", "import data.prices", "from prices import x", "import modeling_spaceexplore"],
)
def test_bare_import_guard_sees(statement):
    names = {"data", "prices", "modeling_spaceexplore"}
    assert len(bare_import_violations("data/windows.py", statement, names)) == 1
    assert bare_import_violations("data/windows.py", "from spaceexploreai.data.prices import x", names) == []


@pytest.mark.parametrize("file", [name for name in SOURCES if name not in HUB_FILES])
def test_the_project_is_imported_by_its_full_name(file):
    project_names = {Path(name).stem for name in SOURCES if not name.startswith("tests/")} | set(FOLDERS)
    assert bare_import_violations(file, SOURCES[file], project_names - {"__init__"}) == []


# --- names of files ---

NAMELESS = {"utils.py", "helpers.py", "common.py", "misc.py"}
LIBRARIES = {
    "datasets",
    "evaluate",
    "jax",
    "lightgbm",
    "pandas_ta",
    "pywt",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
}
# The command has the name users look for; the library of that name is no dependency, and the test below keeps it so.
NAMED_LIKE_A_LIBRARY = {"benchmarks/data.py", "scripts/evaluate.py"}
ROOT_FILES = {"__init__.py", "app.py"}


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def library_names() -> set[str]:
    """Top-level names that a module in a folder of scripts would shadow, that folder being first on the path."""
    project = project_table()["project"]
    requirements = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    dependencies = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}
    return LIBRARIES | dependencies | sys.stdlib_module_names


def name_violations(files: list[str], libraries: set[str]) -> list[str]:
    found = []
    for file in files:
        path = Path(file)
        shadows = len(path.parts) > 1 and path.parts[0] in FOLDERS and path.stem in libraries | set(FOLDERS)
        stray = len(path.parts) == 1 and file not in ROOT_FILES and not re.fullmatch(r"\w+_spaceexplore\.py", file)
        if path.name in NAMELESS or stray or (shadows and file not in NAMED_LIKE_A_LIBRARY):
            found.append(file)
    return found


@pytest.mark.parametrize(
    "file",
    [
        "data/utils.py",
        "tests/helpers.py",
        "data/data.py",
        "data/datasets.py",
        "train/evaluate.py",
        "train/trl.py",
        "train/types.py",
        "conftest.py",
        "modeling.py",
    ],
)
def test_name_guard_sees(file):
    assert name_violations([file, "scripts/evaluate.py", "data/prices.py"], library_names()) == [file]


def test_files_have_names_of_their_own():
    assert name_violations(list(SOURCES), library_names()) == []


def test_nothing_imports_the_library_that_a_script_is_named_like():
    taken = {Path(name).stem for name in NAMED_LIKE_A_LIBRARY}
    assert [name for name, source in SOURCES.items() for item in find_imports(source) if item.top in taken] == []


def test_every_folder_of_code_is_packaged():
    packages = {module_name(name) for name in SOURCES if name.endswith("__init__.py")}
    folders = {module_name(f"{Path(name).parent}/__init__.py") for name in SOURCES if not name.startswith("tests/")}
    assert packages == folders == set(project_table()["tool"]["setuptools"]["packages"])


# --- what code must not do ---

SERIALISERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_ATTRIBUTES = {"sys.path", "torch.load", "torch.save", "pd.read_pickle"}
# The original's checkpoints are torch files; they are read without the code that may be in them.
READS_TORCH_FILES = "scripts/convert_original.py"
WRITES_TORCH_FILES = "tests/test_legacy.py"  # for it to read


def forbidden_code(file: str, source: str) -> list[str]:
    """Path manipulation, and file formats that run code when they are read."""
    nodes = list(ast.walk(ast.parse(source)))
    safe = {id(node.func) for node in nodes if file == READS_TORCH_FILES and loads_weights_only(node)}
    forbidden = FORBIDDEN_ATTRIBUTES - ({"torch.save"} if file == WRITES_TORCH_FILES else set())
    found = [item.module for item in find_imports(source) if item.top in SERIALISERS]
    found += ["sys.path" for item in find_imports(source) if item.module == "sys" and "path" in item.names]
    for node in nodes:
        if isinstance(node, ast.Attribute) and id(node) not in safe:
            name = ast.unparse(node)
            found += [name] if name in forbidden or node.attr == "to_pickle" else []
    return [f"{file} uses {name}" for name in found]


def loads_weights_only(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(
        keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        for keyword in node.keywords
    )


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("train/sft.py", "import sys\nsys.path.insert(0, '.')"),
        ("train/sft.py", "from sys import path"),
        ("train/sft.py", "def f():\n    import pickle"),
        ("train/sft.py", "from joblib import load"),
        ("train/sft.py", "frame.to_pickle('x')"),
        ("train/sft.py", "torch.save(model, 'x')"),
        ("train/sft.py", "torch.load('x', weights_only=True)"),
        ("tests/test_legacy.py", "torch.load('x', weights_only=True)"),
        ("scripts/convert_original.py", "torch.save(model, 'x')"),
        ("scripts/convert_original.py", "torch.load('x')"),
        ("scripts/convert_original.py", "torch.load('x', weights_only=False)"),
    ],
)
def test_forbidden_code_guard_sees(file, statement):
    assert len(forbidden_code(file, statement)) == 1


def test_forbidden_code_guard_permits_reading_original_weights():
    assert forbidden_code("scripts/convert_original.py", "torch.load('x', weights_only=True)") == []
    assert forbidden_code("tests/test_legacy.py", "torch.save(weights, 'x')") == []


@pytest.mark.parametrize("file", list(SOURCES))
def test_no_path_manipulation_and_no_pickles(file):
    assert forbidden_code(file, SOURCES[file]) == []


# Where labels are made, and there alone, code looks ahead.
MAKES_LABELS = "data/windows.py"


def looks_ahead(source: str) -> list[str]:
    """Calls that put a later row's value into an earlier row."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(node) for node in calls if isinstance(node.func, ast.Attribute) and is_backwards(node)]


def is_backwards(call: ast.Call) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if call.func.attr in {"shift", "diff", "pct_change"}:
        periods = call.args[0] if call.args else keywords.get("periods")
        return isinstance(periods, ast.UnaryOp) and isinstance(periods.op, ast.USub)
    centred = "center" in keywords and ast.unparse(keywords["center"]) != "False"
    return call.func.attr in {"bfill", "backfill", "interpolate"} or (call.func.attr == "rolling" and centred)


@pytest.mark.parametrize(
    "statement",
    ["c.shift(-1)", "c.shift(periods=-h)", "c.diff(-1)", "c.pct_change(-1)", "c.rolling(5, center=True)", "c.bfill()"],
)
def test_look_ahead_guard_sees(statement):
    assert looks_ahead(statement) == [statement]


def test_look_ahead_guard_permits_looking_back():
    assert looks_ahead("c.shift(1).diff().rolling(5, center=False).mean()") == []


@pytest.mark.parametrize("file", [name for name in SOURCES if not name.startswith("tests/") and name != MAKES_LABELS])
def test_code_looks_ahead_only_where_labels_are_made(file):
    assert looks_ahead(SOURCES[file]) == []


# --- sizes ---

FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 15
CLASS_LINES = 200
MODELING_LINES = 1300


def lengths(source: str, kind: type | tuple[type, ...]) -> dict[str, int]:
    """Lines of each definition, without its decorators and its docstring."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kind):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
            docstring = first.end_lineno - first.lineno + 1 if documented else 0
            found[f"{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1 - docstring
    return found


def function_lengths(source: str) -> dict[str, int]:
    return lengths(source, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_length_counts_code_without_its_docstring():
    source = '@cached\ndef f():\n    """One.\n\n    Two.\n    """\n    a = 1\n    return a\n\nclass C:\n    x = 1\n'
    assert function_lengths(source) == {"f:2": 3}
    assert lengths(source, ast.ClassDef) == {"C:10": 2}


@pytest.mark.parametrize("file", list(SOURCES))
def test_functions_and_classes_are_small(file):
    functions, classes = function_lengths(SOURCES[file]), lengths(SOURCES[file], ast.ClassDef)
    assert {name: length for name, length in functions.items() if length > FUNCTION_LINES} == {}
    assert {name: length for name, length in classes.items() if length > CLASS_LINES} == {}


def test_the_modeling_file_can_be_read_in_one_sitting():
    source = SOURCES["modeling_spaceexplore.py"]
    assert len(source.splitlines()) < MODELING_LINES
    assert median(function_lengths(source).values()) <= MEDIAN_FUNCTION_LINES


# --- recipes and configuration ---

RECIPE_CONFIGS = [name for name in FILES if re.fullmatch(r"recipes/[^/]+/(config|t2t)\.json", name)]
RECIPE_RUNS = [name for name in FILES if re.fullmatch(r"recipes/[^/]+/[^/]+\.yaml", name)]
SFT_RUNS = [name for name in RECIPE_RUNS if re.fullmatch(r"sft\w*\.yaml", Path(name).name)]


def test_there_are_recipes():
    assert "recipes/tiny/config.json" in RECIPE_CONFIGS
    assert {"recipes/accelerate/cpu.yaml", "recipes/tiny/sft.yaml"} <= set(RECIPE_RUNS)


def unknown_fields(recipe: dict) -> set[str]:
    """Keys that the configuration would keep without anyone reading them."""
    return set(recipe) - set(SpaceExploreConfig().to_dict())


def test_recipe_guard_sees_an_unknown_field():
    assert unknown_fields({"hidden_sise": 64, "hidden_size": 64}) == {"hidden_sise"}


@pytest.mark.parametrize("file", RECIPE_CONFIGS)
def test_recipe_is_a_configuration(file):
    recipe = json.loads((ROOT / file).read_text(encoding="utf-8"))
    config = SpaceExploreConfig(**recipe).to_dict()
    assert unknown_fields(recipe) == set()
    assert {name: config[name] for name in recipe} == recipe


@pytest.mark.parametrize("file", RECIPE_RUNS)
def test_recipe_is_a_mapping(file):
    assert isinstance(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("file", SFT_RUNS)
def test_recipe_is_a_run(file):
    assert parse_run(["--config", str(ROOT / file)]).model is not None


@pytest.mark.parametrize("file", SFT_RUNS)
def test_run_rejects_an_unknown_key(file, tmp_path):
    planted = tmp_path / "sft.yaml"
    planted.write_text((ROOT / file).read_text(encoding="utf-8") + "\nlearning_rat: 0.1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_run(["--config", str(planted)])


# Fields that only the library reads, each with its reader.
READ_BY_TRANSFORMERS = {
    "bos_token_id": "transformers.generation.GenerationConfig",
    "eos_token_id": "transformers.generation.GenerationConfig",
    "tie_word_embeddings": "transformers.modeling_utils.PreTrainedModel",
    "use_cache": "transformers.utils.generic.merge_with_config_defaults",
}


def config_fields(source: str) -> set[str]:
    (config,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}


def config_reads(source: str) -> set[str]:
    """Names read as `config.<name>` or `<anything>.config.<name>`."""
    reads = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "attr", None) or getattr(node.value, "id", "")
            reads |= {node.attr} if owner == "config" or owner.endswith("_config") else set()
    return reads


def unread_fields(config_source: str, sources: list[str], attribute_map: dict[str, str]) -> set[str]:
    reads = set().union(*map(config_reads, sources))
    aliased = {target for alias, target in attribute_map.items() if alias in reads}
    return config_fields(config_source) - reads - aliased - set(READ_BY_TRANSFORMERS)


def test_config_guard_sees_a_field_that_nobody_reads():
    config = "class Config(Base):\n    model_type = 'x'\n    width: int = 1\n    depth: int = 1\n    size: int = 1\n"
    reader = "def f(self, config):\n    config.size = self.config.width + args.depth\n"
    assert unread_fields(config, [reader], {}) == {"depth", "size"}
    assert unread_fields(config, [reader, "model.config.n_layers"], {"n_layers": "depth"}) == {"size"}


def test_every_config_field_is_read():
    config_source = SOURCES["configuration_spaceexplore.py"]
    # What only a test, a benchmark or the picture of the network shows does nothing.
    idle = r"configuration_spaceexplore\.py|(tests|benchmarks)/.*|scripts/draw_architecture\.py"
    readers = [name for name in SOURCES if not re.fullmatch(idle, name)]
    sources = [SOURCES[name] for name in readers]
    assert unread_fields(config_source, sources, SpaceExploreConfig.attribute_map) == set()


@pytest.mark.parametrize("field", list(READ_BY_TRANSFORMERS))
def test_the_library_reads_what_we_leave_to_it(field):
    module, function = READ_BY_TRANSFORMERS[field].rsplit(".", 1)
    assert field in inspect.getsource(getattr(importlib.import_module(module), function))


# --- files ---

LARGEST_FILE = 1_000_000
# Spelled so that this file holds none itself.
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:root|home|work|tmp|Users)/")


def machine_paths(text: str) -> list[str]:
    return [line for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_machine_path_guard_sees():
    line = "open('/" + "home/someone/prices.csv')"
    assert machine_paths(f"import os\n{line}\n") == [line]
    assert machine_paths("https://example.com/home/page, data/tmp/x, ./tmp/") == []


@pytest.mark.parametrize("file", FILES)
def test_file_is_small_and_knows_no_machine(file):
    content = (ROOT / file).read_bytes()
    assert len(content) <= LARGEST_FILE or file.endswith(".safetensors")
    assert machine_paths(content.decode("utf-8", errors="ignore")) == []


def newest_version(changelog: str) -> str:
    return re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)[1]


def test_versions_agree():
    assert newest_version("# Changelog\n\n## [0.2.0] - Unreleased\n\n## [0.1.0] - 2026-01-01\n") == "0.2.0"
    assert newest_version((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")) == project_table()["project"]["version"]
