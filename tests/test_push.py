"""Pushes to a stand-in for the Hub on 127.0.0.1, and what a process without this package loads from there."""

import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hub_server import File, HubServer, Repository, hang_up, status
from huggingface_hub import ModelCard

from spaceexploreai.data.prices import read_prices
from spaceexploreai.scripts import evaluate
from spaceexploreai.scripts.forecasters import load_checkpoint
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer

DATASET, MODEL = "NEOAI/Stocks", "NEOAI/SpaceExploreAI-Small-Base-Regression-27M"
# Runs command lines of the script as they come: what is imported once serves them all.
WORKER = """
import contextlib, io, json, os, sys
import huggingface_hub.constants
from spaceexploreai.scripts import build_dataset, push_to_hub

answers = sys.stdout
for line in sys.stdin:
    order = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": order["token"]} if order["token"] else {})
    huggingface_hub.constants.HF_HUB_DISABLE_XET = not order["xet"]
    build_dataset.TICKERS_PER_FILE = order["tickers_per_file"]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            {"build": build_dataset, "push": push_to_hub}[order["script"]].main(order["arguments"])
        except SystemExit as exit_:
            code = exit_.code
        except Exception as error:
            code = repr(error)
    print(json.dumps([code, output.getvalue(), errors.getvalue()]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def server():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(server):
    server.reset()
    yield server
    assert [path for endpoint, path in server.asked if endpoint == "unknown"] == []


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    environment = server.environment(tmp_path_factory.mktemp("home"), token=None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORKER], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def order(worker):
    """A command line, which gives its exit code, what it printed, and its errors."""

    def run(script: str, *arguments, token: str | None = "hf_writes", xet: bool = False, tickers_per_file: int = 64):
        options = {"token": token, "xet": xet, "tickers_per_file": tickers_per_file}
        print(json.dumps({"script": script, "arguments": [*map(str, arguments)], **options}), file=worker.stdin)
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    return run


@pytest.fixture
def build(order):
    return partial(order, "build", "--config", "sft", "--stride", "64")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: HubServer, name: str = DATASET, kind: str = "datasets") -> dict[str, bytes]:
    """Files of a repository, without the one that the Hub puts into all."""
    files = hub.repositories[kind, name].files
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def run_elsewhere(environment: dict[str, str], code: str, *arguments, folder: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- a dataset -------------------------------------------------------------------------------------------------------

STRANGER = """
import sys
sys.modules["spaceexploreai"] = None  # any import of it raises ImportError
from datasets import load_dataset

repository, output = sys.argv[1:]
assert load_dataset(repository).num_rows == load_dataset(repository, "sft").num_rows
for config in ("series", "sft"):
    for split, dataset in load_dataset(repository, config).items():
        dataset.to_parquet(f"{output}/{config}-{split}.parquet")
