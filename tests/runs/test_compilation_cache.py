"""--compilation-cache: a run that needs the same programs as one before it compiles nothing, with the same bits."""

import pytest

from experiments.config.settings import changed
from experiments.faults.child_run import differences, finished, results
from experiments.mnist import Config, main
from experiments.run.errors import UserError


@pytest.mark.slow
def test_the_second_run_compiles_nothing_and_has_the_same_bits(tmp_path):
    cache, files = tmp_path / "kept here", []
    for name in ("first", "second"):
        flags = ("--epochs", "1", "--compilation-cache", str(cache))
        variables = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")}  # the flag comes before it
        run = finished(tmp_path, tmp_path / name, *flags, variables=variables)
        assert run.ended() == 0, run.output()
        files.append({file.name for file in cache.iterdir() if not file.name.endswith("-atime")})
    assert files[0] == files[1] and len(files[0]) > 10, "every program that is compiled is kept"
    assert not (tmp_path / "elsewhere").exists()
    assert not differences(results(tmp_path / "first"), results(tmp_path / "second"))


def test_a_directory_that_cannot_be_written_in_is_told_before_anything_is_read(tmp_path):
    file = tmp_path / "a file"
    file.touch()
    config = changed(Config(), compilation_cache=str(file), data_dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--compilation-cache: cannot write in .*a file .*another directory"):
        main(config)
