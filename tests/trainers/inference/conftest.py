"""A third of the digits: nothing here asks how well they are told apart."""

from pathlib import Path

import pytest
import sklearn.datasets
from sklearn.utils import Bunch

from bigbatch.data.writing.shard import shard


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = sklearn.datasets.load_digits()
    third = Bunch(
        images=whole.images[::3], target=whole.target[::3], target_names=whole.target_names
    )
    folder = tmp_path_factory.mktemp("shards") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda: third)
        shard("digits", folder, progress=False)
    return folder