"""
SPLITS = {"series": ["history"], "sft": ["train", "validation", "test"]}


def test_a_stranger_loads_what_was_built(hub, build, tmp_path):
    folder = tmp_path / "built"
    code, output, errors = build("--output-dir", folder, "--push-to-hub", DATASET, tickers_per_file=2)
    assert code == 0, errors
    assert output.splitlines()[-1] == f"pushed to {hub.api.url}/datasets/{DATASET}"
    assert pushed(hub) == contents(folder)
    assert not hub.repositories["datasets", DATASET].private
    run_elsewhere(hub.environment(tmp_path / "home", None), STRANGER, DATASET, tmp_path, folder=tmp_path)
    for config, split in [(config, split) for config, splits in SPLITS.items() for split in splits]:
        files = sorted((folder / config).glob(f"{split}-*.parquet"))
        assert len(files) == 3
        written = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
        loaded = pd.read_parquet(tmp_path / f"{config}-{split}.parquet")
        pd.testing.assert_frame_equal(loaded, written, check_exact=True)


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_push_deletes_what_an_earlier_one_had_more(hub, build, tmp_path, xet):
    if xet:
        pytest.importorskip("hf_xet")
    hub.xet_folder = tmp_path / "xet"
    kept = {"notes.md": File(b"mine"), "images/one.png": File(b"mine too")}
    there = {"dpo/train-00000-of-00001.parquet": File(b"pairs", large=True), **kept}
    repository = hub.repositories["datasets", DATASET] = Repository("datasets", DATASET)
    repository.add("main", repository.find("main").files | there, "by hand")
    for tickers_per_file, count in ((1, 5), (64, 1)):
        folder = tmp_path / f"built-{count}"
        command = ("--output-dir", folder), {"tickers_per_file": tickers_per_file, "xet": xet}
        if xet:  # what it carries, the storage must have
            build(*command[0], **command[1])
            hub.objects = {hashlib.sha256(content).hexdigest(): content for content in contents(folder).values()}
        code, _, errors = build(*command[0], "--push-to-hub", DATASET, **command[1])
        assert code == 0, errors
        assert len(list((folder / "series").iterdir())) == count
        assert pushed(hub) == contents(folder) | {path: file.content for path, file in kept.items()}
    assert (hub.count("grant_xet") > 0, hub.count("put_object") > 0) == (xet, not xet)
    assert len(list(repository.find("main").history())) == 4


VISITOR = """
import sys
sys.modules["spaceexploreai"] = None
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

repository, *tokens = sys.argv[1:]
for token in tokens:
    try:
        print(token, load_dataset(repository, "sft", split="test", token=token or False).num_rows)
    except DatasetNotFoundError as error:
        print(token, "refused")
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "public before"])
def test_private_is_private_before_there_is_anything_to_see(hub, build, tmp_path, there):
    if there:
        hub.repositories["datasets", DATASET] = Repository("datasets", DATASET)
    command = ("--output-dir", tmp_path / "built", "--push-to-hub", DATASET, "--private")
    assert build(*command)[0] == 0
    assert hub.repositories["datasets", DATASET].private
    order = [endpoint for endpoint, _ in hub.asked if endpoint in ("change_settings", "put_object", "commit")]
    assert (order[0], order[-1]) == ("change_settings", "commit")
    tokens = ["", "hf_stranger", "hf_reads"]
    seen = run_elsewhere(hub.environment(tmp_path / "home", None), VISITOR, DATASET, *tokens, folder=tmp_path)
    rows = pq.read_metadata(next(tmp_path.glob("built/sft/test-*"))).num_rows
    assert seen.splitlines() == [" refused", "hf_stranger refused", f"hf_reads {rows}"]


def test_a_name_without_an_owner_is_the_callers(hub, build, tmp_path):
    code, output, errors = build("--output-dir", tmp_path / "built", "--push-to-hub", "Stocks")
    assert code == 0, errors
    assert output.splitlines()[-1].endswith("/datasets/NEOAI/Stocks")
    assert pushed(hub) == contents(tmp_path / "built")


# --- a dataset that cannot be pushed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--push-to-hub", "datasets/NEOAI/Stocks"], "hf_writes", "'datasets/NEOAI/Stocks'"),
        (["--push-to-hub", "NEOAI/My Stocks"], "hf_writes", "'NEOAI/My Stocks'"),
        (["--push-to-hub", ""], "hf_writes", "Repo id must"),
        (["--private"], "hf_writes", "--push-to-hub"),
        (["--push-to-hub", DATASET], None, "no token found"),
        (["--push-to-hub", DATASET], "hf_mistyped", "Invalid user token"),
        (["--push-to-hub", "NEOAI/New"], "hf_reads", "may only read"),
        (["--push-to-hub", DATASET], "hf_stranger", "403 Forbidden"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_the_build(hub, build, tmp_path, arguments, token, message):
    hub.repositories["datasets", DATASET] = Repository("datasets", DATASET)
    code, output, errors = build("--output-dir", tmp_path / "built", *arguments, token=token)
    assert (code, output) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "built").exists()
    assert list(hub.repositories) == [("datasets", DATASET)]


