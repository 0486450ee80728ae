"""Says before a results table is measured which columns can be: keys, data sets on the hub, submissions."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, get_token

from data_recipes.fetch.hub import Repository, read_repository
from data_recipes.fetch.remote_file import FetchError
from data_recipes.schema.sample import DataError
from train.config.schema import ConfigError
from train.evaluate.chat_server import ChatServer, text_part
from train.evaluate.evaluation_ranks import EvaluationError
from train.evaluate.suite_columns import Column

JUDGE_KEY = "OPENAI_API_KEY"
JUDGE_URL = "OPENAI_API_URL"
JUDGE_MODEL = "MODEL_VERSION"
"""Environment variables of lmms-eval for the judge."""
_DEFAULT_JUDGE_URL = "https://api.openai.com/v1"
_DEFAULT_JUDGE = "gpt-4o-2024-11-20"
_ENDPOINT = "/chat/completions"
_JUDGE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Judge:
    """The language model that rates answers.

    Attributes:
        url: of its API, without the endpoint.
        refusal: a sentence that says why it cannot be used; empty if it can.
    """

    url: str
    model: str
    refusal: str = ""

    def variables(self, column: Column) -> dict[str, str]:
        """Returns the environment variables by which a task of lmms-eval finds it."""
        url = self.url + (_ENDPOINT if column.judge_url == "endpoint" else "")
        return {"API_TYPE": "openai", JUDGE_URL: url, JUDGE_MODEL: self.model}


class Requirements:
    """What the columns need, as far as it is known before they are measured. The hub and the judge are asked once.

    Args:
        named: columns that the user has named; they are measured although a server scores them.
    """

    def __init__(self, named: frozenset[str]) -> None:
        self._named = named
        self._repositories: dict[str, Repository | str] = {}
        self._judge: Judge | None = None

    @property
    def is_offline(self) -> bool:
        """Whether data sets are read from the hub's cache alone."""
        return bool(constants.HF_HUB_OFFLINE)

    def judge(self) -> Judge:
        """The judge, which was asked for a first answer if there is a key."""
        if self._judge is None:
            self._judge = check_judge(os.environ)
        return self._judge

    def find_refusal(self, name: str, column: Column) -> str:
        """Returns a sentence that says why a column cannot be measured; empty if nothing is known against it."""
        if column.needs == "submission" and name not in self._named:
            return f"{column.server} scores the answers; --columns {name} writes the file for it"
        if column.token and not get_token():
            return f"the task needs a token of the hub: set HF_TOKEN, or run `hf auth login` (data {column.data})"
        if column.needs == "judge" and self.judge().refusal:
            return self.judge().refusal
        if not self.is_offline:
            repository = self.repository(column)
            if isinstance(repository, str):
                return repository
            return repository.refusal
        return ""

    def repository(self, column: Column) -> Repository | str:
        """Returns the data set on the hub, or a sentence that says why it cannot be listed."""
        if column.data not in self._repositories:
            try:
                self._repositories[column.data] = read_repository(f"datasets/{column.data}", "main")
            except (DataError, FetchError) as error:
                self._repositories[column.data] = str(error)
        return self._repositories[column.data]

    def describe_data(self, column: Column) -> dict[str, Any]:
        """Returns the commit and the licence of a column's data; empty if the hub was not asked."""
        repository = "" if self.is_offline else self.repository(column)
        if isinstance(repository, str):
            return {}
        return {"data_revision": repository.revision, "licence": repository.licence or "not stated"}


def check_judge(environment: Mapping[str, str]) -> Judge:
    """Returns the judge that the environment names, after one request.

    Without it a task would count every answer as wrong when the key is refused.
    """
    url = (environment.get(JUDGE_URL) or _DEFAULT_JUDGE_URL).rstrip("/").removesuffix(_ENDPOINT)
    model = environment.get(JUDGE_MODEL) or _DEFAULT_JUDGE
    key = environment.get(JUDGE_KEY, "")
    if not key:
        return Judge(url, model, f"a judge rates the answers: set {JUDGE_KEY} (and {JUDGE_URL} for another server)")
    try:
        server = ChatServer(url, model, key=key, timeout_s=_JUDGE_TIMEOUT_S, key_variable=JUDGE_KEY)
        server.ask([text_part("Reply with the word yes.")], 16, "a first request to the judge")
    except (ConfigError, EvaluationError) as error:
        return Judge(url, model, f"the judge cannot be used: {error}")
    return Judge(url, model)
