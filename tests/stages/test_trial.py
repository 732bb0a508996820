"""A target elsewhere is tried before anything is trained."""

import json

import pytest
from test_workdir import FUNCTION, SMALL

from qmx.progress import about
from qmx.stages.query import near_chance

MOCO = ["--config.inits=('moco',)", "--config.data.limit=300", "--config.pretrain.moco.epochs=1"]


@pytest.mark.slow
def test_before_the_pretraining(command, tmp_path):
    """One image, then two; what they cost is in the account once; a wrong answer costs no
    pretraining."""
    words = [*SMALL, *MOCO, f"--config.target.path={tmp_path}/own.py:f", "--config.price=5"]
    (tmp_path / "own.py").write_text(FUNCTION.replace("size=(flat.shape[1], 10)", "size=(64, 9)"))
    status, out, err = command(*words, f"--workdir={tmp_path}/w")
    assert (status, out) == (2, "") and "with the shape [1, 9]" in err.splitlines()[-1], err
    assert not (tmp_path / "w/pretrain").exists() and (tmp_path / "asked").stat().st_size == 1

    (tmp_path / "own.py").write_text(FUNCTION)
    (tmp_path / "asked").unlink()
    status, _, err = command(*words, f"--workdir={tmp_path}/v")
    assert status == 0, err
    lines = err.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("the target answers; 340 im")]
    assert "and cost 1.7" in lines[place]
    assert place < min(i for i, line in enumerate(lines) if line.startswith("pretrain moco"))
    account = json.loads((tmp_path / "v/results.json").read_text())["account"]
    assert account["calls"] == account["images"] == (tmp_path / "asked").stat().st_size == 340
    status, _, err = command(*words, f"--workdir={tmp_path}/v")
    assert status == 0 and "the target answers" not in err, "it is known"


def test_near_chance():
    assert near_chance(9.7, 10) and near_chance(0.1, 1000) and not near_chance(25, 10)
    assert not near_chance(40, 2), "of two classes every accuracy is near chance"
    assert "9.7 % is near chance, 10 %" in near_chance(9.7, 10)
    assert about(3) == "about 3 s"