FAILED = f"error: the push to {DATASET} failed: "
# What the Hub does, and what the line of the error says of it.
TROUBLES = {
    "create_repository": (status(403, "You have reached your limit"), ("You have reached your limit",)),
    "validate_card": (status(500), ("500 Internal Server Error",)),
    "preupload": (status(403, "Your storage is full"), ("Your storage is full",)),
    "put_object": (status(403, "Request has expired"), (FAILED, "uploading 's", "Request has expired")),
    "commit": (status(500, "Something broke"), ("Something broke",)),
    "change_settings": (hang_up, (FAILED, "Server disconnected")),
}


@pytest.mark.parametrize("endpoint", list(TROUBLES))
def test_a_push_that_fails_leaves_the_built_folder_and_the_repository(hub, build, tmp_path, endpoint):
    trouble, told = TROUBLES[endpoint]
    hub.troubles[endpoint].extend([trouble] * 4)  # that many large files
    command = ("--output-dir", tmp_path / "built", "--push-to-hub", DATASET, "--private")
    code, output, errors = build(*command)
    assert code == 2
    assert output.splitlines()[-1] == f"wrote {tmp_path / 'built'}"
    assert errors.splitlines()[-1].startswith("error: ")
    assert [part for part in told if part not in errors.splitlines()[-1]] == []
    assert "Traceback" not in errors
    built = contents(tmp_path / "built")
    assert {"README.md", "stocks.json"} < set(built)
    assert [repository.private for repository in hub.repositories.values()] in ([], [True])
    assert ("datasets", DATASET) not in hub.repositories or pushed(hub) == {}
    hub.troubles.clear()
    assert build(*command)[0] == 0
    assert pushed(hub) == contents(tmp_path / "built") == built


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(build, hub, tmp_path):
    hub.troubles["whoami"].append(hang_up)
    code, output, errors = build("--output-dir", tmp_path / "built", "--push-to-hub", DATASET)
    assert (code, output) == (2, "")
    assert errors == f"{FAILED}Server disconnected without sending a response.\n"


# --- a model ---------------------------------------------------------------------------------------------------------

UPLOADER = """
import sys
from huggingface_hub import HfApi

repository, *folders = sys.argv[1:]
api = HfApi()
api.create_repo(repository)
for folder in folders:
    print(api.upload_folder(folder_path=folder, repo_id=repository).oid)
"""
MODEL_STRANGER = """
import json, sys
sys.modules["spaceexploreai"] = None
import pandas as pd
import torch
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction, AutoTokenizer
)

repository, prices, output, *revisions = sys.argv[1:]
prices = pd.read_parquet(prices)
for revision in revisions:
    given = {"revision": revision, "trust_remote_code": True}
    extractor = AutoFeatureExtractor.from_pretrained(repository, **given)
    model = AutoModelForTimeSeriesPrediction.from_pretrained(repository, **given)
    assert AutoConfig.from_pretrained(repository, **given).to_dict() == model.config.to_dict()
    assert AutoModel.from_pretrained(repository, **given).num_parameters() <= model.num_parameters()
    with torch.inference_mode():
        outputs = model(**extractor(prices))
    extractor.decode(outputs, prices, model.config).to_parquet(f"{output}/{revision}.parquet")
    ids = AutoTokenizer.from_pretrained(repository, **given)("<bos><r3><eos>")["input_ids"]
    code = getattr(sys.modules[type(extractor).__module__], "RELEASE", None)
    print(json.dumps([ids, code]))
"""


