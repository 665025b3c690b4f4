"""Folders are written atomically."""

import pytest

from minalign.models.folders import atomic_folder
from minalign.running.errors import UserError


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "run" / "model"
    for version in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / version).write_text(version)
            assert not (target / version).exists(), "visible before it is whole"
        assert [path.name for path in target.iterdir()] == [version]
        assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("existed", [True, False])
def test_an_error_while_writing_leaves_what_was_there(existed, tmp_path):
    target = tmp_path / "model"
    if existed:
        target.mkdir()
        (target / "weights").write_text("old")
    message = "model: cannot be written .disk full.: what was there is whole"
    with pytest.raises(UserError, match=message), atomic_folder(target) as folder:
        (folder / "weights").write_text("half")
        raise OSError("disk full")
    assert target.exists() == existed
    if existed:
        assert [(p.name, p.read_text()) for p in target.iterdir()] == [("weights", "old")]
    with atomic_folder(target) as folder:  # and what is left of the attempt is in nobody's way
        (folder / "config").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_lost_between_two_renames_comes_back(tmp_path):
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "kept").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / "kept").exists()
