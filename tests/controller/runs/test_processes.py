"""The environment variables of `torchrun` and `accelerate launch` are read in one place."""

import pytest

from deepinsert.controller.runs.processes import Processes


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process() -> None:
    processes = Processes.from_environment()
    assert processes == Processes(rank=0, world_size=1, local_rank=None)
    assert processes.is_first and processes.cuda_device() == "cuda:0"


def test_a_launcher_numbers_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "11"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    processes = Processes.from_environment()
    assert processes == Processes(rank=11, world_size=16, local_rank=3)
    assert not processes.is_first and processes.cuda_device() == "cuda:3"


def test_processes_beyond_the_gpus_share_them() -> None:
    devices = [Processes(rank, 4, rank).cuda_device(device_count=2) for rank in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_a_variable_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="many"):
        Processes.from_environment()