@pytest.fixture(scope="module")
def releases(checkpoint, tmp_path_factory) -> list[Path]:
    """Two checkpoint folders that differ in weights, in settings and in code."""
    folders = [tmp_path_factory.mktemp(f"release-{number}") for number in (1, 2)]
    model, extractor = load_checkpoint(checkpoint)
    for number, folder in enumerate(folders, 1):
        model.mean_head.bias.data += number
        extractor.context_length -= number
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        SpaceExploreTokenizer(num_bins=10 * number).save_pretrained(folder)
        code = folder / "feature_extraction_spaceexplore.py"
        code.write_text(f"{code.read_text()}\nRELEASE = {number}\n")
    return folders


def test_a_stranger_gets_the_model_of_the_commit_that_is_asked_for(hub, releases, market, tmp_path):
    hub.largest_part = 100_000
    uploaded = run_elsewhere(hub.environment(tmp_path / "here"), UPLOADER, MODEL, *releases, folder=tmp_path).split()
    repository = hub.repositories["models", MODEL]
    assert [commit.oid for commit in repository.find("main").history()][:-1] == uploaded[::-1]
    weights = repository.find("main").files["model.safetensors"]
    assert weights.large
    assert weights.content == (releases[1] / "model.safetensors").read_bytes()
    assert hub.count("put_part") == 2 * -(-len(weights.content) // hub.largest_part)

    there = hub.environment(tmp_path / "there", None)
    arguments = (MODEL, market, tmp_path, uploaded[0], "main")
    said = run_elsewhere(there, MODEL_STRANGER, *arguments, folder=tmp_path).splitlines()
    for number, (folder, revision) in enumerate(zip(releases, (uploaded[0], "main"), strict=True), 1):
        model, extractor = load_checkpoint(folder)
        prices = read_prices(market)
        expected = extractor.decode(model(**extractor(prices)), prices, model.config)
        loaded = pd.read_parquet(tmp_path / f"{revision}.parquet")
        pd.testing.assert_frame_equal(loaded, expected, rtol=1e-6)
        ids = SpaceExploreTokenizer(num_bins=10 * number)("<bos><r3><eos>")["input_ids"]
        assert json.loads(said[number - 1]) == [ids, number]


# --- scripts/push_to_hub.py ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(checkpoint, market, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate.main(["--model", str(checkpoint), "--prices", str(market), "--output", str(folder / "forecasts.parquet")])
    return folder


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with its report, and with what a run leaves beside it."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    (folder / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/optimizer.bin", "training_args.bin"):
        (folder / name).write_bytes(b"stays here")
    return folder


STRANGER_WITH_THE_CARD = """
import sys
sys.modules["spaceexploreai"] = None
import pandas as pd
from huggingface_hub import ModelCard

repository, prices, output = sys.argv[1:]
(code,) = [part.split("```")[0] for part in ModelCard.load(repository).text.split("```python")[1:]]
prices = pd.read_parquet(prices)
exec(code)
table.to_parquet(output)
"""


def test_a_stranger_forecasts_with_what_was_pushed(hub, order, folder, evaluation, market, tmp_path):
    command = ("--model", folder, "--repo-id", MODEL, "--evaluation", evaluation)
    code, output, errors = order("push", *command)
    assert code == 0, errors
    files = pushed(hub, MODEL, "models")
    commit = hub.repositories["models", MODEL].find("main").oid
    assert output.splitlines()[-1].endswith(f"{MODEL}/commit/{commit}")
    assert {name for name in files if name.startswith("evaluation/")} >= {"evaluation/report.html"}
    assert {"checkpoint-2/optimizer.bin", "training_args.bin", "evaluation/forecasts.parquet"}.isdisjoint(files)
    card = ModelCard(files["README.md"].decode())
    scores = json.loads((evaluation / "metrics.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["CRPS skill over EWMA volatility, 5 d"] == pytest.approx(scores["5"]["crps_skill"]["model"])
    environment = hub.environment(tmp_path / "home", None)
    run_elsewhere(environment, STRANGER_WITH_THE_CARD, MODEL, market, tmp_path / "table.parquet", folder=tmp_path)
    model, extractor = load_checkpoint(folder)
    prices = read_prices(market)
    expected = extractor.decode(model(**extractor(prices)), prices, model.config)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), expected, rtol=1e-5)


