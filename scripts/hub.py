"""On the way to the Hugging Face Hub: what it would refuse is refused before the work, and told in one line."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


@contextmanager
def plain_hub_errors(repository: str) -> Iterator[None]:
    """What fails on the way to the Hub is told as other mistakes are; what the Hub answers already is an `OSError`."""
    try:
        yield
    except OSError:
        raise
    except (HTTPError, RuntimeError) as error:  # no connection; an upload, which has the reason for its cause
        reasons = dict.fromkeys(str(reason) for reason in (error, error.__cause__) if reason is not None)
        raise ConnectionError(f"the push to {repository} failed: {' '.join(reasons)}") from error


def check_push(repository: str, repo_type: str) -> None:
    """Refuses, before the work of building, what the Hub would refuse after it."""
    validate_repo_id(repository)
    api = HfApi()
    with plain_hub_errors(repository):
        account = api.whoami()
        name = repository if "/" in repository else f"{account['name']}/{repository}"
        with suppress(RepositoryNotFoundError):  # it will be created
            api.auth_check(name, repo_type=repo_type, write=True)
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"{repository} needs a token that may write, that of {account['name']} may only read")


def push(
    folder: Path, repository: str, repo_type: str, private: bool, stale: Iterable[str], revision: str | None = None
) -> CommitInfo:
    """Makes a repository, or a branch of it, what a folder is, in one commit; both are created if they are not there.

    Args:
        stale: patterns of files that an earlier push may have had more of.
    """
    api = HfApi()
    with plain_hub_errors(repository):
        # Not False where --private is absent: that would make it public where the organisation's default is private.
        name = api.create_repo(repository, repo_type=repo_type, private=private or None, exist_ok=True).repo_id
        if private:  # one that was there before may be public
            api.update_repo_settings(name, repo_type=repo_type, private=True)
        if revision is not None:
            api.create_branch(name, branch=revision, repo_type=repo_type, exist_ok=True)
        return api.upload_folder(
            folder_path=folder, repo_id=name, repo_type=repo_type, revision=revision, delete_patterns=list(stale)
        )
