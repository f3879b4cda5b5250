"""`--push ID`: an export goes to a repository of the Hugging Face hub.

In: a folder and an id. Out: its files there. Decided here: a repository that is not there is made
private, for nobody asked for it to be seen; files of it that the export does not have stay.
"""

import re
from pathlib import Path

from mlx_distill.errors import DistillError, RecipeError
from mlx_distill.files import one_line
from mlx_distill.models.reach import hub_resolves

LATER = "try again when the hub can be reached"
ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Hub:
    """A repository of models. Raises `RecipeError` for an id that none can have."""

    def __init__(self, repository: str):
        if not ID.fullmatch(repository):
            raise RecipeError(f"--push should be an id org/name of the hub, found {repository!r}")
        self.repository = repository

    def upload(self, folder: Path, message: str) -> str:
        """Upload all files of a folder in one commit; a sentence that says where they are. Raises
        `DistillError`.
        """
        from huggingface_hub import HfApi

        if not hub_resolves():
            raise DistillError(self._said("its host is not known here", folder, LATER))
        api = HfApi(library_name="mlx-distill")
        try:
            made = not api.repo_exists(self.repository)
            if made:
                api.create_repo(self.repository, private=True)
            commit = api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message=message
            )
        except Exception as error:  # its own, and those of whichever HTTP library it has
            raise DistillError(self._why(error, folder)) from error
        private = " (a new private repository)" if made else ""
        return f"pushed to {commit.repo_url}{private}"

    def _why(self, error: BaseException, folder: Path) -> str:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        remedies = {
            401: "log in with `hf auth login`",
            403: "your token may not write there: make one that may, then `hf auth login`",
        }
        return self._said(one_line(cause), folder, remedies.get(status or 0, LATER))

    def _said(self, why: str, folder: Path, remedy: str) -> str:
        return f"--push {self.repository}: the hub did not take it ({why}); {folder} is whole: {remedy}"