def test_a_branch_is_pushed_to_alone_and_old_weights_go(hub, order, folder):
    assert order("push", "--model", folder, "--repo-id", MODEL)[0] == 0
    repository = hub.repositories["models", MODEL]
    main = repository.find("main")
    repository.add("main", main.files | {"model-00001-of-00002.safetensors": File(b"old", large=True)}, "by hand")
    before = repository.find("main")
    assert order("push", "--model", folder, "--repo-id", MODEL, "--revision", "next")[0] == 0
    assert repository.find("main") == before
    assert "model-00001-of-00002.safetensors" not in repository.find("next").files
    assert repository.find("next").files["model.safetensors"] == before.files["model.safetensors"]


def test_an_upload_that_breaks_off_is_repeated_and_never_seen_half(hub, order, folder):
    hub.troubles["put_object"].extend([status(403, "Request has expired")] * 4)
    code, _, errors = order("push", "--model", folder, "--repo-id", MODEL)
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: ")
    assert pushed(hub, MODEL, "models") == {}
    hub.troubles.clear()
    assert order("push", "--model", folder, "--repo-id", MODEL)[0] == 0
    weights = hub.repositories["models", MODEL].find("main").files["model.safetensors"]
    assert weights.content == (folder / "model.safetensors").read_bytes()


def test_a_dry_run_asks_nothing(hub, order, folder, build, tmp_path):
    hub.asked.clear()
    code, output, _ = order("push", "--model", folder, "--repo-id", MODEL, "--dry-run", "--private", token=None)
    assert (code, hub.asked) == (0, [])
    assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in output
    assert f"would go to {MODEL}, private" in output
    assert "optimizer.bin" not in output
    build("--output-dir", tmp_path / "built", token=None)
    code, output, _ = order("push", "--dataset", tmp_path / "built", "--repo-id", DATASET, "--dry-run", token=None)
    assert (code, hub.asked) == (0, [])
    assert "sft/test-00000-of-00001.parquet" in output


def test_a_dataset_goes_as_it_was_built(hub, order, build, tmp_path):
    build("--output-dir", tmp_path / "built")
    assert order("push", "--dataset", tmp_path / "built", "--repo-id", DATASET)[0] == 0
    assert pushed(hub) == contents(tmp_path / "built")


def without(name: str):
    return lambda folder: (folder / name).unlink()


def in_sample(folder: Path) -> None:
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text("{}")
    (folder / "evaluation" / "report.json").write_text('{"facts": {}, "notices": ["IN SAMPLE: seen"]}')


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("model.safetensors"), [], "model.safetensors"),
        (without("modeling_spaceexplore.py"), [], "does not carry its code: modeling_spaceexplore.py"),
        (without("pipeline_spaceexplore.py"), [], "does not carry its code: pipeline_spaceexplore.py"),
        (without("README.md"), [], "has no README.md"),
        (in_sample, ["--evaluation", "evaluation"], "is not for a model card. IN SAMPLE: seen"),
        (None, ["--evaluation", "nowhere"], "nowhere has no report.json"),
        (None, ["--repo-id", "a/b/c"], "'a/b/c'"),
    ],
)
def test_a_folder_that_others_could_not_use_is_refused(hub, order, folder, tmp_path, change, options, message):
    shutil.copytree(folder, tmp_path / "model")
    if change:
        change(tmp_path / "model")
    if options[:1] == ["--evaluation"]:
        options = ["--evaluation", tmp_path / "model" / options[1]]
    code, _, errors = order("push", "--model", tmp_path / "model", "--repo-id", MODEL, *options)
    assert code == 2
    assert message in errors.splitlines()[-1]
    assert ("models", MODEL) not in hub.repositories


# --- the stand-in itself ---------------------------------------------------------------------------------------------

