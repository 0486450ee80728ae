"""Uploads an export to a repository of the Hugging Face hub through its own client.

The client reads HF_ENDPOINT, HF_TOKEN and the proxies of the environment. A token is never part of a message.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from llava_next.model_directory import parse_hub_id
from train.config.schema import ConfigError

_NO_ACCOUNT = "the hub knows no account of yours: set HF_TOKEN to a token that may write, or run `hf auth login`"
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the errors of the client's HTTP library, which is another one from version to version of the client."""


def check_may_push(repository: str, *, public: bool) -> None:
    """Checks that there is an account, and that the repository does not exist with another visibility.

    Args:
        repository: ORG/NAME.
        public: whether everybody is to see it.

    Raises:
        ConfigError: otherwise, or the hub cannot be reached.
    """
    hub_id = parse_hub_id(repository)
    if hub_id is None or hub_id.revision is not None:
        raise ConfigError(f"--push {repository}: the name of a repository is ORG/NAME")
    api = HfApi()
    with _explained_errors(repository):
        api.whoami()
        try:
            is_private = bool(api.model_info(repository).private)
        except RepositoryNotFoundError:
            return
    if is_private == public:
        wanted, found = ("public", "private") if public else ("private", "public")
        advice = "leave out --public" if public else "add --public"
        raise ConfigError(
            f"--push {repository} would be {wanted}, but the repository exists and is {found}; {advice}, or choose "
            "another name"
        )


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads a directory as one commit; makes the repository, private unless `public`, if there is none.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: the hub refuses the upload, or cannot be reached.
    """
    api = HfApi()
    with _explained_errors(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model exported by train.export")
    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def _explained_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"--push {repository}: HF_HUB_OFFLINE is set; unset it") from error
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"--push {repository}: {_NO_ACCOUNT}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: _NO_ACCOUNT,
            403: "this account or token may not write there: use a token with write access, or another ORG",
        }
        reason = reasons.get(status, f"the hub answered with status {status}; try again later")
        raise ConfigError(f"--push {repository}: {reason}") from error
    except (_HTTP_ERROR, ConnectionError) as error:
        raise ConfigError(
            f"--push {repository}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); check the network "
            "and HF_ENDPOINT"
        ) from error
