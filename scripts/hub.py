"""On the way to the Hugging Face Hub: what it would refuse is refused before the work, and told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from huggingface_hub import HfApi
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


def open_repository(api: HfApi, repository: str, repo_type: str, private: bool) -> tuple[str, str]:
    """Full name and address of a repository, which is created if it is not there."""
    # Not False where --private is absent: that would make it public where the organisation's default is private.
    url = api.create_repo(repository, repo_type=repo_type, private=private or None, exist_ok=True)
    if private:  # one that was there before may be public
        api.update_repo_settings(url.repo_id, repo_type=repo_type, private=True)
    return url.repo_id, str(url)