LIBRARY = """
import pytest
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
)

api, anyone, stranger = HfApi(), HfApi(token=False), HfApi(token="hf_stranger")
repository = api.create_repo("NEOAI/Model").repo_id
with pytest.raises(HfHubHTTPError, match="409"):
    api.create_repo(repository)
with pytest.raises(HfHubHTTPError, match="rights to create"):
    stranger.create_repo("NEOAI/Other")

def upload(path, content, **options):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repository, **options).oid

def read(path, revision=None, api=api):
    return open(api.hf_hub_download(repository, path, revision=revision), "rb").read()

first = upload("a/b/large.bin", bytes(range(200)))
second = upload("a/small.txt", b"old")
api.create_tag(repository, tag="v1")
api.create_branch(repository, branch="try/it", revision=first)
third = upload("a/small.txt", b"new", parent_commit=second)
with pytest.raises(HfHubHTTPError, match="412"):
    upload("a/small.txt", b"newest", parent_commit=second)
fourth = upload("README.md", b"---\\npipeline_tag: time-series-forecasting\\n---\\n", revision="try/it")

# Revisions, and what there is not.
assert [commit.commit_id for commit in api.list_repo_commits(repository)][:3] == [third, second, first]
assert [read("a/small.txt", revision) for revision in ("main", "v1", second)] == [b"new", b"old", b"old"]
assert not api.file_exists(repository, "a/small.txt", revision="try/it")
assert api.model_info(repository, revision="try/it").pipeline_tag == "time-series-forecasting"
refs = api.list_repo_refs(repository)
assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": third, "try/it": fourth}
assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", second)]
api.delete_tag(repository, tag="v1")
api.delete_branch(repository, branch="try/it")
for revision in ("v1", "try/it", "0" * 40):
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repository, revision=revision)
with pytest.raises(EntryNotFoundError):
    read("a/none.txt")
with pytest.raises(RepositoryNotFoundError):
    api.model_info("NEOAI/None")

# Trees, a page at a time, and parts of files.
assert sorted(api.list_repo_files(repository)) == [".gitattributes", "a/b/large.bin", "a/small.txt"]
assert sorted(entry.path for entry in api.list_repo_tree(repository, "a")) == ["a/b", "a/small.txt"]
(info,) = api.get_paths_info(repository, ["a/b/large.bin", "none"])
assert (info.size, info.lfs.size, info.lfs.sha256 != info.blob_id) == (200, 200, True)
files = HfFileSystem()
assert files.glob(f"{repository}/**/*.txt") == [f"{repository}/a/small.txt"]
assert files.cat_file(f"{repository}/a/b/large.bin", start=50, end=60) == bytes(range(50, 60))
assert files.cat_file(f"{repository}/a/small.txt", start=1) == b"ew"

# Who may read and write.
assert read("a/small.txt", api=anyone) == b"new"
with pytest.raises(HfHubHTTPError, match="403"):
    stranger.delete_repo(repository)
api.update_repo_settings(repository, gated="auto")
for other in (anyone, stranger):
    assert other.model_info(repository).gated == "auto"
    with pytest.raises(GatedRepoError):
        other.hf_hub_download(repository, "a/b/large.bin")
api.update_repo_settings(repository, private=True, gated=False)
for other in (anyone, stranger):
    with pytest.raises(RepositoryNotFoundError):
        other.model_info(repository)
with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
    HfApi(token="hf_none").model_info(repository)
assert read("a/small.txt") == b"new"

api.delete_folder("a/b", repository)
folder = snapshot_download(repository)
assert api.list_repo_files(repository) == [".gitattributes", "a/small.txt"]
api.delete_repo(repository)
assert not api.repo_exists(repository)
"""


def test_the_stand_in_is_a_hub_to_the_library(hub, tmp_path):
    hub.page_size = 2
    run_elsewhere(hub.environment(tmp_path / "home"), LIBRARY, folder=tmp_path)
    assert hub.count("list_tree") > hub.count("delete_repository") == 2
